"""Op observe: equal exactly where address, type, device, sizes and strides are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from childtune_kernels import ops, registry

BASE = torch.zeros(64)
CHANGES: dict[str, Callable[[], Tensor]] = {
    "address": lambda: BASE[1:13].view(3, 4),
    "dtype": lambda: BASE.view(torch.int32)[:12].view(3, 4),
    "sizes": lambda: BASE[:12].view(4, 3),
    "one size": lambda: BASE[:8].view(2, 4),
    "strides": lambda: BASE[:12].view(4, 3).t(),
    "one stride": lambda: BASE[:24].view(3, 8)[:, :4],
    "dimensions": lambda: BASE[:12].view(3, 4, 1),
    "device": lambda: torch.empty(3, 4, device="meta"),
    "no storage": lambda: torch.empty(0, 4),
}


def observe(tensors: list[Tensor], backend: str) -> Tensor:
    return ops.observe(tensors, registry.choose("observe", "cpu", backend))


@pytest.mark.parametrize("change", CHANGES)
def test_every_difference_is_seen(change: str, backend: str) -> None:
    before = BASE[:12].view(3, 4)
    first, again, other = observe([before, BASE[:12].view(3, 4), CHANGES[change]()], backend)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    if change == "address":
        assert first[1] == other[1]


def test_addresses_are_those_of_the_tensors(backend: str) -> None:
    tensors = [torch.nn.Parameter(torch.ones(3)), torch.tensor(2), BASE[5:]]
    observed = observe([*tensors], backend)
    assert observed.shape == (3, 2)
    assert observed.dtype == torch.int64
    assert observed[:, 0].tolist() == [tensor.data_ptr() for tensor in tensors]


def test_nothing_and_what_has_no_strides(backend: str) -> None:
    assert observe([], backend).shape == (0, 2)
    with pytest.raises(RuntimeError):
        observe([torch.eye(3).to_sparse()], backend)
