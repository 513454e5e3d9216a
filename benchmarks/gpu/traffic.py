"""The bytes that a step cannot do without: what the time of a step is compared with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from ..variants import Variant

_SECTOR = 32  # bytes: the least that a GPU's memory gives
_MOMENT = 4
_PER_CHILD_ELEMENT = ("child_exp_avg", "child_exp_avg_sq", "child_master_weight")
_PER_ELEMENT = ("exp_avg", "exp_avg_sq", "master_weight", "step")


def bytes_per_parameter(variant: Variant, optimizer: Optimizer, parameters: int) -> float:
    """Read and written bytes a parameter of one step of a variant.

    Weights and gradients of a compact child count by the sectors that hold a child element, moments (and
    master weights, from which the weights are made) by child element, the child's layout once. Of other
    packages' optimizers the whole state is taken to be read and written.
    """
    weight = variant.dtype.itemsize
    moments = 4.0 * (_MOMENT if variant.family == "childtune" else weight)
    if variant.family == "other":
        moments = 2 * state_bytes(optimizer) / parameters
    weights_read, masters = 1, 0
    layout = 0.0
    if variant.family == "childtune":
        states = list(optimizer.state.values())
        if any(key.endswith("master_weight") for state in states for key in state):
            weights_read, masters = 0, 2 * _MOMENT
        known = (*_PER_CHILD_ELEMENT, *_PER_ELEMENT)
        layout = sum(
            tensor.nbytes
            for state in states
            for key, tensor in state.items()
            if key not in known and isinstance(tensor, torch.Tensor)
        )
    touched = kept = 1.0
    if variant.mask == "fixed":
        kept = variant.kept
        touched = touched_share(kept, variant.run, _SECTOR // weight)
    return touched * (2 + weights_read) * weight + kept * (moments + masters) + layout / parameters


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state, those inside objects of its own too."""
    total = 0
    for state in optimizer.state.values():
        for value in state.values():
            inner = [] if isinstance(value, torch.Tensor) else list(vars_of(value).values())
            total += sum(each.nbytes for each in (value, *inner) if isinstance(each, torch.Tensor))
    return total


def vars_of(value: object) -> dict[str, Any]:
    """An object's attributes, if it has any of its own."""
    names: Iterable[str] = (
        getattr(value, "__dict__", None) or getattr(value, "__slots__", None) or ()
    )
    return {name: getattr(value, name, None) for name in names}


def touched_share(kept: float, run: int, elements: int) -> float:
    """The share of sectors of so many elements that hold an element of a random child in aligned runs."""
    return float(1 - (1 - kept) ** max(1, elements // run))
