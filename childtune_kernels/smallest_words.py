"""The elements of the smallest random words of given parameters (SPEC.md, section 7)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .plan_row import contiguous_map
from .progress import progress_of_amount

_RANDOM_CHILD = 4  # purpose, SPEC.md eq. 2
_INTERPOLATIONS = 8  # then halving, which ends whatever the words are


class Draw(NamedTuple):
    """The words of one parameter for the random child."""

    key: int
    numel: int

    def below(self, threshold: int) -> Tensor:
        """Mask words of the elements whose word lies below a threshold of 0 .. 2**32."""
        if threshold == 0:
            return torch.zeros(-(-self.numel // 32), dtype=torch.int32, device="cpu")
        index_map = contiguous_map(self.numel)
        return ops.keep_words(self.numel, index_map, self.key, 0, threshold, _RANDOM_CHILD)


def smallest_words(draws: Sequence[Draw], k: int) -> list[Tensor]:
    """The mask words of the k elements of smallest word, equal words by position."""
    with progress_of_amount("random child", None, " words") as advance:

        def count(threshold: int) -> int:
            found = 0
            for draw in draws:
                found += ops.count_mask(draw.below(threshold))
                advance(draw.numel)
            return found

        threshold, found = _search(count, k, sum(draw.numel for draw in draws))
        words = []
        missing = k - (count(threshold - 1) if found > k else k)
        for draw in draws:
            at_most = draw.below(threshold)
            if found > k:
                below = draw.below(threshold - 1)
                ties = ops.unpack_mask(at_most ^ below, (draw.numel,))
                ties[ties.nonzero()[missing:]] = False
                missing -= int(ties.sum())
                at_most = below | ops.pack_mask(ties)
            words.append(at_most)
    return words


def _search(count: Callable[[int], int], k: int, numel: int) -> tuple[int, int]:
    """A threshold below which k words lie, else the smallest with more, and its count.

    ``count`` grows by about one every 2**32 / numel thresholds, so that a few interpolations usually meet k.
    """
    low, low_count, high, high_count = 0, 0, ops.KEEP_ALL, numel
    for attempt in itertools.count():
        if high_count == k or high - low == 1:
            break
        guess = (low + high) // 2
        if attempt < _INTERPOLATIONS:
            if k - low_count < high_count - k:
                guess = low + (k - low_count) * ops.KEEP_ALL // numel
            else:
                guess = high - (high_count - k) * ops.KEEP_ALL // numel
        guess = min(max(guess, low + 1), high - 1)
        found = count(guess)
        if found < k:
            low, low_count = guess, found
        else:
            high, high_count = guess, found
    return high, high_count
