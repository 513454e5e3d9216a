"""CUDA graphs: what must hold when a step is captured, and what must stay as it was from then on.

A graph replays the kernels of a step with the addresses of its capture; the host has no part in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import registry
from .step_plan import StepPlan


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on a device now goes into a graph instead of running."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def check_start(groups: Sequence[Mapping[str, Any]], plans: Sequence[StepPlan] | None) -> bool:
    """Whether a step is being captured; if so, what must hold before anything of it is done.

    What is computed during a capture is not there before a replay: plans must stand already.

    Raises:
        RuntimeError: a group without ``capturable``, no step before, or several devices.
        ValueError: a parameter without a gradient, which every replay would leave out.
    """
    if plans is None:
        devices = {parameter.device for group in groups for parameter in group["params"]}
    else:
        devices = {plan.device for plan in plans}
    capturing = [device for device in devices if is_capturing(device)]
    if not capturing:
        return False
    if not all(group["capturable"] for group in groups):
        raise RuntimeError(
            "step() is being captured into a CUDA graph, and capturable is False; build "
            "FusedChildAdamW(..., capturable=True)"
        )
    if len(capturing) < len(devices):
        raise RuntimeError(
            f"step() is being captured into a CUDA graph on {capturing[0]} alone, and updates parameters on "
            f"{len(devices)} devices; use an optimizer for each device"
        )
    if plans is None:
        raise RuntimeError(
            "step() is being captured into a CUDA graph before its first step, or after parameters or state "
            "were exchanged; run forward, backward and step() once outside the graph, so that kernels and "
            "tables are there"
        )
    rows = [row for plan in plans for row in plan.rows]
    given = [row.parameter if row.sharded is None else row.sharded for row in rows]
    missing = [row.label for row, of_row in zip(rows, given, strict=True) if of_row.grad is None]
    if missing:
        raise ValueError(
            f"step() is being captured into a CUDA graph, and {len(missing)} parameters have no gradient "
            f"({', '.join(missing[:4])}): every replay would skip them; capture backward and step "
            "together, or leave them out of the optimizer"
        )
    return True


def check_backend(
    device: torch.device, requested: str | None, capturable: bool, where: str
) -> None:
    """Refuse a backend that cannot serve a device, or whose steps no graph can hold.

    Raises:
        ValueError: ``capturable`` for another backend than Triton's.
        RuntimeError: the requested backend cannot serve.
    """
    if requested is None and not capturable:
        return
    backend = registry.choose("child_adamw", device, requested).backend
    if capturable and backend != "triton":
        raise ValueError(
            f"capturable=True ({where}) is for backend 'triton' on GPUs; parameters on {device} are served "
            f"by {backend!r}: use capturable=False"
        )


class Captures:
    """The captures of one optimizer: all that graphs point at stays alive, gradients and options too."""

    def __init__(self) -> None:
        self._plans: list[tuple[StepPlan, bytes, dict[str, int]]] = []
        self._held: list[Any] = []

    def add(self, plans: Sequence[StepPlan], factors: Sequence[Any]) -> None:
        """Note that a step of these plans has been captured, with what it was scaled and clipped by."""
        self._held += factors
        for plan in plans:
            self._plans.append((plan, plan.placed, plan.addresses))
            self._held += [row.parameter.grad for row in plan.rows]
            options = chain.from_iterable(map(dict.values, plan.groups))
            self._held += [option for option in options if isinstance(option, Tensor)]

    def check_unmoved(self, plans: Sequence[StepPlan]) -> None:
        """Refuse an eager step where weights or state lie elsewhere than a graph knows.

        Raises:
            RuntimeError: names a parameter that has moved.
        """
        places = {plan.placed for plan in plans}
        for _, placed, addresses in self._plans:
            if placed in places:
                continue
            now = {label: at for plan in plans for label, at in plan.addresses.items()}
            moved = [label for label, address in addresses.items() if now.get(label) != address]
            what = f"parameter {moved[0]}" if moved else "the optimizer's state"
            raise RuntimeError(
                f"{what} lies elsewhere since step() was captured into a CUDA graph, which would go on "
                "updating the old memory; build the optimizer anew and capture again"
            )

    def refuse(self, what: str, why: str = "replays would go on updating the old state") -> None:
        """Refuse what does not go with graphs that exist, as an exchange of state that they go on using.

        Raises:
            RuntimeError: a step has been captured.
        """
        if self._plans:
            raise RuntimeError(
                f"{what} after step() was captured into a CUDA graph: {why}; build the optimizer anew, then "
                "capture again"
            )
