"""Op child_adamw: one step of child networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import registry


def child_adamw_(
    rows: Sequence[Any],
    row_table: Tensor,
    group_table: Tensor,
    choice: registry.Choice,
    kept: dict[str, Any],
    factor: Any = None,
    capturing: bool = False,
) -> None:
    """One AdamW step of the child networks of all active rows, in place (SPEC.md, eq. 1 to 12, 17, 18, 20).

    Args:
        rows: the rows of a plan (step_plan.Row), for kernels that take tensors.
        row_table: int64 ``[rows, ROW_WIDTH]``, the same rows for kernels that take pointers.
        group_table: float64 ``[groups, GROUP_WIDTH]``, the numbers of the parameter groups.
        choice: what ``registry.choose("child_adamw", device)`` gave for the plan's device.
        kept: what the backend keeps between the steps of one plan; at first empty.
        factor: what the step is scaled, clipped and skipped by: tensors ``sums``, ``grad_scale`` and
            ``found_inf``, each of them or None, and ``outcome`` (step_factor.StepFactor); None: nothing.
        capturing: the step goes into a CUDA graph, whose replays read what the tables say now.

    Changes in place, for every row whose ``active`` is set: the parameter, exp_avg, exp_avg_sq, the
    master weight, and the step (+1), unless the step is skipped; and ``factor.outcome``. Gradients are
    only read.
    """
    if choice.backend == "reference":
        choice.module.child_adamw_(rows, factor)
    else:
        choice.module.child_adamw_(rows, row_table, group_table, kept, factor, capturing)
