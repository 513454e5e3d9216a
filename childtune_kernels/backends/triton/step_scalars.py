"""The prologue of a step: every active row's step advances, and its scalars are made (SPEC.md, eq. 6, 7, 20).

Rows ``[n]`` and groups in; per row out: ``step`` (int64, += 1), ``draws`` (int64 ``[n, 2]``: t mod 2**32, T)
and the numbers below in both computing types (``[n, 16]``). The host never needs to know t, nor the norm, nor
whether the step is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from . import plan_columns as plan

WIDTH = tl.constexpr(16)
BETA1 = tl.constexpr(0)
C1 = tl.constexpr(1)
BETA2 = tl.constexpr(2)
C2 = tl.constexpr(3)
R = tl.constexpr(4)  # negative where the group maximizes: -(g * r) is g * -r, bit for bit
FIRST_DECAY = tl.constexpr(5)  # a where decay comes first, else 0
LAST_DECAY = tl.constexpr(6)  # a where it comes last, else 0
S = tl.constexpr(7)
B = tl.constexpr(8)
EPS = tl.constexpr(9)
OUTSIDE_DECAY = tl.constexpr(10)  # a where decay reaches weights outside a fixed mask, else 0

UPDATES = tl.constexpr(11)  # 1 where the row takes part in this step, else 0

_BLOCK = 128


@triton.jit
def power(base, exponent):
    """Eq. 6, for tensors."""
    result = tl.zeros_like(base) + 1.0
    while tl.max(exponent, 0) > 0:
        result = tl.where((exponent & 1) == 1, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def _option(group, active, VALUE: tl.constexpr, ADDRESS: tl.constexpr, IS_DOUBLE: tl.constexpr):
    """A number of each group, from the tensor that holds it where there is one."""
    address = tl.load(group + ADDRESS, active, 0.0).to(tl.int64)
    double = tl.load(group + IS_DOUBLE, active, 0.0) != 0.0
    wide = tl.load(address.to(tl.pointer_type(tl.float64)), double & (address != 0), 0.0)
    single = (double == 0) & (address != 0)
    narrow = tl.load(address.to(tl.pointer_type(tl.float32)), single, 0.0).to(tl.float64)
    value = tl.load(group + VALUE, active, 0.0)
    return tl.where(address == 0, value, tl.where(double, wide, narrow))


@triton.jit
def _put(scalars32, scalars64, at, value, active):
    tl.store(scalars32 + at, value.to(tl.float32), active)
    tl.store(scalars64 + at, value, active)


@triton.jit
def _factor(groups, sums, grad_scale, found_inf, outcome):
    """Eq. 20: q·κ and whether the step goes on; the first program writes the norm and the verdict."""
    inverse = 1.0 / tl.load(grad_scale).to(tl.float64)
    norm = tl.sqrt(tl.load(sums)) * inverse
    most = tl.load(groups + plan.MAX_GRAD_NORM)
    share = most / (norm + 1e-6)
    # A NaN stays one.
    clipped = tl.where(most == 0.0, 1.0, tl.where(share >= 1.0, 1.0, share))
    of_all = tl.load(sums + 1)
    # Counts, not bits: the interpreter knows no operations between bits of scalars and of tensors.
    nonfinite = tl.where(of_all - of_all != 0.0, 1, 0)
    nonfinite = tl.where(tl.load(groups + plan.SKIP_NONFINITE) != 0.0, nonfinite, 0)
    skipped = tl.where(tl.load(found_inf) != 0.0, 1, nonfinite)
    if tl.program_id(0) == 0:
        tl.store(outcome, norm)
        tl.store(outcome + 1, skipped.to(tl.float64))
    return inverse * clipped, skipped


@triton.jit
def _step_scalars_kernel(
    rows, groups, sums, grad_scale, found_inf, draws, scalars32, scalars64, outcome, count,
    BLOCK: tl.constexpr,
):  # fmt: skip
    factor, skipped = _factor(groups, sums, grad_scale, found_inf, outcome)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = index < tl.load(count)
    row = rows + index.to(tl.int64) * plan.ROW
    active = exists & (tl.where(skipped == 0, tl.load(row + plan.ACTIVE, exists, 0), 0) != 0)
    group = groups + tl.load(row + plan.GROUP_INDEX, active, 0) * plan.GROUP
    step = tl.load(row + plan.STEP, active, 0).to(tl.pointer_type(tl.int64))
    t = tl.load(step, active, 0) + 1
    tl.store(step, t, active)

    lr = _option(group, active, plan.LR, plan.LR_ADDRESS, plan.LR_IS_DOUBLE)
    weight_decay = _option(
        group, active, plan.WEIGHT_DECAY, plan.WEIGHT_DECAY_ADDRESS, plan.WEIGHT_DECAY_IS_DOUBLE
    )
    beta1 = tl.load(group + plan.BETA1, active, 0.0)
    beta2 = tl.load(group + plan.BETA2, active, 0.0)
    corrects = tl.load(group + plan.CORRECT_BIAS, active, 0.0) != 0.0
    exponent = tl.where(corrects, t, 0)
    correction1 = tl.where(corrects, 1.0 - power(beta1, exponent), 1.0)
    correction2 = tl.where(corrects, 1.0 - power(beta2, exponent), 1.0)
    root = tl.sqrt(correction2)
    original = tl.load(group + plan.ORIGINAL_CONVENTION, active, 0.0) != 0.0
    decay = lr * weight_decay
    r = factor * (1.0 / tl.load(group + plan.RESERVE_P, active, 1.0))
    maximizes = tl.load(group + plan.MAXIMIZE, active, 0.0) != 0.0

    at = index * WIDTH
    _put(scalars32, scalars64, at + UPDATES, active.to(tl.float64), exists)
    _put(scalars32, scalars64, at + BETA1, beta1, active)
    _put(scalars32, scalars64, at + C1, 1.0 - beta1, active)
    _put(scalars32, scalars64, at + BETA2, beta2, active)
    _put(scalars32, scalars64, at + C2, 1.0 - beta2, active)
    _put(scalars32, scalars64, at + R, tl.where(maximizes, -r, r), active)
    _put(scalars32, scalars64, at + FIRST_DECAY, tl.where(original, 0.0, decay), active)
    _put(scalars32, scalars64, at + LAST_DECAY, tl.where(original, decay, 0.0), active)
    frozen = tl.load(group + plan.FREEZE_NON_CHILD, active, 0.0) != 0.0
    _put(scalars32, scalars64, at + OUTSIDE_DECAY, tl.where(frozen, 0.0, decay), active)
    s = tl.where(original, lr * root / correction1, lr / correction1)
    _put(scalars32, scalars64, at + S, s, active)
    _put(scalars32, scalars64, at + B, tl.where(original, 1.0, 1.0 / root), active)
    _put(scalars32, scalars64, at + EPS, tl.load(group + plan.EPS, active, 0.0), active)
    tl.store(draws + 2 * index, t & 0xFFFFFFFF, active)
    threshold = tl.load(group + plan.THRESHOLD, active, 0.0)
    tl.store(draws + 2 * index + 1, threshold.to(tl.int64), active)


def step_scalars_(
    rows: Tensor,
    groups: Tensor,
    sums: Tensor,
    grad_scale: Tensor,
    found_inf: Tensor,
    draws: Tensor,
    scalars32: Tensor,
    scalars64: Tensor,
    outcome: Tensor,
    count: Tensor,
) -> None:
    """Advance the steps of all active rows and write their scalars; all tensors lie on the device.

    Args:
        rows, groups: the plan's tables.
        sums: float64 ``[2]``, Σ and Σ' of eq. 19.
        grad_scale, found_inf: float32 ``[1]``, of a GradScaler; 1 and 0 without one.
        count: int64 ``[1]``, the number of rows.

    Changes in place: the steps that rows point at, ``draws``, both tables of scalars, and ``outcome``
    (float64 ``[2]``: the norm, and 1 where the step is skipped: then no step advances).
    """
    launch.launch(
        _step_scalars_kernel,
        -(-rows.shape[0] // _BLOCK),
        rows.device,
        (rows, groups, sums, grad_scale, found_inf, draws, scalars32, scalars64, outcome, count),
        {"BLOCK": _BLOCK},
        num_warps=_BLOCK // 32,
    )


def variants(generation: str) -> Iterator[launch.Variant]:
    """What is compiled ahead of time."""
    signature = {
        "rows": "*i64",
        "groups": "*fp64",
        "sums": "*fp64",
        "grad_scale": "*fp32",
        "found_inf": "*fp32",
        "draws": "*i64",
        "scalars32": "*fp32",
        "scalars64": "*fp64",
        "outcome": "*fp64",
        "count": "*i64",
        "BLOCK": "constexpr",
    }
    constants = {"BLOCK": _BLOCK}
    yield launch.Variant(
        "step_scalars", _step_scalars_kernel, signature, constants, _BLOCK // 32, False, _BLOCK
    )
