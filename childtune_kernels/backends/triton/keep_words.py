"""Op keep_words: the Bernoulli keep bits of one tensor as mask words (SPEC.md, eq. 1 to 5).

words[j] = sum over i < 32 of keep(element 32 j + i) << i, int32 ``[ceil(numel / 32)]``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan_row import IndexMap
from . import launch
from .philox import KEEP_ALL, keep_bits, mapped_index


@triton.jit
def packed_words(bits):
    """int32 words ``[n]`` of bits ``[n, 32]``."""
    return tl.sum(bits.to(tl.int32) << tl.arange(0, 32)[None, :], 1)


@triton.jit
def load_numbers(numbers):
    """The first four int64 of a table of numbers."""
    return (
        tl.load(numbers),
        tl.load(numbers + 1),
        tl.load(numbers + 2),
        tl.load(numbers + 3),
    )


@triton.jit
def _keep_words_kernel(words, steps, numbers, TILE: tl.constexpr):
    WORDS: tl.constexpr = TILE // 32
    numel, key, purpose, threshold = load_numbers(numbers)
    step = tl.load(steps)
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    local = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    element = mapped_index(local, numbers + 4)
    kept = keep_bits(element, key, step, threshold.to(tl.uint32), purpose.to(tl.uint32))
    kept = (kept | (threshold == KEEP_ALL)) & (local < numel)
    tl.store(words + word, packed_words(kept), word * 32 < numel)


def keep_words(
    numel: int,
    element_map: IndexMap,
    key: int,
    step: int | Tensor,
    purpose: int,
    threshold: int,
    device: torch.device,
) -> Tensor:
    """Keep bits as mask words (contract: ops.keep_words)."""
    tile, num_warps = launch.config("keep_words", launch.generation(device))
    words = torch.empty((numel + 31) // 32, dtype=torch.int32, device=device)
    numbers = [numel, key - (key >> 63 << 64), purpose, threshold, *element_map.columns()]
    if not isinstance(step, Tensor):
        numbers.append(step)
    table = launch.table(numbers, device)
    steps = step if isinstance(step, Tensor) else table[-1]
    programs = -(-numel // tile)
    launch.launch(
        _keep_words_kernel, programs, device, (words, steps, table), {"TILE": tile}, num_warps
    )
    return words


def variants(generation: str) -> Iterator[launch.Variant]:
    """What is compiled ahead of time."""
    tile, num_warps = launch.config("keep_words", generation)
    yield launch.Variant(
        "keep_words",
        _keep_words_kernel,
        {"words": "*i32", "steps": "*i64", "numbers": "*i64", "TILE": "constexpr"},
        {"TILE": tile},
        num_warps,
        elementwise=False,
        tile=tile,
    )
