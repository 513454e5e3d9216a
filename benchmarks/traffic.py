"""The bytes that a step cannot do without: what the time of a step is compared with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .variants import Variant

_SECTOR = 32  # bytes: the least that a GPU's memory gives
_MOMENTS = ("exp_avg", "exp_avg_sq", "child_exp_avg", "child_exp_avg_sq")
_MASTERS = ("master_weight", "child_master_weight")
# Together with the weight they are its master: both are read and written.
_REMAINDERS = ("master_remainder", "child_master_remainder")
_NO_LAYOUT = {*_MOMENTS, *_MASTERS, *_REMAINDERS, "step"}


def bytes_per_parameter(variant: Variant, optimizer: Optimizer, parameters: int) -> float:
    """Read and written bytes a parameter of one step of a variant.

    Weights and gradients of a compact child count by the sectors that hold a child element; moments, fp32
    masters (from which the weights are made) and remainders by child element, the child's layout
    once. Of other packages' optimizers the whole state is taken to be read and written.
    """
    weight = variant.dtype.itemsize
    states = list(optimizer.state.values())
    of_an_element = 4.0 * weight
    weights_read, layout = 1, 0.0
    if variant.family == "other":
        of_an_element = 2 * state_bytes(optimizer) / parameters
    elif variant.family == "childtune":
        masters = _itemsize(states, _MASTERS)
        weights_read = 0 if masters else 1
        kinds = (_MOMENTS, 2), (_MASTERS, 1), (_REMAINDERS, 1)
        of_an_element = sum(2.0 * count * _itemsize(states, names) for names, count in kinds)
        layout = sum(
            tensor.nbytes
            for state in states
            for key, tensor in state.items()
            if key not in _NO_LAYOUT and isinstance(tensor, Tensor)
        )
    touched = kept = 1.0
    if variant.mask == "fixed":
        kept = variant.kept
        touched = touched_share(kept, variant.run, _SECTOR // weight)
    return touched * (2 + weights_read) * weight + kept * of_an_element + layout / parameters


def _itemsize(states: Iterable[dict[str, Any]], names: Iterable[str]) -> int:
    """Bytes of an element of the first of these tensors; 0 where there is none."""
    return next(
        (state[name].element_size() for state in states for name in names if name in state), 0
    )


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
