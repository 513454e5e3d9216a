"""Op gradient_norm: the sums of squared gradients of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import registry
from ..plan_row import ROW_COLUMN

# What says which child a row has, and how it is written down.
_CHILD_COLUMNS = [
    ROW_COLUMN[name]
    for name in (
        "numel", "mask_words", "child_layout", "child_count", "run_count", "child_ranks", "child_places",
    )
]  # fmt: skip


class _ChildWords(NamedTuple):
    """The mask words of all rows; ``held``: what the table and ``addresses`` point at, alive."""

    columns: Tensor
    addresses: Tensor
    held: list[Tensor]


def gradient_norm(
    rows: Sequence[Any],
    row_table: Tensor,
    group_table: Tensor,
    choice: registry.Choice,
    kept: dict[str, Any],
    after_mask: bool = False,
    capturing: bool = False,
) -> Tensor:
    """The sums of squared gradients of all rows, before a step (SPEC.md, eq. 19).

    Args:
        rows: the rows of a plan (step_plan.Row), for kernels that take tensors.
        row_table: int64 ``[rows, ROW_WIDTH]``, the same rows for kernels that take pointers.
        group_table: float64 ``[groups, GROUP_WIDTH]``, the numbers of the parameter groups.
        choice: what ``registry.choose("gradient_norm", device)`` gave for the plan's device.
        kept: what the backend keeps between the steps of one plan; at first empty.
        after_mask: an element that the coming step drops counts as +0, and the others with 1/p².
        capturing: the step goes into a CUDA graph, whose replays read what the tables say now.

    Returns:
        float64 ``[2]`` on the plan's device: Σ, and Σ' over all elements, dropped or not. Without
        ``after_mask`` both are the same number. The host does not wait for it.

    Raises:
        RuntimeError: a capture to which no step of the same rows came before; nothing was launched.
    """
    sums: Tensor
    if choice.backend == "reference":
        sums = choice.module.gradient_norm(rows, after_mask)
    else:
        words = _word_addresses(rows, row_table, kept, capturing) if after_mask else None
        sums = choice.module.gradient_norm(rows, row_table, group_table, kept, words, capturing)
    return sums


def _word_addresses(
    rows: Sequence[Any], row_table: Tensor, kept: dict[str, Any], capturing: bool
) -> Tensor:
    """Addresses of mask words by row (int64, on the CPU), 0 without a fixed mask.

    The same tensor comes back as long as no row has another child. What it was made of is alive, so that
    no other tensor can have come to the same address.
    """
    columns = row_table[:, _CHILD_COLUMNS]
    known: _ChildWords | None = kept.get("child_words")
    if known is not None and torch.equal(known.columns, columns):
        return known.addresses
    if capturing:
        raise RuntimeError(
            "step() is being captured into a CUDA graph, and the last step had other masks or no norm after "
            "them; call step() once outside the graph before each capture"
        )
    words = [row.mask_words for row in rows]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in words]
    layouts = [tensor for row in rows for tensor in row.layout]
    kept["child_words"] = found = _ChildWords(
        columns,
        torch.tensor(addresses, dtype=torch.int64, device="cpu"),
        [tensor.detach() for tensor in (*words, *layouts) if tensor is not None],
    )
    return found.addresses
