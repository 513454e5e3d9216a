"""Op bitmask: bool tensors to mask words and back, and values by them (SPEC.md, "Bit layout")."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_WORDS = 1 << 15  # bounds the temporaries: 32 int64 a word


def _bit_weights(device: torch.device) -> Tensor:
    return torch.ones(32, dtype=torch.int64, device=device) << torch.arange(32, device=device)


def pack_mask(mask: Tensor) -> Tensor:
    """Mask words (int32, one dimension) of a bool tensor, read row-major; bits past the end are 0."""
    flat = mask.reshape(-1)
    words = torch.empty((flat.numel() + 31) // 32, dtype=torch.int32, device=mask.device)
    weights = _bit_weights(mask.device)
    for start in range(0, words.numel(), _CHUNK_WORDS):
        bits = flat[32 * start : 32 * (start + _CHUNK_WORDS)].to(torch.int64)
        bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 32)).view(-1, 32)
        unsigned = (bits * weights).sum(1)
        # Two's complement by hand: what a conversion does with 2**31 and more is not promised.
        words[start : start + _CHUNK_WORDS] = unsigned - ((unsigned >> 31) << 32)
    return words


def unpack_mask(words: Tensor, numel: int) -> Tensor:
    """The first ``numel`` bits of mask words as a bool tensor of one dimension."""
    mask = torch.empty(numel, dtype=torch.bool, device=words.device)
    positions = torch.arange(32, device=words.device)
    for start in range(0, words.numel(), _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS].to(torch.int64)
        bits = ((chunk.unsqueeze(1) >> positions) & 1).to(torch.bool).view(-1)
        end = min(numel, 32 * start + bits.numel())
        mask[32 * start : end] = bits[: end - 32 * start]
    return mask


def count_mask(words: Tensor) -> int:
    """The number of set bits."""
    chunks = words.split(_CHUNK_WORDS)
    return sum(int(unpack_mask(chunk, 32 * chunk.numel()).sum()) for chunk in chunks)


def mask_ranks(words: Tensor, unit: int) -> Tensor:
    """Set bits before every unit, and in all (contract: ops.mask_ranks)."""
    in_byte = torch.tensor(
        [bin(byte).count("1") for byte in range(256)], dtype=torch.uint8, device=words.device
    )
    counts = in_byte[words.contiguous().view(torch.uint8).to(torch.int32)]
    whole = torch.nn.functional.pad(counts, (0, -counts.numel() % (unit // 8))).view(-1, unit // 8)
    return torch.nn.functional.pad(whole.sum(1).cumsum(0), (1, 0))


def mask_indices(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Where bits are set (contract: ops.mask_indices)."""
    indices = unpack_mask(words, 32 * words.numel()).nonzero().view(-1)
    if dtype == torch.int16:
        indices = indices % (1 << 16)
        # Two's complement by hand, as above.
        indices -= (indices >> 15) << 16
    return indices.to(dtype)


def gather_masked(values: Tensor, words: Tensor, _: int | None = None) -> Tensor:
    """The values where bits are set (contract: ops.gather_masked)."""
    return values.reshape(-1)[unpack_mask(words, values.numel())]


def scatter_masked_(values: Tensor, child: Tensor, words: Tensor) -> None:
    """Put values where bits are set (contract: ops.scatter_masked_)."""
    values.view(-1)[unpack_mask(words, values.numel())] = child
