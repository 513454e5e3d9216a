"""The step of children that carry state of their own (SPEC.md, "Child layouts", eq. 8 to 12, 17 and 18).

A program takes some child elements of one tensor. Weight and gradient: [numel] under the tensor's strides;
exp_avg, exp_avg_sq and master: [child_count], a value a child element. A lane needs two numbers:
the element's rank, which is its place in the state, and its local index, its place in the tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...plan_row import INDICES_UNIT
from . import plan_columns as plan
from . import step_scalars
from .adamw_math import FP32, SPLIT, decayed, narrowed, widened
from .child_adamw_dense import child_bits, full_tile, master_address, misaligned, step_of_lanes
from .philox import mapped_index

UNIT_OF_INDICES = tl.constexpr(INDICES_UNIT)


@triton.jit
def set_bits(word):
    """How many bits of each 32-bit word (uint32) are set; compilers know it for their own instruction."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return ((((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _segment_of(rank, ranks, count, STRIDE: tl.constexpr):
    """Which of ``count`` segments (int32) holds each rank, and its first rank; ``ranks`` has those."""
    segment = tl.zeros_like(rank).to(tl.int32)
    while count > 1:
        half = count // 2
        middle = segment + half
        segment = tl.where(tl.load(ranks + middle * STRIDE) <= rank, middle, segment)
        count -= half
    return segment, tl.load(ranks + segment * STRIDE)


@triton.jit
def _local_of_ranks(start, lane, exists, row, first, count, RUNS: tl.constexpr):
    """Local indexes (int64) of child elements start + lane, in ``count`` segments from ``first`` on."""
    rank = start + lane
    if RUNS:
        runs = plan.address(row, plan.CHILD_PLACES, tl.int64) + 2 * first
        segment, before = _segment_of(rank, runs + 1, count, 2)
        return tl.load(runs + 2 * segment) + (rank - before)
    else:
        ranks = plan.address(row, plan.CHILD_RANKS, tl.int64) + first
        segment, _ = _segment_of(rank, ranks, count, 1)
        places = plan.address(row, plan.CHILD_PLACES, tl.int16) + start
        within = tl.load(places + lane, exists, 0).to(tl.int64) & (UNIT_OF_INDICES - 1)
        return (first + segment) * UNIT_OF_INDICES + within


@triton.jit
def _neighbours(local, rank, weight, grad, exp_avg, exp_avg_sq, master, row, MASTER: tl.constexpr):
    """Whether child elements that follow each other can be stepped by whole tiles from here on."""
    odd = misaligned(weight + local) | misaligned(grad + local) | misaligned(exp_avg + rank)
    odd |= misaligned(exp_avg_sq + rank)
    if MASTER == FP32 or MASTER == SPLIT:
        odd |= misaligned(master + rank)
    odd |= (tl.load(row + plan.ELEMENT_MAP) + local) & 3
    maps = tl.load(row + plan.STORAGE_CONTIGUOUS) & tl.load(row + plan.ELEMENT_CONTIGUOUS)
    return (odd == 0) & (maps != 0)


