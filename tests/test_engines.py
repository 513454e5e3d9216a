"""Engines that take an optimizer's parameters into their own hands: they work, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import distribute_tensor

from childtune_kernels import FusedChildAdamW, random_child

from .cases import assert_same_bits
from .ranks import Ranks

OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "reserve_p": 0.5, "seed": 7}


class Model(nn.Module):
    """Two layers of sizes that two and three ranks part unevenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(10, 13)
        self.down = nn.Linear(13, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.down(torch.relu(self.up(tokens)))
        return hidden


def refusal_of(action: Callable[[], object]) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return "no error"


def with_backward(model: nn.Module) -> nn.Module:
    model(torch.ones(2, 10)).square().sum().backward()
    return model


# ZeroRedundancyOptimizer


def zero_redundancy_refusals() -> list[str]:
    model = Model()
    names, weights = zip(*model.named_parameters(), strict=True)
    named = [{"params": list(weights), "param_names": list(names)}]
    ways: list[Any] = [
        (weights, OPTIONS),
        (named, OPTIONS),
        (weights, {**OPTIONS, "reserve_p": 1.0}),
        (weights, {**OPTIONS, "parameters_as_bucket_view": True}),
        (weights, {**OPTIONS, "overlap_with_ddp": True}),
    ]
    return [
        refusal_of(lambda way=way: ZeroRedundancyOptimizer(way[0], FusedChildAdamW, **way[1]))  # type: ignore[misc]
        for way in ways
    ]


@pytest.mark.parametrize("world", [1, 2])
def test_zero_redundancy_optimizer_is_refused_on_every_rank(ranks: Ranks, world: int) -> None:
    for of_rank in ranks.run(world, zero_redundancy_refusals):
        assert all("fully_shard" in refusal for refusal in of_rank[:-1]), of_rank
        assert "functional optimizer" in of_rank[-1]  # torch's own refusal


# FullyShardedDataParallel (FSDP1)


def flattened_refusals() -> list[str]:
    device = torch.device("cpu")
    refusals = []
    for use_orig_params in (True, False):
        model = FullyShardedDataParallel(Model(), use_orig_params=use_orig_params, device_id=device)
        refusals.append(
            refusal_of(lambda model=model: FusedChildAdamW(model.named_parameters(), **OPTIONS))  # type: ignore[misc]
        )
    inner = Model()
    optimizer = FusedChildAdamW(inner.named_parameters(), **OPTIONS)
    with_backward(FullyShardedDataParallel(inner, use_orig_params=True, device_id=device))
    refusals.append(refusal_of(optimizer.step))
    return refusals


def test_flattened_parameters_are_refused(ranks: Ranks) -> None:
    for refusals in ranks.run(2, flattened_refusals):
        assert len(refusals) == 3
        assert all("fully_shard" in refusal for refusal in refusals), refusals
        assert "up.weight" in refusals[0]


# DeepSpeed (tests/engines/deepspeed_zero.py has it itself)


@pytest.mark.parametrize("single", [False, True], ids=["4 tensors", "1 tensor"])
def test_flat_copies_in_the_place_of_parameters_are_refused(single: bool) -> None:
    model: nn.Module = nn.Linear(10, 3, bias=False) if single else Model()
    optimizer = FusedChildAdamW(model.named_parameters(), **OPTIONS)
    group = optimizer.param_groups[0]
    flat = torch.cat([weight.detach().flatten() for weight in group["params"]])
    before = flat.clone()
    group["params"] = [nn.Parameter(flat)]
    group["params"][0].grad = torch.ones_like(flat)
    what = "state of weight is missing" if single else "1 parameters and 4 param_names"
    with pytest.raises(ValueError, match=rf"{what}.*DeepSpeed.*fully_shard"):
        optimizer.step()
    assert torch.equal(flat, before)


def flattened_on_ranks() -> list[str]:
    """As ZeRO 1: every rank has its slice of the flat copy."""
    refusals = []
    for model in (nn.Linear(10, 4, bias=False), Model()):
        optimizer = FusedChildAdamW(model.named_parameters(), **options_of("CT_D", model))
        group = optimizer.param_groups[0]
        flat = torch.cat([weight.detach().flatten() for weight in group["params"]])
        slices = flat.tensor_split(torch.distributed.get_world_size())
        group["params"] = [nn.Parameter(slices[torch.distributed.get_rank()].clone())]
        group["params"][0].grad = torch.ones_like(group["params"][0])
        refusals.append(refusal_of(optimizer.step))
    return refusals


def test_slices_of_flat_copies_are_refused_on_every_rank(ranks: Ranks) -> None:
    for single, several in ranks.run(2, flattened_on_ranks):
        assert "state of weight is missing" in single
        assert "1 parameters and 4 param_names" in several
        assert all("fully_shard" in refusal for refusal in (single, several))


def test_a_flat_copy_of_one_vector_is_refused() -> None:
    weight = nn.Parameter(torch.ones(12))
    optimizer = FusedChildAdamW([("weight", weight)], **OPTIONS)
    optimizer.param_groups[0]["params"] = [nn.Parameter(weight.detach()[:6].clone())]
    optimizer.param_groups[0]["params"][0].grad = torch.ones(6)
    with pytest.raises(ValueError, match=r"DeepSpeed.*fully_shard"):
        optimizer.step()


# Parameters exchanged for DTensors after the optimizer was built, as accelerate does with FSDP2


def exchange(model: nn.Module, optimizer: FusedChildAdamW) -> None:
    """Shard the model, and write its DTensors into the optimizer's groups."""
    before = dict(model.named_parameters())
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    after = dict(model.named_parameters())
    exchanged = {before[name]: after[name] for name in before}
    for group in optimizer.param_groups:
        group["params"] = [exchanged[parameter] for parameter in group["params"]]


def options_of(kind: str, model: nn.Module) -> dict[str, Any]:
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    mask = random_child(shapes, 0.5, seed=3)
    return {
        "CT_F": OPTIONS,
        "CT_D": {**OPTIONS, "child_mask": mask},
        "CT_D, dense": {**OPTIONS, "child_mask": mask, "child_state": "dense"},
        "bf16": {**OPTIONS, "child_mask": mask},
        "fp32 masters": {**OPTIONS, "master_weight": "fp32", "child_mask": mask},
        "released": OPTIONS,
        "added": OPTIONS,
    }[kind]


def trained(kind: str, exchanged: bool) -> tuple[dict[str, Tensor], int]:
    """This rank's weights and bytes of state, of an optimizer built before or after sharding."""
    model = Model().to(torch.bfloat16 if kind in ("bf16", "fp32 masters") else torch.float32)
    options = options_of(kind, model)
    if exchanged:
        optimizer = FusedChildAdamW(model.named_parameters(), **options)
        exchange(model, optimizer)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
        optimizer = FusedChildAdamW(model.named_parameters(), **options)
    if kind == "CT_F":
        assert len(optimizer.state_dict()["state"]) == 4
    if kind == "released":
        optimizer.release_gradients()
    if kind == "added":
        optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(3)))]})
    rank = torch.distributed.get_rank()
    for step in range(3):
        tokens = torch.randn(4, 10, generator=torch.Generator().manual_seed(10 * step + rank))
        model(tokens.to(model.up.weight.dtype)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: value.to_local().clone() for name, value in model.named_parameters()}  # type: ignore[attr-defined]
    return {name: value.detach() for name, value in weights.items()}, optimizer.state_bytes()


