"""Op bitmask: bool tensors to mask words and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import registry


def pack_mask(mask: Tensor, backend: str | None = None) -> Tensor:
    """Mask words (int32, ``[ceil(numel / 32)]``) of a bool tensor, read row-major.

    Raises:
        ValueError: the mask is not bool.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask must be a bool tensor, not {mask.dtype}; compare first (x > 0)")
    words: Tensor = registry.choose("bitmask", mask.device, backend).module.pack_mask(mask)
    return words


def unpack_mask(words: Tensor, shape: Sequence[int], backend: str | None = None) -> Tensor:
    """The bool tensor of ``shape`` that mask words stand for.

    Raises:
        ValueError: words of another type or number, or with bits set past the end.
    """
    numel = torch.Size(shape).numel()
    check_words("mask", words, numel)
    module = registry.choose("bitmask", words.device, backend).module
    mask: Tensor = module.unpack_mask(words, numel)
    return mask.view(tuple(shape))


def count_mask(words: Tensor, backend: str | None = None) -> int:
    """The number of bits set in mask words."""
    count: int = registry.choose("bitmask", words.device, backend).module.count_mask(words)
    return count


def check_words(label: str, words: Tensor, numel: int) -> None:
    """Refuse mask words that are not those of ``numel`` elements.

    Raises:
        ValueError: not int32, not one dimension of ``ceil(numel / 32)`` words, or bits past the end.
    """
    count = (numel + 31) // 32
    if not isinstance(words, Tensor):
        raise ValueError(f"mask of {label}: words must be a tensor, not {type(words).__name__}")
    if words.dtype != torch.int32 or words.shape != (count,):
        raise ValueError(
            f"mask of {label}: words of {words.dtype} and shape {tuple(words.shape)} for {numel} "
            f"elements; expected int32 and ({count},)"
        )
    tail = numel % 32
    if tail and int(words[-1]) & 0xFFFFFFFF & (0xFFFFFFFF << tail):
        raise ValueError(f"mask of {label}: bits are set past its {numel} elements")
