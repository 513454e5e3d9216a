"""The three layouts of a child in compact state, against their definitions by plain loops (SPEC.md)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from childtune_kernels import child_layout, ops
from tests.child_states import LAYOUTS

UNITS = {"words": 4096, "indices": 65536}
DENSITIES = [0.0, 1e-5, 0.02, 0.12, 0.125, 0.3, 0.9, 1.0]


def child_of(numel: int, density: float, run: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(numel + run)
    drawn = torch.rand(-(-numel // run), generator=generator) < density
    return drawn.repeat_interleave(run)[:numel]


def by_plain_loops(child: list[bool], layout: str) -> dict[str, list[object]]:
    """Section 2 of SPEC.md, word for word."""
    places = [i for i, inside in enumerate(child) if inside]
    if layout == "runs":
        starts = [i for i in places if i == 0 or not child[i - 1]]
        runs = [[i, sum(place < i for place in places)] for i in starts]
        return {"child_runs": [*runs, [len(child), len(places)]]}
    unit = UNITS[layout]
    edges = range(0, len(child) + unit, unit) if child else range(1)
    ranks: list[object] = [sum(place < edge for place in places) for edge in edges]
    if layout == "words":
        words = [0] * -(-len(child) // 32)
        for i in places:
            words[i // 32] |= 1 << i % 32
        return {"mask_words": [w - (w >> 31 << 32) for w in words], "child_ranks": ranks}
    return {"child_indices": [i % unit for i in places], "child_ranks": ranks}


def unsigned(name: str, tensor: Tensor) -> list[object]:
    values: list[object] = (tensor.long() % 65536 if name == "child_indices" else tensor).tolist()
    return values


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33, 4095, 4096, 4097, 8200])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_layouts_are_what_the_specification_says(layout: str, numel: int, density: float) -> None:
    child = child_of(numel, density, run=3)
    found = child_layout.child_layout(ops.pack_mask(child), numel, layout)
    expected = by_plain_loops(child.tolist(), layout)
    assert {name: unsigned(name, tensor) for name, tensor in found.items()} == expected


def test_indices_count_from_the_start_of_their_stretch() -> None:
    child = torch.zeros(3 * 65536 + 5, dtype=torch.bool)
    child[[0, 32767, 32768, 65535, 65536, 131073, 3 * 65536 + 4]] = True
    layout = child_layout.child_layout(ops.pack_mask(child), child.numel(), "indices")
    indices = unsigned("child_indices", layout["child_indices"])
    assert indices == [0, 32767, 32768, 65535, 0, 1, 4]
    assert layout["child_ranks"].tolist() == [0, 4, 5, 6, 7]


@settings(max_examples=60, deadline=None)
@given(
    numel=st.integers(0, 200_000),
    density=st.sampled_from(DENSITIES),
    run=st.sampled_from([1, 2, 40, 300]),
)
def test_every_layout_leads_back_to_its_words(numel: int, density: float, run: int) -> None:
    words = ops.pack_mask(child_of(numel, density, run))
    for layout in (*LAYOUTS, None):
        tensors = child_layout.child_layout(words, numel, layout)
        state = {"child_exp_avg": torch.zeros(ops.count_mask(words)), **tensors}
        back = child_layout.mask_words(state, numel)
        assert back is not None
        assert torch.equal(back, words)
        child_layout.check_layout("w", state, torch.device("cpu"), numel, contents=True)
        if layout is not None:
            assert child_layout.layout_of(state) == layout


@pytest.mark.parametrize(
    ("density", "run", "layout"),
    [
        (0.0, 1, "runs"),
        (0.02, 1, "indices"),
        (0.06, 1, "indices"),
        (0.07, 1, "words"),
        (0.3, 1, "words"),
        (0.99, 1, "words"),  # runs of 100, but as many gaps of one
        (1.0, 1, "runs"),
        (0.02, 16, "indices"),
        (0.1, 16, "words"),
        (0.1, 32, "runs"),
        (0.3, 32, "words"),
        (0.3, 256, "runs"),
    ],
)
def test_the_layout_follows_density_and_runs(density: float, run: int, layout: str) -> None:
    numel = 300_000
    words = ops.pack_mask(child_of(numel, density, run))
    state = {"child_exp_avg": torch.zeros(ops.count_mask(words))}
    state |= child_layout.child_layout(words, numel)
    assert child_layout.layout_of(state) == layout


def test_gather_and_scatter_are_inverse() -> None:
    child = child_of(1000, 0.3)
    words, values = ops.pack_mask(child), torch.arange(1000.0).view(20, 50)
    gathered = child_layout.gather_child(values.t().contiguous().t(), words)
    assert gathered.tolist() == [i for i in range(1000) if child[i]]
    whole = child_layout.scatter_child_(torch.full((20, 50), -1.0), gathered, words)
    assert torch.equal(whole, torch.where(child.view(20, 50), values, -1.0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_spoilt_layouts_are_refused(layout: str) -> None:
    child = child_of(5000, 0.3)
    words = ops.pack_mask(child)
    good = {"child_exp_avg": torch.zeros(int(child.sum())),
            **child_layout.child_layout(words, 5000, layout)}  # fmt: skip
    child_layout.check_layout("w", good, torch.device("cpu"), 5000, contents=True)
    for name in good.keys() - {"child_exp_avg"}:
        for bad in (good[name][:-1], good[name].double(), good[name][::2]):
            with pytest.raises(ValueError, match=f"child of w is not written as layout {layout}"):
                child_layout.check_layout(
                    "w", {**good, name: bad}, torch.device("cpu"), 5000, contents=True
                )


@pytest.mark.parametrize(
    ("layout", "name", "place", "value"),
    [
        ("words", "mask_words", 3, 0),
        ("words", "child_ranks", 0, 1),
        ("words", "child_ranks", 1, 9),
        ("indices", "child_indices", 0, -1),
        ("indices", "child_indices", 5, 4),
        ("indices", "child_ranks", 0, -2),
        ("runs", "child_runs", (0, 0), 7),
        ("runs", "child_runs", (2, 1), 1),
        ("runs", "child_runs", (-1, 0), 6000),
    ],
)
def test_layouts_that_are_of_no_child_are_refused(
    layout: str, name: str, place: int | tuple[int, int], value: int
) -> None:
    """A kernel that followed one would write outside the child, or outside the parameter."""
    child = child_of(5000, 0.3)
    child[0] = False
    state = {"child_exp_avg": torch.zeros(int(child.sum())),
             **child_layout.child_layout(ops.pack_mask(child), 5000, layout)}  # fmt: skip
    state[name][place] = value
    child_layout.check_layout("w", state, torch.device("cpu"), 5000, contents=False)
    with pytest.raises(ValueError, match=f"child of w is not written as layout {layout}"):
        child_layout.check_layout("w", state, torch.device("cpu"), 5000, contents=True)


@pytest.mark.parametrize(
    ("count", "runs", "on_cpus", "on_gpus"),
    [
        (0, 0, "runs", "runs"),
        (24 * 100, 100, "runs", "indices"),
        (24 * 100 - 1, 100, "indices", "indices"),
        (64 * 100, 100, "runs", "runs"),
        (64 * 100 - 1, 100, "runs", "indices"),
        (6249, 6000, "indices", "indices"),
        (6250, 6000, "words", "indices"),
        (99_999, 20_000, "words", "indices"),
    ],
)
def test_the_layout_suits_density_clustering_and_device(
    count: int, runs: int, on_cpus: str, on_gpus: str
) -> None:
    for device, expected in (("cpu", on_cpus), ("cuda", on_gpus)):
        found = child_layout.suitable_layout(count, runs, 100_000, torch.device(device))
        assert found == expected