KINDS = ("CT_F", "CT_D", "CT_D, dense", "bf16", "fp32 masters", "released", "added")


def exchanged_like_built_after() -> None:
    for kind in KINDS:
        (found, found_bytes), (expected, expected_bytes) = trained(kind, True), trained(kind, False)
        assert_same_bits(found, expected)
        assert found_bytes == expected_bytes, kind


def test_an_optimizer_built_before_sharding_trains_like_one_built_after(ranks: Ranks) -> None:
    ranks.run(2, exchanged_like_built_after)


def exchanges_that_are_refused() -> list[str]:
    stepped = with_backward(Model())
    optimizer = FusedChildAdamW(stepped.named_parameters(), **OPTIONS)
    optimizer.step()
    exchange(stepped, optimizer)
    refusals = [refusal_of(optimizer.step), refusal_of(optimizer.state_dict)]
    # A DTensor of another shape shards another parameter.
    model = Model()
    optimizer = FusedChildAdamW(model.named_parameters(), **OPTIONS)
    exchange(model, optimizer)
    group = optimizer.param_groups[0]
    first: Any = group["params"][0]
    other = nn.Parameter(distribute_tensor(torch.ones(13, 11), first.device_mesh, first.placements))
    group["params"] = [other, *group["params"][1:]]
    refusals.append(refusal_of(optimizer.step))
    return refusals


def test_other_exchanges_are_refused(ranks: Ranks) -> None:
    after_a_step, saved, other_shape = ranks.run(1, exchanges_that_are_refused)[0]
    assert "up.weight became a DTensor after 1 steps" in after_a_step
    assert saved == after_a_step
    assert "state of up.weight is missing" in other_shape
