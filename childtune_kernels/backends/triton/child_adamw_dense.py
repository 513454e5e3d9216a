"""The step of tensors with moments for every weight (SPEC.md, eq. 8 to 12, 17 and 18).

A program takes one tile of one tensor. Weight and gradient: [numel] under the tensor's strides; exp_avg,
exp_avg_sq and master: [numel], row-major; mask words: [ceil(numel / 32)].
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import plan_columns as plan
from . import step_scalars
from .adamw_math import FP32, SPLIT, STOCHASTIC, step_of
from .philox import element_words, keep_bits, keep_bits_of_blocks, mapped_index, words_of_blocks


@triton.jit
def fours(pointer, lane):
    """The lanes' pointers from an aligned one on: neighbours, four elements a thread and an access.

    More would give a thread eight 16-bit elements beside four moments, and values would have to change
    threads through shared memory. The promise must stand at this sum: Triton drops it from arguments.
    """
    size: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
    return tl.max_contiguous(tl.multiple_of(pointer + lane, 4 * size), 4)


@triton.jit
def misaligned(pointer):
    """Nonzero where a pointer is not aligned to four elements."""
    size: tl.constexpr = 4 * (pointer.dtype.element_ty.primitive_bitwidth // 8)
    return pointer.to(tl.int64) & (size - 1)


@triton.jit
def child_bits(words, local):
    """The bits of local indexes (int64) among mask words."""
    return (tl.load(words + (local >> 5)) >> (local & 31).to(tl.int32)) & 1 != 0


@triton.jit
def _child_bits_of_tile(words, start, TILE: tl.constexpr):
    """The bits of a tile that starts at a whole word; a thread reads those of its four elements at once."""
    quarter = tl.arange(0, TILE // 4)
    four = tl.load(words + start // 32 + quarter // 8) >> (quarter % 8 * 4)
    even = tl.interleave((four & 1) != 0, (four & 4) != 0)
    odd = tl.interleave((four & 2) != 0, (four & 8) != 0)
    return tl.interleave(even, odd)


@triton.jit
def _words_of_tile(element, key, step, purpose, FOURS: tl.constexpr, TILE: tl.constexpr):
    """The words (eq. 2) of a tile that starts at an element whose index is a multiple of 4."""
    if FOURS:
        return words_of_blocks(element // 4 + tl.arange(0, TILE // 4), key, step, purpose)
    else:
        return element_words(element + tl.arange(0, TILE), key, step, purpose)


@triton.jit
def master_address(row, MASTER: tl.constexpr, TYPE: tl.constexpr):
    """The pointer to what stands beside a row's weights: int16 remainders, or fp32 masters."""
    if MASTER == SPLIT:
        return plan.address(row, plan.MASTER, tl.int16)
    else:
        return plan.address(row, plan.MASTER, TYPE)


