"""Proof, bit for bit, that an operation left an optimizer as it was, or that two of them agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, row-major: NaN payloads and the sign of zero count."""
    plain = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    plain = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
    return plain.resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def identical(first: Any, second: Any) -> bool:
    """Whether two values are the same; tensors to the bit, in type, layout and shape."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return (first.dtype, first.layout, first.shape) == (
            second.dtype,
            second.layout,
            second.shape,
        ) and torch.equal(bits(first), bits(second))
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return False
    return type(first) is type(second) and repr(first) == repr(second)


def snapshot(optimizer: Optimizer) -> dict[str, Any]:
    """Copies of weights, gradients, state and options, under readable names."""
    found: dict[str, Any] = {"states": len(optimizer.state)}
    for number, group in enumerate(optimizer.param_groups):
        for option, value in group.items():
            if option != "params":
                found[f"group {number} {option}"] = _copy(value)
        for place, parameter in enumerate(group["params"]):
            where = f"group {number} parameter {place}"
            found[f"{where} identity"] = id(parameter)
            found[f"{where} weight"] = _copy(parameter)
            found[f"{where} gradient"] = _copy(parameter.grad)
            for name, value in optimizer.state[parameter].items():
                found[f"{where} {name}"] = _copy(value)
    return found


def weights_and_state(optimizer: Optimizer) -> dict[str, Any]:
    """What a run has made so far: copies of weights and state, without gradients and options."""
    return {
        name: value
        for name, value in snapshot(optimizer).items()
        if not name.endswith((" identity", " gradient")) and " parameter " in name
    }


def assert_identical(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Two snapshots agree in every bit; the message names what differs."""
    assert first.keys() == second.keys()
    assert [name for name in first if not identical(first[name], second[name])] == []


@contextmanager
def untouched(optimizer: Optimizer) -> Iterator[None]:
    """Nothing of the optimizer, its weights and their gradients changes inside the block."""
    before = snapshot(optimizer)
    yield
    assert_identical(before, snapshot(optimizer))


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
