"""Op child_adamw: one step of child networks, a prologue and a launch a combination of types and mask kind.

Equations 6 to 12, 17, 18 and 20 of SPEC.md for all rows of a plan. The prologue is in step_scalars.py, the
maths in adamw_math.py, the kernels in child_adamw_dense.py and child_adamw_compact.py; device_plan.py says
who takes part in which launch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...plan_row import MASTER_CODES
from . import launch
from .adamw_math import STOCHASTIC
from .child_adamw_compact import (
    _child_adamw_segments_kernel,
    _child_adamw_words_kernel,
    _decay_outside_kernel,
)
from .child_adamw_dense import _child_adamw_dense_kernel
from .device_plan import Combination, DevicePlan, Launch, cut_of, outside, plan_of
from .step_scalars import step_scalars_

_KINDS = {
    torch.bfloat16: ("none", "fp32", "split", "stochastic"),
    torch.float16: ("none", "fp32"),
}
_MASTERS = {**MASTER_CODES, "stochastic": int(STOCHASTIC)}
_KERNELS = {
    "dense": _child_adamw_dense_kernel,
    "fixed": _child_adamw_dense_kernel,
    "words": _child_adamw_words_kernel,
    "indices": _child_adamw_segments_kernel,
    "runs": _child_adamw_segments_kernel,
    "outside": _decay_outside_kernel,
}


def _constants(combination: Combination, generation: str) -> dict[str, Any]:
    """The constexpr arguments of a combination's kernel."""
    layout, cut = combination.layout, cut_of(combination, generation)
    weight = {"WEIGHT": launch.TYPES[combination.weight]}
    if layout == "outside":
        return weight | {"TILE": cut.tile, "LANES": cut.lanes}
    constants = weight | {
        "GRAD": launch.TYPES[combination.grad],
        "MOMENT": launch.TYPES[combination.moment],
        "MASTER": _MASTERS[combination.master],
        "BERNOULLI": combination.bernoulli,
        "TILE": cut.tile,
    }
    if layout == "words":
        return constants | {"LANES": cut.lanes, "FULL": cut.full}
    if layout in ("dense", "fixed"):
        return constants | {"FIXED": layout == "fixed", "LANES": cut.lanes}
    return constants | {"RUNS": layout == "runs", "LANES": cut.lanes}


def _step_launch(plan: DevicePlan, rows: Tensor, each: Launch) -> None:
    combination = each.combination
    cut = cut_of(combination, plan.generation)
    between = plan.draws if each.words is None else each.words
    launch.launch(
        _KERNELS[combination.layout],
        each.chunks.shape[0],
        plan.device,
        (rows, each.chunks, between, plan.scalars[combination.compute]),
        _constants(combination, plan.generation),
        cut.num_warps,
        cut.registers,
    )


def child_adamw_(
    rows: Sequence[Any],
    row_table: Tensor,
    group_table: Tensor,
    kept: dict[str, Any],
    factor: Any,
    capturing: bool,
) -> None:
    """Update every active row in place (contract: ops.child_adamw_)."""
    plan = plan_of(rows, kept)
    if capturing:
        device_rows, device_groups = plan.captured(row_table, group_table)
    else:
        device_rows, device_groups = plan.refresh(rows, row_table, group_table)
    sums, grad_scale, found_inf, outcome = _tensors_of(factor, plan)
    step_scalars_(
        device_rows,
        device_groups,
        sums,
        grad_scale,
        found_inf,
        plan.draws,
        plan.scalars[torch.float32],
        plan.scalars[torch.float64],
        outcome,
        plan.count,
    )
    for each in plan.launches:
        _step_launch(plan, device_rows, each)


def _tensors_of(factor: Any, plan: DevicePlan) -> list[Tensor]:
    """What the prologue reads and writes of a step's factor; what is not there is idle."""
    return [
        idle if factor is None or given is None else given
        for given, idle in zip(factor or [None] * 4, plan.idle_factor, strict=True)
    ]


def combinations() -> Iterator[Combination]:
    """Every combination of types and mask kind that a plan can hold."""
    types = [(torch.float32, torch.float32, "none")]
    for weight, masters in _KINDS.items():
        for master, grad in itertools.product(masters, (weight, torch.float32)):
            types.append((weight, grad, master))
    kinds = [(*each, moment) for each in types for moment in (torch.float32, torch.bfloat16)]
    kinds.append((torch.float64, torch.float64, "none", torch.float64))
    for layout in _KERNELS:
        if layout == "outside":
            continue
        for (weight, grad, master, moment), bernoulli in itertools.product(kinds, (False, True)):
            yield Combination(weight, grad, moment, master, bernoulli, layout)
    yield from map(outside, launch.TYPES)


def variants(generation: str) -> Iterator[launch.Variant]:
    """What is compiled ahead of time."""
    for each in combinations():
        names = [
            str(each.weight),
            str(each.grad),
            {"none": "", "fp32": "master"}.get(each.master, each.master),
            "bf16_moments" if each.moment == torch.bfloat16 else "",
            "bernoulli" * each.bernoulli,
        ]
        constants = _constants(each, generation)
        between = "all_words" if each.layout == "outside" else "all_draws"
        signature = {"rows": "*i64", "chunks": "*i32", between: "*i64"}
        signature["all_scalars"] = "*fp64" if each.compute == torch.float64 else "*fp32"
        cut = cut_of(each, generation)
        yield launch.Variant(
            "-".join(["child_adamw", each.layout, *filter(None, names)]).replace("torch.", ""),
            _KERNELS[each.layout],
            signature | dict.fromkeys(constants, "constexpr"),
            constants,
            cut.num_warps,
            elementwise=each.layout != "words",
            tile=cut.tile,
            registers=cut.registers,
            full=None if each.layout in ("indices", "outside") else cut.full,
            lanes=cut.lanes,
        )
