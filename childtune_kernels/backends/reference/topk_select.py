"""Op topk_select: the passes of an exact selection over a list of tensors (SPEC.md, eq. 15 and 16)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .bitmask import pack_mask

_SIGN = 1 << 31
_KEY = _SIGN - 1
_INFINITE = 0x7F800000
_CHUNK = 1 << 20  # bounds the temporaries; a multiple of 32


def _keys(score: Tensor) -> Tensor:
    """Eq. 15: the 31 bits below the sign as int32, one dimension; -0 has the key of +0."""
    return score.view(-1).view(torch.int32) & _KEY


def _chunks(score: Tensor, size: int = _CHUNK) -> Iterator[Tensor]:
    flat = score.view(-1)
    return (flat[start : start + size] for start in range(0, flat.numel(), size))


def _count_refused(score: Tensor) -> Tensor:
    """How many scores are NaN, infinite or negative, -0 not among them."""
    bits = score.view(-1).view(torch.int32)
    return ((bits & _KEY >= _INFINITE) | ((bits < 0) & (bits & _KEY != 0))).sum()


def digit_histogram(
    scores: Sequence[Tensor], shift: int, bits: int, prefix: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Counts of one digit, and of refused scores (contract: ops.digit_histogram)."""
    device = scores[0].device
    counts = torch.zeros(1 << bits, dtype=torch.int64, device=device)
    refused = torch.zeros(len(scores), dtype=torch.int64, device=device)
    for at, score in enumerate(scores):
        for chunk in _chunks(score):
            keys = _keys(chunk)
            keys = keys[keys >> (shift + bits) == prefix]
            digits = (keys >> shift) & ((1 << bits) - 1)
            counts += torch.bincount(digits, minlength=1 << bits)
            if shift + bits == 31:
                refused[at] += _count_refused(chunk)
    return counts, refused


def bracket_histogram(
    scores: Sequence[Tensor], low: int | Tensor, high: int | Tensor, shift: int | Tensor, bins: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts of the keys in a bracket, above it, and refused (contract: ops.bracket_histogram)."""
    device = scores[0].device
    counts = torch.zeros(bins, dtype=torch.int64, device=device)
    above = torch.zeros((), dtype=torch.int64, device=device)
    refused = torch.zeros(len(scores), dtype=torch.int64, device=device)
    for at, score in enumerate(scores if low <= high else []):
        for chunk in _chunks(score):
            keys = _keys(chunk)
            inside = keys[(keys >= low) & (keys <= high)]
            counts += torch.bincount((inside - low) >> shift, minlength=bins)
            above += (keys > high).sum()
            refused[at] += _count_refused(chunk)
    return counts, above, refused


def select_words(
    scores: Sequence[Tensor], threshold: int | Tensor, largest: bool, unit: int
) -> tuple[list[Tensor], Tensor]:
    """Words beyond a key and counts of equals (contract: ops.select_words)."""
    words, ties = [], []
    for score in scores:
        parts = [score.new_empty(0, dtype=torch.int32)]
        for chunk in _chunks(score):
            keys = _keys(chunk)
            parts.append(pack_mask(keys > threshold if largest else keys < threshold))
        words.append(torch.cat(parts))
        ties += [(_keys(part) == threshold).sum() for part in _chunks(score, unit)]
    none = torch.zeros(0, dtype=torch.int64, device=scores[0].device)
    return words, torch.stack(ties) if ties else none


def take_ties_(
    scores: Sequence[Tensor],
    words: Sequence[Tensor],
    threshold: int | Tensor,
    quotas: Tensor,
    unit: int,
) -> None:
    """Set the bits of the first equals of each unit (contract: ops.take_ties_)."""
    remaining = iter(quotas.tolist())
    for score, target in zip(scores, words, strict=True):
        for start in range(0, score.numel(), unit):
            quota = next(remaining)
            if quota == 0:
                continue
            equal = _keys(score.view(-1)[start : start + unit]) == threshold
            first = pack_mask(equal & (equal.cumsum(0) <= quota))
            target[start // 32 : start // 32 + first.numel()] |= first


def run_scores(scores: Sequence[Tensor], granularity: int) -> tuple[list[Tensor], Tensor]:
    """Sums of runs, and counts of refused elements (contract: ops.run_scores)."""
    sums = [_run_sums(score.view(-1), granularity) for score in scores]
    return sums, torch.stack([_count_refused(score) for score in scores])


def _run_sums(score: Tensor, granularity: int) -> Tensor:
    """Eq. 16 for one tensor of one dimension."""
    blocks = torch.nn.functional.pad(score.abs(), (0, -score.numel() % 32)).view(-1, 32)
    for width in (16, 8, 4, 2, 1):
        blocks = blocks[:, :width] + blocks[:, width:]
    a_run = granularity // 32
    by_block = torch.nn.functional.pad(blocks.view(-1), (0, -blocks.numel() % a_run)).view(
        -1, a_run
    )
    total = by_block[:, 0].clone()
    for block in range(1, a_run):
        total += by_block[:, block]
    return total
