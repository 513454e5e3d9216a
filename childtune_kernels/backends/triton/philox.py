"""The keep bits of a Bernoulli mask and the indexes they are asked for (SPEC.md, eq. 1, 2 and 5)."""

from __future__ import annotations

import triton
import triton.language as tl

KEEP_ALL = tl.constexpr(1 << 32)


@triton.jit
def block_words(counter, key, step, purpose):
    """Eq. 1: the four output words at 64-bit counters; Triton's Philox is Random123's Philox4x32-10.

    ``counter``: int64 tensor; ``key``: int64 scalar, k0 in its low word; ``step``, ``purpose``: scalars.
    """
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low ^ low
    return tl.philox(key, low, high, zero + step.to(tl.uint32), zero + purpose)


@triton.jit
def words_of_blocks(counter, key, step, purpose):
    """The words (eq. 2) of whole blocks: from counters ``[n]`` those of elements ``[4n]``, in order."""
    w0, w1, w2, w3 = block_words(counter, key, step, purpose)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def keep_bits_of_blocks(counter, key, step, threshold):
    """Eq. 2 for whole blocks: from counters ``[n]`` the keep bits of elements ``[4n]``, in order.

    The four words of a block stay with the thread that has its four elements: no data changes hands.
    ``threshold``: below 2**32, a uint32 scalar.
    """
    w0, w1, w2, w3 = block_words(counter, key, step, 0)
    even = tl.interleave(w0 < threshold, w2 < threshold)
    odd = tl.interleave(w1 < threshold, w3 < threshold)
    return tl.interleave(even, odd)


@triton.jit
def element_words(element, key, step, purpose):
    """The words (eq. 2) of any elements (int64 tensor): a Philox block for each of them."""
    w0, w1, w2, w3 = block_words(element >> 2, key, step, purpose)
    place = element & 3
    return tl.where(place < 2, tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3))


@triton.jit
def keep_bits(element, key, step, threshold, purpose):
    """Eq. 2 for any elements (int64 tensor)."""
    return element_words(element, key, step, purpose) < threshold


@triton.jit
def mapped_index(local, index_map):
    """Eq. 5: the images of local indexes (int64 tensor); ``index_map`` points at its nine numbers."""
    index = tl.load(index_map) + tl.zeros_like(local)
    rest = local
    for place in tl.static_range(3):
        size = tl.load(index_map + 7 - 2 * place)
        outer = rest // size
        index += (rest - outer * size) * tl.load(index_map + 8 - 2 * place)
        rest = outer
    return index + rest * tl.load(index_map + 2)
