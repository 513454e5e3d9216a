"""Op bitmask: mask words, and the values of a child by them (SPEC.md, "Bit layout" and "Child layouts").

words[j] = sum over i < 32 of mask[32 j + i] << i, int32 ``[ceil(numel / 32)]``; the r-th child element of
a tensor is the one of rank r, the number of bits set before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan_row import INDICES_UNIT, WORDS_UNIT
from . import launch
from .keep_words import packed_words

_COUNT_UNIT = 1 << 16  # elements that are counted together
_COUNTED_WORDS = 1 << 11  # that one program counts, if a unit is not larger


@triton.jit
def popcount(words):
    """Bits set in each int32 word, as int32: sums of ever wider fields."""
    bits = words.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def bits_of(words):
    """The bits of int32 words ``[n]`` as int32 0 or 1 ``[n, 32]``."""
    return (words[:, None] >> tl.arange(0, 32)[None, :]) & 1


@triton.jit
def ranks_within(words):
    """Bits set before each bit of int32 words ``[n]``, over all of them: int32 ``[n, 32]``."""
    counts = popcount(words)
    before = tl.cumsum(counts, 0) - counts
    below = (1 << tl.arange(0, 32)) - 1
    return before[:, None] + popcount(words[:, None] & below[None, :])


@triton.jit
def _pack_mask_kernel(mask, words, numbers, TILE: tl.constexpr):
    WORDS: tl.constexpr = TILE // 32
    numel = tl.load(numbers)
    aligned = tl.load(numbers + 1) != 0
    start = tl.program_id(0).to(tl.int64) * TILE
    word = tl.arange(0, WORDS)
    place = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    # A bool seen through another type may hold any byte.
    if aligned & (start + TILE <= numel):
        whole = tl.load(tl.multiple_of(mask + start, 16) + place)
        tl.store(words + start // 32 + word, packed_words(whole != 0))
    else:
        byte = tl.load(mask + start + place, start + place < numel, 0)
        tl.store(words + start // 32 + word, packed_words(byte != 0), start + word * 32 < numel)


@triton.jit
def _unpack_mask_kernel(words, mask, numbers, TILE: tl.constexpr):
    WORDS: tl.constexpr = TILE // 32
    numel = tl.load(numbers)
    start = tl.program_id(0).to(tl.int64) * TILE
    word = tl.arange(0, WORDS)
    place = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    bits = bits_of(tl.load(words + start // 32 + word, start + word * 32 < numel, 0)).to(tl.uint8)
    if start + TILE <= numel:
        tl.store(tl.multiple_of(mask + start, 16) + place, bits)
    else:
        tl.store(mask + start + place, bits, start + place < numel)


@triton.jit
def _unit_counts_kernel(words, counts, numbers, UNIT: tl.constexpr, TILE: tl.constexpr):
    # UNIT and TILE count words; a program has whole units.
    UNITS: tl.constexpr = TILE // UNIT
    word_count = tl.load(numbers)
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    word = unit[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    count = tl.sum(popcount(tl.load(words + word, word < word_count, 0)), 1)
    tl.store(counts + unit, count.to(tl.int64), unit * UNIT < word_count)


@triton.jit
def _move_masked_kernel(
    words, ranks, whole, child, numbers, SOURCE: tl.constexpr, TILE: tl.constexpr
):
    # SOURCE: "whole" takes the child's values out, "child" puts them in, "places" writes indexes.
    WORDS: tl.constexpr = TILE // 32
    numel = tl.load(numbers)
    unit = tl.program_id(0).to(tl.int64)
    first = tl.load(ranks + unit)
    if tl.load(ranks + unit + 1) > first:
        word = unit * WORDS + tl.arange(0, WORDS)
        found = tl.load(words + word, word * 32 < numel, 0)
        local = word[:, None] * 32 + tl.arange(0, 32)[None, :]
        place = first + ranks_within(found)
        chosen = bits_of(found) != 0
        if SOURCE == "whole":
            tl.store(child + place, tl.load(whole + local, chosen), chosen)
        elif SOURCE == "child":
            tl.store(whole + local, tl.load(child + place, chosen), chosen)
        else:
            tl.store(child + place, local.to(child.dtype.element_ty), chosen)


def pack_mask(mask: Tensor) -> Tensor:
    """Mask words of a bool tensor (contract: ops.pack_mask)."""
    mask = mask.contiguous()
    words = torch.empty((mask.numel() + 31) // 32, dtype=torch.int32, device=mask.device)
    numbers = (mask.numel(), mask.data_ptr() % 16 == 0)
    _launch(_pack_mask_kernel, mask.numel(), (mask.view(torch.uint8), words), numbers)
    return words


def unpack_mask(words: Tensor, numel: int) -> Tensor:
    """A bool tensor of mask words (contract: ops.unpack_mask)."""
    mask = torch.empty(numel, dtype=torch.bool, device=words.device)
    _launch(_unpack_mask_kernel, numel, (words.contiguous(), mask.view(torch.uint8)), (numel,))
    return mask


def count_mask(words: Tensor) -> int:
    """The number of set bits (contract: ops.count_mask)."""
    return int(_unit_counts(words, _COUNT_UNIT).sum())


def mask_ranks(words: Tensor, unit: int) -> Tensor:
    """Set bits before every unit, and in all (contract: ops.mask_ranks)."""
    counts = _unit_counts(words, unit)
    ranks = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=words.device)
    torch.cumsum(counts, 0, out=ranks[1:])
    return ranks


def mask_indices(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Where bits are set (contract: ops.mask_indices)."""
    ranks = mask_ranks(words, _config(words).tile)
    indices = torch.empty(int(ranks[-1]), dtype=dtype, device=words.device)
    _move(words, ranks, 32 * words.numel(), words, indices, "places")
    return indices