@triton.jit
def _child_adamw_segments_kernel(
    rows, chunks, all_draws, all_scalars,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr, MASTER: tl.constexpr,
    BERNOULLI: tl.constexpr, RUNS: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Layouts runs and indices: a tile of ranks; the chunk names the runs, or units, that they lie in."""
    chunk = chunks + 4 * tl.program_id(0).to(tl.int64)
    index = tl.load(chunk).to(tl.int64)
    start = tl.load(chunk + 1).to(tl.int64) * TILE
    first, count = tl.load(chunk + 2).to(tl.int64), tl.load(chunk + 3)
    row = rows + index * plan.ROW
    scalars = all_scalars + index * step_scalars.WIDTH
    draws = all_draws + 2 * index
    TYPE: tl.constexpr = all_scalars.dtype.element_ty
    # All loads of the row go out at once: those behind a branch would wait for it.
    updates = tl.load(scalars + step_scalars.UPDATES)
    weight = plan.address(row, plan.WEIGHT, WEIGHT)
    grad = plan.address(row, plan.GRAD, GRAD)
    exp_avg = plan.address(row, plan.EXP_AVG, MOMENT)
    exp_avg_sq = plan.address(row, plan.EXP_AVG_SQ, MOMENT)
    master = master_address(row, MASTER, TYPE)
    left = tl.load(row + plan.CHILD_COUNT) - start
    if updates != 0:
        in_one_run = False
        if RUNS:
            run = plan.address(row, plan.CHILD_PLACES, tl.int64) + 2 * first
            local0 = tl.load(run) + (start - tl.load(run + 1))
            in_one_run = (
                (count == 1)
                & (left >= TILE)
                & _neighbours(local0, start, weight, grad, exp_avg, exp_avg_sq, master, row, MASTER)
            )
        else:
            local0 = start
        if in_one_run:
            full_tile(
                weight + local0, grad + local0, exp_avg + start, exp_avg_sq + start, master + start,
                row, local0, tl.load(row + plan.ELEMENT_MAP) + local0,
                tl.load(row + plan.PHILOX_KEY), draws, scalars, MASTER, BERNOULLI, False, TILE,
            )  # fmt: skip
        else:
            lanes = tl.minimum(left, TILE).to(tl.int32)
            for at in range(0, lanes, LANES):
                lane = at + tl.arange(0, LANES)
                exists = lane < lanes
                local = _local_of_ranks(start, lane, exists, row, first, count, RUNS)
                # Addresses are loaded again in every turn: meanwhile they take no registers.
                step_of_lanes(
                    local, lane, exists, True, plan.address(row, plan.WEIGHT, WEIGHT),
                    plan.address(row, plan.GRAD, GRAD), plan.address(row, plan.EXP_AVG, MOMENT) + start,
                    plan.address(row, plan.EXP_AVG_SQ, MOMENT) + start,
                    master_address(row, MASTER, TYPE) + start,
                    tl.load(row + plan.STORAGE_CONTIGUOUS), tl.load(row + plan.ELEMENT_CONTIGUOUS),
                    tl.load(row + plan.PHILOX_KEY), row, draws, scalars, MASTER, BERNOULLI, False,
                )  # fmt: skip


@triton.jit
def _child_adamw_words_kernel(
    rows, chunks, all_draws, all_scalars,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr, MASTER: tl.constexpr,
    BERNOULLI: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Layout words: a unit of TILE elements, whose first rank is known; the others are counted on."""
    chunk = chunks + 4 * tl.program_id(0).to(tl.int64)
    index = tl.load(chunk).to(tl.int64)
    unit = tl.load(chunk + 1).to(tl.int64)
    row = rows + index * plan.ROW
    scalars = all_scalars + index * step_scalars.WIDTH
    draws = all_draws + 2 * index
    TYPE: tl.constexpr = all_scalars.dtype.element_ty
    if tl.load(scalars + step_scalars.UPDATES) != 0:
        start = unit * TILE
        left = tl.minimum(tl.load(row + plan.NUMEL) - start, TILE).to(tl.int32)
        weight = plan.address(row, plan.WEIGHT, WEIGHT)
        grad = plan.address(row, plan.GRAD, GRAD)
        exp_avg = plan.address(row, plan.EXP_AVG, MOMENT)
        exp_avg_sq = plan.address(row, plan.EXP_AVG_SQ, MOMENT)
        master = master_address(row, MASTER, TYPE)
        words = plan.address(row, plan.MASK_WORDS, tl.uint32) + start // 32
        ranks = plan.address(row, plan.CHILD_RANKS, tl.int64) + unit
        rank0 = tl.load(ranks)
        whole = (tl.load(ranks + 1) - rank0 == TILE) & _neighbours(
            start, rank0, weight, grad, exp_avg, exp_avg_sq, master, row, FP32
        )
        if whole:
            key, first = tl.load(row + plan.PHILOX_KEY), tl.load(row + plan.ELEMENT_MAP) + start
            for at in range(0, TILE, FULL):
                full_tile(
                    weight + start + at, grad + start + at, exp_avg + rank0 + at,
                    exp_avg_sq + rank0 + at, master + rank0 + at, row, start, first + at, key,
                    draws, scalars, MASTER, BERNOULLI, False, FULL,
                )  # fmt: skip
        else:
            bit = tl.arange(0, 32)[None, :]
            below = (tl.full((1, 32), 1, tl.uint32) << bit) - 1
            for at in range(0, left, LANES):
                place = at // 32 + tl.arange(0, LANES // 32)
                word = tl.load(words + place, place * 32 < left, 0)
                counts = set_bits(word)
                before_word = tl.cumsum(counts, 0) - counts
                rank = before_word[:, None] + set_bits(word[:, None] & below)
                exists = ((word[:, None] >> bit) & 1) != 0
                local = start + (place[:, None] * 32 + bit)
                step_of_lanes(
                    local, rank, exists, True, weight, grad, exp_avg + rank0, exp_avg_sq + rank0,
                    master + rank0, tl.load(row + plan.STORAGE_CONTIGUOUS),
                    tl.load(row + plan.ELEMENT_CONTIGUOUS),
                    tl.load(row + plan.PHILOX_KEY), row, draws, scalars, MASTER, BERNOULLI, False,
                )  # fmt: skip
                rank0 += tl.sum(counts, 0)


@triton.jit
def _decay_outside_kernel(
    rows, chunks, all_words, all_scalars,
    WEIGHT: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Eq. 9 for the weights outside the child, of a row without masters; ``all_words``: addresses by row."""
    chunk = chunks + 2 * tl.program_id(0).to(tl.int64)
    index = tl.load(chunk).to(tl.int64)
    start = tl.load(chunk + 1).to(tl.int64) * TILE
    row = rows + index * plan.ROW
    scalars = all_scalars + index * step_scalars.WIDTH
    decay = tl.load(scalars + step_scalars.OUTSIDE_DECAY)
    if (tl.load(scalars + step_scalars.UPDATES) != 0) & (decay != 0):
        words = tl.load(all_words + index).to(tl.pointer_type(tl.int32))
        weight = plan.address(row, plan.WEIGHT, WEIGHT)
        left = tl.minimum(tl.load(row + plan.NUMEL) - start, TILE).to(tl.int32)
        for at in range(0, left, LANES):
            lane = at + tl.arange(0, LANES)
            local = start + lane
            inside = lane < left
            outside = inside & (child_bits(words, tl.where(inside, local, start)) == 0)
            place = local
            if tl.load(row + plan.STORAGE_CONTIGUOUS) == 0:
                place = mapped_index(local, row + plan.STORAGE_MAP)
            old = widened(tl.load(weight + place, outside), all_scalars.dtype.element_ty)
            tl.store(weight + place, narrowed(decayed(old, decay), WEIGHT), outside)
