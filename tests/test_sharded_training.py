"""Models under FSDP2, tensor parallelism and both are trained as one device trains them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from childtune_kernels import FusedChildAdamW, ops, random_child, sharding

from .cases import assert_same_bits
from .ranks import Ranks

OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "reserve_p": 0.3, "seed": 7}
STEPS = 3


class Model(nn.Module):
    """Sizes that two, three and four ranks part unevenly; ``idle`` gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(10, 12)
        self.norm = nn.LayerNorm(12)
        self.down = nn.Linear(12, 3)
        self.idle = nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.down(torch.relu(self.norm(self.up(tokens))))
        return hidden


def tokens_of(step: int, rank: int = 0) -> Tensor:
    return torch.randn(4, 10, generator=torch.Generator().manual_seed(100 * rank + step))


def fsdp(offload: bool = False) -> nn.Module:
    model = Model()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    policy: dict[str, Any] = {}
    if offload:
        policy["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for layer in (model.up, model.norm):
        fully_shard(layer, mesh=mesh, **policy)
    fully_shard(model, mesh=mesh, **policy)
    return model


def tensor_parallel() -> nn.Module:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    plan = {"up": ColwiseParallel(output_layouts=Shard(0)), "norm": SequenceParallel(sequence_dim=0),
            "down": RowwiseParallel(input_layouts=Shard(0))}  # fmt: skip
    return parallelize_module(Model(), mesh, plan)


def both() -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = Model()
    model.norm = nn.Identity()  # type: ignore[assignment]
    parallelize_module(model, mesh["tp"], plan)
    fully_shard(model, mesh=mesh["dp"])
    return model


ENGINES = {"fsdp": fsdp, "tensor parallel": tensor_parallel, "both": both}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained_beside_a_whole_one(engine: str, *arguments: Any) -> list[str]:
    """Train under an engine, and the whole weights with the whole gradients; the placements seen."""
    model = ENGINES[engine](*arguments)
    named = dict(model.named_parameters())
    copies = {name: nn.Parameter(whole(value.detach()).clone()) for name, value in named.items()}
    optimizer = FusedChildAdamW(model.named_parameters(), **OPTIONS)
    of_copies = FusedChildAdamW(copies.items(), **OPTIONS)
    rank = torch.distributed.get_rank()
    seen = []
    for step in range(STEPS):
        # Ranks of tensor parallelism have the same batch.
        tokens = tokens_of(step, rank if engine == "fsdp" else 0)
        model(tokens).square().sum().backward()
        for name, parameter in named.items():
            gradient = parameter.grad
            copies[name].grad = None if gradient is None else whole(gradient).clone()
            if gradient is not None:
                seen.append(str(getattr(gradient, "placements", None)))
        optimizer.step()
        of_copies.step()
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in named.values())
    assert_same_bits({name: whole(value.detach()) for name, value in named.items()}, copies)
    return seen


@pytest.mark.parametrize(
    ("engine", "world"),
    [
        ("fsdp", 2),
        ("fsdp", 3),
        ("fsdp", 4),
        ("tensor parallel", 2),
        ("tensor parallel", 4),
        ("both", 4),
    ],
)
def test_an_engine_trains_as_one_device_does(ranks: Ranks, engine: str, world: int) -> None:
    seen = ranks.run(world, trained_beside_a_whole_one, engine)
    if engine == "tensor parallel":
        assert any("Partial" in placements for placements in seen[0])
    else:
        assert any("Shard" in placements for placements in seen[0])


def test_offloaded_parts_are_stepped_on_the_cpu(ranks: Ranks) -> None:
    ranks.run(2, trained_beside_a_whole_one, "fsdp", True)


