"""State dicts in other groups: what counts by name, what by position, and what is refused."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from childtune_kernels import FusedChildAdamW
from childtune_kernels.saved_groups import continued
from tests.snapshots import assert_identical, identical, untouched, weights_and_state
from tests.test_state_dict import saved_and_loaded
from tests.test_state_dict_interchange import copied, outcome
from tests.toy_parameters import SHAPES, random_tensor, toy_mask, toy_parameters, train

Parameters = dict[str, Parameter]
StateDict = dict[str, Any]
BODY, HEAD = ("embedding.weight", "layer.weight"), ("layer.bias", "nothing", "scale")


def entries(parameters: Parameters, names: tuple[str, ...] = tuple(SHAPES)) -> Any:
    return [(name, parameters[name]) for name in names]


def in_two_groups(
    parameters: Parameters, body: dict[str, Any], head: dict[str, Any], **options: Any
) -> FusedChildAdamW:
    groups = [
        {"params": entries(parameters, BODY), **body},
        {"params": entries(parameters, HEAD), **head},
    ]
    return FusedChildAdamW(groups, **{"lr": 0.1, "seed": 1, **options})


def saved_in_two_groups(body: dict[str, Any], head: dict[str, Any]) -> StateDict:
    """A state dict whose groups differ in what is given; ``seed`` and keys of users, too."""
    parameters = toy_parameters()
    optimizer = in_two_groups(parameters, {}, {})
    train(optimizer, parameters, range(2))
    for group, options in zip(optimizer.param_groups, (body, head), strict=True):
        group.update(options)
    return saved_and_loaded(optimizer.state_dict())


DIFFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "weight_decay": ({"weight_decay": 0.1}, {"weight_decay": 0.0}, "0.1", "0.0"),
    "lr": ({"lr": 0.1}, {"lr": 0.2}, "0.1", "0.2"),
    "tensor lr": ({"lr": torch.tensor(0.5)}, {"lr": 0.25}, "tensor(0.5000)", "0.25"),
    "fp32 lr": ({"lr": torch.tensor(0.1)}, {"lr": 0.1}, "tensor(0.1000)", "0.1"),
    "betas": ({}, {"betas": (0.5, 0.999)}, "(0.9, 0.999)", "(0.5, 0.999)"),
    "reserve_p": ({"reserve_p": 0.5}, {}, "0.5", "1.0"),
    "seed": ({}, {"seed": 2}, "1", "2"),
    "convention": ({"convention": "original"}, {}, "'original'", "'torch'"),
    "initial_lr": ({"initial_lr": 0.1}, {"initial_lr": 0.2}, "0.1", "0.2"),
    "initial_lr of one": ({"initial_lr": 0.1}, {}, "0.1", "nothing"),
    "tag of the other": ({}, {"tag": None}, "nothing", "None"),
    "tags": ({"tag": [1, 2]}, {"tag": [1, 3]}, "[1, 2]", "[1, 3]"),
    "tensors": ({"tag": torch.ones(1)}, {"tag": torch.zeros(1)}, "tensor([1.])", "tensor([0.])"),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_one_group_cannot_take_two_values(what: str) -> None:
    body, head, first, second = DIFFERENCES[what]
    saved = saved_in_two_groups(body, head)
    name = next(iter({**body, **head}))
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.items(), lr=0.3)
    train(optimizer, parameters, range(1))
    message = (
        f"{name} differs in the state dict: {first} for embedding.weight, {second} for layer.bias, which "
        f"are in one group now; put them into groups of their own, or make {name} one in the state dict's "
        "param_groups"
    )
    with untouched(optimizer), pytest.raises(ValueError, match=re.escape(message)):
        optimizer.load_state_dict(saved)
    # The remedies: groups of their own in any order, or one value.
    other = toy_parameters()
    apart = FusedChildAdamW(
        [{"params": entries(other, (label,))} for label in reversed(SHAPES)], lr=0.3
    )
    apart.load_state_dict(saved)
    for group, label in zip(apart.param_groups, reversed(SHAPES), strict=True):
        given = body if label in BODY else head
        for option, value in given.items():
            assert identical(group[option], value)
    for group in saved["param_groups"]:
        group[name] = saved["param_groups"][0].get(name, 3)
    optimizer.load_state_dict(saved)


AGREEING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a tensor and its number": ({"lr": torch.tensor(0.5)}, {"lr": 0.5}),
    "a tuple and a list": ({"betas": (0.5, 0.75)}, {"betas": [0.5, 0.75]}),
    "tensors of two types": (
        {"lr": torch.tensor(0.5)}, {"lr": torch.tensor([0.5], dtype=torch.float64).squeeze()},
    ),
    "the same key of the user": ({"tag": {"a": [1]}}, {"tag": {"a": [1]}}),
    "what has no effect": ({"fused": True, "foreach": None}, {"fused": None, "foreach": False}),
    "how an optimizer steps": ({"capturable": True, "child_state": "dense"}, {"capturable": False}),
}  # fmt: skip


@pytest.mark.parametrize("what", AGREEING)
def test_values_that_mean_the_same_agree(what: str) -> None:
    body, head = AGREEING[what]
    optimizer = FusedChildAdamW(toy_parameters().items(), lr=0.3)
    optimizer.load_state_dict(saved_in_two_groups(body, head))
    for name in body.keys() & {"lr", "betas", "tag"}:
        assert identical(optimizer.param_groups[0][name], body[name])
    assert optimizer.param_groups[0]["child_state"] == "auto"
    assert optimizer.param_groups[0]["capturable"] is False


@pytest.mark.parametrize("wrote", [(True, False), (False, True), (False, False)])
def test_a_group_has_written_outside_its_child_if_a_part_of_it_has(
    wrote: tuple[bool, bool],
) -> None:
    """save_child asks for it."""
    body, head = ({"wrote_outside_child": value} for value in wrote)
    optimizer = FusedChildAdamW(toy_parameters().items())
    optimizer.load_state_dict(saved_in_two_groups(body, head))
    assert optimizer.param_groups[0]["wrote_outside_child"] is any(wrote)


def saved_in_one_group(kind: type[Optimizer] = FusedChildAdamW, **options: Any) -> StateDict:
    parameters = toy_parameters()
    optimizer = kind(parameters.items(), **{"lr": 0.1, "weight_decay": 0.2, **options})
    train(optimizer, parameters, range(2))
    return saved_and_loaded(optimizer.state_dict())


@pytest.mark.parametrize("kind", [FusedChildAdamW, AdamW])
def test_differences_that_the_saved_group_undoes_draw_a_warning(kind: type[Optimizer]) -> None:
    """Who splits a group to let a part of it not decay must hear that all of it still does."""
    parameters = toy_parameters()
    optimizer = in_two_groups(
        parameters, {"weight_decay": 0.5}, {"weight_decay": 0.0, "lr": 0.7, "tag": 1}
    )
    with pytest.warns(UserWarning, match="groups differ no longer") as caught:
        optimizer.load_state_dict(saved_in_one_group(kind))
    message = str(caught[0].message)
    assert "weight_decay (0.5 with embedding.weight, 0.0 with layer.bias; now 0.2)" in message
    assert "lr (0.1 with embedding.weight, 0.7 with layer.bias; now 0.1)" in message
    assert "set what shall differ after loading" in message
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.2]
    assert optimizer.param_groups[1]["tag"] == 1
    optimizer.param_groups[1]["weight_decay"] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[1]["weight_decay"] == 0.0


def test_the_warning_as_an_error_leaves_no_trace() -> None:
    parameters = toy_parameters()
    optimizer = in_two_groups(parameters, {"weight_decay": 0.5}, {"weight_decay": 0.0})
    train(optimizer, parameters, range(1))
    with warnings.catch_warnings(), untouched(optimizer):
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="differ no longer"):
            optimizer.load_state_dict(saved_in_one_group())


def test_groups_that_stay_as_they_were_take_their_options_without_a_word() -> None:
    """As torch does: the saved run's weight decay counts, whatever the constructor was given."""
    saved = saved_in_two_groups({"weight_decay": 0.1}, {"weight_decay": 0.1})
    optimizer = in_two_groups(toy_parameters(), {"weight_decay": 0.5}, {"weight_decay": 0.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_tensors_in_groups_are_shared_as_the_groups_were() -> None:
    """Schedulers write into a group's tensor: two groups made of one must not share it."""
    lr = torch.tensor(0.5)
    one = saved_in_one_group(lr=lr)
    split = in_two_groups(toy_parameters(), {}, {})
    split.load_state_dict(one)
    split.param_groups[0]["lr"].fill_(0.25)
    assert float(split.param_groups[1]["lr"]) == 0.5
    again = FusedChildAdamW(toy_parameters().items())
    again.load_state_dict(one)
    again.param_groups[0]["lr"].fill_(0.25)
    assert float(one["param_groups"][0]["lr"]) == 0.5
    two = saved_in_two_groups({"lr": lr}, {"lr": lr})
    same = in_two_groups(toy_parameters(), {}, {})
    same.load_state_dict(two)
    assert same.param_groups[0]["lr"] is same.param_groups[1]["lr"]


def test_a_frozen_and_a_new_layer_are_named() -> None:
    saved = saved_in_one_group()
    parameters = toy_parameters()
    fewer = FusedChildAdamW(entries(parameters, BODY), lr=0.1)
    train(fewer, parameters, range(1))
    message = "labels differ: the optimizer lacks layer.bias, nothing, scale; give the optimizer these too"
    with untouched(fewer), pytest.raises(ValueError, match=message):
        fewer.load_state_dict(saved)
    names = {name: saved["param_groups"][0][name] for name in ("params", "param_names")}
    saved["param_groups"][0] |= {name: values[:2] for name, values in names.items()}
    fewer.load_state_dict(saved)  # as the message says
    new = {f"new.{index}": Parameter(torch.ones(2)) for index in range(6)}
    more = FusedChildAdamW([*entries(parameters, BODY), *new.items()], lr=0.1)
    message = (
        r"labels differ: the state dict lacks new\.0, new\.1, new\.2, new\.3 and 2 more; build the "
        "optimizer without them, load, and add them with add_param_group"
    )
    with untouched(more), pytest.raises(ValueError, match=message):
        more.load_state_dict(saved)
    fewer.add_param_group({"params": new.items()})


@pytest.mark.parametrize("kind", [FusedChildAdamW, AdamW])
def test_without_names_the_groups_must_be_the_same(kind: type[Optimizer]) -> None:
    """And give names, once the groups are those of the saved run: the way from unnamed groups to named."""
    parameters = toy_parameters()
    unnamed = [{"params": [parameters[name] for name in names]} for names in (BODY, HEAD)]
    optimizer = kind(unnamed, lr=0.1)  # type: ignore[call-arg]
    train(optimizer, parameters, range(2))
    saved = saved_and_loaded(optimizer.state_dict())
    other = FusedChildAdamW(copied(parameters).values())
    message = (
        r"groups of \[2, 3\] parameters, the optimizer of \[5\], and without names .* position"
    )
    with untouched(other), pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
    named = in_two_groups(copied(parameters), {}, {})
    named.load_state_dict(saved, relabel=True)
    twins = copied(parameters)
    moved = FusedChildAdamW(reversed(twins.items()))
    moved.load_state_dict(named.state_dict())
    for name, parameter in parameters.items():
        theirs = optimizer.state[parameter]["exp_avg"]
        assert identical(moved.state[twins[name]]["exp_avg"], theirs)


def test_relabel_goes_by_position_even_where_the_names_are_the_same() -> None:
    saved = saved_in_one_group()
    parameters = {name: Parameter(torch.ones(3)) for name in ("a", "b")}
    optimizer = FusedChildAdamW(parameters.items())
    for parameter, value in zip(parameters.values(), (1.0, 2.0), strict=True):
        optimizer.state[parameter]["exp_avg"].fill_(value)
    swapped = FusedChildAdamW(reversed(parameters.items()))
    swapped.load_state_dict(optimizer.state_dict(), relabel=True)
    assert float(swapped.state[parameters["b"]]["exp_avg"][0]) == 1.0
    swapped.load_state_dict(optimizer.state_dict())
    assert float(swapped.state[parameters["b"]]["exp_avg"][0]) == 2.0
    other = in_two_groups(toy_parameters(), {}, {})
    with untouched(other), pytest.raises(ValueError, match=r"groups of \[5\]"):
        other.load_state_dict(saved, relabel=True)


def test_a_tensor_option_goes_where_the_group_has_its_own() -> None:
    """A checkpoint read with map_location="cpu" must not take a captured learning rate off the GPU."""
    saved = saved_in_one_group(lr=torch.tensor(0.5))
    optimizer = FusedChildAdamW(toy_parameters().items())
    optimizer.param_groups[0]["lr"] = torch.empty((), device="meta")
    with pytest.raises(RuntimeError, match="meta"):  # where its number cannot be read
        optimizer.load_state_dict(saved)


def test_an_empty_group_gets_the_seed_of_the_run() -> None:
    """What is added later draws the masks of the saved run."""
    parameters = toy_parameters()
    optimizer = FusedChildAdamW([{"params": []}, {"params": entries(parameters)}], seed=9)
    saved = saved_in_one_group(seed=4)
    optimizer.load_state_dict(saved)
    assert [group["seed"] for group in optimizer.param_groups] == [4, 4]
    assert optimizer.defaults["seed"] == 4
    one = FusedChildAdamW(toy_parameters().items())
    one.load_state_dict(optimizer.state_dict())
    assert one.param_groups[0]["weight_decay"] == 0.2


def test_a_hook_may_rename_what_then_goes_by_name() -> None:
    parameters = toy_parameters()
    saved = saved_in_one_group()
    renamed = {f"model.{name}": parameter for name, parameter in parameters.items()}
    optimizer = FusedChildAdamW(reversed(renamed.items()))
    seen: list[float] = []

    def rename(_: Optimizer, state_dict: StateDict) -> StateDict:
        groups = [
            {**group, "param_names": [f"model.{name}" for name in group["param_names"]]}
            for group in state_dict["param_groups"]
        ]
        return {**state_dict, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.register_load_state_dict_post_hook(
        lambda loaded: seen.append(loaded.param_groups[0]["weight_decay"])
    )
    optimizer.load_state_dict(saved)
    assert seen == [0.2]
    assert saved["param_groups"][0]["param_names"] == list(SHAPES)
    for index, parameter in enumerate(parameters.values()):
        assert identical(optimizer.state[parameter]["exp_avg"], saved["state"][index]["exp_avg"])


def test_copies_of_an_optimizer_take_its_state_in_other_groups() -> None:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(
        parameters.items(), lr=0.1, seed=1, reserve_p=0.5, child_mask=toy_mask(parameters)
    )
    train(optimizer, parameters, range(2))
    twins, twin = copy.deepcopy((parameters, optimizer))
    regrouped = copied(parameters)
    other = in_two_groups(regrouped, {}, {}, seed=8)
    other.load_state_dict(copy.deepcopy(twin.state_dict()))
    for each, of in ((optimizer, parameters), (twin, twins), (other, regrouped)):
        train(each, of, range(2, 4))
    assert_identical(weights_and_state(twin), weights_and_state(optimizer))
    assert_identical(outcome(regrouped, other), outcome(parameters, optimizer))


def test_what_fails_in_the_last_group_leaves_no_trace() -> None:
    parameters = toy_parameters()
    optimizer = in_two_groups(parameters, {"lr": 0.5}, {"lr": 0.6}, reserve_p=0.5)
    train(optimizer, parameters, range(1))
    late = saved_in_one_group()
    late["state"][4]["exp_avg_sq"] = torch.zeros(3)
    with untouched(optimizer), pytest.raises(ValueError, match=r"exp_avg_sq of scale is \(3,\)"):
        optimizer.load_state_dict(late)
    options = saved_in_two_groups({}, {"eps": 0.0, "reserve_p": 0.5})
    reversed_groups = FusedChildAdamW(
        [{"params": entries(parameters, names)} for names in (HEAD, BODY)]
    )
    with untouched(reversed_groups), pytest.raises(ValueError, match=r"eps=0\.0 .the state dict."):
        reversed_groups.load_state_dict(options)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_distributed_checkpoints_in_other_groups_are_refused(flat: bool, split: bool) -> None:
    """torch.distributed.checkpoint matches groups itself, and brings names of other groups."""

    def made(grouped: bool) -> tuple[nn.Module, FusedChildAdamW]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        names = list(model.named_parameters())
        groups = [{"params": names[:1]}, {"params": names[1:]}] if grouped else names
        optimizer = FusedChildAdamW(groups, lr=0.1)
        for parameter in model.parameters():
            parameter.grad = random_tensor(parameter.shape, 3)
        optimizer.step()
        return model, optimizer

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = get_optimizer_state_dict(*made(split), options=options)
    model, optimizer = made(not split)
    with untouched(optimizer), pytest.raises((ValueError, RuntimeError, KeyError), match="param"):
        set_optimizer_state_dict(model, optimizer, saved, options=options)


def test_groups_of_a_hundred_parameters_are_matched_one_by_one() -> None:
    names = [f"w{index}" for index in range(100)]
    saved = [{"params": list(range(100)), "param_names": names[::-1], "reserve_p": 1, "seed": 0}]
    groups = [{"params": [None], "param_names": [name]} for name in names]
    found = continued(groups, saved, relabel=False)
    assert [each.numbers for each in found] == [[99 - index] for index in range(100)]
    assert all(each.sources == {0} for each in found)
