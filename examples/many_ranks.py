"""One child on any number of ranks: what the engines of torch.distributed train, beside one device.

    torchrun --nproc-per-node 2 examples/many_ranks.py

Runs over gloo on CPUs, and over NCCL where every rank has a GPU (``--device cpu`` keeps it off them). Each
engine gets the same gradients as one device, and has to end with the same weights, to the bit: in CT_F,
in CT_D with a child that the ranks select together, and after a checkpoint in the middle. It takes seconds;
the exit status is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from childtune_kernels import ChildMask, FusedChildAdamW, select_child

OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
SAVED_AFTER, STEPS = 2, 4
#: Sizes that most numbers of ranks part unevenly.
WIDTH, HIDDEN, CLASSES = 10, 52, 7
CHECKS = ("CT_F", "child", "CT_D", "resumed")


class Network(nn.Module):
    """Two layers with the same weights everywhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, values: Tensor) -> Tensor:
        outputs: Tensor = self.down(torch.relu(self.up(values)))
        return outputs


def replicated(device: torch.device) -> nn.Module:
    """DistributedDataParallel."""
    return DistributedDataParallel(Network().to(device))


def sharded(device: torch.device) -> nn.Module:
    """fully_shard (FSDP2)."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    model = Network().to(device)
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def tensor_parallel(device: torch.device) -> nn.Module:
    """parallelize_module, by columns and by rows."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    return parallelize_module(Network().to(device), mesh, _plan())


def sharded_over_tensor_parallel(device: torch.device) -> nn.Module:
    """fully_shard over parallelize_module, on a mesh of two dimensions."""
    mesh = init_device_mesh(
        device.type, (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "model")
    )
    model = parallelize_module(Network().to(device), mesh["model"], _plan())
    fully_shard(model, mesh=mesh["data"])
    return model


