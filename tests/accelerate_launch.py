"""What a launcher tells accelerate, for ranks whose processes nobody launched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LAUNCHED = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


@contextmanager
def as_launched() -> Iterator[None]:
    """This rank's environment is that of torchrun; accelerate's states are cleared afterwards."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    rank, world = str(torch.distributed.get_rank()), str(torch.distributed.get_world_size())
    launched = (rank, rank, world, world, "127.0.0.1", "29500")  # nobody connects anew
    given = {name: os.environ.get(name) for name in _LAUNCHED}
    os.environ.update(zip(_LAUNCHED, launched, strict=True))
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState._reset_state()
        for name, value in given.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
