"""Optimizers of sharded models: saved by one number of ranks, resumed by another, continuing bit for bit."""

from __future__ import annotations

import copy
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.distributed.checkpoint
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
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

from childtune_kernels import ChildMask, FusedChildAdamW

from .cases import assert_same_bits
from .ranks import Ranks

BASE: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "seed": 7}
#: By name: the parameters' type and the options of the run.
KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "compact": (torch.float32, {}),
    "compact and CT_F": (torch.float32, {"reserve_p": 0.5}),
    "compact, split": (torch.bfloat16, {"master_weight": "split"}),
    "compact, fp32 master": (torch.float16, {}),
    "dense, split": (torch.bfloat16, {"child_state": "dense", "freeze_non_child": False}),
}


class Model(nn.Module):
    """Sizes that ranks part unevenly; children of many densities, so that each has another layout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(10, 96)
        self.down = nn.Linear(96, 3)
        self.head = nn.Linear(3, 2)


def mask() -> ChildMask:
    drawn = torch.Generator().manual_seed(5)
    dense = {
        "up.weight": torch.rand(96, 10, generator=drawn) < 0.3,
        "up.bias": torch.arange(96) == 70,
        "down.weight": (torch.arange(96) < 60).repeat(3, 1),
        "down.bias": torch.zeros(3, dtype=torch.bool),
        "head.weight": torch.ones(2, 3, dtype=torch.bool),
    }
    return ChildMask.from_dense(dense, dense=["head.bias"])


def sharded(engine: str, dtype: torch.dtype) -> nn.Module:
    world = torch.distributed.get_world_size()
    model: nn.Module = Model().to(dtype)
    columns = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if engine == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    elif engine == "replicas":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("r", "s")))
    elif engine == "tensor parallel":
        # What it leaves alone is in the optimizer too, whole.
        model = parallelize_module(model, init_device_mesh("cpu", (world,)), columns)
    else:
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], columns)
        fully_shard(model, mesh=mesh["dp"])
    return model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(value: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def train(model: nn.Module, optimizer: FusedChildAdamW, steps: range) -> dict[str, Tensor]:
    """Steps with gradients that are functions of name and step; the whole weights."""
    for step in steps:
        for name, parameter in model.named_parameters():
            drawn = torch.Generator().manual_seed(len(name) + 100 * step)
            gradient = torch.randn(parameter.shape, generator=drawn).to(parameter.dtype)
            parameter.grad = placed(gradient, parameter)
        optimizer.step()
        optimizer.zero_grad()
    return {name: whole(value.detach()).clone() for name, value in model.named_parameters()}


def made(engine: str, kind: str, **others: Any) -> tuple[nn.Module, FusedChildAdamW]:
    dtype, options = KINDS[kind]
    model = sharded(engine, dtype)
    options = {**BASE, **options, "child_mask": mask(), **others}
    return model, FusedChildAdamW(model.named_parameters(), **options)


def states_of(model: nn.Module, optimizer: FusedChildAdamW) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}


def saved(engine: str, folder: str) -> dict[str, dict[str, Tensor]]:
    """Train, save, go on: what each kind of run ends with."""
    ends = {}
    for kind in KINDS:
        model, optimizer = made(engine, kind)
        train(model, optimizer, range(2))
        before = {of: copy.deepcopy(state) for of, state in optimizer.state.items()}
        states = states_of(model, optimizer)
        for parameter, state in optimizer.state.items():
            assert_same_bits(state, before[parameter])
        torch.distributed.checkpoint.save(states, checkpoint_id=str(Path(folder) / kind))
        ends[kind] = train(model, optimizer, range(2, 4))
    return ends


def resumed(engine: str, folder: str) -> dict[str, dict[str, Tensor]]:
    ends = {}
    for kind in KINDS:
        model, optimizer = made(engine, kind, seed=1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        states = states_of(model, optimizer)
        torch.distributed.checkpoint.load(states, checkpoint_id=str(Path(folder) / kind))
        set_optimizer_state_dict(model, optimizer, states["optimizer"])
        model.load_state_dict(states["model"])
        ends[kind] = train(model, optimizer, range(2, 4))
    return ends


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(("fsdp", 2), ("fsdp", 4), marks=pytest.mark.slow),
        (("fsdp", 3), ("tensor parallel", 2)),
        (("tensor parallel", 3), ("fsdp", 1)),
        (("both", 4), ("fsdp", 3)),
        (("fsdp", 1), ("both", 4)),
        pytest.param(("replicas", 4), ("fsdp", 2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_goes_on_with_other_ranks(
    ranks: Ranks, tmp_path: Path, first: tuple[str, int], second: tuple[str, int]
) -> None:
    (engine, world), (next_engine, next_world) = first, second
    expected = ranks.run(world, saved, engine, str(tmp_path))[0]
    for found in ranks.run(next_world, resumed, next_engine, str(tmp_path)):
        for kind in KINDS:
            assert_same_bits(found[kind], expected[kind])


def alone(kind: str) -> tuple[nn.Module, FusedChildAdamW]:
    dtype, options = KINDS[kind]
    model = Model().to(dtype)
    return model, FusedChildAdamW(
        model.named_parameters(), **{**BASE, **options, "child_mask": mask()}
    )


def whole_states(engine: str, flat: bool) -> dict[str, Any]:
    """The whole state dicts of sharded runs, and what they end with; loaded again they do the same."""
    found = {}
    options = StateDictOptions(
        full_state_dict=not flat, broadcast_from_rank0=not flat, flatten_optimizer_state_dict=flat
    )
    # No process group gathers int16, so that torch makes no whole state of remainders.
    for kind in [kind for kind in KINDS if flat or "split" not in kind]:
        model, optimizer = made(engine, kind)
        weights = train(model, optimizer, range(2))
        # Steps and dense moments are the run's own tensors.
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        end = train(model, optimizer, range(2, 4))
        found[kind] = None if flat else state, weights, end
        again, optimizer = made(engine, kind, seed=1)
        for name, parameter in again.named_parameters():
            parameter.detach().copy_(placed(weights[name], parameter))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            set_optimizer_state_dict(again, optimizer, state, options=options)
        assert all("flat" in str(each.message) for each in caught)
        assert bool(caught) <= flat
        assert_same_bits(train(again, optimizer, range(2, 4)), end)
    return found


def test_the_whole_state_is_that_of_one_process(ranks: Ranks) -> None:
    for found in ranks.run(3, whole_states, "fsdp", False)[:1]:
        for kind, (state, weights, end) in found.items():
            model, optimizer = alone(kind)
            model.load_state_dict(weights)
            set_optimizer_state_dict(model, optimizer, state)
            assert_same_bits(train(model, optimizer, range(2, 4)), end)


def test_flat_state_dicts_load(ranks: Ranks) -> None:
    ranks.run(4, whole_states, "both", True)


def exported() -> None:
    """An AdamW goes on from a sharded CT_D run as it does from the same run of one process."""
    model, optimizer = made("fsdp", "compact")
    weights = train(model, optimizer, range(2))
    other = nn.ParameterDict(
        {name.replace(".", "_"): nn.Parameter(weight) for name, weight in weights.items()}
    )
    single, alone_optimizer = alone("compact")
    single.load_state_dict({name: Model().state_dict()[name] for name in weights})
    train(single, alone_optimizer, range(2))
    expected = alone_optimizer.to_adamw_state_dict()["state"]
    for number, state in optimizer.to_adamw_state_dict()["state"].items():
        assert_same_bits({name: whole(each) for name, each in state.items()}, expected[number])
    adamw = torch.optim.AdamW(model.parameters(), foreach=False)
    adamw.load_state_dict(optimizer.to_adamw_state_dict())
    assert len(other) == len(weights)


def test_adamw_takes_the_state_of_a_sharded_child(ranks: Ranks) -> None:
    ranks.run(2, exported)


class Dying(torch.distributed.checkpoint.FileSystemWriter):
    """The second rank is cut off in the middle of its file."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        if torch.distributed.get_rank() == 1:
            Path(self.path, "__1_0.distcp").write_bytes(b"half")
            raise OSError("no space left on device")
        return super().write_data(plan, planner)


