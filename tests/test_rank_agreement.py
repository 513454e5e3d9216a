"""Ranks that train together cannot diverge: one seed, one child, and what differs is named on all of them."""

from __future__ import annotations

import copy
import pickle
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from childtune_kernels import ChildMask, FusedChildAdamW, rank_values

from .cases import assert_same_bits
from .ranks import Ranks

WORLD = 2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def mask_of(model: nn.Module, seed: int = 3) -> ChildMask:
    generator = torch.Generator().manual_seed(seed)
    return ChildMask.from_dense(
        {
            name: torch.rand(parameter.shape, generator=generator) < 0.4
            for name, parameter in model.named_parameters()
        }
    )


def with_gradients(model: nn.Module) -> nn.Module:
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 + number)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
    }


def trained_under_ddp() -> tuple[dict[str, Tensor], int]:
    """Weights, and the seed used: dropout and batches differ between ranks, generators too."""
    rank = torch.distributed.get_rank()
    model = DistributedDataParallel(network())
    torch.manual_seed(50 + rank)
    optimizer = FusedChildAdamW(model.named_parameters(), lr=0.1, reserve_p=0.3)
    for _ in range(3):
        tokens = torch.randn(3 + rank, 6)
        model(tokens).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model), optimizer.param_groups[0]["seed"]


def test_without_a_seed_all_ranks_take_that_of_the_first(ranks: Ranks) -> None:
    results = ranks.run(3, trained_under_ddp)
    for found, seed in results:
        assert seed == 50
        assert_same_bits(found, results[0][0])


def trained_with_given_gradients(wrapped: bool) -> dict[str, Tensor]:
    model: nn.Module = network()
    if wrapped:
        model = DistributedDataParallel(model)
    optimizer = FusedChildAdamW(model.named_parameters(), lr=0.1, reserve_p=0.3, seed=9)
    for _ in range(2):
        with_gradients(model)
        optimizer.step()
    return weights(model)


def test_wrappers_and_ranks_change_no_mask(ranks: Ranks) -> None:
    alone = trained_with_given_gradients(wrapped=False)
    for found in ranks.run(WORLD, trained_with_given_gradients, True):
        assert_same_bits(found, alone)


def _seed(model: nn.Module) -> FusedChildAdamW:
    return FusedChildAdamW(model.named_parameters(), reserve_p=0.3, seed=8)


def _reserve_p(model: nn.Module) -> FusedChildAdamW:
    return FusedChildAdamW(model.named_parameters(), reserve_p=0.4, seed=7)


def _mask(model: nn.Module) -> FusedChildAdamW:
    mask = mask_of(model)
    return FusedChildAdamW(model.named_parameters(), reserve_p=0.3, child_mask=mask, seed=7)


def _fewer(model: nn.Module) -> FusedChildAdamW:
    return FusedChildAdamW(list(model.named_parameters())[:-1], reserve_p=0.3, seed=7)


def _another_group(model: nn.Module) -> FusedChildAdamW:
    first, *others = model.named_parameters()
    groups: list[dict[str, Any]] = [{"params": [first], "weight_decay": 0.5}, {"params": others}]
    return FusedChildAdamW(groups, reserve_p=0.3, seed=7)


def _another_start(model: nn.Module) -> FusedChildAdamW:
    optimizer = usual(model)
    for state in optimizer.state.values():
        state["step"] += 2
    return optimizer


def usual(model: nn.Module) -> FusedChildAdamW:
    return FusedChildAdamW(model.named_parameters(), reserve_p=0.3, seed=7)


DIFFERENT: dict[str, tuple[Callable[[nn.Module], FusedChildAdamW], str]] = {
    "seed": (_seed, "seed=8 on rank 1, 7 on rank 0"),
    "reserve_p": (
        _reserve_p,
        "reserve_p of 0.weight, 0.bias, 2.weight and 1 more is 0.4 on rank 1 and 0.3 on rank 0",
    ),
    "mask": (
        _mask,
        "the child_mask of 0.weight, 0.bias, 2.weight and 1 more is given on rank 1 and none on rank 0",
    ),
    "parameters": (_fewer, "1 parameters of rank 0 are missing on rank 1: 2.bias"),
    "groups": (_another_group, "weight_decay of 0.weight.* is 0.5 on rank 1 and 0.01 on rank 0"),
    "steps": (_another_start, "steps of 0.weight.* is 2 on rank 1 and 0 on rank 0"),
}


def refused_where_ranks_differ() -> dict[str, str]:
    """What the first step says of every difference, and that it wrote nothing; then without one it steps."""
    said = {}
    for what, (make, _) in DIFFERENT.items():
        model = with_gradients(network())
        before = weights(model)
        optimizer = (make if torch.distributed.get_rank() else usual)(model)
        with pytest.raises(ValueError, match="ranks that train together differ") as caught:
            optimizer.step()
        said[what] = str(caught.value)
        assert_same_bits(weights(model), before)
        if what == "reserve_p":
            optimizer.param_groups[0]["reserve_p"] = 0.3
            optimizer.step()
            assert not torch.equal(weights(model)["0.weight"], before["0.weight"])
    return said


