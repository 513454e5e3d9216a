"""Op gradient_norm: the sums of squared gradients of all rows of a plan (SPEC.md, eq. 19).

A launch for each type and mask kind leaves the sums of all units of 4096 elements (gradient_norm_units.py),
and a few more sum those again in the same order, until one is left.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...plan_row import GROUP_COLUMN, ROW_COLUMN
from . import launch
from .device_plan import DTYPES, KEEP_ALL, DevicePlan, plan_of
from .gradient_norm_units import _gradient_norm_again_kernel, _gradient_norm_kernel

_UNIT, _ROWS = 4096, 32  # of elements; of 128 elements


class _Kind(NamedTuple):
    """What the rows of one launch share."""

    grad: torch.dtype
    fixed: bool = False
    bernoulli: bool = False

    @property
    def rows_at_once(self) -> int:
        """How many rows' loads are under way together: as many as 64 registers a thread hold."""
        return 1 if self.bernoulli else 8 if self.fixed else 16

    def constants(self, generation: str) -> dict[str, Any]:
        """The constexpr arguments of the kernel."""
        config = launch.config("gradient_norm", generation)
        return {
            "GRAD": launch.TYPES[self.grad],
            "FIXED": self.fixed,
            "BERNOULLI": self.bernoulli,
            "UNITS": config.tile // _UNIT,
            "AT_ONCE": self.rows_at_once,
            "WIDTH": _any_width(generation),
        }


def _any_width(generation: str) -> int:
    """Columns that are read together where elements lie anywhere; the interpreter pays by operation."""
    return 128 if generation == "interpreter" else 32


class _Level(NamedTuple):
    """One launch that sums sums of units again."""

    programs: int
    numbers: Tensor
    sums: Tensor | None  # None: the result


class _Norm:
    """What stays on the device between the calls for one plan, as long as its launches stay the same."""

    def __init__(
        self, row_table: Tensor, group_table: Tensor, device_plan: DevicePlan, after_mask: bool
    ) -> None:
        device = device_plan.device
        self.launches_of_step, self.after_mask = device_plan.launches, after_mask
        sizes = row_table[:, ROW_COLUMN["numel"]].tolist()
        units = torch.tensor([-(-size // _UNIT) for size in sizes], dtype=torch.int64, device="cpu")
        count = int(units.sum())
        self.first_units = launch.upload(units.cumsum(0) - units, device)
        sequences = 2 if after_mask else 1
        self.numbers = launch.table([count, sequences], device)
        self.sums = torch.zeros(sequences * count, dtype=torch.float64, device=device)
        config = launch.config("gradient_norm", device_plan.generation)
        kinds = [_kind_of(numbers, group_table, after_mask) for numbers in row_table.tolist()]
        self.chunks: dict[_Kind, Tensor] = {}
        for kind in dict.fromkeys(kinds):
            alike = [size if own == kind else 0 for size, own in zip(sizes, kinds, strict=True)]
            self.chunks[kind] = launch.upload(launch.chunk_map(alike, config.tile), device)
        self.levels = list(_levels(count, sequences, device))


def _kind_of(numbers: Sequence[int], group_table: Tensor, after_mask: bool) -> _Kind:
    grad = DTYPES[numbers[ROW_COLUMN["grad_dtype"]]]
    group = group_table[numbers[ROW_COLUMN["group"]]]
    fixed = numbers[ROW_COLUMN["mask_words"]] or numbers[ROW_COLUMN["child_layout"]]
    bernoulli = float(group[GROUP_COLUMN["threshold"]]) != KEEP_ALL
    return _Kind(grad, bool(fixed), bernoulli) if after_mask else _Kind(grad)


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
    device_plan = plan_of(rows, kept)
    norm: _Norm | None = kept.get("gradient_norm")
    if capturing:
        _refuse_unready(norm, device_plan, kept, words)
        table, groups = device_plan.captured(row_table, group_table, goes_on=True)
    else:
        table, groups = device_plan.refresh(rows, row_table, group_table)
    after_mask = words is not None
    if norm is None or not _serves(norm, device_plan, after_mask):
        norm = _Norm(row_table, group_table, device_plan, after_mask)
        kept["gradient_norm"] = norm
    if words is not None and kept.get("words_sent", (None,))[0] is not words:
        kept["words_sent"] = words, launch.upload(words, device_plan.device)
    sent = kept["words_sent"][1] if words is not None else norm.first_units
    if capturing:
        held = norm, sent, kept["child_words"] if after_mask else None
        kept.setdefault("gradient_norms_captured", []).append(held)
    return _launched(norm, device_plan, table, groups, sent)


def _serves(norm: _Norm, device_plan: DevicePlan, after_mask: bool) -> bool:
    """Whether chunks and sums are still good: whatever decides on them makes the launches of a step new."""
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
    for kind, chunks in norm.chunks.items():
        launch.launch(
            _gradient_norm_kernel,
            chunks.shape[0],
            device,
            (rows, groups, chunks, norm.first_units, words, norm.sums, norm.numbers),
            kind.constants(device_plan.generation),
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


def variants(generation: str) -> Iterator[launch.Variant]:
    """What is compiled ahead of time."""
    config = launch.config("gradient_norm", generation)
    signature = {
        "rows": "*i64", "groups": "*fp64", "chunks": "*i32", "first_units": "*i64", "all_words": "*i64",
        "sums": "*fp64", "numbers": "*i64",
    }  # fmt: skip
    masks = {
        "plain": (False, False),
        "fixed": (True, False),
        "bernoulli": (False, True),
        "both": (True, True),
    }
    for dtype, (mask, flags) in itertools.product(launch.TYPES, masks.items()):
        constants = _Kind(dtype, *flags).constants(generation)
        yield launch.Variant(
            f"gradient_norm-{mask}-{dtype}".replace("torch.", ""),
            _gradient_norm_kernel,
            signature | dict.fromkeys(constants, "constexpr"),
            constants,
            config.num_warps,
            elementwise=False,
            tile=config.tile,
            registers=launch.HALF_OCCUPANCY,
            full=config.tile // _ROWS * constants["AT_ONCE"],
            reduces=True,
        )
    yield launch.Variant(
        "gradient_norm-again",
        _gradient_norm_again_kernel,
        {"values": "*fp64", "sums": "*fp64", "numbers": "*i64"},
        {},
        _WARPS_AGAIN,
        elementwise=False,
        tile=_UNIT,
    )
