"""Op gradient_norm: the sums of squared gradients of all rows of a plan (SPEC.md, eq. 19).

A program takes a few units of 4096 neighbouring elements of one tensor: fp64 column sums ``[units, 128]``, to
which it adds the units' 32 rows one after the other. Sums of units, float64 ``[sequences, units of all rows]``,
are summed again by the same order until each sequence has one. The second sequence, of all elements, is
there only with ``after_mask``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan_row import DTYPE_CODES, ROW_COLUMN
from . import launch
from . import plan_columns as plan
from .adamw_math import widened
from .child_adamw_dense import child_bits, misaligned
from .device_plan import DevicePlan
from .philox import KEEP_ALL, keep_bits, keep_bits_of_blocks, mapped_index

_UNIT = 4096
COLUMNS = tl.constexpr(128)
QUARTER = tl.constexpr(32)
ROWS = tl.constexpr(32)
UNIT = tl.constexpr(_UNIT)
# Loads of so many rows are under way at once; a thread has four elements of each.
_ROWS_AT_ONCE = tl.constexpr(4)

_TYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


@triton.jit
def folded(sums, UNITS: tl.constexpr, WIDTH: tl.constexpr):
    """Eq. 19's fold of column sums ``[UNITS, WIDTH]`` to ``[UNITS]``; every sum has two terms."""
    for step in tl.static_range(7):
        if WIDTH >> step > 1:
            sums = tl.sum(tl.reshape(sums, (UNITS, 2, WIDTH >> (step + 1))), 1)
    return tl.reshape(sums, (UNITS,))


@triton.jit
def squared(gradient):
    """x of eq. 19 for gradients of any type."""
    if gradient.dtype == tl.float64:
        return gradient * gradient
    else:
        wide = widened(gradient, tl.float32).to(tl.float64)
        return wide * wide


