"""Fisher sums of sharded parameters, of which each rank holds its part (SPEC.md, section 10)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import rank_values, sharding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def zeros_for(parameter: Tensor, device: str | torch.device | None) -> Tensor:
    """fp32 zeros as a parameter lies, on ``device`` (None: beside it); of a DTensor a DTensor."""
    part = sharding.local_of(parameter)
    zeros = torch.zeros(part.shape, dtype=torch.float32, device=device or part.device)
    return sharding.placed_as(zeros, parameter)


def for_sums(label: str, value: Tensor, total: Tensor) -> Tensor:
    """What of other sums of a parameter goes with this rank's ``total``; it may be a collective.

    It is one where the other sums are DTensors, of the ranks that hold them.
    """
    if sharding.is_sharded(total):
        return sharding.part_of(label, value, total)
    return whole_sum(value)


def any_sharded(sums: Mapping[str, Tensor]) -> bool:
    """Whether reading all of the sums takes other ranks."""
    return any(map(sharding.is_sharded, sums.values()))


def on_cpu(total: Tensor) -> Tensor:
    """Sums with this rank's part in main memory."""
    return sharding.placed_as(sharding.local_of(total).cpu(), total)


def whole_sum(total: Tensor) -> Tensor:
    """The sums of a whole parameter, on every rank; of a DTensor a collective of the ranks that hold it."""
    placed = sharding.placed_of(total)
    if placed is None:
        return total
    # Offloaded parts go back to the device whose ranks talk to each other.
    here = sharding.local_of(total).to(placed.device_mesh.device_type)
    return sharding.whole_of(sharding.placed_by(here, placed))


def whole_sums(sums: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """All sums whole and on the CPU, on rank 0; None on the others. A collective of all ranks.

    Where no sums are sharded every process has its own, and gets them.

    Raises:
        RuntimeError: on all ranks: one of them holds no part of some sums.
    """
    if not any_sharded(sums):
        return {label: total.cpu() for label, total in sums.items()}
    with rank_values.agreed():
        for label, total in sums.items():
            placed = sharding.placed_of(total)
            if placed is not None and placed.device_mesh.get_coordinate() is None:
                raise RuntimeError(
                    f"{sharding.described(label, placed)}: rank {torch.distributed.get_rank()} has no part "
                    "of it; save on ranks that all hold the model"
                )
    is_first = torch.distributed.get_rank() == 0
    whole = {}
    for label, total in sums.items():
        gathered = whole_sum(total)
        if is_first:
            whole[label] = gathered.cpu()
    return whole if is_first else None


def require_models_of_their_own(
    sums: Mapping[str, Tensor], process_group: ProcessGroup | None
) -> None:
    """Refuse to add up what ranks of a group hold of one and the same model.

    Raises:
        ValueError: names a parameter.
    """
    ranks = set(torch.distributed.get_process_group_ranks(process_group))
    for label, total in sums.items():
        placed = sharding.placed_of(total)
        if placed is None:
            continue
        if len(ranks & set(placed.device_mesh.mesh.flatten().tolist())) > 1:
            raise ValueError(
                f"reduce: ranks of the group hold parts of one {sharding.described(label, placed)}, and its "
                "sums are theirs together already. Without reduce() they are complete; where several such "
                "models ran on examples of their own, give a process_group of one rank of each"
            )
