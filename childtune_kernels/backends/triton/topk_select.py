"""Op topk_select: the passes of an exact selection over a list of tensors (SPEC.md, eq. 15 and 16).

key = bits(x) mod 2**31 of an fp32 score x. A program reads a stretch of one tensor, which all its threads
count together in shared memory: scores crowd in few bins, many of them are exact zeros, and a counter that
all programs shared would be waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .bitmask import bits_of, ranks_within
from .keep_words import packed_words

_KEY = tl.constexpr(0x7FFFFFFF)
_INFINITE = tl.constexpr(0x7F800000)
# Columns of a tensor's row: address of scores, elements, whether wide accesses fit, address of the results.
_WIDTH = tl.constexpr(4)

_STRETCH = 8  # tiles of scores that a program counts
_DIGITS = ((20, 11), (10, 10), (0, 10))  # the usual (shift, bits), which are compiled ahead of time
_COPIES = 2  # of the bins of a bracket, so that half of all programs meet in one
_UNIT = 1 << 16  # the usual unit of ties


@triton.jit
def refused_bits(bits):
    """Whether scores, as int32 bits, are NaN, infinite or negative; -0 is not."""
    key = bits & _KEY
    return (key >= _INFINITE) | ((bits < 0) & (key != 0))


@triton.jit
def load_stretch(chunks, rows, STRETCH: tl.constexpr):
    """A program's row and part: its tensor, scores, how many of them, and whether a wide access fits."""
    program = tl.program_id(0)
    tensor = tl.load(chunks + 2 * program)
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * STRETCH
    row = rows + tensor.to(tl.int64) * _WIDTH
    scores = tl.load(row).to(tl.pointer_type(tl.int32)) + start
    left = tl.minimum(tl.load(row + 1) - start, STRETCH).to(tl.int32)
    return tensor, start, row, scores, left, (tl.load(row + 2) != 0) & (left == STRETCH)


