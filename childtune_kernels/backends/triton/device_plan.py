"""A plan's tables on its device, and which launches a step takes (SPEC.md, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...plan_row import (
    DTYPE_CODES,
    GROUP_COLUMN,
    LAYOUT_CODES,
    MASTER_CODES,
    ROW_COLUMN,
    WORDS_UNIT,
)
from . import launch, step_scalars

KEEP_ALL = float(1 << 32)
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
_LAYOUTS = {code: name for name, code in LAYOUT_CODES.items()}
_MASTERS = {code: kind for kind, code in MASTER_CODES.items()}
# What decides on launches and chunk maps. Addresses of weights and gradients do not.
_STRUCTURE = [
    ROW_COLUMN[name]
    for name in (
        "group", "numel", "weight_dtype", "grad_dtype", "moment_dtype", "master_kind", "mask_words",
        "child_layout", "child_count", "run_count", "child_ranks", "child_places",
    )
]  # fmt: skip


class Combination(NamedTuple):
    """What the rows of one launch share.

    ``master``: "none", "fp32", "split" or "stochastic"; ``moment``: the type of both moments; ``layout``:
    "dense" (no fixed mask), "fixed" (a fixed mask over dense state), a layout of compact state, or "outside"
    (decay of the weights outside a compact child).
    """

    weight: torch.dtype
    grad: torch.dtype
    moment: torch.dtype
    master: str
    bernoulli: bool
    layout: str

    @property
    def draws(self) -> bool:
        """Whether weights or moments are rounded by random words."""
        return self.master == "stochastic" or self.moment != self.compute

    @property
    def compute(self) -> torch.dtype:
        """The computing type."""
        return torch.float64 if self.weight == torch.float64 else torch.float32


class Cut(NamedTuple):
    """How the kernel of a combination is cut up.

    ``tile``: elements a program; ``full``: elements that a branch of 128-bit accesses takes at a time;
    ``lanes``: those of any other branch; ``registers``: the most that a thread may have.
    """

    tile: int
    full: int
    lanes: int
    num_warps: int
    registers: int


def _name_of(combination: Combination) -> str:
    """Under which name launch.py has the tile and warps of a combination."""
    if combination.layout == "runs":
        return "child_adamw_runs"
    if combination.layout not in ("dense", "fixed"):
        return "child_adamw_compact"
    heavy = combination.master != "none" or combination.draws or combination.layout == "fixed"
    return "child_adamw" if heavy or combination.compute == torch.float64 else "child_adamw_light"


def cut_of(combination: Combination, generation: str) -> Cut:
    """The tile and lanes with which a kernel needs no more than 64 registers a thread.

    fp64 takes twice the registers; random words over scattered children a Philox block an element. Words
    and a fixed mask in one tile take 80 registers: the instructions that they are limited by hide what half
    of all threads would.
    """
    config = launch.config(_name_of(combination), generation)
    tile, num_warps = config
    words = combination.layout == "words"
    if generation == "interpreter":
        return Cut(
            WORDS_UNIT if words else tile, WORDS_UNIT, tile, num_warps, launch.HALF_OCCUPANCY
        )
    threads = launch.lanes(generation, config)
    double = combination.compute == torch.float64
    full = tile // 2 if double else tile
    random = combination.bernoulli or combination.draws
    scattered = threads if random or double else 2 * threads
    registers = launch.HALF_OCCUPANCY
    if combination.draws and combination.layout == "fixed":
        registers = launch.THIRD_OCCUPANCY
    if words:
        return Cut(WORDS_UNIT, full, scattered, num_warps, registers)
    lanes = scattered if combination.layout == "indices" else threads
    return Cut(full, full, lanes, num_warps, registers)


def outside(weight: torch.dtype) -> Combination:
    """Decay of the weights outside a compact child."""
    compute = torch.float64 if weight == torch.float64 else torch.float32
    return Combination(weight, weight, compute, "none", False, "outside")


class Launch(NamedTuple):
    """One launch of a step: the rows of a combination, by programs."""

    combination: Combination
    chunks: Tensor
    words: Tensor | None  # addresses of mask words by row, for "outside"


class DevicePlan:
    """What stays on the device between the steps of one plan.

    Args:
        device: of all tensors of the plan.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generation = launch.generation(device)
        self.launches: list[Launch] = []
        # Of a step that nothing scales, clips or skips: sums, scale, found_inf, and where its outcome goes.
        self.idle_factor = (
            torch.zeros(2, dtype=torch.float64, device=device),
            torch.ones(1, dtype=torch.float32, device=device),
            torch.zeros(1, dtype=torch.float32, device=device),
            torch.zeros(2, dtype=torch.float64, device=device),
        )
        self._host: dict[str, Tensor] = {}
        self._on_device: dict[str, Tensor] = {}
        self._structure = torch.empty(0, dtype=torch.int64, device="cpu")
        self._whole = False
        self._held: list[Any] = []
        self._spare: list[Tensor] = []
        self._captured: list[Any] = []
        self._begun: tuple[Tensor, Tensor] | None = None

    def refresh(
        self, rows: Sequence[Any], row_table: Tensor, group_table: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Bring the tables on the device up to date; what has not changed is not sent.

        Args:
            rows: the plan's rows; ``row_table`` and ``group_table`` its tables on the host.

        Returns:
            The tables on the device.
        """
        # Until all of it stands, nothing may be taken for planned.
        was_whole, self._whole, self._begun = self._whole, False, None
        known = self._host.get("rows")
        other_rows = self._send("rows", row_table) and not _differ_in_gradients(known, row_table)
        if self._send("groups", group_table) or other_rows or not was_whole:
            structure = self._structure_of(row_table, group_table)
            if not was_whole or not torch.equal(structure, self._structure):
                self._make_room(len(rows))
                self._plan_launches(rows, row_table, group_table)
                self._structure = structure
        if not self._spare:
            self._spare = [
                launch.pinned_like(table, self.device) for table in (row_table, group_table)
            ]
        self._whole = True
        return self._on_device["rows"], self._on_device["groups"]

    def captured(
        self, row_table: Tensor, group_table: Tensor, goes_on: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Tables for a graph alone: eager steps write others, and replays read what stands here now.

        No memory can be pinned during a capture, so a block has been kept ready. It belongs to the graph from
        now on, which sends it at every replay.

        Args:
            goes_on: another op of the same step asks next, and gets the same tables.

        Raises:
            RuntimeError: nothing is ready, or the step would need other launches than the last one.
        """
        begun, self._begun = self._begun, None
        if begun is not None and not goes_on:
            return begun
        structure = self._structure_of(row_table, group_table)
        if not self._spare or not self._whole or not torch.equal(structure, self._structure):
            raise RuntimeError(
                "step() is being captured into a CUDA graph, and the last step was another one (parameters, "
                "gradient types or masks have changed since, or it was captured too); call step() once "
                "outside the graph before each capture"
            )
        pinned, self._spare = self._spare, []
        sent = []
        for block, table in zip(pinned, (row_table, group_table), strict=True):
            block.copy_(table)
            target = torch.empty_like(table, device=self.device)
            launch.send_(target, block)
            sent.append(target)
        # A later plan of other launches takes new ones: the graph goes on with these.
        own = (self.draws, self.scalars, self.count, self.launches, self._held)
        self._captured.append((pinned, sent, own))
        tables = sent[0], sent[1]
        self._begun = tables if goes_on else None
        return tables

    def _send(self, name: str, table: Tensor) -> bool:
        """Whether a table differs from what the device has; then it is sent, without waiting."""
        known = self._host.get(name)
        if known is not None and torch.equal(known.view(torch.int64), table.view(torch.int64)):
            return False
        if known is None:
            self._on_device[name] = launch.upload(table, self.device)
        else:
            # A block of its own: an earlier one may still be on its way.
            launch.send_(self._on_device[name], launch.pinned_like(table, self.device).copy_(table))
        self._host[name] = table.clone()
        return True

    @staticmethod
    def _structure_of(row_table: Tensor, group_table: Tensor) -> Tensor:
        draws = group_table[:, GROUP_COLUMN["threshold"]] != KEEP_ALL
        decays = group_table[:, GROUP_COLUMN["freeze_non_child"]] == 0
        return torch.cat([row_table[:, _STRUCTURE].flatten(), draws.long(), decays.long()])

    def _make_room(self, count: int) -> None:
        """The tables that the prologue of a step writes."""
        width = int(step_scalars.WIDTH)
        self.count = launch.table([count], self.device)
        self.draws = torch.zeros((count, 2), dtype=torch.int64, device=self.device)
        self.scalars = {
            dtype: torch.zeros((count, width), dtype=dtype, device=self.device)
            for dtype in (torch.float32, torch.float64)
        }

    def _plan_launches(self, rows: Sequence[Any], row_table: Tensor, group_table: Tensor) -> None:
        members: dict[Combination, list[int]] = {}
        for index, numbers in enumerate(row_table.tolist()):
            group = group_table[numbers[ROW_COLUMN["group"]]].tolist()
            for combination in _combinations_of(numbers, group):
                members.setdefault(combination, []).append(index)
        self._held = []
        launches = (
            self._launch_of(combination, indexes, rows) for combination, indexes in members.items()
        )
        self.launches = [each for each in launches if each.chunks.shape[0]]

    def _launch_of(
        self, combination: Combination, indexes: Sequence[int], rows: Sequence[Any]
    ) -> Launch:
        tile = cut_of(combination, self.generation).tile
        if combination.layout in ("dense", "fixed", "outside"):
            chunks = launch.chunk_map([rows[index].parameter.numel() for index in indexes], tile)
            chunks[:, 0] = torch.tensor(indexes, dtype=torch.int32, device="cpu")[
                chunks[:, 0].long()
            ]
            words = self._words_of(rows, indexes) if combination.layout == "outside" else None
            return Launch(combination, launch.upload(chunks, self.device), words)
        cuts = [
            _word_chunks(index, rows[index])
            if combination.layout == "words"
            else _segment_chunks(index, rows[index], tile)
            for index in indexes
        ]
        return Launch(combination, torch.cat(cuts).to(torch.int32), None)

    def _words_of(self, rows: Sequence[Any], indexes: Sequence[int]) -> Tensor:
        """The addresses of mask words by row; words that no state has are made, and held."""
        addresses = [0] * len(rows)
        for index in indexes:
            words = rows[index].mask_words
            self._held.append(words)
            addresses[index] = words.data_ptr()
        return launch.table(addresses, self.device)


def plan_of(rows: Sequence[Any], kept: dict[str, Any]) -> DevicePlan:
    """What all ops of one plan share of it on the device, in the plan's own dict; at first made."""
    if "device_plan" not in kept:
        kept["device_plan"] = DevicePlan(rows[0].parameter.device)
    plan: DevicePlan = kept["device_plan"]
    return plan


def _differ_in_gradients(known: Tensor | None, row_table: Tensor) -> bool:
    """Whether two tables of rows are equal but for where the gradients lie, the usual change."""
    if known is None:
        return False
    with_known = row_table.clone()
    with_known[:, ROW_COLUMN["grad"]] = known[:, ROW_COLUMN["grad"]]
    return torch.equal(with_known, known)


def _combinations_of(numbers: Sequence[int], group: Sequence[float]) -> list[Combination]:
    """The launches that a row takes part in."""
    weight = DTYPES[numbers[ROW_COLUMN["weight_dtype"]]]
    grad = DTYPES[numbers[ROW_COLUMN["grad_dtype"]]]
    if grad != weight and (grad != torch.float32 or weight == torch.float64):
        grad = weight  # of a row that has never had a gradient
    layout = _LAYOUTS[numbers[ROW_COLUMN["child_layout"]]]
    if layout == "dense" and numbers[ROW_COLUMN["mask_words"]]:
        layout = "fixed"
    moment = DTYPES[numbers[ROW_COLUMN["moment_dtype"]]]
    master = _MASTERS[numbers[ROW_COLUMN["master_kind"]]]
    if weight == torch.bfloat16 and group[GROUP_COLUMN["stochastic_rounding"]]:
        master = "stochastic"
    bernoulli = group[GROUP_COLUMN["threshold"]] != KEEP_ALL
    combinations = [Combination(weight, grad, moment, master, bernoulli, layout)]
    frozen = group[GROUP_COLUMN["freeze_non_child"]]
    if layout in ("words", "indices", "runs") and not frozen:
        combinations.append(outside(weight))
    return combinations


def _chunks(index: int, tiles: Tensor, first: Tensor, count: Tensor) -> Tensor:
    return torch.stack([torch.full_like(tiles, index), tiles, first, count], 1)


def _word_chunks(index: int, row: Any) -> Tensor:
    """A tensor's units of words that hold any child element."""
    ranks = row.state["child_ranks"]
    units = (ranks[1:] != ranks[:-1]).nonzero().view(-1)
    return _chunks(index, units, torch.zeros_like(units), torch.zeros_like(units))


def _segment_chunks(index: int, row: Any, tile: int) -> Tensor:
    """Tiles of ranks, with the first segment (a run, or a unit of indices) and the number of them in each."""
    runs = row.state.get("child_runs")
    ranks = (row.state["child_ranks"] if runs is None else runs[:, 1])[:-1].contiguous()
    count = row.exp_avg.numel()
    tiles = torch.arange(-(-count // tile), device=ranks.device)
    first = torch.searchsorted(ranks, tiles * tile, right=True) - 1
    last_rank = (tiles * tile + tile - 1).clamp(max=count - 1)
    last = torch.searchsorted(ranks, last_rank, right=True) - 1
    return _chunks(index, tiles, first, last - first + 1)
