"""The kernels of op gradient_norm (SPEC.md, eq. 19).

A program takes a few units of 4096 neighbouring elements of one tensor: fp64 column sums ``[units, 128]``,
to which it adds the units' 32 rows one after the other. Gradients: [numel] under their parameter's strides;
mask words: [ceil(numel / 32)]; sums of units: float64 ``[sequences, units of all rows]``. The second
sequence, of all elements whatever the masks, is there only with ``after_mask``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import plan_columns as plan
from .adamw_math import widened
from .child_adamw_dense import child_bits, misaligned
from .philox import keep_bits, keep_bits_of_blocks, mapped_index

COLUMNS = tl.constexpr(128)
ROWS = tl.constexpr(32)
UNIT = tl.constexpr(4096)


@triton.jit
def folded(sums, UNITS: tl.constexpr, WIDTH: tl.constexpr):
    """Eq. 19's fold of column sums ``[UNITS, WIDTH]`` to ``[UNITS]``; every sum has two terms."""
    for step in tl.static_range(7):
        if WIDTH >> step > 1:
            sums = tl.sum(tl.reshape(sums, (UNITS, 2, WIDTH >> (step + 1))), 1)
    return tl.reshape(sums, (UNITS,))


@triton.jit
def squared(gradient):
    """x of eq. 19 for gradients of any type."""
    if gradient.dtype == tl.float64:
        return gradient * gradient
    else:
        wide = widened(gradient, tl.float32).to(tl.float64)
        return wide * wide


