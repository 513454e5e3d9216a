"""What the ranks of a process group tell each other: small values, the same on every rank afterwards."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_PIECE = 1 << 22  # elements
PATIENCE_S = 60.0
# Errors that a message alone makes again.
_PLAIN_ERRORS = {ValueError, TypeError, RuntimeError, KeyError, OSError, FileNotFoundError}


def is_distributed(group: ProcessGroup | None = None) -> bool:
    """Whether this process is one of several in the group (None: of all)."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_rank(group) >= 0 and distributed.get_world_size(group) > 1


@contextmanager
def said_when_late() -> Iterator[None]:
    """Warn, where the block takes longer than ``PATIENCE_S``, that others do not come, and to what."""
    waiting = threading.Timer(PATIENCE_S, _warn_of_waiting, (threading.get_ident(),))
    waiting.daemon = True
    waiting.start()
    try:
        yield
    finally:
        waiting.cancel()


def _warn_of_waiting(thread: int) -> None:
    package, name = __name__.split(".")[0], "a collective"
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] == package:
            qualified = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
            name = f"{qualified.split('<locals>.')[-1]}()"
        frame = frame.f_back
    warnings.warn(
        f"{name} has waited {PATIENCE_S:.0f} s for other ranks: all of them (of process_group=, where one "
        "was given) must call it. A step also waits where this rank alone has called set_child_mask, "
        "load_state_dict or add_param_group before it",
        UserWarning,
        stacklevel=2,
    )


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
    with said_when_late():
        torch.distributed.all_gather_object(received, value, group=group)
    return received


def of_first_rank(values: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The values of the group's rank 0, on every rank of it."""
    sent = values.to(_device_of(group, values.device)).contiguous()
    torch.distributed.broadcast(sent, group=group, group_src=0)
    return sent.to(values.device)


def start_sum_(values: Tensor, group: ProcessGroup | None = None) -> torch.futures.Future[Any]:
    """Begin to add up the values of all ranks of the group, in place; done when the future is."""
    work = torch.distributed.all_reduce(values, group=group, async_op=True)
    future: torch.futures.Future[Any] = work.get_future()
    return future


def group_of_hosts(group: ProcessGroup) -> ProcessGroup:
    """The group, or one of the same ranks that takes CPU tensors where it does not; all ranks call it."""
    if _device_of(group, torch.device("cpu")).type == "cpu":
        return group
    ranks = torch.distributed.get_process_group_ranks(group)
    made: ProcessGroup = torch.distributed.new_group(
        ranks, backend="gloo", use_local_synchronization=True
    )
    return made


def counts_over_ranks(counts: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The sum of all ranks' counts: int64 of one shape, which no order of adding can change."""
    if not is_distributed(group):
        return counts
    total = counts.to(_device_of(group, counts.device), copy=True).contiguous()
    with said_when_late():
        torch.distributed.all_reduce(total, group=group)
    return total.to(counts.device)


def add_over_ranks_(values: Tensor, group: ProcessGroup | None = None) -> None:
    """Replace contiguous values by the sum over all ranks, in the order of the ranks: the same bits on each.

    Each rank sums a slice and hands it on, so that no rank holds more than two pieces of 2**22 elements.
    """
    if not is_distributed(group):
        return
    world = torch.distributed.get_world_size(group)
    for piece in values.view(-1).split(_PIECE):
        padded = piece.new_zeros(-(-piece.numel() // world) * world)
        padded[: piece.numel()] = piece
        sent = padded.to(_device_of(group, values.device))
        received = torch.empty_like(sent)
        torch.distributed.all_to_all_single(received, sent, group=group)
        first, *others = received.view(world, -1)
        for other in others:
            first = first + other
        slices = list(sent.view(world, -1))
        torch.distributed.all_gather(slices, first.contiguous(), group=group)
        piece.copy_(sent[: piece.numel()])


@contextmanager
def agreed(group: ProcessGroup | None = None) -> Iterator[None]:
    """An error inside the block, on whichever rank, is raised on every rank of the group.

    All ranks enter it, and wait at its end for each other; inside it nobody may wait. Where several ranks
    have an error, each raises its own.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    for of_rank in gathered_objects(None if error is None else (type(error), str(error)), group):
        if error is None and of_rank is not None:
            kind, message = of_rank
            error = kind(message) if kind in _PLAIN_ERRORS else RuntimeError(message)
    if error is not None:
        raise error


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