def released() -> None:
    models = [fsdp(), fsdp()]
    optimizers = [FusedChildAdamW(model.named_parameters(), **OPTIONS) for model in models]
    optimizers[0].release_gradients()
    for step in range(STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(tokens_of(step, torch.distributed.get_rank())).square().sum().backward()
            if model is models[0]:
                assert all(parameter.grad is None for parameter in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
    found, expected = (
        {name: whole(value.detach()) for name, value in model.named_parameters()}
        for model in models
    )
    assert_same_bits(found, expected)


def test_gradients_are_released_as_the_engine_reduces_them(ranks: Ranks) -> None:
    ranks.run(3, released)


def saved(path: str) -> dict[str, Tensor]:
    model = fsdp()
    optimizer = FusedChildAdamW(model.named_parameters(), **OPTIONS)
    _train(model, optimizer, range(2))
    torch.distributed.checkpoint.save(_states(model, optimizer), checkpoint_id=path)
    _train(model, optimizer, range(2, 4))
    return {name: whole(value.detach()) for name, value in model.named_parameters()}


def resumed(path: str) -> dict[str, Tensor]:
    model = fsdp()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer = FusedChildAdamW(model.named_parameters(), **{**OPTIONS, "seed": 1})
    states = _states(model, optimizer)
    torch.distributed.checkpoint.load(states, checkpoint_id=path)
    set_optimizer_state_dict(model, optimizer, states["optimizer"])
    _train(model, optimizer, range(2, 4))
    return {name: whole(value.detach()) for name, value in model.named_parameters()}


def _states(model: nn.Module, optimizer: FusedChildAdamW) -> dict[str, Any]:
    before = [parameter.detach().clone() for parameter in model.parameters()]
    states = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    after = [parameter.detach() for parameter in model.parameters()]
    assert all(torch.equal(whole(a), whole(b)) for a, b in zip(before, after, strict=True))
    return states


def _train(model: nn.Module, optimizer: FusedChildAdamW, steps: range) -> None:
    """The same batch on every rank: averages of equal gradients are equal on any number of them."""
    for step in steps:
        for name, parameter in model.named_parameters():
            gradient = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(len(name) + 100 * step)
            )
            assert isinstance(parameter, DTensor)
            parameter.grad = distribute_tensor(
                gradient, parameter.device_mesh, parameter.placements
            )
        optimizer.step()


@pytest.mark.parametrize(("before", "after"), [(2, 4), (3, 1), (1, 3)])
def test_a_run_goes_on_with_other_ranks(
    ranks: Ranks, tmp_path: Path, before: int, after: int
) -> None:
    expected = ranks.run(before, saved, str(tmp_path / "run"))
    for found in ranks.run(after, resumed, str(tmp_path / "run")):
        assert_same_bits(found, expected[0])


def overflowing(skip_nonfinite: bool) -> tuple[bool, bool]:
    """A step whose gradient is infinite in the last rank's part alone: unchanged weights, and skipped."""
    model = fsdp()
    scaler = torch.amp.GradScaler("cpu", enabled=not skip_nonfinite, init_scale=4.0)
    options = {**OPTIONS, "skip_nonfinite": skip_nonfinite}
    optimizer = FusedChildAdamW(model.named_parameters(), **options)
    before = {name: whole(value.detach()).clone() for name, value in model.named_parameters()}
    scaler.scale(model(tokens_of(0)).square().sum()).backward()
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        gradient: Any = model.up.weight.grad  # type: ignore[union-attr]
        gradient._local_tensor[-1, -1] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    now = {name: whole(value.detach()) for name, value in model.named_parameters()}
    unchanged = all(torch.equal(now[name], before[name]) for name in now)
    return unchanged, bool(optimizer.step_was_skipped)


@pytest.mark.parametrize("skip_nonfinite", [False, True], ids=["scaler", "skip_nonfinite"])
def test_a_step_is_skipped_on_all_ranks_or_on_none(ranks: Ranks, skip_nonfinite: bool) -> None:
    assert ranks.run(2, overflowing, skip_nonfinite) == [(True, True)] * 2


def made_too_early() -> None:
    """fully_shard puts other parameters into the model than the optimizer has."""
    model = Model()
    optimizer = FusedChildAdamW(model.named_parameters(), **OPTIONS)
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    model(tokens_of(0)).square().sum().backward()
    with pytest.warns(UserWarning, match="no gradient at any of 8 parameters.*fully_shard"):
        optimizer.step()


def test_an_optimizer_made_before_the_model_is_sharded_says_so(ranks: Ranks) -> None:
    ranks.run(2, made_too_early)


def summary_of_parts() -> str:
    """Densities, bytes and totals are those of what this rank holds."""
    model = fsdp()
    named = list(model.named_parameters())
    mask = random_child(dict(named), 0.25, seed=1)
    optimizer = FusedChildAdamW(named, child_mask=mask)
    rows = {line.split("  ")[0]: line.split() for line in optimizer.summary().splitlines()}
    held = sum(sharding.local_of(weight).numel() for _, weight in named)
    kept = sum(ops.count_mask(words) for words in mask.words.values())
    assert rows["this rank's"][2:4] == [f"{held:,}", f"{kept / held:.4f}"]
    part = ops.count_mask(mask.words["up.weight"]) / sharding.local_of(model.up.weight).numel()  # type: ignore[union-attr, arg-type]
    assert rows["up.weight"][1:4] == ["12x10", "1", f"{part:.4f}"]
    return optimizer.summary()


def test_a_summary_of_parts_is_this_ranks(ranks: Ranks) -> None:
    ranks.run(3, summary_of_parts)
