"""Philox4x32-10 and the indexes it is asked for (SPEC.md, eq. 1, 2 and 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
KEEP_ALL = 1 << 32


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of constant * x for 32-bit values, without leaving int64's range."""
    low_part = (constant & 0xFFFF) * x
    high_part = (constant >> 16) * x + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox_words(counter: Tensor, key: int, step: int, purpose: int) -> tuple[Tensor, ...]:
    """Eq. 1: the four output words (int64, 0 .. 2**32-1) at each 64-bit counter.

    ``counter``: int64 of any shape, its bits read as unsigned; ``key``: 64 bits, k0 in the low word.
    """
    x0, x1 = counter & _WORD, (counter >> 32) & _WORD
    x2 = torch.full_like(counter, step & _WORD)
    x3 = torch.full_like(counter, purpose)
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    for _ in range(10):
        high0, low0 = _multiply(_M0, x0)
        high1, low1 = _multiply(_M1, x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _WORD, (k1 + _W1) & _WORD
    return x0, x1, x2, x3


def element_words(elements: Tensor, key: int, step: int, purpose: int) -> Tensor:
    """The Philox word of each element index (eq. 2), int64 in the shape of ``elements``."""
    words = torch.stack(philox_words(elements >> 2, key, step, purpose))
    return words.gather(0, (elements & 3).unsqueeze(0)).squeeze(0)


def mapped_indexes(
    numel: int, base: int, levels: Sequence[tuple[int, int]], device: torch.device
) -> Tensor:
    """Eq. 5 for local indexes 0 .. numel-1, int64."""
    local = torch.arange(numel, dtype=torch.int64, device=device)
    index = torch.full_like(local, base)
    for level, (size, stride) in reversed(list(enumerate(levels))):
        digit = local if level == 0 else local % size
        index += digit * stride
        local = torch.div(local, size, rounding_mode="floor") if level else local
    return index


def keep_mask(elements: Tensor, key: int, step: int, threshold: int, purpose: int = 0) -> Tensor:
    """Eq. 2: the keep bit of each element index, as bool."""
    if threshold == KEEP_ALL:
        return torch.ones_like(elements, dtype=torch.bool)
    return element_words(elements, key, step, purpose) < threshold
