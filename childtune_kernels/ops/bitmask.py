"""Op bitmask: bool tensors to mask words and back, and the values of a child by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def unpack_mask(
    words: Tensor, shape: Sequence[int], backend: str | None = None, *, tail_is_zero: bool = False
) -> Tensor:
    """The bool tensor of ``shape`` that mask words stand for.

    Args:
        tail_is_zero: no bits are set past the end, and the host need not read the last word to know it.

    Raises:
        ValueError: words of another type or number, or with bits set past the end.
    """
    numel = torch.Size(shape).numel()
    check_words("mask", words, numel, tail_is_zero=tail_is_zero)
    module = registry.choose("bitmask", words.device, backend).module
    mask: Tensor = module.unpack_mask(words, numel)
    return mask.view(tuple(shape))


def count_mask(words: Tensor, backend: str | None = None) -> int:
    """The number of bits set in mask words."""
    count: int = registry.choose("bitmask", words.device, backend).module.count_mask(words)
    return count


def mask_ranks(words: Tensor, unit: int, backend: str | None = None) -> Tensor:
    """Bits set before every ``unit``-th element, and in all (SPEC.md, "Child layouts").

    Args:
        words: int32 mask words of one dimension.
        unit: a power of two from 32 on.

    Returns:
        int64 ``[ceil(32 * words / unit) + 1]``.

    Raises:
        ValueError: words of another kind, or another unit.
    """
    _check_kind(words)
    if unit < 32 or unit & (unit - 1):
        raise ValueError(f"unit={unit} must be a power of two from 32 on")
    ranks: Tensor = registry.choose("bitmask", words.device, backend).module.mask_ranks(words, unit)
    return ranks


def mask_indices(
    words: Tensor, dtype: torch.dtype = torch.int64, backend: str | None = None
) -> Tensor:
    """The index of every bit that is set, ascending, one dimension.

    Args:
        words: int32 mask words of one dimension.
        dtype: int64, or int16 for the lowest 16 bits of each index, unsigned.

    Raises:
        ValueError: words of another kind, or another dtype.
    """
    _check_kind(words)
    if dtype not in (torch.int64, torch.int16):
        raise ValueError(f"dtype={dtype} must be torch.int64 or torch.int16")
    module = registry.choose("bitmask", words.device, backend).module
    indices: Tensor = module.mask_indices(words, dtype)
    return indices


def gather_masked(
    values: Tensor, words: Tensor, backend: str | None = None, *, count: int | None = None
) -> Tensor:
    """The elements of a tensor whose bit is set, row-major, one dimension; every bit of them is kept.

    Args:
        values: any shape and strides, elements of up to 8 bytes; strides that are not row-major are copied.
        words: mask words of as many elements, on the same device.
        count: the bits that are set, none of them past the end, where the caller is sure of it: then no host
            waits for a device.

    Raises:
        ValueError: words that do not fit, or lie elsewhere.
    """
    _check_values(values, words, tail_is_zero=count is not None)
    module = registry.choose("bitmask", words.device, backend).module
    child: Tensor = module.gather_masked(values, words, count)
    return child


def scatter_masked_(
    values: Tensor,
    child: Tensor,
    words: Tensor,
    backend: str | None = None,
    *,
    count: int | None = None,
) -> None:
    """Put ``child`` where bits are set: the inverse of ``gather_masked``.

    Args:
        values: contiguous; changed in place, where bits are set alone.
        child: one dimension, of the type of ``values``, an element for each bit that is set.
        words: mask words of the elements of ``values``; all three on one device.
        count: as in ``gather_masked``.

    Raises:
        ValueError: words or values that do not fit or lie elsewhere; nothing was written.
    """
    _check_values(values, words, tail_is_zero=count is not None)
    if not values.is_contiguous():
        raise ValueError(f"values with strides {values.stride()} must be contiguous")
    count = count_mask(words, backend) if count is None else count
    if child.dtype != values.dtype or child.shape != (count,) or child.device != values.device:
        raise ValueError(
            f"child of {child.dtype} {tuple(child.shape)} on {child.device} for {count} elements of "
            f"{values.dtype} on {values.device}"
        )
    registry.choose("bitmask", words.device, backend).module.scatter_masked_(values, child, words)


def join_words(words: Sequence[Tensor], numels: Sequence[int]) -> Tensor:
    """The mask words of several tensors laid one after the other.

    Args:
        words: int32 mask words of each, without bits past the end, on one device.
        numels: elements of each; at least one tensor.

    Returns:
        int32 ``[ceil(sum(numels) / 32)]``; the host reads nothing.

    Raises:
        ValueError: words of another kind or number.
    """
    joined = words[0].new_zeros((sum(numels) + 31) // 32)
    at = 0
    for each, numel in zip(words, numels, strict=True):
        check_words("part", each, numel, tail_is_zero=True)
        (first, shift), at = divmod(at, 32), at + numel
        if shift == 0:
            joined[first : first + each.numel()] = each
            continue
        joined[first : first + each.numel()].bitwise_or_(each << shift)
        # What is shifted out of a word; >> fills up with the sign.
        carried = (each >> (32 - shift)) & ((1 << shift) - 1)
        following = joined[first + 1 : first + 1 + each.numel()]
        following.bitwise_or_(carried[: following.numel()])
    return joined


def _check_kind(words: Tensor) -> None:
    if words.dtype != torch.int32 or words.dim() != 1:
        raise ValueError(
            f"words of {words.dtype} and shape {tuple(words.shape)}; expected int32 [n]"
        )


def _check_values(values: Tensor, words: Tensor, *, tail_is_zero: bool = False) -> None:
    check_words("values", words, values.numel(), tail_is_zero=tail_is_zero)
    if words.device != values.device:
        raise ValueError(f"words on {words.device} for values on {values.device}; use one device")
    if values.element_size() > 8:
        raise ValueError(f"values of {values.dtype}: elements of more than 8 bytes are not served")


def check_words(label: str, words: Tensor, numel: int, *, tail_is_zero: bool = False) -> None:
    """Refuse mask words that are not those of ``numel`` elements.

    ``tail_is_zero``: no bits are set past the end, and the host need not read the last word to know it.

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
    if numel % 32 and not tail_is_zero:
        _check_tail(label, int(words[-1]), numel)


def check_tails(words: Mapping[str, Tensor], numels: Mapping[str, int]) -> None:
    """Refuse mask words (of the right number) with bits past the end; each device is read once.

    Raises:
        ValueError: names the first label whose words have bits past its ``numels`` elements.
    """
    by_device: dict[torch.device, list[str]] = {}
    for label, each in words.items():
        if numels[label] % 32:
            by_device.setdefault(each.device, []).append(label)
    for labels in by_device.values():
        last = torch.stack([words[label][-1] for label in labels]).tolist()
        for label, word in zip(labels, last, strict=True):
            _check_tail(label, word, numels[label])


def _check_tail(label: str, word: int, numel: int) -> None:
    if word & 0xFFFFFFFF & (0xFFFFFFFF << numel % 32):
        raise ValueError(f"mask of {label}: bits are set past its {numel} elements")