def cut_off(folder: str) -> None:
    """A save that fails on one rank, over a checkpoint and beside it: the earlier one stands."""
    model, optimizer = made("fsdp", "compact")
    train(model, optimizer, range(1))
    last = Path(folder) / "last"
    torch.distributed.checkpoint.save(states_of(model, optimizer), checkpoint_id=str(last))
    before = {name: whole(value).clone() for name, value in model.state_dict().items()}
    train(model, optimizer, range(1, 2))
    beside = Path(folder) / "next"
    with pytest.raises(torch.distributed.checkpoint.api.CheckpointException):
        torch.distributed.checkpoint.save(
            states_of(model, optimizer), storage_writer=Dying(str(beside))
        )
    states = states_of(model, optimizer)
    with pytest.raises(torch.distributed.checkpoint.api.CheckpointException, match="metadata"):
        torch.distributed.checkpoint.load(states, checkpoint_id=str(beside))
    torch.distributed.checkpoint.load(states, checkpoint_id=str(last))
    assert_same_bits({name: whole(value) for name, value in states["model"].items()}, before)


def test_a_save_that_fails_on_one_rank_leaves_nothing_that_loads(
    ranks: Ranks, tmp_path: Path
) -> None:
    ranks.run(2, cut_off, str(tmp_path))


