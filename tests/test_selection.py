"""select_child and random_child against a stable sort, plain loops and NumPy (SPEC.md, "Selection")."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from childtune_kernels import ChildMask, select_child

from .cases import generator_of

pytestmark = pytest.mark.usefixtures("one_thread")

SUBNORMAL = 1e-45


def chosen(mask: ChildMask) -> list[tuple[str, int]]:
    """(name, element) of the child, in the order of the mask."""
    return [
        (name, element)
        for name in mask.words
        for element in mask.dense(name).flatten().nonzero().flatten().tolist()
    ]


def sorted_child(fisher: Mapping[str, Tensor], k: int, largest: bool) -> list[tuple[str, int]]:
    """The first k of a stable sort in plain Python, back in the order of the mask."""
    order = {name: at for at, name in enumerate(fisher)}
    elements = [
        (name, element, value)
        for name, values in fisher.items()
        for element, value in enumerate(values.flatten().tolist())
    ]
    elements.sort(key=lambda each: -each[2] if largest else each[2])
    first = [(name, element) for name, element, _ in elements[:k]]
    return sorted(first, key=lambda each: (order[each[0]], each[1]))


def check_selection(fisher: Mapping[str, Tensor], k: int, largest: bool, backend: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        mask = select_child(fisher, k=k, largest=largest, backend=backend)
    assert mask.count() == k
    assert chosen(mask) == sorted_child(fisher, k, largest)


def split(values: Tensor, *sizes: int) -> dict[str, Tensor]:
    """One tensor in parts under names that are not in alphabetical order, an empty one among them."""
    assert sum(sizes) == values.numel()
    parts = values.split(list(sizes))
    return {f"{(7 * at + 3) % 11}.{at}": part for at, part in enumerate(parts)}


def ulps(count: int) -> Tensor:
    """Neighbouring fp32 numbers around 1."""
    return (torch.arange(count, dtype=torch.int32) + 0x3F800000 - count // 2).view(torch.float32)


def shuffled(values: Tensor, *what: object) -> Tensor:
    return values[torch.randperm(values.numel(), generator=generator_of(*what))]


NUMEL = 700
SIZES = (300, 0, 64, 1, 335)
VALUES: dict[str, Tensor] = {
    "random": torch.rand(NUMEL, generator=generator_of("random")),
    "squares of many sizes": (torch.randn(NUMEL, generator=generator_of("squares")) * 1e-6).square(),
    "all equal": torch.full((NUMEL,), 0.125),
    "all zero": torch.zeros(NUMEL),
    "zeros of both signs": torch.tensor([0.0, -0.0, -0.0, 0.0, 1.0]).repeat(NUMEL // 5),
    "80 % zeros": torch.rand(NUMEL, generator=generator_of("zeros")).sub(0.8).clamp(min=0),
    "subnormal": shuffled(torch.arange(NUMEL) % 50, "subnormal") * SUBNORMAL,
    "one ulp apart": shuffled(ulps(NUMEL // 2).repeat(2), "ulps"),
    "a bin's borders": shuffled(
        torch.tensor([0x3F7FFFFF, 0x3F800000, 0x3F8003FF, 0x3F800400, 0x3F8FFFFF, 0x3F900000, 0x7F7FFFFF])
        .to(torch.int32).view(torch.float32).repeat(NUMEL // 7), "borders"),
}  # fmt: skip


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
def test_selection_is_a_stable_sort(values: str, largest: bool, backend: str) -> None:
    fisher = split(VALUES[values], *SIZES)
    assert list(fisher) != sorted(fisher)
    for k in (1, 2, 137, 350, NUMEL - 1, NUMEL):
        check_selection(fisher, k, largest, backend)


_SCORES = st.one_of(
    st.sampled_from([0.0, -0.0, SUBNORMAL, 1.0, float(np.nextafter(np.float32(1), 2)), 3.4e38]),
    st.floats(0, 2.0**127, width=32),
)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(parts=st.lists(st.lists(_SCORES, max_size=90), min_size=1, max_size=6), data=st.data())
def test_any_split(backend: str, parts: list[list[float]], data: st.DataObject) -> None:
    names = data.draw(st.permutations([f"layer.{at}" for at in range(len(parts))]))
    fisher = {
        name: torch.tensor(part, dtype=torch.float32)
        for name, part in zip(names, parts, strict=True)
    }
    numel = sum(map(len, parts))
    if numel:
        k = data.draw(st.integers(1, numel))
        check_selection(fisher, k, data.draw(st.booleans()), backend)
    else:
        assert select_child(fisher, reserve_p=0.5, backend=backend).count() == 0
