"""The plan of a step: one row a tensor, one table for all groups (SPEC.md, section 4).

Pointers are read anew at every step and compared by value with those of the step before; only rows
that changed are checked and written again. The plan keeps parameters and state alive, never
gradients.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops, registry
from .group_options import group_numbers, numeric_options
from .plan_row import (
    DTYPE_CODES,
    GROUP_COLUMN,
    GROUP_WIDTH,
    ROW_COLUMN,
    ROW_WIDTH,
    GroupNumbers,
    IndexMap,
    contiguous_map,
    strided_map,
)

_MAPS = {"element_map", "storage_map"}


@dataclass(eq=False)
class Row:
    """One tensor of a plan: what a kernel that takes tensors reads, and what the table is made of.

    ``state`` is the parameter's entry in ``optimizer.state`` (SPEC.md, section 5); ``group_index``
    counts the groups of this plan.
    """

    label: str
    parameter: Tensor
    state: dict[str, Tensor]
    group_index: int
    philox_key: int
    element_map: IndexMap
    numbers: GroupNumbers | None = None
    active: bool = False

    @property
    def exp_avg(self) -> Tensor:
        return self.state["exp_avg"]

    @property
    def exp_avg_sq(self) -> Tensor:
        return self.state["exp_avg_sq"]

    @property
    def step(self) -> Tensor:
        return self.state["step"]

    @property
    def master_weight(self) -> Tensor | None:
        return self.state.get("master_weight")

    @property
    def mask_words(self) -> Tensor | None:
        return self.state.get("mask_words")


def _placement(parameter: Tensor) -> tuple[Any, ...]:
    return parameter.shape, parameter.stride(), parameter.dtype, parameter.device


def check_state(row: Row) -> None:
    """Refuse state that does not fit its parameter (SPEC.md, section 5).

    Raises:
        ValueError: a missing tensor, or one of another type, shape, device or layout.
    """
    parameter, label = row.parameter, row.label
    compute = ops.compute_dtype(parameter.dtype)
    expected = {"exp_avg": compute, "exp_avg_sq": compute, "master_weight": torch.float32}
    for name, dtype in expected.items():
        tensor = row.state.get(name)
        if tensor is None and name == "master_weight":
            continue
        if (
            not isinstance(tensor, Tensor)
            or tensor.dtype != dtype
            or tensor.shape != parameter.shape
            or tensor.device != parameter.device
            or not tensor.is_contiguous()
        ):
            raise ValueError(
                f"state {name} of {label} must be a contiguous {dtype} tensor of shape "
                f"{tuple(parameter.shape)} on {parameter.device}; load a state dict with "
                "load_state_dict instead of writing into optimizer.state"
            )
    step = row.state.get("step")
    if not isinstance(step, Tensor) or step.dtype != torch.int64 or step.dim() != 0:
        raise ValueError(f"state step of {label} must be an int64 tensor of no dimension")
    if row.mask_words is not None:
        ops.check_words(label, row.mask_words, parameter.numel())


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
        self.groups = list(groups)
        self.choice = choice
        self._row_data = array("q", bytes(8 * ROW_WIDTH * len(self.rows)))
        self._group_data = array("d", bytes(8 * GROUP_WIDTH * len(self.groups)))
        self.row_table = torch.frombuffer(self._row_data, dtype=torch.int64).view(-1, ROW_WIDTH)
        self.group_table = torch.frombuffer(self._group_data, dtype=torch.float64).view(
            -1, GROUP_WIDTH
        )
        self._parameters = [row.parameter for row in self.rows]
        self._states = [row.state for row in self.rows]
        self._rows_of_group: list[list[Row]] = [[] for _ in self.groups]
        for row in self.rows:
            self._rows_of_group[row.group_index].append(row)
        self._options: list[Any] = [None] * len(self.groups)
        self._seen_gradients: list[Any] = [None] * len(self.rows)
        self._seen_pointers: list[Any] = [None] * len(self.rows)
        self._placements: list[Any] = [None] * len(self.rows)
        # Alive as long as the table points at them, so that no address can be given out again.
        self._held: list[Any] = [None] * len(self.rows)
        self._copies: list[Tensor] = []

    def refresh(self) -> None:
        """Bring the tables up to date with the groups' options and this step's pointers.

        Raises:
            ValueError: an option, a gradient or state that no kernel may see; nothing was written.
        """
        self._copies.clear()
        self._refresh_groups()
        gradients = [parameter.grad for parameter in self._parameters]
        signatures = self._gradient_signatures(gradients)
        pointers = self._pointers()
        if pointers == self._seen_pointers and signatures == self._seen_gradients:
            return
        for index, row in enumerate(self.rows):
            moved = pointers[index] != self._seen_pointers[index]
            if not moved and signatures[index] == self._seen_gradients[index]:
                continue
            if moved or _placement(row.parameter) != self._placements[index]:
                self._place(index, row)
                self._seen_pointers[index] = pointers[index]
            copied = self._point_at_gradient(index, row, gradients[index])
            # A copied gradient is copied at every step: its row never counts as unchanged.
            self._seen_gradients[index] = () if copied else signatures[index]

    def _gradient_signatures(self, gradients: list[Tensor | None]) -> list[Any]:
        try:
            return [
                None if grad is None else (grad.data_ptr(), grad.dtype, grad.shape, grad.stride())
                for grad in gradients
            ]
        except RuntimeError:  # a sparse gradient has neither strides nor a pointer
            for row, grad in zip(self.rows, gradients, strict=True):
                if grad is not None:
                    ops.check_gradient(row.label, row.parameter, grad)
            raise

    def _pointers(self) -> list[Any]:
        pointer = Tensor.data_ptr
        try:
            return [
                (pointer(parameter), *map(pointer, state.values()))
                for parameter, state in zip(self._parameters, self._states, strict=True)
            ]
        except TypeError:
            for row in self.rows:
                check_state(row)
            raise

    def finish(self) -> None:
        """Drop what only the step needed, and tell autograd that the weights have changed."""
        self._copies.clear()
        changed = [row.parameter for row in self.rows if row.active]
        torch.autograd.graph.increment_version(changed)

    def _at(self, index: int, column: str) -> int:
        return index * ROW_WIDTH + ROW_COLUMN[column]

    def _refresh_groups(self) -> None:
        for index, group in enumerate(self.groups):
            options = numeric_options(group)
            if options == self._options[index]:
                continue
            rows = self._rows_of_group[index]
            masked = any("mask_words" in row.state for row in rows)
            numbers = group_numbers(group, masked, f"group of {rows[0].label}")
            start = index * GROUP_WIDTH
            for name, at in GROUP_COLUMN.items():
                self._group_data[start + at] = getattr(numbers, name)
            for row in rows:
                row.numbers = numbers
            self._options[index] = options

    def _point_at_gradient(self, index: int, row: Row, grad: Tensor | None) -> bool:
        """Write what a row says of its gradient; whether it had to be copied."""
        data = self._row_data
        row.active = grad is not None
        data[self._at(index, "active")] = row.active
        if grad is None:
            return False
        ops.check_gradient(row.label, row.parameter, grad)
        copied = grad.stride() != row.parameter.stride() and grad.numel() > 0
        if copied:
            grad = torch.empty_like(row.parameter, dtype=grad.dtype).copy_(grad)
            self._copies.append(grad)
        data[self._at(index, "grad")] = grad.data_ptr()
        data[self._at(index, "grad_dtype")] = DTYPE_CODES[grad.dtype]
        return copied

    def _place(self, index: int, row: Row) -> None:
        """Write everything of a row that is not the gradient's."""
        ops.check_parameter(row.label, row.parameter)
        check_state(row)
        parameter, numel = row.parameter, row.parameter.numel()
        try:
            storage = strided_map(parameter.shape, parameter.stride())
        except ValueError as error:
            raise ValueError(f"parameter {row.label}: {error}; call .contiguous() on it") from None
        if numel == 0 or parameter.is_contiguous():
            storage = contiguous_map(numel)
        words, master = row.mask_words, row.master_weight
        key = row.philox_key
        columns: dict[str, Any] = {
            "group": row.group_index,
            "numel": numel,
            "weight_dtype": DTYPE_CODES[parameter.dtype],
            "weight": parameter.data_ptr(),
            "exp_avg": row.exp_avg.data_ptr(),
            "exp_avg_sq": row.exp_avg_sq.data_ptr(),
            "master_weight": 0 if master is None else master.data_ptr(),
            "mask_words": 0 if words is None else words.data_ptr(),
            "step": row.step.data_ptr(),
            "philox_key": key - (key >> 63 << 64),
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
        self._held[index] = (dict(row.state), parameter.detach())
        self._placements[index] = _placement(parameter)