def gather_masked(values: Tensor, words: Tensor, count: int | None = None) -> Tensor:
    """The values where bits are set (contract: ops.gather_masked)."""
    ranks = mask_ranks(words, _config(words).tile)
    count = int(ranks[-1]) if count is None else count
    child = torch.empty(count, dtype=values.dtype, device=values.device)
    _move(words, ranks, values.numel(), _bits(values.contiguous()), _bits(child), "whole")
    return child


def scatter_masked_(values: Tensor, child: Tensor, words: Tensor) -> None:
    """Put values where bits are set (contract: ops.scatter_masked_)."""
    ranks = mask_ranks(words, _config(words).tile)
    _move(words, ranks, values.numel(), _bits(values), _bits(child.contiguous()), "child")


_BY_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(values: Tensor) -> Tensor:
    """Values as integers of their size: what is only moved keeps every bit, and needs a kernel a size."""
    return values.view(_BY_SIZE[values.element_size()])


def _config(tensor: Tensor) -> launch.Config:
    return launch.config("bitmask", launch.generation(tensor.device))


def _unit_counts(words: Tensor, unit: int) -> Tensor:
    """Set bits in every unit of so many elements, int64."""
    words = words.contiguous()
    counts = torch.empty(-(-32 * words.numel() // unit), dtype=torch.int64, device=words.device)
    constants = _counting(unit)
    launch.launch(
        _unit_counts_kernel,
        -(-words.numel() // constants["TILE"]),
        words.device,
        (words, counts, launch.table((words.numel(),), words.device)),
        constants,
        _config(words).num_warps,
    )
    return counts


def _counting(unit: int) -> dict[str, int]:
    return {"UNIT": unit // 32, "TILE": max(unit // 32, _COUNTED_WORDS)}


def _warps(config: launch.Config, size: int) -> int:
    """Warps that move elements of so many bytes: wide ones want the registers of more threads."""
    return config.num_warps * 2 if size == 8 else config.num_warps


def _move(
    words: Tensor, ranks: Tensor, numel: int, whole: Tensor, child: Tensor, source: str
) -> None:
    """Values between their places in a tensor and in the child."""
    config = _config(words)
    launch.launch(
        _move_masked_kernel,
        ranks.numel() - 1,
        words.device,
        (words.contiguous(), ranks, whole, child, launch.table((numel,), words.device)),
        {"SOURCE": source, "TILE": config.tile},
        _warps(config, child.element_size()),
    )


def _launch(kernel: Any, numel: int, tensors: tuple[Tensor, ...], numbers: tuple[int, ...]) -> None:
    """A kernel over the tiles of one tensor."""
    device, config = tensors[0].device, _config(tensors[0])
    launch.launch(
        kernel,
        -(-numel // config.tile),
        device,
        (*tensors, launch.table(numbers, device)),
        {"TILE": config.tile},
        config.num_warps,
    )


def variants(generation: str) -> Iterator[launch.Variant]:
    """What is compiled ahead of time."""
    config = launch.config("bitmask", generation)
    tile = config.tile
    yield _variant("pack", _pack_mask_kernel, "u8 i32 i64", {"TILE": tile}, config)
    yield _variant("unpack", _unpack_mask_kernel, "i32 u8 i64", {"TILE": tile}, config)
    for unit in {WORDS_UNIT, INDICES_UNIT, _COUNT_UNIT, tile}:
        name = f"count {unit}"
        yield _variant(name, _unit_counts_kernel, "i32 i64 i64", _counting(unit), config)
    moves = [(name, size, size) for name in ("whole", "child") for size in (1, 2, 4, 8)]
    for source, size, size_of_whole in [*moves, ("places", 2, 4), ("places", 8, 4)]:
        types = f"i32 i64 i{8 * size_of_whole} i{8 * size} i64"
        constants = {"SOURCE": source, "TILE": config.tile}
        wide = config._replace(num_warps=_warps(config, size))
        name = f"move {source} {8 * size}"
        yield _variant(name, _move_masked_kernel, types, constants, wide)


def _variant(
    name: str, kernel: Any, types: str, constants: dict[str, Any], config: launch.Config
) -> launch.Variant:
    pointers = [f"*{each}" for each in types.split()]
    arguments = [each for each in kernel.arg_names if each not in constants]
    return launch.Variant(
        f"bitmask {name}",
        kernel,
        dict(zip(arguments, pointers, strict=True)) | dict.fromkeys(constants, "constexpr"),
        constants,
        config.num_warps,
        elementwise=False,
        tile=constants["TILE"],
    )