@triton.jit
def _child_bits_of_fours(words, four):
    """The bits of neighbours in fours; ``four``: index (int64 ``[n, 32]``) of each four among a tensor's."""
    bits = tl.load(words + four // 8) >> (four % 8 * 4).to(tl.int32)
    even = tl.interleave((bits & 1) != 0, (bits & 4) != 0)
    odd = tl.interleave((bits & 2) != 0, (bits & 8) != 0)
    return tl.interleave(even, odd)


@triton.jit
def _whole_sums(
    grad, start, row, words, threshold, step,
    FIXED: tl.constexpr, BERNOULLI: tl.constexpr, UNITS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Sums of whole units of neighbours from local index ``start`` on, of those that count, and of all.

    Accesses have 128 bits and no mask. To Philox too the elements are neighbours in whole fours.
    """
    unit = tl.arange(0, UNITS)[:, None] * UNIT
    lane = unit + tl.arange(0, COLUMNS)[None, :]
    four = start // 4 + (unit // 4 + tl.arange(0, COLUMNS // 4)[None, :])
    # The promise must stand here: Triton drops it from what a function returns.
    size: tl.constexpr = grad.dtype.element_ty.primitive_bitwidth // 8
    first = tl.multiple_of(grad + start, 4 * size)
    counting = tl.zeros((UNITS, COLUMNS), tl.float64)
    every = tl.zeros((UNITS, COLUMNS), tl.float64)
    for some in range(0, UNIT, AT_ONCE * COLUMNS):
        for ahead in tl.static_range(AT_ONCE):
            at = some + ahead * COLUMNS
            x = squared(tl.load(first + at + lane))
            every += x
            if FIXED:
                x = tl.where(_child_bits_of_fours(words, four + at // 4), x, 0.0)
            if BERNOULLI:
                block = tl.load(row + plan.ELEMENT_MAP) // 4 + (four + at // 4)
                key = tl.load(row + plan.PHILOX_KEY)
                x = tl.where(keep_bits_of_blocks(block, key, step, threshold), x, 0.0)
            if FIXED or BERNOULLI:
                counting += x
    if FIXED or BERNOULLI:
        sums = folded(every, UNITS, COLUMNS)
        return folded(counting, UNITS, COLUMNS), sums
    else:
        sums = folded(every, UNITS, COLUMNS)
        return sums, sums


@triton.jit
def _any_sums(
    grad, start, left, row, words, threshold, step,
    FIXED: tl.constexpr, BERNOULLI: tl.constexpr, UNITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums of the ``left`` elements from ``start`` on, wherever they lie, of those that count, and of all.

    WIDTH columns at a time; with a quarter of them a thread has one element, and the fold's first two steps
    are done between quarters. What lies past the end need not be added: it is +0, and sums are never -0.
    """
    contiguous = tl.load(row + plan.STORAGE_CONTIGUOUS)
    whole = tl.load(row + plan.ELEMENT_CONTIGUOUS)
    lane = tl.arange(0, UNITS)[:, None] * UNIT + tl.arange(0, WIDTH)[None, :]
    # What the fold adds first.
    APART: tl.constexpr = WIDTH if WIDTH > COLUMNS // 2 else COLUMNS // 2
    end = tl.minimum(left, UNIT)
    counting = tl.zeros((UNITS, WIDTH), tl.float64)
    every = tl.zeros((UNITS, WIDTH), tl.float64)
    for first in range(0, APART, WIDTH):
        two_counting = tl.zeros((UNITS, WIDTH), tl.float64)
        two_every = tl.zeros((UNITS, WIDTH), tl.float64)
        for column in range(first, COLUMNS, APART):
            one_counting = tl.zeros((UNITS, WIDTH), tl.float64)
            one_every = tl.zeros((UNITS, WIDTH), tl.float64)
            for at in range(column, end, COLUMNS):
                exists = at + lane < left
                local = start + tl.where(exists, at + lane, 0)
                place = local
                if contiguous == 0:
                    place = mapped_index(local, row + plan.STORAGE_MAP)
                x = squared(tl.load(grad + place, exists, 0.0))
                one_every += x
                if FIXED:
                    x = tl.where(child_bits(words, local), x, 0.0)
                if BERNOULLI:
                    element = local + tl.load(row + plan.ELEMENT_MAP)
                    if whole == 0:
                        element = mapped_index(local, row + plan.ELEMENT_MAP)
                    key = tl.load(row + plan.PHILOX_KEY)
                    x = tl.where(keep_bits(element, key, step, threshold, 0), x, 0.0)
                one_counting += x
            two_every += one_every
            two_counting += one_counting
        every += two_every
        counting += two_counting
    return folded(counting, UNITS, WIDTH), folded(every, UNITS, WIDTH)


@triton.jit
def _gradient_norm_kernel(
    rows, groups, chunks, first_units, all_words, sums, numbers,
    GRAD: tl.constexpr, FIXED: tl.constexpr, BERNOULLI: tl.constexpr,
    UNITS: tl.constexpr, AT_ONCE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums of a few units; the chunk names their row, and which of its units they are.

    ``numbers``: how many units all rows have, and of sequences. A row without a gradient has sums of +0.
    """
    chunk = chunks + 2 * tl.program_id(0).to(tl.int64)
    index = tl.load(chunk).to(tl.int64)
    first_unit = tl.load(chunk + 1).to(tl.int64) * UNITS
    start = first_unit * UNIT
    row = rows + index * plan.ROW
    # All loads of the row go out at once: those behind a branch would wait for it.
    active = tl.load(row + plan.ACTIVE)
    numel = tl.load(row + plan.NUMEL)
    grad = plan.address(row, plan.GRAD, GRAD)
    group = groups + tl.load(row + plan.GROUP_INDEX) * plan.GROUP
    neighbours = tl.load(row + plan.STORAGE_CONTIGUOUS)
    odd = misaligned(grad)
    words, threshold, step = row, index, index
    if FIXED:
        words = tl.load(all_words + index).to(tl.pointer_type(tl.int32))
    if BERNOULLI:
        threshold = tl.load(group + plan.THRESHOLD).to(tl.uint32)
        step = (tl.load(plan.address(row, plan.STEP, tl.int64)) + 1) & 0xFFFFFFFF
        neighbours &= tl.load(row + plan.ELEMENT_CONTIGUOUS)
        odd |= tl.load(row + plan.ELEMENT_MAP) & 3
    left = tl.where(active != 0, tl.minimum(numel - start, UNITS * UNIT), 0).to(tl.int32)
    if (left == UNITS * UNIT) & (neighbours != 0) & (odd == 0):
        counting, every = _whole_sums(
            grad, start, row, words, threshold, step, FIXED, BERNOULLI, UNITS, AT_ONCE
        )
    else:
        counting, every = _any_sums(
            grad, start, left, row, words, threshold, step, FIXED, BERNOULLI, UNITS, WIDTH
        )
    r = 1.0 / tl.load(group + plan.RESERVE_P)
    after_mask = tl.load(numbers + 1) == 2
    unit = tl.arange(0, UNITS)
    exists = start + unit * UNIT < numel
    place = sums + tl.load(first_units + index) + first_unit + unit
    tl.store(place, counting * tl.where(after_mask, r * r, 1.0), exists)
    if after_mask:
        tl.store(place + tl.load(numbers), every, exists)


@triton.jit
def _gradient_norm_again_kernel(values, sums, numbers):
    """The sum of one unit of the sums of units, of one sequence.

    ``numbers``: how many values a sequence has, how far apart the sequences' are, how many sums it gets.
    """
    count, distance, units = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    program = tl.program_id(0).to(tl.int64)
    sequence = program // units
    start = (program - sequence * units) * UNIT
    lane = start + tl.arange(0, COLUMNS)[None, :]
    columns = tl.zeros((1, COLUMNS), tl.float64)
    for at in tl.static_range(ROWS):
        place = lane + at * COLUMNS
        columns += tl.load(values + sequence * distance + place, place < count, 0.0)
    tl.store(sums + program + tl.arange(0, 1), folded(columns, 1, COLUMNS))
