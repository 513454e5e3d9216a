"""Weights as bit patterns, a bounded part at a time: what is equal, what changed, a child's values.

NaN payloads and the sign of zero count; no temporary of a tensor's size is made, one bool tensor in
``changed_words`` apart. Elements are counted row-major, whatever the strides (SPEC.md, "Bit layout").
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Iterator

import torch
from torch import Tensor

from . import ops

PART = 1 << 22  # elements in one part at most
_PATTERNS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_pattern(tensor: Tensor) -> Tensor:
    """Integers with the bits of a tensor, in the same memory; a complex one gets a last dimension of 2."""
    plain = tensor.detach()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    return plain.view(_PATTERNS[plain.element_size()])


def parts(*tensors: Tensor, start: int = 0) -> Iterator[tuple[int, list[Tensor]]]:
    """Tensors of one shape in row-major order, in lockstep: the first element's index, and views."""
    shape = tensors[0]
    if all(tensor.is_contiguous() for tensor in tensors):
        flat = [tensor.view(-1) for tensor in tensors]
        for begin in range(0, shape.numel(), PART):
            yield start + begin, [tensor[begin : begin + PART] for tensor in flat]
    elif shape.numel() <= PART:
        yield start, list(tensors)
    else:
        row = shape[0].numel()
        rows = PART // row
        pieces = [tensor.split(rows) if rows else tensor.unbind(0) for tensor in tensors]
        for together in zip(*pieces, strict=True):
            yield from parts(*together, start=start)
            start += together[0].numel()


def child_bits(words: Tensor, start: int, count: int) -> Tensor:
    """The child bits of ``count`` elements from ``start`` on, as a bool tensor of one dimension."""
    first, last = start // 32, (start + count + 31) // 32
    bits = ops.unpack_mask(words[first:last], (32 * (last - first),))
    return bits[start - 32 * first :][:count]


def child_values(tensor: Tensor, words: Tensor) -> Tensor:
    """The elements of a tensor in the child, in element order, as a CPU tensor of one dimension."""
    words = words.cpu()
    found = [torch.empty(0, dtype=bit_pattern(tensor).dtype, device="cpu")]
    for start, (part,) in parts(bit_pattern(tensor)):
        bits = child_bits(words, start, part.numel()).to(part.device)
        found.append(part.reshape(-1)[bits].cpu())
    return torch.cat(found).view(tensor.dtype)


def set_child_values_(tensor: Tensor, words: Tensor, values: Tensor) -> None:
    """Write a child's values into a tensor, in place; all other elements keep their bits.

    Args:
        tensor: of any strides and device; its autograd version advances.
        words: its mask words.
        values: as ``child_values`` gives them.
    """
    words, new, taken = words.cpu(), bit_pattern(values), 0
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        for start, (part,) in parts(bit_pattern(tensor)):
            bits = child_bits(words, start, part.numel())
            count = int(bits.sum())
            flat = part.reshape(-1)
            flat[bits.to(part.device)] = new[taken : taken + count].to(part.device)
            if not part.is_contiguous():
                part.copy_(flat.view(part.shape))
            taken += count


def set_bits_(tensor: Tensor, values: Tensor) -> None:
    """Copy a tensor of the same shape and type, in place and to the bit; the autograd version advances."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        bit_pattern(tensor).copy_(bit_pattern(values))


def same_bits(first: Tensor, second: Tensor, words: Tensor | None = None) -> bool:
    """Whether two tensors of one shape and type agree in every bit outside the child of ``words``."""
    words = None if words is None else words.cpu()
    for start, (one, other) in parts(bit_pattern(first), bit_pattern(second)):
        differs = (one.cpu() != other.cpu()).reshape(-1)
        if words is not None:
            differs &= ~child_bits(words, start, differs.numel())
        if differs.any():
            return False
    return True


def changed_words(base: Tensor, tuned: Tensor) -> Tensor:
    """Mask words of the elements of two real tensors, of one shape and type, whose bits differ."""
    changed = torch.empty(base.numel(), dtype=torch.bool, device="cpu")
    for start, (one, other) in parts(bit_pattern(base), bit_pattern(tuned)):
        changed[start : start + one.numel()] = (one.cpu() != other.cpu()).reshape(-1)
    return ops.pack_mask(changed)


class BitDigest:
    """A SHA-256 over named tensors: name, type, shape and bits, row-major and little-endian."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._sha256 = hashlib.sha256()

    def add_line(self, *content: object) -> None:
        """Add a line of JSON."""
        self._sha256.update(json.dumps(content).encode() + b"\n")

    def add(self, name: str, tensor: Tensor, words: Tensor | None = None) -> None:
        """Add a tensor; where mask words are given, child elements count as zero bits."""
        self.add_line(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        words = None if words is None else words.cpu()
        for start, (part,) in parts(bit_pattern(tensor)):
            flat = part.reshape(-1)
            if words is not None:
                bits = child_bits(words, start, flat.numel())
                flat = flat.masked_fill(bits.to(flat.device), 0)
            flat = flat.cpu().contiguous()
            if flat.numel():
                size = flat.numel() * flat.element_size()
                self._sha256.update((ctypes.c_char * size).from_address(flat.data_ptr()))

    def hexdigest(self) -> str:
        """The digest so far, in hexadecimal digits."""
        return self._sha256.hexdigest()