def test_what_differs_is_named_on_all_ranks(ranks: Ranks) -> None:
    first, second = ranks.run(WORLD, refused_where_ranks_differ)
    assert first == second
    for what, (_, words) in DIFFERENT.items():
        assert re.search(words, first[what]), what


def sharded_with_different_masks() -> str:
    model = network()
    mask = mask_of(model, seed=torch.distributed.get_rank())
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    optimizer = FusedChildAdamW(model.named_parameters(), child_mask=mask, seed=1)
    with pytest.raises(ValueError, match="ranks that train together differ") as caught:
        optimizer.step()
    return str(caught.value)


def test_masks_that_differ_are_found_in_parts_too(ranks: Ranks) -> None:
    for said in ranks.run(WORLD, sharded_with_different_masks):
        assert (
            "the child_mask of 0.weight, 0.bias, 2.weight and 1 more on rank 1 is another" in said
        )
        assert "FisherAccumulator.reduce()" in said


def placed_differently() -> str:
    """Each rank has cut its part from a whole mask of its own."""
    model = network()
    mask = mask_of(model, seed=torch.distributed.get_rank())
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    named = list(model.named_parameters())
    optimizer = FusedChildAdamW(named, child_mask=mask.placed(named), seed=1)
    with pytest.raises(ValueError, match="ranks that train together differ") as caught:
        optimizer.step()
    same = mask_of(model, seed=5).placed(named)
    FusedChildAdamW(named, child_mask=same, seed=1).step()
    return str(caught.value)


def test_parts_of_different_masks_are_found(ranks: Ranks) -> None:
    for said in ranks.run(WORLD, placed_differently):
        assert (
            "the child_mask of 0.weight, 0.bias, 2.weight and 1 more on rank 1 is another" in said
        )


