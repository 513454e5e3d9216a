"""Op child_adamw: one AdamW step of a child network (SPEC.md, eq. 6 to 12, 17, 18 and 20)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bitmask import unpack_mask
from .element_types import (
    current_master,
    joined_master,
    narrow,
    narrow_by_words,
    split_master,
)
from .philox import KEEP_ALL, element_words, keep_mask, mapped_indexes
from .square_root import square_root

# What the words of an element are for (eq. 2).
KEEP, OF_WEIGHT, OF_EXP_AVG, OF_EXP_AVG_SQ = range(4)


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


def adamw_scalars(numbers: Any, step: int, factor: float = 1.0) -> Scalars:
    """Eq. 7 for a group's numbers (``GroupNumbers``) at a parameter's ``step``; ``factor``: q·κ of eq. 20."""
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
        r=factor * (1.0 / numbers.reserve_p),
        a=numbers.lr * numbers.weight_decay,
        s=s,
        b=b,
        eps=numbers.eps,
    )


class Verdict(NamedTuple):
    """Eq. 20: q·κ, the norm, and whether the step is skipped."""

    factor: float
    norm: float
    skipped: bool


def step_verdict(factor: Any, numbers: Any) -> Verdict:
    """Eq. 20.

    Args:
        factor: tensors ``sums``, ``grad_scale`` and ``found_inf``, each of them or None.
        numbers: of any group (``GroupNumbers``): ``max_grad_norm`` and ``skip_nonfinite``.
    """
    scale = 1.0 if factor.grad_scale is None else float(factor.grad_scale)
    total, total_of_all = (0.0, 0.0) if factor.sums is None else factor.sums.tolist()
    # As a tensor: Python's own division refuses a scale of 0.
    inverse = float(torch.tensor(1.0, dtype=torch.float64, device="cpu") / scale)
    norm = math.sqrt(total) * inverse
    clipped = 1.0
    if numbers.max_grad_norm:
        share = numbers.max_grad_norm / (norm + 1e-6)
        clipped = 1.0 if share >= 1.0 else share  # a NaN stays one
    found = factor.found_inf is not None and float(factor.found_inf) != 0.0
    nonfinite = numbers.skip_nonfinite and not math.isfinite(total_of_all)
    return Verdict(inverse * clipped, norm, found or nonfinite)


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


class Elements:
    """The elements of a row that one step takes, by place: what is random about each of them.

    Args:
        row: a row of a plan.
        step: the parameter's step, t.
        places: local indexes, or None for all elements.
    """

    def __init__(self, row: Any, step: int, places: Tensor | None) -> None:
        self._row = row
        self._step = step
        self._places = places

    @functools.cached_property
    def _indexes(self) -> Tensor:
        row = self._row
        count, device = row.parameter.numel(), row.parameter.device
        indexes = mapped_indexes(count, row.element_map.base, row.element_map.levels, device)
        return indexes if self._places is None else indexes[self._places]

    def taken(self, whole: Tensor) -> Tensor:
        """Their values of a tensor that has all elements."""
        return whole if self._places is None else whole[self._places]

    def kept(self, threshold: int) -> Tensor:
        """Eq. 2 for each of them."""
        return keep_mask(self._indexes, self._row.philox_key, self._step, threshold)

    def rounded(self, value: Tensor, purpose: int) -> Tensor:
        """Eq. 18 by the words of a purpose."""
        words = element_words(self._indexes, self._row.philox_key, self._step, purpose)
        return narrow_by_words(value, words)


def _masked_gradient(row: Any, scalars: Scalars, elements: Elements) -> Tensor:
    """Eq. 8."""
    numbers = row.numbers
    grad = elements.taken(row.parameter.grad.detach().reshape(-1)).to(row.compute_dtype)
    grad = -grad if numbers.maximize else grad
    grad = grad * scalars.r if scalars.r != 1.0 else grad
    if numbers.threshold != KEEP_ALL:
        grad = torch.where(elements.kept(numbers.threshold), grad, torch.zeros_like(grad))
    return grad


def _current_weight(stored: Tensor, master: Tensor | None, compute: torch.dtype) -> Tensor:
    """Eq. 12 and 17: the master, or the stored weight where somebody has written it since."""
    if master is None:
        return stored.to(compute)
    if master.dtype == torch.int16:
        return joined_master(stored, master)
    return current_master(stored, master)


def _stored(weight: Tensor, row: Any, elements: Elements | None) -> tuple[Tensor, Tensor | None]:
    """A new weight as parameter and master store it (eq. 12, 17 and 18)."""
    dtype, master = row.parameter.dtype, row.master
    if master is not None and master.dtype == torch.int16:
        return split_master(weight)
    if elements is not None and dtype == torch.bfloat16 and row.numbers.stochastic_rounding:
        return elements.rounded(weight, OF_WEIGHT), None
    narrowed = weight if weight.dtype == dtype else narrow(weight, dtype)
    return narrowed, weight if master is not None else None


def _stored_moments(
    exp_avg: Tensor, exp_avg_sq: Tensor, row: Any, elements: Elements
) -> tuple[Tensor, Tensor]:
    """New moments as the state stores them (eq. 18)."""
    if row.exp_avg.dtype == exp_avg.dtype:
        return exp_avg, exp_avg_sq
    return elements.rounded(exp_avg, OF_EXP_AVG), elements.rounded(exp_avg_sq, OF_EXP_AVG_SQ)


def _step_row(row: Any, factor: float) -> None:
    row.step.add_(1)
    step, numbers = int(row.step), row.numbers
    scalars = adamw_scalars(numbers, step, factor)
    if row.compact:
        _step_compact(row, step, scalars)
        return
    parameter, compute = row.parameter.detach(), row.compute_dtype
    elements = Elements(row, step, None)
    exp_avg, exp_avg_sq = row.exp_avg.view(-1), row.exp_avg_sq.view(-1)
    stored = parameter.reshape(-1)
    master = None if row.master is None else row.master.view(-1)
    grad = _masked_gradient(row, scalars, elements)
    weight = _current_weight(stored, master, compute)
    updated, exact_exp_avg, exact_exp_avg_sq = _update(
        weight, grad, exp_avg.to(compute), exp_avg_sq.to(compute), scalars, numbers
    )
    new_exp_avg, new_exp_avg_sq = _stored_moments(exact_exp_avg, exact_exp_avg_sq, row, elements)
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
    new_stored, new_master = _stored(updated, row, elements)
    if written is not None:
        new_stored = torch.where(written, new_stored, stored)
    if master is not None and new_master is not None:
        master.copy_(new_master if written is None else torch.where(written, new_master, master))
    parameter.copy_(new_stored.view(parameter.shape))


def _step_compact(row: Any, step: int, scalars: Scalars) -> None:
    """The same for state that holds the child's elements alone."""
    parameter, numbers, compute = row.parameter.detach(), row.numbers, row.compute_dtype
    places = unpack_mask(row.mask_words, parameter.numel()).nonzero().view(-1)
    elements = Elements(row, step, places)
    whole = parameter.reshape(-1).clone()
    grad = _masked_gradient(row, scalars, elements)
    weight = _current_weight(whole[places], row.master, compute)
    exp_avg, exp_avg_sq = row.exp_avg.to(compute), row.exp_avg_sq.to(compute)
    updated, exp_avg, exp_avg_sq = _update(weight, grad, exp_avg, exp_avg_sq, scalars, numbers)
    new_exp_avg, new_exp_avg_sq = _stored_moments(exp_avg, exp_avg_sq, row, elements)
    row.exp_avg.copy_(new_exp_avg)
    row.exp_avg_sq.copy_(new_exp_avg_sq)
    everything = whole.to(compute)
    decayed = _decayed(everything, scalars)
    if not numbers.freeze_non_child and decayed is not everything:
        whole, _ = _stored(decayed, row, None)
    whole[places], new_master = _stored(updated, row, elements)
    if row.master is not None:
        row.master.copy_(new_master)
    parameter.copy_(whole.view(parameter.shape))


def child_adamw_(rows: Sequence[Any], factor: Any = None) -> None:
    """Update every active row of a plan in place: weight, moments, master weight and step.

    A row offers ``active``, ``parameter`` (with its ``grad``), ``compute_dtype``, ``exp_avg``,
    ``exp_avg_sq``, ``master`` (fp32 masters, int16 remainders, or None), ``mask_words`` or None, ``compact``,
    ``step``, ``philox_key``, ``element_map`` and ``numbers`` (``GroupNumbers``); shapes and types are those
    of SPEC.md, section 5.
    """
    verdict = Verdict(1.0, 0.0, False)
    if factor is not None and rows:
        verdict = step_verdict(factor, rows[0].numbers)
        factor.outcome[0], factor.outcome[1] = verdict.norm, float(verdict.skipped)
    for row in rows:
        if row.active and not verdict.skipped:
            _step_row(row, verdict.factor)
