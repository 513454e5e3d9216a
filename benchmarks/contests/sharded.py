"""What does a parameter cost the host more in a step because it is a DTensor?

torch.distributed.tensor is imported by those who need it: the package looks at whether anybody has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed
from torch import Tensor
from torch.optim import Optimizer

from ..cases import SMALL_TENSORS, Case, Shapes, Workload
from ..variants import CT_F, TORCH_FUSED
from .contest import Comparison, Competitor, Contest, Prepared

WHOLE = Competitor("whole", "CT_F, p = 0.3, plain tensors")
SHARDED = Competitor("sharded", "CT_F, p = 0.3, DTensors")
TORCH = Competitor("torch", "torch AdamW, fused, plain tensors")
TORCH_SHARDED = Competitor("torch_sharded", "torch AdamW, fused, DTensors")

TO_WHOLE = Comparison("ratio_to_whole", "time / plain tensors", WHOLE.name)
TO_TORCH = Comparison("ratio_to_torch_sharded", "time / torch, DTensors", TORCH_SHARDED.name)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_STEPS = 3


def _mesh(device: torch.device) -> DeviceMesh:
    """This process alone: parts are whole, so that all competitors do the same work."""
    from torch.distributed.device_mesh import init_device_mesh

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    return init_device_mesh(device.type, (1,))


def _optimizers(shapes: Shapes, device: torch.device, backend: str | None) -> dict[str, Optimizer]:
    """Each steps weights of its own, with the same values and gradients."""
    mesh = _mesh(device)
    made: dict[str, Optimizer] = {}
    for name in (WHOLE.name, SHARDED.name, TORCH.name, TORCH_SHARDED.name):
        named = Workload(shapes, device).named
        if name in (SHARDED.name, TORCH_SHARDED.name):
            named = [(of, _distributed(weight, mesh)) for of, weight in named]
        made[name] = (TORCH_FUSED if name in (TORCH.name, TORCH_SHARDED.name) else CT_F).build(
            named, backend
        )
    return made


def _distributed(weight: torch.nn.Parameter, mesh: DeviceMesh) -> torch.nn.Parameter:
    from torch.distributed.tensor import Shard, distribute_tensor

    assert weight.grad is not None
    sharded = torch.nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
    sharded.grad = distribute_tensor(weight.grad, mesh, [Shard(0)])
    return sharded


def _prepare(shapes: Shapes, device: torch.device, backend: str | None = None) -> Prepared:
    steps: dict[str, Callable[[], object]] = {
        name: optimizer.step for name, optimizer in _optimizers(shapes, device, backend).items()
    }
    return Prepared(steps)


def _faults(shapes: Shapes, device: torch.device, backend: str | None = None) -> dict[str, str]:
    """DTensors take the bits of plain tensors."""
    weights = {}
    for name, optimizer in _optimizers(shapes, device, backend).items():
        for _ in range(_STEPS):
            optimizer.step()
        weights[name] = [weight.detach() for weight in optimizer.param_groups[0]["params"]]
    pairs = {SHARDED.name: WHOLE.name, TORCH_SHARDED.name: TORCH.name}
    return {
        name: f"its weights are not those of {other}"
        for name, other in pairs.items()
        if not all(map(_are_equal, weights[name], weights[other]))
    }


def _are_equal(sharded: Tensor, whole: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    assert isinstance(sharded, DTensor)
    return torch.equal(sharded.to_local(), whole)


def contest_of(name: str, case: Case, rounds: int, backend: str | None = None) -> Contest:
    """Steps over the tensors of a case; ``backend`` None takes the best that serves the device."""
    return Contest(
        name=name,
        title=f"DTensors: {case.title}",
        family="sharded",
        op="child_adamw",
        competitors=(WHOLE, SHARDED, TORCH, TORCH_SHARDED),
        make_shapes=case.make_shapes,
        tensors=case.tensors,
        elements=case.parameters,
        prepare=functools.partial(_prepare, backend=backend),
        faults=functools.partial(_faults, backend=backend),
        comparisons=(TO_WHOLE, TO_TORCH),
        rounds=rounds,
    )


SMALL = contest_of("sharded_small_tensors", SMALL_TENSORS, rounds=101)
CONTESTS = (SMALL,)
