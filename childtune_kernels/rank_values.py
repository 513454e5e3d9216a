"""What the ranks of a process group tell each other: small values, the same on every rank afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def is_distributed(group: ProcessGroup | None = None) -> bool:
    """Whether this process is one of several in the group (None: of all)."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_rank(group) >= 0 and distributed.get_world_size(group) > 1


def gathered(values: Tensor, group: ProcessGroup | None = None) -> list[Tensor]:
    """The values of all ranks of the group, in the order of its ranks; shapes and types must agree.

    They travel on their own device, or on the group's where its backend serves no other.
    """
    sent = values.to(_device_of(group, values.device)).contiguous()
    received = [torch.empty_like(sent) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(received, sent, group=group)
    return [each.to(values.device) for each in received]


def sum_over_ranks(values: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The sum of all ranks' values, in the order of the ranks: the same bits on each."""
    first, *others = gathered(values, group)
    for other in others:
        first = first + other
    return first


def gathered_objects(value: Any, group: ProcessGroup | None = None) -> list[Any]:
    """What all ranks of the group hold, in the order of its ranks; it is pickled."""
    received: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(received, value, group=group)
    return received


def of_first_rank(values: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The values of the group's rank 0, on every rank of it."""
    sent = values.to(_device_of(group, values.device)).contiguous()
    torch.distributed.broadcast(sent, group=group, group_src=0)
    return sent.to(values.device)


def _device_of(group: ProcessGroup | None, device: torch.device) -> torch.device:
    """The device where the group's backends take a tensor of ``device``."""
    config = torch.distributed.get_backend_config(group)  # "cpu:gloo,cuda:nccl"
    served = [entry.split(":")[0] for entry in config.split(",")]
    if device.type in served:
        return device
    return (
        torch.device(served[0])
        if served[0] == "cpu"
        else torch.device(served[0], torch.accelerator.current_device_index())
    )
