"""The columns of the table op x backend that tests run, and where each of them has its tensors."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from childtune_kernels import registry
from childtune_kernels.backends import cpp

CPU = torch.device("cpu")


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") != "0"


@functools.cache
def device_of(backend: str | None) -> torch.device:
    """Where tests run a backend: Triton kernels on a GPU, if there is one and they are compiled for it."""
    if backend == "triton" and not interpreted() and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return CPU


class Column(NamedTuple):
    """One backend; of C++ with one instruction set."""

    backend: str
    capability: str | None = None

    def __str__(self) -> str:
        return "-".join(filter(None, self))

    def has_kernels_of(self, ops: Iterable[str]) -> bool:
        """Whether the table has a cell for each of the ops."""
        return all(registry.TABLE[op][self.backend] is not None for op in ops)

    def absent(self, ops: Iterable[str]) -> str | None:
        """None, or why this machine cannot run the column's kernels of these ops."""
        if self.capability is not None and self.capability not in cpp.supported_capabilities():
            return cpp.load() or f"this processor or build lacks {self.capability}"
        for cell in registry.survey(device_of(self.backend)):
            if cell.op in ops and cell.backend == self.backend and not cell.available:
                return f"{cell.op} on {cell.backend}: {cell.reason}"
        return None


REFERENCE = Column("reference")
TRITON = Column("triton")
CPP = [Column("cpp", capability) for capability in cpp.CAPABILITIES]
# What runs where nothing else is asked for. Interpreted kernels take minutes; they have runs of their
# own (tests/test_interpreted.py).
COLUMNS = [*CPP, TRITON] if device_of("triton") != CPU else CPP


def storage_of(tensor: Tensor) -> Tensor:
    """All elements of a tensor's memory, its gaps too."""
    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return whole.set_(tensor.detach().untyped_storage())


def in_memory_of(tensor: Tensor, device: torch.device) -> Tensor:
    """The same values on a device, with the same offset, strides and gaps; there already: the tensor."""
    if tensor.device == device:
        return tensor
    whole = storage_of(tensor).to(device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def placed(tensor: Tensor, backend: str | None) -> Tensor:
    """A tensor of the CPU where a backend is tested: a copy in its memory, or the tensor itself."""
    return in_memory_of(tensor, device_of(backend))
