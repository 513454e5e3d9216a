"""The plan of a step: one row a tensor, one table for all groups (SPEC.md, section 4).

Addresses are read anew at every step and compared by value with those of the step before; rows are
checked and written again only where something has moved or looks different. The plan keeps parameters
and state alive, never gradients.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from . import child_layout, ops, registry, state_tensors, weight_formats
from .group_options import WROTE_OUTSIDE, check_spelling, group_numbers, watched_options
from .labels import philox_key
from .plan_row import (
    DTYPE_CODES,
    GROUP_COLUMN,
    GROUP_WIDTH,
    LAYOUT_CODES,
    MASTER_CODES,
    ROW_COLUMN,
    ROW_WIDTH,
    GroupNumbers,
    IndexMap,
    contiguous_map,
    strided_map,
)

_MAPS = {"element_map", "storage_map"}
# The options that a parameter's state must go with (state_tensors.check_options).
_KINDS = ("child_state", "master_weight", "state_dtype", "freeze_non_child")
_NOTHING = b"", b"", b""


@dataclass(eq=False)
class Row:
    """One tensor of a plan: what a kernel that takes tensors reads, and what the table is made of.

    ``state`` is the parameter's entry in ``optimizer.state`` (SPEC.md, section 5); ``group_index``
    counts the groups of this plan. Of a ``sharded`` parameter, ``parameter`` is this rank's part.
    """

    label: str
    parameter: Tensor
    state: dict[str, Tensor]
    group_index: int
    philox_key: int
    element_map: IndexMap
    sharded: Tensor | None = None
    numbers: GroupNumbers | None = None
    active: bool = False
    masked: bool = field(init=False)
    compact: bool = field(init=False)
    layout: list[Tensor | None] = field(init=False)  # the tensors of the child, as last checked

    def __post_init__(self) -> None:
        self.masked = child_layout.has_child(self.state)
        self.compact = child_layout.is_compact(self.state)
        self.layout = [None] * len(child_layout.LAYOUT_KEYS)

    @property
    def exp_avg(self) -> Tensor:
        return self.state[weight_formats.key("exp_avg", self.compact)]

    @property
    def exp_avg_sq(self) -> Tensor:
        return self.state[weight_formats.key("exp_avg_sq", self.compact)]

    @property
    def step(self) -> Tensor:
        return self.state["step"]

    @property
    def master_kind(self) -> str:
        return weight_formats.kept_master(self.state)

    @property
    def master(self) -> Tensor | None:
        """fp32 masters or int16 remainders, where the state holds them."""
        name = weight_formats.MASTERS.get(self.master_kind)
        return None if name is None else self.state[weight_formats.key(name, self.compact)]

    @property
    def compute_dtype(self) -> torch.dtype:
        return ops.compute_dtype(self.parameter.dtype)

    @property
    def mask_words(self) -> Tensor | None:
        return child_layout.mask_words(self.state, self.parameter.numel())


def _needs_copy(parameter: Tensor, grad: Tensor) -> bool:
    """Whether a kernel that walks the parameter's strides cannot read the gradient where it lies."""
    walks_alike = all(
        of_grad == of_parameter
        for size, of_grad, of_parameter in zip(
            parameter.shape, grad.stride(), parameter.stride(), strict=True
        )
        if size > 1
    )
    return grad.numel() > 0 and (not walks_alike or grad.is_neg() or grad.data_ptr() == 0)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _signed(key: int) -> int:
    return key - (key >> 63 << 64)


def _equal(options: tuple[Any, ...], seen: tuple[Any, ...]) -> bool:
    try:
        return options == seen
    except RuntimeError:  # a tensor of several elements has no truth value; group_numbers says so
        return False