def group_of_some() -> list[str]:
    """A process_group that has some of the ranks of a mesh, or this rank alone."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    said = []
    for dim in ("dp", "tp"):
        model = network()
        fully_shard(model, mesh=mesh["dp"])
        named = list(model.named_parameters())
        optimizer = FusedChildAdamW(named, process_group=mesh[dim].get_group())
        if dim == "dp":
            with_gradients(model)
            optimizer.step()
            continue
        with pytest.raises(ValueError, match="process_group= has ranks") as caught:
            optimizer.step()
        said.append(str(caught.value))
    alone = torch.distributed.new_subgroups(1)[0]
    with pytest.raises(ValueError, match="process_group= has ranks") as caught:
        FusedChildAdamW(named, process_group=alone).step()
    return [*said, str(caught.value)]


def test_a_group_of_some_of_a_meshs_ranks_is_refused(ranks: Ranks) -> None:
    for of_two, of_one in ranks.run(4, group_of_some):
        assert "parameter 0.weight, a DTensor" in of_two
        assert "a group of all ranks that train together" in of_one


def asked_again() -> list[str]:
    """After a state is loaded, a mask set or a group added, what differs is found once more."""
    rank = torch.distributed.get_rank()
    said = []
    for change in ("load", "mask", "group"):
        model = with_gradients(network())
        optimizer = usual(model)
        optimizer.step()
        if change == "load":
            state = optimizer.state_dict()
            state["param_groups"][0]["seed"] += rank
            optimizer.load_state_dict(state)
        elif change == "mask":
            optimizer.set_child_mask(mask_of(model, seed=rank))
        else:
            extra = nn.Parameter(torch.ones(3))
            optimizer.add_param_group({"params": [("extra", extra)], "lr": 0.1 + rank})
        with pytest.raises(ValueError, match="ranks that train together differ") as caught:
            optimizer.step()
        said.append(str(caught.value))
    return said


def test_ranks_are_asked_again_after_a_change(ranks: Ranks) -> None:
    for loaded, masked, added in ranks.run(WORLD, asked_again):
        assert "seed=8 on rank 1, 7 on rank 0" in loaded
        assert "the child_mask of 0.weight, 0.bias, 2.weight and 1 more on rank 1" in masked
        assert "lr of extra is 1.1 on rank 1 and 0.1 on rank 0" in added


def groups_apart() -> list[Any]:
    """Ranks 0 and 1 train together, rank 2 alone with a seed of its own, rank 3 has no optimizer."""
    members = [[0, 1], [2], [3]]
    groups = [torch.distributed.new_group(each) for each in members]
    rank = torch.distributed.get_rank()
    if rank == 3:
        return []
    torch.manual_seed(rank)
    model = with_gradients(network())
    group = next(group for group, each in zip(groups, members, strict=True) if rank in each)
    optimizer = FusedChildAdamW(
        model.named_parameters(), reserve_p=0.5, process_group=group, max_grad_norm=1.0
    )
    torch.manual_seed(rank)
    drawn = torch.initial_seed()
    optimizer.defaults["seed"] = optimizer.param_groups[0]["seed"] = drawn
    optimizer.step()
    copied = copy.deepcopy(optimizer)
    copied.step()
    assert pickle.loads(pickle.dumps(optimizer)).param_groups[0]["reserve_p"] == 0.5
    return [optimizer.param_groups[0]["seed"], float(optimizer.last_grad_norm)]  # type: ignore[arg-type]


def test_only_ranks_of_the_process_group_are_asked(ranks: Ranks) -> None:
    first, second, third, nobody = ranks.run(4, groups_apart)
    assert [first[0], second[0], third[0]] == [0, 0, 2]
    assert first[1] == second[1] == third[1] > 0
    assert nobody == []


EMBEDDING = torch.arange(12.0).reshape(4, 3)


def stages_of_a_pipeline(aliases: dict[str, str]) -> tuple[dict[str, Tensor], float]:
    """Two stages with a weight that both hold, under two names, and a layer each; a third rank idles."""
    rank = torch.distributed.get_rank()
    group = torch.distributed.new_group([0, 1])
    if rank == 2:
        return {}, 0.0
    torch.manual_seed(rank)
    shared = nn.Parameter(EMBEDDING.clone())
    own = nn.Parameter(torch.ones(5))
    names = [("embed.weight", "first.bias"), ("head.weight", "last.bias")][rank]
    shared.grad, own.grad = torch.full((4, 3), 2.0), torch.full((5,), 1.0 + rank)
    optimizer = FusedChildAdamW(
        zip(names, (shared, own), strict=True), lr=0.1, reserve_p=0.5, aliases=aliases,
        max_grad_norm=1.0, process_group=group,
    )  # fmt: skip
    optimizer.step()
    norm = float(optimizer.last_grad_norm)  # type: ignore[arg-type]
    return dict(zip(names, (shared.detach(), own.detach()), strict=True)), norm


def test_a_weight_of_two_stages_is_one_weight(ranks: Ranks) -> None:
    (first, norm), (last, same_norm), _ = ranks.run(
        3, stages_of_a_pipeline, {"module.head.weight": "embed.weight"}
    )
    assert torch.equal(first["embed.weight"], last["head.weight"])
    assert 0 < (first["embed.weight"] != EMBEDDING * (1 - 0.1 * 0.01)).sum() < 12
    # The shared weight once, and both of the others.
    assert norm == same_norm == pytest.approx((12 * 4 + 5 * 1 + 5 * 4) ** 0.5)


def test_without_an_alias_they_are_two(ranks: Ranks) -> None:
    (first, norm), (last, _) = ranks.run(WORLD, stages_of_a_pipeline, {})
    assert not torch.equal(first["embed.weight"], last["head.weight"])
    assert norm == pytest.approx((2 * 12 * 4 + 5 * 1 + 5 * 4) ** 0.5)


def wrong_alias(aliases: dict[str, str]) -> str:
    with pytest.raises(ValueError, match="aliases=") as caught:
        stages_of_a_pipeline(aliases)
    return str(caught.value)


@pytest.mark.parametrize(
    ("aliases", "missing"),
    [
        ({"heed.weight": "embed.weight"}, "heed.weight"),
        ({"head.weight": "embedding.weight"}, "embedding.weight"),
    ],
)
def test_an_alias_of_nothing_is_an_error_on_all_ranks(
    ranks: Ranks, aliases: dict[str, str], missing: str
) -> None:
    for said in ranks.run(WORLD, wrong_alias, aliases):
        assert f"no parameter of any rank is called {missing!r}" in said


def test_an_alias_in_one_process() -> None:
    weight = nn.Parameter(EMBEDDING.clone())
    weight.grad = torch.ones(4, 3)
    optimizer = FusedChildAdamW([("embed.weight", weight)], aliases={"head.weight": "embed.weight"})
    optimizer.step()
    assert optimizer.param_groups[0]["param_names"] == ["embed.weight"]
    optimizer = FusedChildAdamW([("embed.weight", weight)], aliases={"head.weight": "embedding"})
    before = weight.detach().clone()
    with pytest.raises(ValueError, match="no parameter of any rank is called 'embedding'"):
        optimizer.step()
    assert torch.equal(weight, before)


def test_a_rank_that_waits_says_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings(record=True) as caught, rank_values.said_when_late():
        pass
    assert caught == []
    monkeypatch.setattr(rank_values, "PATIENCE_S", 0.02)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with rank_values.said_when_late():
            time.sleep(0.3)
    assert ["must call it" in str(each.message) for each in caught] == [True]


def one_comes_late() -> list[str]:
    """What the first rank is told while the second one is busy with something else."""
    mesh = init_device_mesh("cpu", (2,))
    mask = ChildMask.from_dense({"w": distribute_tensor(torch.ones(4, 3) > 0, mesh, [Shard(0)])})
    optimizer = FusedChildAdamW([("w", nn.Parameter(torch.ones(3)))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(rank_values, "PATIENCE_S", 0.05)
        for collective in (mask.density, mask.gather, optimizer.step):
            if torch.distributed.get_rank():
                time.sleep(0.5)
            collective()
    return [str(each.message).split(" ")[0] for each in caught]


def test_the_call_that_waits_is_named(ranks: Ranks) -> None:
    called = ["density()", "gather()", "guarded_step()"]
    first, second = ranks.run(2, one_comes_late)
    assert [name.rsplit(".", 1)[-1] for name in first] == called
    assert second == []