@triton.jit
def full_tile(
    weight, grad, exp_avg, exp_avg_sq, master, words, start, element, key, draws, scalars,
    MASTER: tl.constexpr, BERNOULLI: tl.constexpr, FIXED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A whole tile of neighbours: 128-bit accesses, no lane masked. Pointers show the tile's first element.

    ``element``: its index, a multiple of 4; ``start``: its place among the bits of ``words``, a multiple
    of 32.
    """
    lane = tl.arange(0, TILE)
    weight_at, exp_avg_at = fours(weight, lane), fours(exp_avg, lane)
    exp_avg_sq_at, master_at = fours(exp_avg_sq, lane), fours(master, lane)
    stored = tl.load(weight_at)
    g = tl.load(fours(grad, lane))
    m = tl.load(exp_avg_at)
    v = tl.load(exp_avg_sq_at)
    KEPT: tl.constexpr = MASTER == FP32 or MASTER == SPLIT
    if KEPT:
        old_master = tl.load(master_at)
    else:
        old_master = stored
    keep = True
    child = True
    # A thread has two fp64 elements at a time: what is made for four would have to change threads.
    FOURS: tl.constexpr = scalars.dtype.element_ty == tl.float32
    step = tl.load(draws)
    if BERNOULLI:
        threshold = tl.load(draws + 1).to(tl.uint32)
        if FOURS:
            blocks = element // 4 + tl.arange(0, TILE // 4)
            keep = keep_bits_of_blocks(blocks, key, step, threshold)
        else:
            keep = keep_bits(element + lane, key, step, threshold, 0)
    if FIXED:
        if FOURS:
            child = _child_bits_of_tile(words, start, TILE)
        else:
            child = child_bits(words, start + lane)
    words1, words2, words3 = 0, 0, 0
    if MASTER == STOCHASTIC:
        words1 = _words_of_tile(element, key, step, 1, FOURS, TILE)
    if exp_avg.dtype.element_ty != scalars.dtype.element_ty:
        words2 = _words_of_tile(element, key, step, 2, FOURS, TILE)
        words3 = _words_of_tile(element, key, step, 3, FOURS, TILE)
    new_stored, new_master, m, v = step_of(
        stored, old_master, g, m, v, keep, child, words1, words2, words3, scalars,
        weight.dtype.element_ty, MASTER, BERNOULLI, FIXED,
    )  # fmt: skip
    tl.store(weight_at, new_stored)
    tl.store(exp_avg_at, m)
    tl.store(exp_avg_sq_at, v)
    if KEPT:
        tl.store(master_at, new_master)


@triton.jit
def step_of_lanes(
    local, rank, exists, child, weight, grad, exp_avg, exp_avg_sq, master,
    contiguous, whole, key, row, draws, scalars,
    MASTER: tl.constexpr, BERNOULLI: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """The step of elements wherever they lie: lanes that exist, given by local index and rank.

    The rank is an element's place in the state, from where its pointers show. ``child``: as for ``step_of``.
    """
    place = local
    if contiguous == 0:
        place = mapped_index(local, row + plan.STORAGE_MAP)
    stored = tl.load(weight + place, exists)
    g = tl.load(grad + place, exists)
    m = tl.load(exp_avg + rank, exists)
    v = tl.load(exp_avg_sq + rank, exists)
    KEPT: tl.constexpr = MASTER == FP32 or MASTER == SPLIT
    if KEPT:
        old_master = tl.load(master + rank, exists)
    else:
        old_master = stored
    MOMENTS_DRAW: tl.constexpr = exp_avg.dtype.element_ty != scalars.dtype.element_ty
    keep = True
    words1, words2, words3 = 0, 0, 0
    if BERNOULLI or MASTER == STOCHASTIC or MOMENTS_DRAW:
        element = local + tl.load(row + plan.ELEMENT_MAP)
        if whole == 0:
            element = mapped_index(local, row + plan.ELEMENT_MAP)
        step = tl.load(draws)
        if BERNOULLI:
            keep = keep_bits(element, key, step, tl.load(draws + 1).to(tl.uint32), 0)
        if MASTER == STOCHASTIC:
            words1 = element_words(element, key, step, 1)
        if MOMENTS_DRAW:
            words2 = element_words(element, key, step, 2)
            words3 = element_words(element, key, step, 3)
    new_stored, new_master, m, v = step_of(
        stored, old_master, g, m, v, keep, child, words1, words2, words3, scalars,
        weight.dtype.element_ty, MASTER, BERNOULLI, FIXED,
    )  # fmt: skip
    tl.store(weight + place, new_stored, exists)
    tl.store(exp_avg + rank, m, exists)
    tl.store(exp_avg_sq + rank, v, exists)
    if KEPT:
        tl.store(master + rank, new_master, exists)


@triton.jit
def _any_tile(
    weight, grad, exp_avg, exp_avg_sq, master, words, start, left, row, draws, scalars,
    MASTER: tl.constexpr, BERNOULLI: tl.constexpr, FIXED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The ``left`` elements from local index ``start`` on, wherever they lie: an element a thread at a time.

    Pointers show the tensors' first elements.
    """
    contiguous = tl.load(row + plan.STORAGE_CONTIGUOUS)
    whole = tl.load(row + plan.ELEMENT_CONTIGUOUS)
    key = tl.load(row + plan.PHILOX_KEY)
    for at in range(0, left, LANES):
        lane = at + tl.arange(0, LANES)
        inside = lane < left
        local = start + lane
        child = True
        if FIXED:
            child = child_bits(words, tl.where(inside, local, start))
        step_of_lanes(
            local, local, inside, child, weight, grad, exp_avg, exp_avg_sq, master,
            contiguous, whole, key, row, draws, scalars, MASTER, BERNOULLI, FIXED,
        )  # fmt: skip


@triton.jit
def _child_adamw_dense_kernel(
    rows, chunks, all_draws, all_scalars,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr, MASTER: tl.constexpr,
    BERNOULLI: tl.constexpr, FIXED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A tile of a tensor; the chunk names its row and which tile it is."""
    chunk = chunks + 2 * tl.program_id(0).to(tl.int64)
    index = tl.load(chunk).to(tl.int64)
    start = tl.load(chunk + 1).to(tl.int64) * TILE
    row = rows + index * plan.ROW
    scalars = all_scalars + index * step_scalars.WIDTH
    draws = all_draws + 2 * index
    # All loads of the row go out at once: those behind a branch would wait for it.
    updates = tl.load(scalars + step_scalars.UPDATES)
    numel = tl.load(row + plan.NUMEL)
    weight = plan.address(row, plan.WEIGHT, WEIGHT)
    grad = plan.address(row, plan.GRAD, GRAD)
    exp_avg = plan.address(row, plan.EXP_AVG, MOMENT)
    exp_avg_sq = plan.address(row, plan.EXP_AVG_SQ, MOMENT)
    master = master_address(row, MASTER, all_scalars.dtype.element_ty)
    words = plan.address(row, plan.MASK_WORDS, tl.int32)
    first = tl.load(row + plan.ELEMENT_MAP)
    neighbours = tl.load(row + plan.STORAGE_CONTIGUOUS) & tl.load(row + plan.ELEMENT_CONTIGUOUS)
    if updates != 0:
        odd = misaligned(weight) | misaligned(grad) | misaligned(exp_avg)
        odd |= misaligned(exp_avg_sq) | (first & 3)
        if MASTER == FP32 or MASTER == SPLIT:
            odd |= misaligned(master)
        if (start + TILE <= numel) & (odd == 0) & (neighbours != 0):
            full_tile(
                weight + start, grad + start, exp_avg + start, exp_avg_sq + start, master + start,
                words, start, first + start, tl.load(row + plan.PHILOX_KEY), draws, scalars,
                MASTER, BERNOULLI, FIXED, TILE,
            )  # fmt: skip
        else:
            _any_tile(
                weight, grad, exp_avg, exp_avg_sq, master, words, start,
                tl.minimum(numel - start, TILE).to(tl.int32), row, draws, scalars,
                MASTER, BERNOULLI, FIXED, LANES,
            )  # fmt: skip