@triton.jit
def _child_bits_of_fours(words, four):
    """The bits of neighbours in fours; ``four``: index (int64 ``[n, 32]``) of each four among a tensor's."""
    bits = tl.load(words + four // 8) >> (four % 8 * 4).to(tl.int32)
    even = tl.interleave((bits & 1) != 0, (bits & 4) != 0)
    odd = tl.interleave((bits & 2) != 0, (bits & 8) != 0)
    return tl.interleave(even, odd)


@triton.jit
def _whole_sums(grad, start, UNITS: tl.constexpr):
    """Sums of whole units of neighbours from local index ``start`` on: 128-bit accesses, no lane masked.

    The promise of alignment must stand here: Triton drops it from what a function returns.
    """
    lane = tl.arange(0, UNITS)[:, None] * UNIT + tl.arange(0, COLUMNS)[None, :]
    size: tl.constexpr = grad.dtype.element_ty.primitive_bitwidth // 8
    first = tl.multiple_of(grad + start, 4 * size)
    columns = tl.zeros((UNITS, COLUMNS), tl.float64)
    for at in range(0, UNIT, _ROWS_AT_ONCE * COLUMNS):
        for row in tl.static_range(_ROWS_AT_ONCE):
            columns += squared(tl.load(first + at + row * COLUMNS + lane))
    return folded(columns, UNITS, COLUMNS)


@triton.jit
def _whole_masked_sums(grad, start, row, words, threshold, step, UNITS: tl.constexpr):
    """The same of the elements that count, and of all. To Philox too they are neighbours in whole fours."""
    unit = tl.arange(0, UNITS)[:, None] * UNIT
    lane = unit + tl.arange(0, COLUMNS)[None, :]
    four = start // 4 + (unit // 4 + tl.arange(0, COLUMNS // 4)[None, :])
    key = tl.load(row + plan.PHILOX_KEY)
    first_block = tl.load(row + plan.ELEMENT_MAP) // 4
    size: tl.constexpr = grad.dtype.element_ty.primitive_bitwidth // 8
    first = tl.multiple_of(grad + start, 4 * size)
    counting = tl.zeros((UNITS, COLUMNS), tl.float64)
    every = tl.zeros((UNITS, COLUMNS), tl.float64)
    for at in range(0, UNIT, COLUMNS):
        x = squared(tl.load(first + at + lane))
        every += x
        if words.to(tl.int64) != 0:
            x = tl.where(_child_bits_of_fours(words, four + at // 4), x, 0.0)
        if threshold != KEEP_ALL:
            blocks = first_block + (four + at // 4)
            x = tl.where(keep_bits_of_blocks(blocks, key, step, threshold.to(tl.uint32)), x, 0.0)
        counting += x
    return folded(counting, UNITS, COLUMNS), folded(every, UNITS, COLUMNS)


@triton.jit
def _any_sums(
    grad, start, left, row, words, threshold, step, MASKED: tl.constexpr, UNITS: tl.constexpr
):
    """Sums of the ``left`` elements from ``start`` on, wherever they lie, of those that count, and of all.

    A quarter of the columns at a time, one a thread: the fold's first two steps are done between quarters. What
    lies past the end need not be added: it is +0, and sums are never -0.
    """
    contiguous = tl.load(row + plan.STORAGE_CONTIGUOUS)
    lane = tl.arange(0, UNITS)[:, None] * UNIT + tl.arange(0, QUARTER)[None, :]
    end = tl.minimum(left, UNIT)
    counting = tl.zeros((UNITS, QUARTER), tl.float64)
    every = tl.zeros((UNITS, QUARTER), tl.float64)
    for first in range(0, 2 * QUARTER, QUARTER):
        two_counting = tl.zeros((UNITS, QUARTER), tl.float64)
        two_every = tl.zeros((UNITS, QUARTER), tl.float64)
        for quarter in range(first, COLUMNS, 2 * QUARTER):
            one_counting = tl.zeros((UNITS, QUARTER), tl.float64)
            one_every = tl.zeros((UNITS, QUARTER), tl.float64)
            for at in range(quarter, end, COLUMNS):
                exists = at + lane < left
                local = start + tl.where(exists, at + lane, 0)
                place = local
                if contiguous == 0:
                    place = mapped_index(local, row + plan.STORAGE_MAP)
                x = squared(tl.load(grad + place, exists, 0.0))
                one_every += x
                if MASKED:
                    counts = _counting(local, row, words, threshold, step)
                    one_counting += tl.where(counts, x, 0.0)
            two_every += one_every
            two_counting += one_counting
        every += two_every
        counting += two_counting
    return folded(counting, UNITS, QUARTER), folded(every, UNITS, QUARTER)


@triton.jit
def _counting(local, row, words, threshold, step):
    """Which elements the coming step does not drop, given by local index (int64)."""
    counts = local >= 0
    if words.to(tl.int64) != 0:
        counts &= child_bits(words, local)
    if threshold != KEEP_ALL:
        key = tl.load(row + plan.PHILOX_KEY)
        element = local + tl.load(row + plan.ELEMENT_MAP)
        if tl.load(row + plan.ELEMENT_CONTIGUOUS) == 0:
            element = mapped_index(local, row + plan.ELEMENT_MAP)
        counts &= keep_bits(element, key, step, threshold.to(tl.uint32), 0)
    return counts


@triton.jit
def _gradient_norm_kernel(
    rows, groups, chunks, first_units, all_words, sums, numbers,
    GRAD: tl.constexpr, MASKED: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Sums of a few units; the chunk names their row, and which of its units they are.

    ``numbers``: how many units all rows have. A row without a gradient has sums of +0.
    """
    chunk = chunks + 2 * tl.program_id(0).to(tl.int64)
    index = tl.load(chunk).to(tl.int64)
    first_unit = tl.load(chunk + 1).to(tl.int64) * UNITS
    start = first_unit * UNIT
    row = rows + index * plan.ROW
    # All loads of the row go out at once: those behind a branch would wait for it.
    active = tl.load(row + plan.ACTIVE)
    numel = tl.load(row + plan.NUMEL)
    grad = plan.address(row, plan.GRAD, GRAD)
    contiguous = tl.load(row + plan.STORAGE_CONTIGUOUS)
    place = tl.load(first_units + index) + first_unit
    left = tl.where(active != 0, tl.minimum(numel - start, UNITS * UNIT), 0).to(tl.int32)
    whole = (left == UNITS * UNIT) & (contiguous != 0) & (misaligned(grad) == 0)
    unit = tl.arange(0, UNITS)
    exists = start + unit * UNIT < numel
    if MASKED:
        group = groups + tl.load(row + plan.GROUP_INDEX) * plan.GROUP
        words = tl.load(all_words + index).to(tl.pointer_type(tl.int32))
        threshold = tl.load(group + plan.THRESHOLD).to(tl.int64)
        step = (tl.load(plan.address(row, plan.STEP, tl.int64)) + 1) & 0xFFFFFFFF
        r = 1.0 / tl.load(group + plan.RESERVE_P)
        whole &= tl.load(row + plan.ELEMENT_CONTIGUOUS) != 0
        whole &= (tl.load(row + plan.ELEMENT_MAP) & 3) == 0
        if whole:
            counting, every = _whole_masked_sums(grad, start, row, words, threshold, step, UNITS)
        else:
            counting, every = _any_sums(grad, start, left, row, words, threshold, step, True, UNITS)
        tl.store(sums + place + unit, counting * (r * r), exists)
        tl.store(sums + tl.load(numbers) + place + unit, every, exists)
    else:
        if whole:
            every = _whole_sums(grad, start, UNITS)
        else:
            _, every = _any_sums(grad, start, left, row, row, index, index, False, UNITS)
        tl.store(sums + place + unit, every, exists)


@triton.jit
def _gradient_norm_again_kernel(values, sums, numbers):
    """The sum of one unit of the sums of units, of one sequence.

    ``numbers``: how many values a sequence has, how far apart the sequences' are, how many sums it gets.
    """
    count, distance, units = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    program = tl.program_id(0).to(tl.int64)
    sequence = program // units
    start = (program - sequence * units) * UNIT
    lane = start + tl.arange(0, COLUMNS)[None, :]
    columns = tl.zeros((1, COLUMNS), tl.float64)
    for at in tl.static_range(ROWS):
        place = lane + at * COLUMNS
        columns += tl.load(values + sequence * distance + place, place < count, 0.0)
    tl.store(sums + program + tl.arange(0, 1), folded(columns, 1, COLUMNS))


class _Level(NamedTuple):
    """One launch that sums sums of units again."""

    programs: int
    numbers: Tensor
    sums: Tensor | None  # None: the result


class _Norm:
    """What stays on the device between the calls for one plan, as long as its launches stay the same."""

    def __init__(self, row_table: Tensor, device_plan: DevicePlan, after_mask: bool) -> None:
        device = device_plan.device
        self.launches_of_step, self.after_mask = device_plan.launches, after_mask
        sizes = row_table[:, ROW_COLUMN["numel"]].tolist()
        units = torch.tensor([-(-size // _UNIT) for size in sizes], dtype=torch.int64, device="cpu")
        count = int(units.sum())
        self.first_units = launch.upload(units.cumsum(0) - units, device)
        self.numbers = launch.table([count], device)
        sequences = 2 if after_mask else 1
        self.sums = torch.zeros(sequences * count, dtype=torch.float64, device=device)
        config = launch.config("gradient_norm", device_plan.generation)
        codes = row_table[:, ROW_COLUMN["grad_dtype"]].tolist()
        self.chunks: dict[torch.dtype, Tensor] = {}
        for code in sorted(set(codes)):
            of_type = [size if own == code else 0 for size, own in zip(sizes, codes, strict=True)]
            chunks = launch.chunk_map(of_type, config.tile)
            if chunks.shape[0]:
                self.chunks[_DTYPES[code]] = launch.upload(chunks, device)
        self.levels = list(_levels(count, sequences, device))


def _levels(count: int, sequences: int, device: torch.device) -> Iterator[_Level]:
    """Launches from ``count`` sums of units a sequence to the result, which has two numbers in any case."""
    while True:
        units = max(1, -(-count // _UNIT))
        last = units == 1
        # A single sequence is read twice at last: with nothing after the mask both numbers are its sum.
        numbers = launch.table([count, count if sequences == 2 else 0, units], device)
        if last:
            yield _Level(2, numbers, None)
            return
        sums = torch.empty(sequences * units, dtype=torch.float64, device=device)
        yield _Level(sequences * units, numbers, sums)
        count = units


def gradient_norm(
    rows: Sequence[Any],
    row_table: Tensor,
    group_table: Tensor,
    kept: dict[str, Any],
    words: Tensor | None,
    capturing: bool,
) -> Tensor:
    """Sums of squared gradients (contract: ops.gradient_norm); ``words``: addresses of mask words by row."""
    device_plan = kept.get("device_plan")
    if device_plan is None:
        device_plan = kept["device_plan"] = DevicePlan(rows[0].parameter.device)
    norm: _Norm | None = kept.get("gradient_norm")
    if capturing:
        _refuse_unready(norm, device_plan, kept, words)
        tables = device_plan.captured(row_table, group_table, goes_on=True)
    else:
        tables = device_plan.refresh(rows, row_table, group_table)
    after_mask = words is not None
    if norm is None or not _serves(norm, device_plan, after_mask):
        norm = kept["gradient_norm"] = _Norm(row_table, device_plan, after_mask)
    if words is not None and kept.get("words_sent", (None,))[0] is not words:
        kept["words_sent"] = words, launch.upload(words, device_plan.device)
    sent = kept["words_sent"][1] if words is not None else norm.first_units
    if capturing:
        held = norm, sent, kept["child_words"] if after_mask else None
        kept.setdefault("gradient_norms_captured", []).append(held)
    return _launched(norm, device_plan, *tables, sent)


def _serves(norm: _Norm, device_plan: DevicePlan, after_mask: bool) -> bool:
    """Whether a plan's chunks and sums are still good: the launches of a step are made anew when they are not."""
    return norm.launches_of_step is device_plan.launches and norm.after_mask == after_mask


def _refuse_unready(
    norm: _Norm | None, device_plan: DevicePlan, kept: dict[str, Any], words: Tensor | None
) -> None:
    """Nothing can be sent for good during a capture."""
    ready = norm is not None and _serves(norm, device_plan, words is not None)
    if not ready or (words is not None and kept.get("words_sent", (None,))[0] is not words):
        raise RuntimeError(
            "step() is being captured into a CUDA graph, and the last step took no norm of the gradients, or "
            "another one; call step() once outside the graph before each capture"
        )


def _launched(
    norm: _Norm, device_plan: DevicePlan, rows: Tensor, groups: Tensor, words: Tensor
) -> Tensor:
    device = device_plan.device
    result = torch.empty(2, dtype=torch.float64, device=device)
    config = launch.config("gradient_norm", device_plan.generation)
    for dtype, chunks in norm.chunks.items():
        launch.launch(
            _gradient_norm_kernel,
            chunks.shape[0],
            device,
            (rows, groups, chunks, norm.first_units, words, norm.sums, norm.numbers),
            _constants(dtype, norm.after_mask, config),
            config.num_warps,
            launch.HALF_OCCUPANCY,
        )
    values = norm.sums
    for level in norm.levels:
        sums = result if level.sums is None else level.sums
        launch.launch(
            _gradient_norm_again_kernel,
            level.programs,
            device,
            (values, sums, level.numbers),
            {},
            _WARPS_AGAIN,
        )
        values = sums
    return result


_WARPS_AGAIN = 4  # a column a thread


def _constants(dtype: torch.dtype, masked: bool, config: launch.Config) -> dict[str, Any]:
    return {"GRAD": _TYPES[dtype], "MASKED": masked, "UNITS": config.tile // _UNIT}


def variants(generation: str) -> Iterator[launch.Variant]:
    """What is compiled ahead of time."""
    config = launch.config("gradient_norm", generation)
    signature = {
        "rows": "*i64", "groups": "*fp64", "chunks": "*i32", "first_units": "*i64", "all_words": "*i64",
        "sums": "*fp64", "numbers": "*i64",
    }  # fmt: skip
    for dtype in _TYPES:
        for masked in (False, True):
            constants = _constants(dtype, masked, config)
            yield launch.Variant(
                f"gradient_norm{' masked' * masked} {str(dtype).removeprefix('torch.')}",
                _gradient_norm_kernel,
                signature | dict.fromkeys(constants, "constexpr"),
                constants,
                config.num_warps,
                elementwise=False,
                tile=config.tile,
                registers=launch.HALF_OCCUPANCY,
            )
    yield launch.Variant(
        "gradient_norm again",
        _gradient_norm_again_kernel,
        {"values": "*fp64", "sums": "*fp64", "numbers": "*i64"},
        {},
        _WARPS_AGAIN,
        elementwise=False,
        tile=_UNIT,
    )
