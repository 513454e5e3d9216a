"""Where a run takes place, how long it may take, and whether its times mean anything."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from childtune_kernels import registry

from ..correctness import missing_kernel


@dataclass(frozen=True)
class Setting:
    """A device and a time by which everything is done.

    ``tiny``: the whole run with tensors of some thousand elements, Triton's kernels interpreted on the CPU;
    it shows that everything works, and measures nothing.
    """

    device: torch.device
    tiny: bool
    deadline: float

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def backend(self, op: str) -> str | None:
        """What to ask for: on a GPU what users get, on a CPU the interpreted kernel where there is one."""
        if self.tiny and registry.TABLE[op]["triton"] is not None:
            return "triton"
        return None

    def absent(self, op: str) -> str | None:
        """Why an op is not measured here, or None."""
        if self.tiny:
            return None
        return missing_kernel(op, self.device)


def say(line: str) -> None:
    """Show a line of progress at once, whoever reads it."""
    print(line, flush=True)
