"""The maths of one element: gradient, decay, moments, update, masters (SPEC.md, eq. 8 to 12, 17 and 18)."""

from __future__ import annotations

import triton
import triton.language as tl

from ...plan_row import MASTER_CODES
from . import step_scalars as at

# What stands beside a weight. To "stochastic" ones nothing, and they are rounded by random words.
FP32 = tl.constexpr(MASTER_CODES["fp32"])
SPLIT = tl.constexpr(MASTER_CODES["split"])
STOCHASTIC = tl.constexpr(len(MASTER_CODES))


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
def _bf16_of_upper_half(bits):
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def narrowed_by_words(value, words):
    """Eq. 18: fp32 values rounded to bf16 by random words (uint32)."""
    bits = value.to(tl.uint32, bitcast=True) + (words & 0xFFFF)
    return _bf16_of_upper_half(tl.where(value != value, 0x7FC00000, bits))


@triton.jit
def split_master(value):
    """Eq. 17: the bf16 weight and the int16 remainder, which is the master's lower half as it is."""
    bits = tl.where(value != value, 0x7FC00000, value.to(tl.uint32, bitcast=True))
    remainder = (bits & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True)
    return _bf16_of_upper_half(bits + 0x8000), remainder


@triton.jit
def joined_master(stored, remainder):
    """Eq. 17: the fp32 masters."""
    upper = stored.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    bits = upper + remainder.to(tl.int32).to(tl.uint32, bitcast=True)
    # Another sign than the weight's: a zero that somebody has written since.
    return tl.where((bits ^ upper) >> 31 != 0, upper, bits).to(tl.float32, bitcast=True)


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
    stored, master, grad, exp_avg, exp_avg_sq, keep, child, weight_words, exp_avg_words, exp_avg_sq_words,
    scalars, WEIGHT: tl.constexpr, MASTER: tl.constexpr, BERNOULLI: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Eq. 8 to 12, 17 and 18 for elements in registers: weight, master and moments as they are stored now.

    ``keep`` and ``child`` are bits, looked at with BERNOULLI and FIXED; the words are looked at where bf16
    moments, or weights of STOCHASTIC kind, are rounded by them. ``scalars`` points at the row's numbers
    (step_scalars.py), of the computing type. Outside the child everything comes back as it was, to the bit,
    but for the decay that may reach the weight there.
    """
    TYPE: tl.constexpr = scalars.dtype.element_ty
    g = widened(grad, TYPE) * tl.load(scalars + at.R)
    if BERNOULLI:
        g = tl.where(keep, g, tl.zeros_like(g))
    if MASTER == SPLIT:
        old = joined_master(stored, master)
    elif MASTER == FP32:
        old = current_weight(stored, master, WEIGHT)
    else:
        old = widened(stored, TYPE)
    new, new_exp_avg, new_exp_avg_sq = updated(
        old, g, widened(exp_avg, TYPE), widened(exp_avg_sq, TYPE), scalars
    )
    if exp_avg.dtype != TYPE:
        new_exp_avg = narrowed_by_words(new_exp_avg, exp_avg_words)
        new_exp_avg_sq = narrowed_by_words(new_exp_avg_sq, exp_avg_sq_words)
    if FIXED:
        decay = tl.load(scalars + at.OUTSIDE_DECAY)
        new = tl.where(child, new, decayed(old, decay))
        new_exp_avg = tl.where(child, new_exp_avg, exp_avg)
        new_exp_avg_sq = tl.where(child, new_exp_avg_sq, exp_avg_sq)
    new_master = new
    if MASTER == SPLIT:
        new_stored, new_master = split_master(new)
    elif MASTER == STOCHASTIC:
        new_stored = narrowed_by_words(new, weight_words)
    else:
        new_stored = narrowed(new, WEIGHT)
    if FIXED:
        new_stored = tl.where(child, new_stored, tl.where(decay != 0, new_stored, stored))
        if MASTER == FP32 or MASTER == SPLIT:
            new_master = tl.where(child, new_master, tl.where(decay != 0, new_master, master))
    return new_stored, new_master, new_exp_avg, new_exp_avg_sq
