"""Steps that were captured into a CUDA graph once and are replayed: no work of the host is left in them."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from ..cases import Shapes, Workload
from ..variants import Variant
from .variants import eager_of

_WARM_UP_STEPS = 3
_REPLAYS = 2


class Replay:
    """An optimizer's step as a graph; on a CPU, which has none, the step itself.

    Args:
        optimizer: with ``capturable=True``; steps a few times before it is captured.
        device: of all its parameters.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer  # what the graph writes to lives as long as the graph
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            for _ in range(_WARM_UP_STEPS):
                optimizer.step()
            return
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP_STEPS):
                    optimizer.step()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                optimizer.step()

    def __call__(self) -> None:
        """Replay the step on the current stream."""
        if self._graph is None:
            self._optimizer.step()
        else:
            self._graph.replay()


def replay_differs(
    variant: Variant, shapes: Shapes, device: torch.device, backend: str | None
) -> str | None:
    """How replayed steps differ from as many eager ones, or None where every bit is equal.

    torch's own are compared with the same options: its capturable step rounds elsewhere.
    """
    eager = eager_of(variant) if variant.family == "childtune" else variant
    results = []
    for replayed in (True, False):
        workload = Workload(shapes, device, dtype=variant.dtype)
        optimizer = (variant if replayed else eager).build(workload.named, backend)
        step = Replay(optimizer, device) if replayed else optimizer.step
        for _ in range(_REPLAYS if replayed else _REPLAYS + _WARM_UP_STEPS):
            step()
        results.append([parameter.detach() for _, parameter in workload.named])
    for name, found, expected in zip(shapes, *results, strict=True):
        if not torch.equal(found, expected):
            return f"weight {name} after replays is not bitwise equal to that of eager steps"
    return None