def replicas_of_shards(device: torch.device) -> nn.Module:
    """fully_shard on a mesh of two dimensions: replicas of shards (HSDP)."""
    mesh = init_device_mesh(
        device.type, (2, dist.get_world_size() // 2), mesh_dim_names=("replica", "shard")
    )
    model = Network().to(device)
    fully_shard(model, mesh=mesh)
    return model


def _plan() -> dict[str, Any]:
    return {"up": ColwiseParallel(), "down": RowwiseParallel()}


Engine = Callable[[torch.device], nn.Module]
ENGINES: dict[str, Engine] = {
    "DDP": replicated,
    "FSDP2": sharded,
    "tensor parallel": tensor_parallel,
    "FSDP2 over tensor parallel": sharded_over_tensor_parallel,
    "HSDP": replicas_of_shards,
}
#: On meshes of two dimensions.
OF_FOUR_RANKS = ("FSDP2 over tensor parallel", "HSDP")


def values_of(name: str, step: int, shape: torch.Size, device: torch.device) -> Tensor:
    """Random numbers that are the same on every rank and in every engine."""
    seed = 1000 * step + sum(map(ord, name.removeprefix("module.")))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def train(model: nn.Module, optimizer: FusedChildAdamW, steps: range) -> None:
    """Steps with gradients that are functions of name and step."""
    for step in steps:
        for name, parameter in model.named_parameters():
            gradient = values_of(name, step, parameter.shape, parameter.device)
            parameter.grad = as_placed(gradient, parameter)
        optimizer.step()
        optimizer.zero_grad()


def as_placed(value: Tensor, parameter: Tensor) -> Tensor:
    """A value that every rank has whole, placed as a parameter is."""
    if not isinstance(parameter, DTensor):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name → weight, gathered."""
    return {
        name.removeprefix("module."): (
            weight.full_tensor() if isinstance(weight, DTensor) else weight
        ).detach()
        for name, weight in model.named_parameters()
    }


def child_of(model: nn.Module) -> ChildMask:
    """A third of the weights, by scores of which each rank has its part; many of them are equal."""
    scores = {
        name: as_placed(
            values_of(name, -1, weight.shape, weight.device).mul(2).round().abs(), weight
        )
        for name, weight in model.named_parameters()
    }
    return select_child(scores, reserve_p=1 / 3)


def runs(engine: Engine, device: torch.device, folder: str) -> dict[str, Any]:
    """What an engine ends with, by CHECKS; a collective of all ranks."""
    model = engine(device)
    train(model, _optimizer(model, reserve_p=0.3), range(STEPS))
    ends: dict[str, Any] = {"CT_F": whole_weights(model)}

    model = engine(device)
    child = child_of(model)
    ends["child"] = child.gather()
    optimizer = _optimizer(model, child_mask=child)
    train(model, optimizer, range(SAVED_AFTER))
    dcp.save(_states(model, optimizer), checkpoint_id=folder)
    train(model, optimizer, range(SAVED_AFTER, STEPS))
    ends["CT_D"] = whole_weights(model)

    model = engine(device)
    optimizer = _optimizer(model, child_mask=child_of(model))
    states = _states(model, optimizer)
    dcp.load(states, checkpoint_id=folder)
    model.load_state_dict(states["model"])
    set_optimizer_state_dict(model, optimizer, states["optimizer"])
    train(model, optimizer, range(SAVED_AFTER, STEPS))
    ends["resumed"] = whole_weights(model)
    return ends


def _optimizer(model: nn.Module, **options: Any) -> FusedChildAdamW:
    return FusedChildAdamW(model.named_parameters(), seed=0, **OPTIONS, **options)


def _states(model: nn.Module, optimizer: FusedChildAdamW) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}


def of_one_device(device: torch.device) -> dict[str, Any]:
    """The same on this rank alone, without a checkpoint."""
    model = Network().to(device)
    train(model, _optimizer(model, reserve_p=0.3), range(STEPS))
    ends: dict[str, Any] = {"CT_F": whole_weights(model)}
    model = Network().to(device)
    ends["child"] = child_of(model)
    train(model, _optimizer(model, child_mask=ends["child"]), range(STEPS))
    ends["CT_D"] = ends["resumed"] = whole_weights(model)
    return ends


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, bool]:
    """Check → whether anything differs on any rank."""
    differing = [not _are_same(found[check], expected[check]) for check in CHECKS]
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, differing)
    return {check: any(rank[at] for rank in of_ranks) for at, check in enumerate(CHECKS)}


def _are_same(found: Any, expected: Any) -> bool:
    if isinstance(expected, ChildMask):
        return {label: words.tolist() for label, words in found.words.items()} == {
            label: words.tolist() for label, words in expected.words.items()
        }
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], weight) for name, weight in expected.items()
    )


def compare(device: torch.device, folder: str) -> dict[str, dict[str, bool]]:
    """Engine → check → whether anything differs from one device; a collective of all ranks."""
    expected = of_one_device(device)
    world, table = dist.get_world_size(), {}
    for name, engine in ENGINES.items():
        if name in OF_FOUR_RANKS and (world < 4 or world % 2):
            continue
        table[name] = differences(runs(engine, device, str(Path(folder, name))), expected)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument(
        "--folder", help="for checkpoints, seen by all machines; by default a temporary one"
    )
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with: torchrun --nproc-per-node 2 examples/many_ranks.py")
    rank_here = int(os.environ["LOCAL_RANK"])
    ranks_here = int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cpu")
    if arguments.device == "auto" and torch.cuda.device_count() >= ranks_here:
        device = torch.device("cuda", rank_here)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    with tempfile.TemporaryDirectory() as temporary:
        folder: list[Any] = [arguments.folder or temporary]
        dist.broadcast_object_list(folder)
        table = compare(device, folder[0])
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks on {device.type}, beside one device")
        print(f"{'':28}" + "".join(f"{check:>12}" for check in CHECKS))
        for name, row in table.items():
            said = ("differs" if row[check] else "same bits" for check in CHECKS)
            print(f"{name:28}" + "".join(f"{each:>12}" for each in said))
    dist.destroy_process_group()
    return int(any(differs for row in table.values() for differs in row.values()))


if __name__ == "__main__":
    sys.exit(main())
