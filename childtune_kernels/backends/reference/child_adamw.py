"""Op child_adamw: one AdamW step of a child network (SPEC.md, eq. 6 to 12)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bitmask import unpack_mask
from .philox import KEEP_ALL, keep_mask, mapped_indexes
from .square_root import square_root


def power(base: float, exponent: int) -> float:
    """Eq. 6: base**exponent by binary powering, in double precision."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


class Scalars(NamedTuple):
    """Eq. 7, in double precision; a tensor operation rounds each once to its own type."""

    beta1: float
    c1: float
    beta2: float
    c2: float
    r: float
    a: float
    s: float
    b: float
    eps: float


def adamw_scalars(numbers: Any, step: int) -> Scalars:
    """Eq. 7 for a group's numbers (``GroupNumbers``) at a parameter's ``step``."""
    correction1 = 1.0 - power(numbers.beta1, step) if numbers.correct_bias else 1.0
    correction2 = 1.0 - power(numbers.beta2, step) if numbers.correct_bias else 1.0
    if numbers.original_convention:
        s, b = numbers.lr * math.sqrt(correction2) / correction1, 1.0
    else:
        s, b = numbers.lr / correction1, 1.0 / math.sqrt(correction2)
    return Scalars(
        beta1=numbers.beta1,
        c1=1.0 - numbers.beta1,
        beta2=numbers.beta2,
        c2=1.0 - numbers.beta2,
        r=1.0 / numbers.reserve_p,
        a=numbers.lr * numbers.weight_decay,
        s=s,
        b=b,
        eps=numbers.eps,
    )


def _decayed(weight: Tensor, scalars: Scalars) -> Tensor:
    """Eq. 9."""
    decay = torch.tensor(scalars.a, dtype=weight.dtype, device="cpu")
    return weight if decay == 0 else weight - weight * scalars.a


def _update(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Scalars,
    numbers: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 10 and 11 for masked gradients: the new weight, exp_avg and exp_avg_sq."""
    exp_avg = exp_avg * scalars.beta1 + grad * scalars.c1
    exp_avg_sq = exp_avg_sq * scalars.beta2 + (grad * grad) * scalars.c2
    root = square_root(exp_avg_sq)
    if numbers.original_convention:
        weight = weight - (exp_avg * scalars.s) / (root + scalars.eps)
        return _decayed(weight, scalars), exp_avg, exp_avg_sq
    weight = _decayed(weight, scalars)
    weight = weight - (exp_avg * scalars.s) / (root * scalars.b + scalars.eps)
    return weight, exp_avg, exp_avg_sq


def _stored(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight if weight.dtype == dtype else narrow(weight, dtype)


def narrow(master: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight rounded to its storage type; every bf16 NaN becomes 0x7FC0 (SPEC.md, "Types")."""
    narrowed = master.to(dtype)
    return torch.where(master.isnan(), torch.full_like(narrowed, math.nan), narrowed)


def _current_weight(stored: Tensor, master: Tensor | None, compute: torch.dtype) -> Tensor:
    """Eq. 12: the master, or the stored weight where somebody has written it since."""
    if master is None:
        return stored.to(compute)
    same = narrow(master, stored.dtype).view(torch.int16) == stored.view(torch.int16)
    return torch.where(same, master, stored.to(compute))


def _masked_gradient(row: Any, step: int, scalars: Scalars, places: Tensor | None) -> Tensor:
    """Eq. 8: the gradient of all elements, or of those at ``places``."""
    numbers, parameter, compute = row.numbers, row.parameter, row.exp_avg.dtype
    grad = row.parameter.grad.detach().reshape(-1)
    grad = (grad if places is None else grad[places]).to(compute)
    grad = -grad if numbers.maximize else grad
    grad = grad * scalars.r if numbers.reserve_p != 1.0 else grad
    if numbers.threshold != KEEP_ALL:
        count, device = parameter.numel(), parameter.device
        elements = mapped_indexes(count, row.element_map.base, row.element_map.levels, device)
        elements = elements if places is None else elements[places]
        keep = keep_mask(elements, row.philox_key, step, numbers.threshold)
        grad = torch.where(keep, grad, torch.zeros_like(grad))
    return grad


def _step_row(row: Any) -> None:
    row.step.add_(1)
    step, numbers = int(row.step), row.numbers
    scalars = adamw_scalars(numbers, step)
    if row.compact:
        _step_compact(row, step, scalars)
        return
    parameter = row.parameter.detach()
    exp_avg, exp_avg_sq = row.exp_avg.view(-1), row.exp_avg_sq.view(-1)
    compute = exp_avg.dtype
    stored = parameter.reshape(-1)
    master = None if row.master_weight is None else row.master_weight.view(-1)
    grad = _masked_gradient(row, step, scalars, None)
    weight = _current_weight(stored, master, compute)
    updated, new_exp_avg, new_exp_avg_sq = _update(
        weight, grad, exp_avg, exp_avg_sq, scalars, numbers
    )
    written: Tensor | None = None
    if row.mask_words is not None:
        child = unpack_mask(row.mask_words, parameter.numel())
        outside = weight if numbers.freeze_non_child else _decayed(weight, scalars)
        updated = torch.where(child, updated, outside)
        new_exp_avg = torch.where(child, new_exp_avg, exp_avg)
        new_exp_avg_sq = torch.where(child, new_exp_avg_sq, exp_avg_sq)
        # Without decay nothing outside the child is written, whatever freeze_non_child says.
        untouched = numbers.freeze_non_child or outside is weight
        written = child if untouched else None
    exp_avg.copy_(new_exp_avg)
    exp_avg_sq.copy_(new_exp_avg_sq)
    narrowed = _stored(updated, stored.dtype)
    if written is not None:
        narrowed = torch.where(written, narrowed, stored)
        updated = updated if master is None else torch.where(written, updated, master)
    if master is not None:
        master.copy_(updated)
    parameter.copy_(narrowed.view(parameter.shape))


def _step_compact(row: Any, step: int, scalars: Scalars) -> None:
    """The same for state that holds the child's elements alone."""
    parameter, numbers, compute = row.parameter.detach(), row.numbers, row.exp_avg.dtype
    places = unpack_mask(row.mask_words, parameter.numel()).nonzero().view(-1)
    whole = parameter.reshape(-1).clone()
    stored = whole[places]
    grad = _masked_gradient(row, step, scalars, places)
    weight = _current_weight(stored, row.master_weight, compute)
    updated, exp_avg, exp_avg_sq = _update(
        weight, grad, row.exp_avg, row.exp_avg_sq, scalars, numbers
    )
    row.exp_avg.copy_(exp_avg)
    row.exp_avg_sq.copy_(exp_avg_sq)
    if row.master_weight is not None:
        row.master_weight.copy_(updated)
    everything = whole.to(compute)
    decayed = _decayed(everything, scalars)
    if not numbers.freeze_non_child and decayed is not everything:
        whole = _stored(decayed, whole.dtype)
    whole[places] = _stored(updated, whole.dtype)
    parameter.copy_(whole.view(parameter.shape))


def child_adamw_(rows: Iterable[Any]) -> None:
    """Update every active row of a plan in place: weight, moments, master weight and step.

    A row offers ``active``, ``parameter`` (with its ``grad``), ``exp_avg``, ``exp_avg_sq``,
    ``master_weight`` or None, ``mask_words`` or None, ``compact``, ``step``, ``philox_key``,
    ``element_map`` and ``numbers`` (``GroupNumbers``); shapes and types are those of SPEC.md, section 5.
    """
    for row in rows:
        if row.active:
            _step_row(row)
