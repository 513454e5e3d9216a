"""Op topk_select: the passes of an exact selection.

A key or a prefix may be a Python int, or an int64 tensor without dimensions on the scores' device: what one
pass finds goes into the next without the host reading it. Only ints are checked against their range.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import registry
from .bitmask import check_words

SCORE_UNIT = 1 << 16  # elements whose equal scores are counted together


Number = int | Tensor


def digit_histogram(
    scores: Sequence[Tensor], shift: int, bits: int, prefix: Number, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """One pass of a radix selection over all tensors (SPEC.md, eq. 15).

    Of the scores whose key, shifted right by ``shift + bits``, is ``prefix``, the number for each
    value of the ``bits`` key bits above the lowest ``shift``.

    Args:
        scores: contiguous fp32 tensors on one device; not changed.
        shift, bits: where the digit lies in the key's 31 bits.
        prefix: the key's bits above the digit.

    Returns:
        int64 ``[2**bits]`` counts, and int64 ``[len(scores)]``: how many scores of each tensor are NaN,
        infinite or negative. Those are looked for in the first pass only (``shift + bits == 31``), and counts
        have a meaning only where there are none.

    Raises:
        ValueError: scores that are no contiguous fp32 tensors of one device, or bits outside the key.
    """
    device = _check_scores(scores)
    prefix = _number("prefix", prefix, device)
    if not (
        shift >= 0 < bits
        and shift + bits <= 31
        and (isinstance(prefix, Tensor) or 0 <= prefix < 1 << (31 - shift - bits))
    ):
        raise ValueError(
            f"digit (shift={shift}, bits={bits}, prefix={prefix}) leaves a key's 31 bits"
        )
    module = registry.choose("topk_select", device, backend).module
    counts, refused = module.digit_histogram(scores, shift, bits, prefix)
    return counts, refused


def bracket_histogram(
    scores: Sequence[Tensor],
    low: Number,
    high: Number,
    shift: Number,
    backend: str | None = None,
    *,
    bins: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over all tensors that looks closely at the keys of a bracket alone (SPEC.md, eq. 15).

    Made for brackets with few of the scores between their ends. One whose first key is greater than its
    last is no pass at all: nothing is read or counted.

    Args:
        scores: contiguous fp32 tensors on one device; not changed.
        low, high: the bracket's first and last key.
        shift: a bin holds ``2**shift`` keys.
        bins: how many there are at least; must be said where the others are tensors.

    Returns:
        int64 ``[bins]`` (else ``[((high - low) >> shift) + 1]``): how many scores have each value of
        ``(key - low) >> shift``; int64 ``[]``: how many keys lie above the bracket; and int64
        ``[len(scores)]``: how many scores of each tensor are NaN, infinite or negative. The others have
        a meaning only where there are none of those.

    Raises:
        ValueError: scores that are no contiguous fp32 tensors of one device, a bracket outside the keys,
            or fewer bins than it has.
    """
    device = _check_scores(scores)
    for what, number in (("low", low), ("high", high), ("shift", shift)):
        _number(what, number, device)
    if isinstance(low, int) and isinstance(high, int) and isinstance(shift, int):
        if not (0 <= low <= high < 1 << 31 and 0 <= shift < 31):
            raise ValueError(
                f"bracket (low={low}, high={high}, shift={shift}) leaves a key's 31 bits"
            )
        needed = ((high - low) >> shift) + 1
        bins = needed if bins is None else bins
        if bins < needed:
            raise ValueError(f"bins={bins} for a bracket of {needed}")
    if bins is None or bins < 1:
        raise ValueError(f"bins={bins} must be said, and positive, where the bracket is unread")
    module = registry.choose("topk_select", device, backend).module
    counts, above, refused = module.bracket_histogram(scores, low, high, shift, bins)
    return counts, above, refused