@triton.jit
def _digit_histogram_kernel(
    chunks, rows, prefix, counts, refused,
    SHIFT: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    BINS: tl.constexpr = 1 << BITS
    FIRST: tl.constexpr = SHIFT + BITS == 31
    tensor, _, _, scores, left, full = load_stretch(chunks, rows, STRETCH)
    above = tl.load(prefix).to(tl.int32)
    bin_counts = tl.zeros([BINS], tl.int32)
    bad = tl.zeros([], tl.int32)
    for at in range(0, left, TILE):
        lane = at + tl.arange(0, TILE)
        inside = lane < left
        if full:
            bits = tl.load(tl.multiple_of(scores + at, 16) + tl.arange(0, TILE))
        else:
            bits = tl.load(scores + lane, inside, 0)
        digit = ((bits & _KEY) >> SHIFT) & (BINS - 1)
        if FIRST:
            bad += tl.sum(refused_bits(bits).to(tl.int32), 0)
            bin_counts += tl.histogram(digit, BINS, inside)
        else:
            bin_counts += tl.histogram(
                digit, BINS, inside & ((bits & _KEY) >> (SHIFT + BITS) == above)
            )
    tl.atomic_add(
        counts + tl.arange(0, BINS), bin_counts.to(tl.int64), bin_counts > 0, sem="relaxed"
    )
    if bad > 0:
        tl.atomic_add(refused + tensor, bad.to(tl.int64), sem="relaxed")


@triton.jit
def _bracket_histogram_kernel(
    chunks, rows, lowest, highest, shifts, counts, bins, above, refused,
    COPIES: tl.constexpr, TILE: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    low, high = tl.load(lowest).to(tl.int32), tl.load(highest).to(tl.int32)
    if low <= high:
        tensor, _, _, scores, left, _ = load_stretch(chunks, rows, STRETCH)
        shift = tl.load(shifts).to(tl.int32)
        counts += tl.program_id(0) % COPIES * tl.load(bins)
        beyond = tl.zeros([TILE], tl.int32)
        at_low = tl.zeros([TILE], tl.int32)
        at_high = tl.zeros([TILE], tl.int32)
        bad = tl.zeros([TILE], tl.int32)
        for at in range(0, left, TILE):
            lane = at + tl.arange(0, TILE)
            own = lane < left
            # No wider access: scores would change hands on their way to the atomics.
            bits = tl.load(scores + lane, own, 0)
            key = bits & _KEY
            bad += refused_bits(bits).to(tl.int32)
            beyond += ((key > high) & own).to(tl.int32)
            at_low += ((key == low) & own).to(tl.int32)
            at_high += ((key == high) & own).to(tl.int32)
            inside = (key > low) & (key < high) & own
            place = counts + ((key - low) >> shift)
            tl.atomic_add(place, tl.full([TILE], 1, tl.int64), inside, sem="relaxed")
        # Crowds of equal scores stand at an end of the bracket; between its ends a sample had few.
        tl.atomic_add(counts, tl.sum(at_low, 0).to(tl.int64), sem="relaxed")
        if high > low:
            last = counts + ((high - low) >> shift)
            tl.atomic_add(last, tl.sum(at_high, 0).to(tl.int64), sem="relaxed")
        tl.atomic_add(above, tl.sum(beyond, 0).to(tl.int64), sem="relaxed")
        count = tl.sum(bad, 0)
        if count > 0:
            tl.atomic_add(refused + tensor, count.to(tl.int64), sem="relaxed")


@triton.jit
def _select_words_kernel(
    chunks, rows, threshold, ties,
    LARGEST: tl.constexpr, TILE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    WORDS: tl.constexpr = TILE // 32
    _, start, row, scores, left, full = load_stretch(chunks, rows, UNIT)
    words = tl.load(row + 3).to(tl.pointer_type(tl.int32)) + start // 32
    key_of_threshold = tl.load(threshold).to(tl.int32)
    word = tl.arange(0, WORDS)
    place = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    equal = tl.zeros([WORDS, 32], tl.int32)
    for at in range(0, left, TILE):
        inside = at + place < left
        if full:
            bits = tl.load(tl.multiple_of(scores + at, 16) + place)
        else:
            bits = tl.load(scores + at + place, inside, 0)
        key = bits & _KEY
        beyond = key > key_of_threshold if LARGEST else key < key_of_threshold
        tl.store(words + at // 32 + word, packed_words(beyond & inside), at + word * 32 < left)
        equal += ((key == key_of_threshold) & inside).to(tl.int32)
    tl.store(ties + tl.program_id(0), tl.sum(tl.sum(equal, 1), 0).to(tl.int64))


@triton.jit
def _take_ties_kernel(chunks, rows, threshold, quotas, TILE: tl.constexpr, UNIT: tl.constexpr):
    WORDS: tl.constexpr = TILE // 32
    quota = tl.load(quotas + tl.program_id(0))
    if quota > 0:
        _, start, row, scores, left, _ = load_stretch(chunks, rows, UNIT)
        words = tl.load(row + 3).to(tl.pointer_type(tl.int32)) + start // 32
        key_of_threshold = tl.load(threshold).to(tl.int32)
        word = tl.arange(0, WORDS)
        place = word[:, None] * 32 + tl.arange(0, 32)[None, :]
        taken = quota.to(tl.int32) * 0
        for at in range(0, left, TILE):
            if taken < quota:
                inside = at + place < left
                key = tl.load(scores + at + place, inside, 0) & _KEY
                equal = packed_words((key == key_of_threshold) & inside)
                rank = taken + ranks_within(equal)
                first = packed_words((bits_of(equal) != 0) & (rank < quota))
                own = at + word * 32 < left
                before = tl.load(words + at // 32 + word, own, 0)
                tl.store(words + at // 32 + word, before | first, own)
                taken += tl.sum(tl.sum(bits_of(equal), 1), 0)


@triton.jit
def block_sums(values, RUNS: tl.constexpr):
    """Eq. 16: the tree over the 32 columns of fp32 ``[RUNS, 32]``, as ``[RUNS]``."""
    sums = values
    for level in tl.static_range(5):
        halves = tl.reshape(sums, [RUNS, 2, 16 >> level])
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        sums = left + right
    return tl.reshape(sums, [RUNS])


@triton.jit
def _run_scores_kernel(chunks, rows, refused, numbers, RUNS: tl.constexpr):
    program = tl.program_id(0)
    tensor = tl.load(chunks + 2 * program)
    row = rows + tensor.to(tl.int64) * _WIDTH
    scores = tl.load(row).to(tl.pointer_type(tl.int32))
    numel = tl.load(row + 1)
    granularity = tl.load(numbers)
    sums = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    first = tl.load(chunks + 2 * program + 1).to(tl.int64) * RUNS
    run = first + tl.arange(0, RUNS)
    end = tl.minimum((run + 1) * granularity, numel)
    full = (tl.load(row + 2) != 0) & ((first + RUNS) * granularity <= numel)
    total = tl.zeros([RUNS], tl.float32)
    bad = tl.zeros([RUNS, 32], tl.int32)
    for block in range(0, tl.minimum(granularity, numel - first * granularity), 32):
        start = tl.multiple_of(run * granularity + block, 32)
        if full:
            bits = tl.load(tl.multiple_of(scores, 16) + start[:, None] + tl.arange(0, 32)[None, :])
        else:
            place = start[:, None] + tl.arange(0, 32)[None, :]
            bits = tl.load(scores + place, place < end[:, None], 0)
        bad += refused_bits(bits).to(tl.int32)
        total += block_sums((bits & _KEY).to(tl.float32, bitcast=True), RUNS)
    tl.store(sums + run, total, run * granularity < numel)
    count = tl.sum(tl.sum(bad, 1), 0)
    if count > 0:
        tl.atomic_add(refused + tensor, count.to(tl.int64), sem="relaxed")


def digit_histogram(
    scores: Sequence[Tensor], shift: int, bits: int, prefix: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Counts of one digit, and of refused scores (contract: ops.digit_histogram)."""
    device = scores[0].device
    counts = torch.zeros(1 << bits, dtype=torch.int64, device=device)
    refused = torch.zeros(len(scores), dtype=torch.int64, device=device)
    config = _config(device)
    constants = {"SHIFT": shift, "BITS": bits, **_stretches(config)}
    tables = _tables(scores, scores, constants["STRETCH"])
    arguments = (*tables, _number(prefix, device), counts, refused)
    _launch(_digit_histogram_kernel, arguments, constants, config)
    return counts, refused


def bracket_histogram(
    scores: Sequence[Tensor], low: int | Tensor, high: int | Tensor, shift: int | Tensor, bins: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts of the keys in a bracket, above it, and refused (contract: ops.bracket_histogram)."""
    device = scores[0].device
    counts = torch.zeros((_COPIES, bins), dtype=torch.int64, device=device)
    above = torch.zeros((), dtype=torch.int64, device=device)
    refused = torch.zeros(len(scores), dtype=torch.int64, device=device)
    config = _config(device)
    constants = _bracket_constants(config)
    numbers = [_number(each, device) for each in (low, high, shift)]
    tables = _tables(scores, scores, constants["STRETCH"])
    arguments = (*tables, *numbers, counts, _number(bins, device), above, refused)
    _launch(_bracket_histogram_kernel, arguments, constants, config)
    return counts.sum(0), above, refused


def select_words(
    scores: Sequence[Tensor], threshold: int | Tensor, largest: bool, unit: int
) -> tuple[list[Tensor], Tensor]:
    """Words beyond a key and counts of equals (contract: ops.select_words)."""
    device = scores[0].device
    words = [_empty(score, 32, torch.int32) for score in scores]
    chunks, rows = _tables(scores, words, unit)
    ties = torch.empty(chunks.shape[0], dtype=torch.int64, device=device)
    config = _config(device)
    constants = {"LARGEST": largest, **_words_and_unit(config, unit)}
    arguments = (chunks, rows, _number(threshold, device), ties)
    _launch(_select_words_kernel, arguments, constants, config)
    return words, ties


def take_ties_(
    scores: Sequence[Tensor],
    words: Sequence[Tensor],
    threshold: int | Tensor,
    quotas: Tensor,
    unit: int,
) -> None:
    """Set the bits of the first equals of each unit (contract: ops.take_ties_)."""
    device = scores[0].device
    config = _config(device)
    arguments = (
        *_tables(scores, words, unit), _number(threshold, device), quotas.contiguous()
    )  # fmt: skip
    _launch(_take_ties_kernel, arguments, _words_and_unit(config, unit), config)


def run_scores(scores: Sequence[Tensor], granularity: int) -> tuple[list[Tensor], Tensor]:
    """Sums of runs, and counts of refused elements (contract: ops.run_scores)."""
    device = scores[0].device
    sums = [_empty(score, granularity, torch.float32) for score in scores]
    refused = torch.zeros(len(scores), dtype=torch.int64, device=device)
    config = _config(device)
    constants = {"RUNS": _runs_a_program(config, granularity)}
    chunks = launch.chunks([each.numel() for each in sums], constants["RUNS"], device)
    numbers = launch.table((granularity,), device)
    arguments = (chunks, _rows(scores, sums), refused, numbers)
    _launch(_run_scores_kernel, arguments, constants, config)
    return sums, refused


def _config(device: torch.device) -> launch.Config:
    return launch.config("topk_select", launch.generation(device))


def _stretches(config: launch.Config) -> dict[str, int]:
    return {"TILE": config.tile, "STRETCH": _STRETCH * config.tile}


# Words and brackets want more registers an element than digits do.
def _bracket_constants(config: launch.Config) -> dict[str, int]:
    return {"COPIES": _COPIES, **_stretches(config._replace(tile=config.tile // 2))}


def _words_and_unit(config: launch.Config, unit: int) -> dict[str, int]:
    return {"TILE": min(config.tile // 2, unit & -unit), "UNIT": unit}  # a unit has whole tiles


def _runs_a_program(config: launch.Config, granularity: int) -> int:
    """A power of two: as many runs as a program counts elements in, within bounds for its threads."""
    most = config.tile // 128
    wanted = 1 << max(1, _STRETCH * config.tile // granularity).bit_length() - 1
    return min(most, max(most // 4, wanted))


def _empty(score: Tensor, each: int, dtype: torch.dtype) -> Tensor:
    """Room for one value of every ``each`` elements."""
    return torch.empty(-(-score.numel() // each), dtype=dtype, device=score.device)


def _number(number: int | Tensor, device: torch.device) -> Tensor:
    """A number that may already be on the device, where it is not read."""
    return number if isinstance(number, Tensor) else launch.table((number,), device)


def _tables(
    scores: Sequence[Tensor], results: Sequence[Tensor], stretch: int
) -> tuple[Tensor, Tensor]:
    """The chunk map of stretches of tensors, and their rows."""
    chunks = launch.chunks([score.numel() for score in scores], stretch, scores[0].device)
    return chunks, _rows(scores, results)


def _rows(scores: Sequence[Tensor], results: Sequence[Tensor]) -> Tensor:
    rows: list[int] = []
    for score, result in zip(scores, results, strict=True):
        address = score.data_ptr()
        rows += [address, score.numel(), address % 16 == 0, result.data_ptr()]
    return launch.table(rows, scores[0].device)


def _launch(
    kernel: Any, arguments: tuple[Tensor, ...], constants: dict[str, Any], config: launch.Config
) -> None:
    chunks = arguments[0]
    launch.launch(
        kernel,
        chunks.shape[0],
        chunks.device,
        arguments,
        constants,
        config.num_warps,
        launch.HALF_OCCUPANCY,
    )


def variants(generation: str) -> Iterator[launch.Variant]:
    """What is compiled ahead of time."""
    config = launch.config("topk_select", generation)
    tile = config.tile

    def variant(name: str, kernel: Any, constants: dict[str, Any]) -> launch.Variant:
        types = dict.fromkeys(kernel.arg_names, "*i64") | {"chunks": "*i32"}
        return launch.Variant(
            f"topk_select {name}",
            kernel,
            types | dict.fromkeys(constants, "constexpr"),
            constants,
            config.num_warps,
            elementwise=False,
            tile=tile,
            registers=launch.HALF_OCCUPANCY,
        )

    for shift, bits in _DIGITS:
        constants = {"SHIFT": shift, "BITS": bits, **_stretches(config)}
        yield variant(f"digit_histogram {shift}", _digit_histogram_kernel, constants)
    yield variant("bracket_histogram", _bracket_histogram_kernel, _bracket_constants(config))
    for largest in (True, False):
        name = f"select_words {'largest' if largest else 'smallest'}"
        constants = {"LARGEST": largest, **_words_and_unit(config, _UNIT)}
        yield variant(name, _select_words_kernel, constants)
    yield variant("take_ties", _take_ties_kernel, _words_and_unit(config, _UNIT))
    for granularity in (32, 1 << 10, 1 << 20):
        runs = _runs_a_program(config, granularity)
        yield variant(f"run_scores {runs}", _run_scores_kernel, {"RUNS": runs})