class Killed(torch.distributed.checkpoint.FileSystemWriter):
    """The second rank's process ends in the middle of its file."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        if torch.distributed.get_rank() == 1:
            Path(self.path, "__1_0.distcp").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write_data(plan, planner)


def killed_half_way(rank: int, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model, optimizer = made("fsdp", "compact")
    train(model, optimizer, range(1))
    torch.distributed.checkpoint.save(states_of(model, optimizer), checkpoint_id=f"{folder}/last")
    train(model, optimizer, range(1, 2))
    with pytest.raises(Exception, match=r"(?i)connection|peer|rank"):
        torch.distributed.checkpoint.save(
            states_of(model, optimizer), storage_writer=Killed(f"{folder}/next")
        )


def continued(folder: str) -> None:
    """One rank goes on where two stopped."""
    model, optimizer = made("fsdp", "compact")
    states = states_of(model, optimizer)
    with pytest.raises(torch.distributed.checkpoint.api.CheckpointException, match="metadata"):
        torch.distributed.checkpoint.load(states, checkpoint_id=f"{folder}/next")
    torch.distributed.checkpoint.load(states, checkpoint_id=f"{folder}/last")
    set_optimizer_state_dict(model, optimizer, states["optimizer"])
    assert optimizer.state[next(model.parameters())]["step"] == 1


def test_a_killed_rank_leaves_nothing_that_loads(ranks: Ranks, tmp_path: Path) -> None:
    processes = torch.multiprocessing.start_processes(
        killed_half_way, (str(tmp_path),), nprocs=2, join=False, start_method="spawn"
    ).processes
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    assert (tmp_path / "next" / "__1_0.distcp").read_bytes() == b"half"
    ranks.run(1, continued, str(tmp_path))


LARGE = 2**20


def peak_of_a_save() -> tuple[int, int]:
    """Bytes that ``state_dict`` holds at its peak beyond what it returns, of many equal parameters."""
    from benchmarks.peak_memory import tensor_peak

    world = torch.distributed.get_world_size()
    model = nn.ParameterList(torch.zeros(LARGE // 256, 256) for _ in range(6))
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    child = ChildMask.from_dense(
        {str(n): torch.arange(LARGE).reshape(-1, 256) % 7 == 0 for n in range(6)}
    )
    optimizer = FusedChildAdamW(model.named_parameters(), child_mask=child, **BASE)
    kept: list[Any] = []
    peak = tensor_peak(lambda: kept.append(optimizer.state_dict()), torch.device("cpu"))
    returned = sum(
        value.to_local().nbytes
        for state in kept[0]["state"].values()
        for value in state.values()
        if isinstance(value, DTensor)
    )
    return peak, returned


def test_a_save_needs_one_dense_parameter_beside_what_it_returns(ranks: Ranks) -> None:
    dense_state = 8 * LARGE
    for peak, returned in ranks.run(2, peak_of_a_save):
        assert returned < peak <= returned + dense_state
