"""What one step is scaled, clipped and skipped by (SPEC.md, eq. 20): the tensors that its kernels read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, rank_values, registry
from .rank_agreement import RankAgreement
from .step_plan import StepPlan

#: What ``torch.amp.GradScaler`` sets on an optimizer before its step.
SET_BY_SCALER = ("grad_scale", "found_inf")


class StepFactor(NamedTuple):
    """The tensors on one plan's device, float64 but for the scaler's own.

    ``sums``: ``[2]``, Σ and Σ' of eq. 19; ``grad_scale``, ``found_inf``: one element each; ``outcome``:
    ``[2]``, to which the step writes the norm, and 1 where it was skipped. None: no such thing in this step.
    """

    sums: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None
    outcome: Tensor


def step_factors(
    plans: Sequence[StepPlan],
    group: Mapping[str, Any],
    grad_scale: Any,
    found_inf: Any,
    capturing: bool,
    agreement: RankAgreement,
) -> list[StepFactor | None]:
    """For every plan, refreshed for this step, what its step is scaled, clipped and skipped by.

    Args:
        group: a parameter group: ``max_grad_norm``, ``clip`` and ``skip_nonfinite`` are those of all.
        grad_scale, found_inf: what ``torch.amp.GradScaler`` has set, or None.
        agreement: of the ranks that hold other parameters, or parts, of the same norm.

    Nothing waits for a device. Raises: RuntimeError, see ``ops.gradient_norm``.
    """
    takes_norm = group["max_grad_norm"] is not None or group["skip_nonfinite"]
    if not takes_norm and grad_scale is None and found_inf is None:
        return [None] * len(plans)
    sums: list[Tensor | None] = [None] * len(plans)
    if takes_norm:
        sums = _sums(plans, group["clip"] == "after_mask", capturing, agreement)
    return [
        StepFactor(
            sums=of_plan,
            grad_scale=_scalar(grad_scale, plan.device),
            found_inf=_scalar(found_inf, plan.device),
            outcome=torch.zeros(2, dtype=torch.float64, device=plan.device),
        )
        for plan, of_plan in zip(plans, sums, strict=True)
    ]


def _sums(
    plans: Sequence[StepPlan], after_mask: bool, capturing: bool, agreement: RankAgreement
) -> list[Tensor | None]:
    """Σ and Σ' over all plans, and over ranks where these hold parts of the whole, on the device of each."""
    spread = agreement if is_spread(plans, agreement) else None
    total, *others = (_sums_of_plan(plan, spread, after_mask, capturing) for plan in plans)
    for other in others:
        total = total + _sent(other, total.device)
    if spread is not None:
        total = rank_values.sum_over_ranks(total, spread.group)
    return [_sent(total, plan.device) for plan in plans]


def is_spread(plans: Sequence[StepPlan], agreement: RankAgreement) -> bool:
    """Whether other ranks hold parts of parameters, or other parameters."""
    return bool(agreement.first_holders) or any(plan.sharded_rows for plan in plans)


def _sums_of_plan(
    plan: StepPlan, spread: RankAgreement | None, after_mask: bool, capturing: bool
) -> Tensor:
    """Σ and Σ' of a plan's rows; where they are ``spread`` over ranks, of those that this one counts."""
    choice = registry.choose("gradient_norm", plan.device, plan.choice.backend)
    rows, row_table, kept = plan.rows, plan.row_table, plan.kept
    if spread is not None:
        if "counted" not in kept:
            kept["counted"] = spread.counted(rows), {}
        counted, of_counted = kept["counted"]
        if not counted:
            return torch.zeros(2, dtype=torch.float64, device=plan.device)
        if len(counted) < len(rows):
            rows, row_table, kept = [rows[at] for at in counted], row_table[counted], of_counted
    return ops.gradient_norm(rows, row_table, plan.group_table, choice, kept, after_mask, capturing)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, for which the host waits only where it reads the tensor itself."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def _scalar(value: Any, device: torch.device) -> Tensor | None:
    """What a GradScaler has set, as one fp32 element on a device."""
    if value is None:
        return None
    tensor = torch.as_tensor(value)
    if tensor.numel() != 1:
        raise ValueError(
            f"grad_scale and found_inf must have one element, not {tuple(tensor.shape)}; leave them to "
            "torch.amp.GradScaler"
        )
    return _sent(tensor.detach(), device).to(torch.float32)


def without_scale_after_error(step: Callable[..., Any]) -> Callable[..., Any]:
    """An optimizer's step after whose errors, those of its hooks too, nothing is left of a GradScaler.

    A GradScaler takes its tensors back only after success: left there they would scale the next step too.
    """

    @functools.wraps(step)
    def guarded_step(optimizer: Any, *arguments: Any, **keywords: Any) -> Any:
        try:
            return step(optimizer, *arguments, **keywords)
        except BaseException:
            for name in SET_BY_SCALER:
                vars(optimizer).pop(name, None)
            raise

    return guarded_step
