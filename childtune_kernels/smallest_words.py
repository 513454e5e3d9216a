"""The elements of the smallest random words of given parameters (SPEC.md, section 7)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .plan_row import IndexMap
from .progress import progress_of_amount
from .score_parts import ScoreParts

_RANDOM_CHILD = 4  # purpose, SPEC.md eq. 2
_INTERPOLATIONS = 8  # then halving, which ends whatever the words are


class Draw(NamedTuple):
    """The words of one parameter, or of this rank's part of it, for the random child."""

    key: int
    numel: int
    element_map: IndexMap

    def below(self, threshold: int) -> Tensor:
        """Mask words of the elements whose word lies below a threshold of 0 .. 2**32."""
        if threshold == 0:
            return torch.zeros(-(-self.numel // 32), dtype=torch.int32, device="cpu")
        return ops.keep_words(self.numel, self.element_map, self.key, 0, threshold, _RANDOM_CHILD)


def smallest_words(draws: Sequence[Draw], k: int, over: ScoreParts | None = None) -> list[Tensor]:
    """The mask words of the k elements of smallest word, equal words by position.

    With ``over`` they are the k of all ranks' parts: a collective.
    """
    with progress_of_amount("random child", None, " words") as advance:

        def count(threshold: int) -> int:
            found = []
            for draw in draws:
                found.append(ops.count_mask(draw.below(threshold)))
                advance(draw.numel)
            return sum(found if over is None else over.sum_of_tensors(found))

        numel = sum(draw.numel for draw in draws) if over is None else over.candidates
        threshold, found = _search(count, k, numel)
        if found == k:
            return [draw.below(threshold) for draw in draws]
        return _with_first_ties(draws, threshold, k - count(threshold - 1), over)


def _with_first_ties(
    draws: Sequence[Draw], threshold: int, missing: int, over: ScoreParts | None
) -> list[Tensor]:
    """The words below the threshold's last word, and the first ``missing`` of those equal to it."""
    below = [draw.below(threshold - 1) for draw in draws]
    ties = [draw.below(threshold) ^ words for draw, words in zip(draws, below, strict=True)]
    held = [ops.count_mask(words) for words in ties]
    if over is None:
        before = itertools.accumulate(held, initial=0)
        taken = [max(missing - reached, 0) for reached, _ in zip(before, held, strict=False)]
    else:
        taken = over.taken(held, ties.__getitem__, missing)
    words = []
    for draw, lower, equal, count in zip(draws, below, ties, taken, strict=True):
        mask = ops.unpack_mask(equal, (draw.numel,))
        mask[mask.nonzero()[count:]] = False
        words.append(lower | ops.pack_mask(mask))
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
