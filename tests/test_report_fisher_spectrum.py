"""The Fisher spectrum: its histogram, threshold and mass against plain loops, and its table."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from childtune_kernels import ChildMask
from childtune_kernels.report import fisher_spectrum as module
from childtune_kernels.report.fisher_spectrum import (
    FisherSpectrum,
    fisher_spectrum,
    fisher_spectrum_table,
    sentences,
)

TINY, HUGE = 2.0**-149, torch.finfo(torch.float32).max


def random_fisher(*sizes: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    fisher = {
        f"w{at}": torch.randn(size, generator=generator).mul(6).sub(20).exp()
        for at, size in enumerate(sizes)
    }
    for values in fisher.values():
        values[::5] = 0.0
    return fisher


def child_above(fisher: dict[str, Tensor], bound: float) -> ChildMask:
    return ChildMask.from_dense({name: values > bound for name, values in fisher.items()})


def by_loops(fisher: dict[str, Tensor], mask: ChildMask, found: FisherSpectrum) -> FisherSpectrum:
    """What the spectrum with the edges of ``found`` should be."""
    pairs = [
        (value, bit)
        for name in mask.words
        for value, bit in zip(
            fisher[name].flatten().tolist(), mask.dense(name).flatten().tolist(), strict=True
        )
    ]
    bins = list(zip(found.edges, found.edges[1:], strict=False))
    inside = [value for value, bit in pairs if bit]
    outside = [value for value, bit in pairs if not bit]

    # Sums in fp64 differ by their order, counts do not.
    near: Any = pytest.approx

    def histogram(values: list[float]) -> tuple[int, ...]:
        return tuple(sum(low <= value < high for value in values) for low, high in bins)

    return FisherSpectrum(
        edges=found.edges,
        counts=histogram([value for value, _ in pairs]),
        child_counts=histogram(inside),
        zeros=sum(value == 0 for value, _ in pairs),
        child_zeros=sum(value == 0 for value in inside),
        numel=len(pairs),
        child=len(inside),
        threshold=min(inside, default=None),
        largest_outside=max(outside, default=None),
        mass=near(math.fsum(value for value, _ in pairs), rel=1e-12),
        child_mass=near(math.fsum(inside), rel=1e-12),
    )


@pytest.mark.parametrize("bound", [-1.0, 0.0, 1e-9, 1e30])
def test_the_spectrum_is_that_of_plain_loops(bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 64)  # several chunks a tensor, the last of them short
    fisher = random_fisher(1, 200, 333)
    mask = child_above(fisher, bound)
    found = fisher_spectrum(fisher, mask)
    assert found == by_loops(fisher, mask, found)
    assert sum(found.counts) + found.zeros == found.numel
    assert found.counts[0] > 0
    assert found.counts[-1] > 0


def test_bins_are_tenths_of_a_decade() -> None:
    found = fisher_spectrum(*_with_whole_mask(torch.logspace(-20, 10, 4000)))
    ratios = [high / low for low, high in zip(found.edges, found.edges[1:], strict=False)]
    assert all(ratio == pytest.approx(10**0.1, rel=0.01) for ratio in ratios)
    assert any(edge == pytest.approx(1.0, rel=0.004) for edge in found.edges)


def _with_whole_mask(values: Tensor) -> tuple[dict[str, Tensor], ChildMask]:
    return {"w": values}, ChildMask.from_dense({"w": torch.ones_like(values, dtype=torch.bool)})


def test_the_ends_of_fp32_are_counted() -> None:
    values = torch.tensor([0.0, -0.0, TINY, 1e-40, 2e-38, 1.0, 3.3e38, HUGE])
    fisher, mask = _with_whole_mask(values)
    found = fisher_spectrum(fisher, mask)
    assert found == by_loops(fisher, mask, found)
    assert found.zeros == found.child_zeros == 2
    assert found.edges[0] == TINY
    assert found.edges[-1] == math.inf
    table = fisher_spectrum_table(found)
    assert re.search(r"below 1e-38 +2 ", table)
    assert re.search(r"1e\+38 to 1e\+39 +2 ", table)


def test_values_next_to_an_edge_fall_on_its_right_side() -> None:
    edges = torch.tensor(fisher_spectrum(*_with_whole_mask(torch.logspace(-9, 3, 999))).edges)
    values = torch.cat([edges, torch.nextafter(edges, torch.tensor(0.0))])
    fisher, mask = _with_whole_mask(values)
    found = fisher_spectrum(fisher, mask)
    assert found.counts == by_loops(fisher, mask, found).counts


def test_names_outside_the_scope_do_not_count() -> None:
    fisher = random_fisher(100, 50)
    mask = ChildMask.from_dense({"w0": fisher["w0"] > 1e-9}, dense=["w1"])
    assert fisher_spectrum(fisher, mask) == fisher_spectrum({"module.w0": fisher["w0"]}, mask)


def test_the_table_holds_the_numbers() -> None:
    fisher = {"w": torch.tensor([0.0, 2e-7, 3e-7, 5e-7, 4e-5, 6e-5, 2.0, 3.0])}
    mask = ChildMask.from_dense({"w": fisher["w"] > 4.5e-7})
    table = fisher_spectrum_table(fisher_spectrum(fisher, mask))
    rows = {
        line[:14].strip(): line[14:].split() for line in table.splitlines() if line[:1].isdigit()
    }
    assert rows == {
        "1e+00 to 1e+01": ["2", "25.0", "2", "100"],
        "1e-05 to 1e-04": ["2", "25.0", "2", "100"],
        "1e-07 to 1e-06": ["3", "37.5", "1", "33.3"],
        "0": ["1", "12.5", "0", "0"],
    } | {title: ["0", "0", "0", "-"] for title in rows if title in EMPTY_DECADES}
    assert "smallest Fisher inside the child): 5.000e-07." in table
    assert "Largest Fisher outside the child: 3.000e-07; the child is the global top" in table
    assert "is 62.5 % of the elements and holds 99.9 % of the Fisher information" in table


EMPTY_DECADES = {f"1e{d:+03d} to 1e{d + 1:+03d}" for d in (-6, -4, -3, -2, -1)}


def test_a_child_that_is_not_the_top_is_said_to_be_none() -> None:
    fisher = {"w": torch.tensor([1.0, 2.0, 3.0])}
    found = fisher_spectrum(fisher, ChildMask.from_dense({"w": torch.tensor([True, False, True])}))
    assert sentences(found)[-1].endswith(": 2.000e+00; the child is not the global top.")
    assert found.mass_share == pytest.approx(4 / 6)


def test_no_information_and_no_child_are_said() -> None:
    fisher, mask = _with_whole_mask(torch.zeros(40))
    found = fisher_spectrum(fisher, mask)
    assert (found.edges, found.counts, found.threshold) == ((), (), 0.0)
    assert found.largest_outside is None
    assert "Every Fisher value is zero" in fisher_spectrum_table(found)
    empty = fisher_spectrum({"w": torch.ones(40)}, ~mask)
    assert empty.threshold is None
    assert "The child is empty" in fisher_spectrum_table(empty)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-30])
def test_impossible_fisher_names_the_parameter(value: float) -> None:
    fisher = random_fisher(100, 50)
    mask = child_above(fisher, 0.0)
    fisher["w1"][3] = value
    with pytest.raises(ValueError, match="Fisher of w1 holds values from"):
        fisher_spectrum(fisher, mask)


def test_fisher_of_another_model_is_refused() -> None:
    fisher = random_fisher(100, 50)
    mask = child_above(fisher, 0.0)
    with pytest.raises(ValueError, match="parameter w1 has no Fisher information here; give"):
        fisher_spectrum({"w0": fisher["w0"]}, mask)
    with pytest.raises(ValueError, match=r"Fisher of w1: torch.float32 of shape \(49,\)"):
        fisher_spectrum({"w0": fisher["w0"], "w1": fisher["w1"][1:]}, mask)
    with pytest.raises(ValueError, match=r"Fisher of w0: torch.float64"):
        fisher_spectrum({"w0": fisher["w0"].double(), "w1": fisher["w1"]}, mask)
    with pytest.raises(ValueError, match="without elements in scope"):
        fisher_spectrum({}, ChildMask.from_dense({}, dense=["w"]))