def check_row(row: Row) -> None:
    """Refuse state that does not fit its parameter, or has come to be another kind than the row's.

    Raises:
        ValueError: see ``state_tensors.check_state``.
    """
    present = (child_layout.has_child(row.state), child_layout.is_compact(row.state))
    if present != (row.masked, row.compact):
        raise ValueError(
            f"the mask in the state of {row.label} came or went after the optimizer was built; use "
            "set_child_mask or load a state dict"
        )
    moment = row.state.get(weight_formats.key("exp_avg", row.compact))
    if isinstance(moment, Tensor) and moment.device != row.parameter.device:
        raise ValueError(
            f"{row.label} lies on {row.parameter.device}, its state on {moment.device}; move the "
            "model before the optimizer is built, or take its state along: "
            "optimizer.load_state_dict(optimizer.state_dict())"
        )
    layout = [row.state.get(name) for name in child_layout.LAYOUT_KEYS]
    new = any(tensor is not known for tensor, known in zip(layout, row.layout, strict=True))
    state_tensors.check_state(row.label, row.parameter, row.state, contents=new)
    row.layout = layout


class StepPlan:
    """The tables of all tensors of one device, in the order of the optimizer's groups.

    Args:
        rows: the rows, whose ``group_index`` counts ``groups``.
        groups: the optimizer's parameter groups that have a tensor in this plan.
        choice: the backend of op child_adamw for the plan's device.
    """

    def __init__(
        self, rows: Sequence[Row], groups: Sequence[dict[str, Any]], choice: registry.Choice
    ) -> None:
        self.rows = list(rows)
        self.sharded_rows = [row for row in self.rows if row.sharded is not None]
        self.groups = list(groups)
        self.choice = choice
        self.device = rows[0].parameter.device
        observed_by = "reference" if choice.backend == "reference" else None
        self.observer = registry.choose("observe", self.device, observed_by)
        self._row_data = array("q", bytes(8 * ROW_WIDTH * len(self.rows)))
        self._group_data = array("d", bytes(8 * GROUP_WIDTH * len(self.groups)))
        self.row_table = torch.frombuffer(self._row_data, dtype=torch.int64).view(-1, ROW_WIDTH)
        self.group_table = torch.frombuffer(self._group_data, dtype=torch.float64).view(
            -1, GROUP_WIDTH
        )
        self._parameters = tuple(row.parameter for row in self.rows)
        self._states = tuple(row.state for row in self.rows)
        self._rows_of_group: list[list[Row]] = [[] for _ in self.groups]
        for row in self.rows:
            self._rows_of_group[row.group_index].append(row)
        self._has_child = [any(row.masked for row in rows) for rows in self._rows_of_group]
        self._options: list[Any] = [None] * len(self.groups)
        self._kinds: list[Any] = [None] * len(self.groups)
        self._seeds = [group["seed"] for group in self.groups]
        self._key_counts = [0] * len(self.groups)
        self._decays_outside = [False] * len(self.groups)
        self._writes_outside: list[dict[str, Any]] = []
        self._settled: Any = None  # what was seen of options that need no other look
        self._option_objects: list[Any] = []  # alive, so that their identities stay theirs
        self._seen = _NOTHING
        self._watched = ops.watch(self._states, self.observer)
        self._copied_rows: list[int] = []
        self._changing: list[Tensor] = []
        # Alive as long as the table points at them, so that no address can be given out again.
        self._held: list[Any] = [None] * len(self.rows)
        self._copies: list[Tensor] = []
        self.kept: dict[str, Any] = {}

    @property
    def placed(self) -> bytes:
        """Where parameters and state lie, as last seen; empty before the first refresh."""
        return self._seen[0]

    @property
    def addresses(self) -> dict[str, int]:
        """The address of every parameter, as the table has it."""
        column = self._row_data[ROW_COLUMN["weight"] :: ROW_WIDTH]
        return {row.label: address for row, address in zip(self.rows, column, strict=True)}

    def refresh(self, options: Any = None) -> None:
        """Bring the tables up to date with the groups' options and this step's tensors.

        Args:
            options: the second row of ``ops.observe_groups``, as it is now; None: every option is read.

        Raises:
            ValueError: an option, a gradient or state that no kernel may see; nothing was written.
        """
        self._copies.clear()
        if options is None or options != self._settled:
            self._refresh_groups(options)
        placed, looks, pointed = seen = self._observed()
        if placed != self._seen[0] or looks != self._seen[1]:
            self._refresh_rows(moved=placed != self._seen[0])
        elif pointed != self._seen[2]:
            self._row_data[ROW_COLUMN["grad"] :: ROW_WIDTH] = array("q", pointed)
        self._seen = seen
        for index in self._copied_rows:
            self._point_at_copy(index, self._parameters[index].grad)

    def _observed(self) -> tuple[bytes, bytes, bytes]:
        """What parameters, state and gradients look like now (ops.observe)."""
        try:
            return ops.observe(
                self._parameters, self._states, self._watched, self._seen, self.observer
            )
        except (TypeError, RuntimeError, AttributeError):
            for row in self.rows:
                ops.check_parameter(row.label, row.parameter)
                check_row(row)
                if row.parameter.grad is not None:
                    ops.check_gradient(row.label, row.parameter, row.parameter.grad)
            raise

    def _refresh_rows(self, moved: bool) -> None:
        """Check and write the rows anew: something has moved, or looks different."""
        # Until every row is right, nothing may be taken for unchanged.
        self._seen = _NOTHING
        gradients = [parameter.grad for parameter in self._parameters]
        for index, (row, grad) in enumerate(zip(self.rows, gradients, strict=True)):
            if moved:
                self._place(index, row)
            if grad is not None:
                ops.check_gradient(row.label, row.parameter, grad)
        for index, (row, grad) in enumerate(zip(self.rows, gradients, strict=True)):
            row.active = grad is not None
            self._row_data[self._at(index, "active")] = row.active
            if grad is not None:
                self._row_data[self._at(index, "grad")] = grad.data_ptr()
                self._row_data[self._at(index, "grad_dtype")] = DTYPE_CODES[grad.dtype]
        self._changing = [row.parameter for row in self.rows if row.active]
        self._copied_rows = [
            index
            for index, (row, grad) in enumerate(zip(self.rows, gradients, strict=True))
            if grad is not None and _needs_copy(row.parameter, grad)
        ]
        if moved:
            self._watched = ops.watch(self._states, self.observer)

    def _point_at_copy(self, index: int, grad: Tensor | None) -> None:
        """Give a row its gradient under the strides of its parameter."""
        assert grad is not None
        parameter = self.rows[index].parameter
        copy = torch.empty_strided(
            parameter.shape, parameter.stride(), dtype=grad.dtype, device=grad.device
        ).copy_(grad)
        self._copies.append(copy)
        self._row_data[self._at(index, "grad")] = copy.data_ptr()

    def run(self, factor: Any = None, capturing: bool = False) -> None:
        """Step what ``refresh`` found (ops.child_adamw_), and tell autograd that weights have changed.

        Args:
            factor: what the step is scaled, clipped and skipped by (step_factor.StepFactor), or None.
            capturing: the step goes into a CUDA graph.
        """
        tables = self.rows, self.row_table, self.group_table
        ops.child_adamw_(*tables, self.choice, self.kept, factor, capturing)
        self._copies.clear()
        torch.autograd.graph.increment_version(self._changing)
        for group in self._writes_outside:
            group[WROTE_OUTSIDE] = True

    def drop_copies(self) -> None:
        """Free the copies of gradients that ``refresh`` made: no step follows."""
        self._copies.clear()

    def _at(self, index: int, column: str) -> int:
        return index * ROW_WIDTH + ROW_COLUMN[column]

    def _refresh_groups(self, seen_options: Any) -> None:
        # Until every group is right, nothing may be taken for unchanged.
        self._settled = None
        for index, group in enumerate(self.groups):
            if len(group) != self._key_counts[index]:
                check_spelling(group, f"group of {self._rows_of_group[index][0].label}")
                self._key_counts[index] = len(group)
            options, seen = watched_options(group), self._options[index]
            if seen is not None and _equal(options, seen):
                continue
            rows = self._rows_of_group[index]
            self._options[index] = None
            masked = self._has_child[index]
            if group["capturable"] and self.choice.backend != "triton":
                raise ValueError(
                    f"capturable=True (group of {rows[0].label}) is for backend 'triton' on GPUs, not "
                    f"{self.choice.backend!r}; use capturable=False"
                )
            numbers = group_numbers(group, masked, f"group of {rows[0].label}", self.device)
            start = index * GROUP_WIDTH
            for name, at in GROUP_COLUMN.items():
                self._group_data[start + at] = getattr(numbers, name)
            decays_outside = masked and numbers.may_decay and not numbers.freeze_non_child
            self._decays_outside[index] = decays_outside
            for row in rows:
                row.numbers = numbers
            kinds = tuple(group[name] for name in _KINDS)
            if kinds != self._kinds[index]:
                self._kinds[index] = None
                for row in rows:
                    state_tensors.check_options(row.label, row.parameter, row.state, group)
                self._kinds[index] = kinds
            if group["seed"] != self._seeds[index]:
                self._take_seed(index, rows, group["seed"])
            # A tensor or list can change and still be the same object: it is read at every step.
            if isinstance(group["betas"], tuple) and not any(
                isinstance(option, Tensor) for option in (*options, *group["betas"])
            ):
                self._options[index] = options
        self._writes_outside = list(compress(self.groups, self._decays_outside))
        if None not in self._options:
            self._option_objects = [[*group.items()] for group in self.groups]
            self._settled = seen_options

    def _take_seed(self, index: int, rows: Sequence[Row], seed: int) -> None:
        """Draw the masks of a group from another seed."""
        for row in rows:
            row.philox_key = philox_key(seed, row.label)
            at = self._at(self.rows.index(row), "philox_key")
            self._row_data[at] = _signed(row.philox_key)
        self._seeds[index] = seed

    def _place(self, index: int, row: Row) -> None:
        """Write everything of a row that is not the gradient's."""
        ops.check_parameter(row.label, row.parameter)
        check_row(row)
        group = self.groups[row.group_index]
        state_tensors.check_options(row.label, row.parameter, row.state, group)
        parameter, numel = row.parameter, row.parameter.numel()
        try:
            storage = strided_map(parameter.shape, parameter.stride())
        except ValueError as error:
            raise ValueError(f"parameter {row.label}: {error}; call .contiguous() on it") from None
        if numel == 0 or parameter.is_contiguous():
            storage = contiguous_map(numel)
        state = row.state
        layout = child_layout.layout_of(state)
        runs = state.get("child_runs")
        columns: dict[str, Any] = {
            "group": row.group_index,
            "numel": numel,
            "weight_dtype": DTYPE_CODES[parameter.dtype],
            "weight": parameter.data_ptr(),
            "exp_avg": row.exp_avg.data_ptr(),
            "exp_avg_sq": row.exp_avg_sq.data_ptr(),
            "moment_dtype": DTYPE_CODES[row.exp_avg.dtype],
            "master_kind": MASTER_CODES[row.master_kind],
            "master": _address(row.master),
            "mask_words": _address(state.get("mask_words")),
            "child_layout": LAYOUT_CODES[layout],
            "child_count": row.exp_avg.numel(),
            "run_count": 0 if runs is None else runs.shape[0] - 1,
            "child_ranks": _address(state.get("child_ranks")),
            "child_places": _address(state.get("child_indices", runs)),
            "step": row.step.data_ptr(),
            "philox_key": _signed(row.philox_key),
            "element_contiguous": row.element_map.is_contiguous,
            "storage_contiguous": storage.is_contiguous,
            "element_map": row.element_map,
            "storage_map": storage,
        }
        for name, value in columns.items():
            at = self._at(index, name)
            if name in _MAPS:
                self._row_data[at : at + 9] = array("q", value.columns())
            else:
                self._row_data[at] = value
        self._held[index] = [tensor.detach() for tensor in (parameter, *row.state.values())]
