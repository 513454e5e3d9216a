"""The maths of one element: masked gradient, decay, moments, update, masters (SPEC.md, eq. 8 to 12)."""

from __future__ import annotations

import triton
import triton.language as tl

from . import step_scalars as at


@triton.jit
def widened(value, TYPE: tl.constexpr):
    """A weight or gradient in the computing type, exactly."""
    if value.dtype == tl.bfloat16:
        # By integers: the interpreter loses bf16's subnormals.
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return value.to(TYPE)


@triton.jit
def narrowed(value, TYPE: tl.constexpr):
    """A weight rounded to its storage type; every bf16 NaN becomes 0x7FC0 (SPEC.md, "Types and rounding")."""
    if tl.bfloat16 == TYPE:
        # By integers: GPUs write NaN as 0x7FFF, and the interpreter does not round to nearest.
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.where(value != value, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(TYPE)


@triton.jit
def current_weight(stored, master, TYPE: tl.constexpr):
    """Eq. 12: the master, or the stored weight where somebody has written it since."""
    same = narrowed(master, TYPE).to(tl.int16, bitcast=True) == stored.to(tl.int16, bitcast=True)
    return tl.where(same, master, widened(stored, tl.float32))


@triton.jit
def _quotient(x, y):
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _square_root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def decayed(weight, decay):
    """Eq. 9; ``decay`` is a scalar, and 0 leaves the weight as it is, -0 and NaN payloads too."""
    return tl.where(decay != 0, weight - decay * weight, weight)


@triton.jit
def updated(weight, grad, exp_avg, exp_avg_sq, scalars):
    """Eq. 9 to 11 for masked gradients: the new weight, exp_avg and exp_avg_sq.

    ``scalars`` points at the row's numbers (step_scalars.py), of the computing type.
    """
    exp_avg = tl.load(scalars + at.BETA1) * exp_avg + tl.load(scalars + at.C1) * grad
    exp_avg_sq = tl.load(scalars + at.BETA2) * exp_avg_sq + tl.load(scalars + at.C2) * (grad * grad)
    weight = decayed(weight, tl.load(scalars + at.FIRST_DECAY))
    # b is 1 in the original convention, where sqrt(v) * 1 is sqrt(v).
    denominator = _square_root(exp_avg_sq) * tl.load(scalars + at.B) + tl.load(scalars + at.EPS)
    weight = weight - _quotient(tl.load(scalars + at.S) * exp_avg, denominator)
    return decayed(weight, tl.load(scalars + at.LAST_DECAY)), exp_avg, exp_avg_sq


@triton.jit
def step_of(
    stored, master, grad, exp_avg, exp_avg_sq, keep, child, scalars,
    WEIGHT: tl.constexpr, MASTER: tl.constexpr, BERNOULLI: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Eq. 8 to 12 for elements in registers: the new stored weight, master, exp_avg and exp_avg_sq.

    ``keep`` and ``child`` are bits, looked at with BERNOULLI and FIXED; ``scalars`` points at the row's
    numbers (step_scalars.py). Outside the child everything comes back as it was, to the bit, but for the
    decay that may reach the weight there.
    """
    g = widened(grad, exp_avg.dtype) * tl.load(scalars + at.R)
    if BERNOULLI:
        g = tl.where(keep, g, tl.zeros_like(g))
    if MASTER:
        old = current_weight(stored, master, WEIGHT)
    else:
        old = widened(stored, exp_avg.dtype)
    new, new_exp_avg, new_exp_avg_sq = updated(old, g, exp_avg, exp_avg_sq, scalars)
    if FIXED:
        decay = tl.load(scalars + at.OUTSIDE_DECAY)
        new = tl.where(child, new, decayed(old, decay))
        new_exp_avg = tl.where(child, new_exp_avg, exp_avg)
        new_exp_avg_sq = tl.where(child, new_exp_avg_sq, exp_avg_sq)
        narrow = narrowed(new, WEIGHT)
        new_stored = tl.where(child, narrow, tl.where(decay != 0, narrow, stored))
        if MASTER:
            new = tl.where(child, new, tl.where(decay != 0, new, master))
    else:
        new_stored = narrowed(new, WEIGHT)
    return new_stored, new, new_exp_avg, new_exp_avg_sq