def select_words(
    scores: Sequence[Tensor],
    threshold: Number,
    largest: bool,
    unit: int = SCORE_UNIT,
    backend: str | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Mask words of the scores beyond a key, and where those equal to it are (SPEC.md, eq. 15).

    Args:
        scores: contiguous fp32 tensors on one device, without NaN, infinity and negatives.
        threshold: a key, or -1, or 2**31 - 1; the child's keys lie above it (``largest``) or below.
        unit: equal scores are counted for every ``unit`` elements of a tensor, a multiple of 64.

    Returns:
        int32 mask words for each tensor, and int64 counts of the equal ones, one for each unit: tensor by
        tensor, ``ceil(numel / unit)`` of them each.

    Raises:
        ValueError: scores of another kind, a threshold or unit out of range.
    """
    device = _check_scores(scores)
    threshold = _number("threshold", threshold, device)
    if not (isinstance(threshold, Tensor) or -1 <= threshold < 1 << 31):
        raise ValueError(f"threshold={threshold} must be a key of 31 bits, or -1")
    _check_unit(unit)
    module = registry.choose("topk_select", device, backend).module
    words, ties = module.select_words(scores, threshold, largest, unit)
    return words, ties


def take_ties_(
    scores: Sequence[Tensor],
    words: Sequence[Tensor],
    threshold: Number,
    quotas: Tensor,
    unit: int = SCORE_UNIT,
    backend: str | None = None,
) -> None:
    """Set the bits of the first scores equal to a key, ``quotas`` many in each unit (SPEC.md, eq. 15).

    Args:
        scores, threshold, unit: as for ``select_words``.
        words: what ``select_words`` gave, whose tails are not read; changed in place.
        quotas: int64 ``[units]``, each at most the unit's count of equal scores.

    Raises:
        ValueError: scores of another kind, words or quotas that do not fit them.
    """
    device = _check_scores(scores)
    threshold = _number("threshold", threshold, device)
    _check_unit(unit)
    units = sum(-(-score.numel() // unit) for score in scores)
    if quotas.dtype != torch.int64 or quotas.shape != (units,) or len(words) != len(scores):
        raise ValueError(
            f"{len(words)} words and quotas of {quotas.dtype} {tuple(quotas.shape)} for {len(scores)} "
            f"tensors; expected as many words, and int64 ({units},)"
        )
    for at, (score, target) in enumerate(zip(scores, words, strict=True)):
        check_words(f"scores {at}", target, score.numel(), tail_is_zero=True)
    module = registry.choose("topk_select", device, backend).module
    module.take_ties_(scores, words, threshold, quotas, unit)


def run_scores(
    scores: Sequence[Tensor], granularity: int, backend: str | None = None
) -> tuple[list[Tensor], Tensor]:
    """The score of every run of ``granularity`` elements (SPEC.md, eq. 16).

    Args:
        scores: contiguous fp32 tensors on one device; not changed.
        granularity: elements in a run, a multiple of 32.

    Returns:
        fp32 ``[ceil(numel / granularity)]`` for each tensor, and int64 ``[len(scores)]``: how many
        elements of each tensor are NaN, infinite or negative.

    Raises:
        ValueError: scores of another kind, or another granularity.
    """
    device = _check_scores(scores)
    if granularity < 32 or granularity % 32:
        raise ValueError(f"granularity={granularity} must be a multiple of 32")
    module = registry.choose("topk_select", device, backend).module
    runs, refused = module.run_scores(scores, granularity)
    return runs, refused


def _number(what: str, number: Number, device: torch.device) -> Number:
    """A number, checked where it is a tensor."""
    if isinstance(number, Tensor) and (
        number.dtype != torch.int64 or number.dim() or number.device != device
    ):
        raise ValueError(
            f"{what}: a tensor of {number.dtype} {tuple(number.shape)} on {number.device}; expected "
            f"int64 () on {device}, or an int"
        )
    return number


def _check_unit(unit: int) -> None:
    if unit < 64 or unit % 64:
        raise ValueError(f"unit={unit} must be a multiple of 64")


def _check_scores(scores: Sequence[Tensor]) -> torch.device:
    """The device that all scores share, after a check of what they are."""
    for at, score in enumerate(scores):
        if score.dtype != torch.float32 or not score.is_contiguous():
            raise ValueError(
                f"scores {at}: {score.dtype}, strides {score.stride()}; make it contiguous fp32"
            )
        if score.device != scores[0].device:
            raise ValueError(
                f"scores {at}: on {score.device}, the first on {scores[0].device}; use one device"
            )
    if not scores:
        raise ValueError("no scores were given; select among one tensor at least")
    return scores[0].device
