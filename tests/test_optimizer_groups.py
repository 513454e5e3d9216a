"""Groups of parameters: options and masks of their own, and groups that come later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from childtune_kernels import FusedChildAdamW
from tests.snapshots import assert_identical, identical, untouched, weights_and_state
from tests.toy_parameters import give_gradients, toy_mask, toy_parameters, train

OF_ONE_GROUP: dict[str, dict[str, Any]] = {
    "embedding.weight": {"lr": 0.2, "weight_decay": 0.0},
    "layer.weight": {"reserve_p": 0.4, "betas": (0.5, 0.9)},
    "layer.bias": {"convention": "original", "eps": 1e-4, "correct_bias": False},
    "nothing": {"maximize": True},
    "scale": {"maximize": True, "weight_decay": 0.7},
}


def test_every_group_follows_its_own_options() -> None:
    together, apart = toy_parameters(), toy_parameters()
    groups = [{"params": [(n, together[n])], **options} for n, options in OF_ONE_GROUP.items()]
    optimizer = FusedChildAdamW(groups, lr=0.1, seed=1)
    train(optimizer, together, range(4))
    for name, options in OF_ONE_GROUP.items():
        alone = FusedChildAdamW([(name, apart[name])], **{"lr": 0.1, "seed": 1, **options})
        train(alone, {name: apart[name]}, range(4))
        assert identical(together[name], apart[name]), name


def test_every_group_may_have_a_mask_of_its_own() -> None:
    parameters = toy_parameters()
    masks = [toy_mask(parameters, 7), toy_mask(parameters, 70), None]
    names = ["embedding.weight", "layer.weight", "layer.bias"]
    groups = [
        {"params": [(name, parameters[name])], "child_mask": mask}
        for name, mask in zip(names, masks, strict=True)
    ]
    start = {name: parameters[name].detach().clone() for name in names}
    optimizer = FusedChildAdamW(groups, lr=0.1, child_mask=toy_mask(parameters, 700))
    train(optimizer, parameters, range(2))
    for name, mask in zip(names, masks, strict=True):
        child = torch.ones_like(start[name], dtype=torch.bool) if mask is None else mask.dense(name)
        assert torch.equal(parameters[name] != start[name], child)


def test_dense_parameters_of_a_mask_train_whole() -> None:
    parameters = toy_parameters()
    start = parameters["layer.bias"].detach().clone()
    mask = toy_mask(parameters, dense=["layer.bias"])
    optimizer = FusedChildAdamW(parameters.items(), lr=0.1, child_mask=mask)
    train(optimizer, parameters, range(1))
    assert bool((parameters["layer.bias"] != start).all())
    assert "mask_words" not in optimizer.state[parameters["layer.bias"]]


def test_the_mask_given_is_copied() -> None:
    parameters = toy_parameters()
    mask = toy_mask(parameters)
    optimizer = FusedChildAdamW(parameters.items(), lr=0.1, child_mask=mask)
    mask.words["layer.bias"].zero_()
    start = parameters["layer.bias"].detach().clone()
    train(optimizer, parameters, range(1))
    assert int((parameters["layer.bias"] != start).sum()) > 5


@pytest.mark.parametrize("named", [True, False])
def test_a_group_added_before_the_first_step(named: bool) -> None:
    early, late = toy_parameters(), toy_parameters()

    def entries(parameters: dict[str, Parameter]) -> list[Any]:
        return list(parameters.items()) if named else list(parameters.values())

    options: dict[str, Any] = {"lr": 0.1, "reserve_p": 0.5, "seed": 1}
    first, second = entries(early)[:2], entries(early)[2:]
    groups: list[dict[str, Any]] = [{"params": first}, {"params": second, "lr": 0.3}]
    whole = FusedChildAdamW(groups, **options)
    grown = FusedChildAdamW(entries(late)[:2], **options)
    grown.add_param_group({"params": entries(late)[2:], "lr": 0.3})
    train(whole, early, range(3))
    train(grown, late, range(3))
    assert_identical(weights_and_state(whole), weights_and_state(grown))


def test_a_group_added_between_steps_starts_at_its_first_step() -> None:
    parameters, twin = toy_parameters(), toy_parameters()
    bias = {"layer.bias": parameters.pop("layer.bias")}
    twin_bias = {"layer.bias": twin.pop("layer.bias")}
    options: dict[str, Any] = {"lr": 0.1, "reserve_p": 0.5, "seed": 1}
    grown = FusedChildAdamW(parameters.items(), **options)
    train(grown, parameters, range(3))
    grown.add_param_group({"params": bias.items(), "reserve_p": 0.25})
    train(grown, parameters | bias, range(3, 5))
    apart = FusedChildAdamW(twin.items(), **options)
    train(apart, twin, range(5))
    alone = FusedChildAdamW(twin_bias.items(), **{**options, "reserve_p": 0.25})
    train(alone, twin_bias, range(3, 5))
    assert all(identical(parameters[name], twin[name]) for name in parameters)
    assert identical(bias["layer.bias"], twin_bias["layer.bias"])
    assert int(grown.state[bias["layer.bias"]]["step"]) == 2


def test_groups_of_another_optimizer_bring_their_names() -> None:
    parameters = toy_parameters()
    mask = toy_mask(parameters)
    others = torch.optim.AdamW(parameters.items(), lr=0.3).param_groups
    optimizer = FusedChildAdamW(others, child_mask=mask)
    assert optimizer.param_groups[0]["param_names"] == list(parameters)
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert "mask_words" in optimizer.state[parameters["scale"]]
    unnamed = FusedChildAdamW(torch.optim.AdamW(parameters.values()).param_groups)
    assert unnamed.param_groups[0]["param_names"][:2] == ["#0", "#1"]
    short = [{"params": list(parameters.values()), "param_names": ["a", "b"]}]
    with pytest.raises(ValueError, match="2 names for 5 parameters"):
        FusedChildAdamW(short)


def test_the_dict_of_a_group_is_left_alone() -> None:
    parameter = Parameter(torch.ones(3))
    group = {"params": [("w", parameter)], "lr": 0.5}
    FusedChildAdamW([group])
    assert group == {"params": [("w", parameter)], "lr": 0.5}


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ([Parameter(torch.ones(2))], TypeError, "group must be a dict, not list"),
        ({"params": {Parameter(torch.ones(2))}}, TypeError, "is a set, .* pass a list"),
        ({"params": ["layer.bias"]}, TypeError, "holds a str; only tensors train"),
        (
            {"params": [("new", torch.ones(2).int())]},
            ValueError,
            "parameter new: dtype torch.int32",
        ),
        ({"params": [Parameter(torch.ones(2))]}, ValueError, "some groups have names"),
        ({"params": [("scale", Parameter(torch.ones(2)))]}, ValueError, "'scale' .* rename one"),
        (
            {
                "params": [("new", Parameter(torch.ones(2)))],
                "child_mask": toy_mask(toy_parameters()),
            },
            ValueError,
            "no name of it matches new; it knows .*scale; give .* dense=",
        ),
        (
            {"params": [("new", Parameter(torch.ones(2)).exp())]},
            ValueError,
            "can't optimize a non-leaf Tensor",
        ),
        (
            {"params": [("new", Parameter(torch.ones(2))), ("bad", torch.ones(2).int())]},
            ValueError,
            "parameter bad",
        ),
    ],
)
def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was(
    group: Any, error: type[Exception], message: str
) -> None:
    parameters, twin = toy_parameters(), toy_parameters()
    optimizer, other = (FusedChildAdamW(p.items(), lr=0.1) for p in (parameters, twin))
    train(optimizer, parameters, range(2))
    with untouched(optimizer), pytest.raises(error, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    train(optimizer, parameters, range(2, 4))
    train(other, twin, range(4))
    assert_identical(weights_and_state(optimizer), weights_and_state(other))


def test_the_same_tensor_again_is_refused() -> None:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.items())
    again = {"params": [("other", parameters["scale"])]}
    message = (
        r"parameter other .group 1. is the same tensor as scale.*; pass each (weight|tensor) once"
    )
    with untouched(optimizer), pytest.raises(ValueError, match=message):
        optimizer.add_param_group(again)


def test_a_group_without_parameters_is_harmless() -> None:
    parameters = toy_parameters()
    groups: list[dict[str, Any]] = [{"params": []}, {"params": list(parameters.items())}]
    optimizer = FusedChildAdamW(groups, lr=0.1)
    optimizer.add_param_group({"params": []})
    start = parameters["scale"].detach().clone()
    train(optimizer, parameters, range(2))
    assert not torch.equal(parameters["scale"], start)
    assert "layer.bias" in optimizer.summary()


def test_options_changed_between_steps_take_effect() -> None:
    changed, rebuilt = toy_parameters(), toy_parameters()
    new: dict[str, Any] = {"lr": 0.01, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.5,
                           "reserve_p": 0.5, "maximize": True, "convention": "original",
                           "correct_bias": False}  # fmt: skip
    optimizer = FusedChildAdamW(changed.items(), lr=0.1, seed=1)
    train(optimizer, changed, range(2))
    optimizer.param_groups[0].update(new)
    first = FusedChildAdamW(rebuilt.items(), lr=0.1, seed=1)
    train(first, rebuilt, range(2))
    second = FusedChildAdamW(rebuilt.items(), seed=1, **new)
    for parameter in rebuilt.values():
        for name, tensor in first.state[parameter].items():
            second.state[parameter][name].copy_(tensor)
    train(optimizer, changed, range(2, 4))
    train(second, rebuilt, range(2, 4))
    assert_identical(weights_and_state(optimizer), weights_and_state(second))


def test_a_list_of_betas_may_be_changed_in_place() -> None:
    parameters, twin = toy_parameters(), toy_parameters()
    optimizer = FusedChildAdamW(parameters.items(), lr=0.1, betas=[0.9, 0.99])  # type: ignore[arg-type]
    other = FusedChildAdamW(twin.items(), lr=0.1, betas=(0.9, 0.99))
    train(optimizer, parameters, range(2))
    train(other, twin, range(2))
    optimizer.param_groups[0]["betas"][0] = 0.5
    other.param_groups[0]["betas"] = (0.5, 0.99)
    give_gradients(parameters, 5)
    optimizer.step()
    train(other, twin, [5])
    assert_identical(
        {k: v for k, v in weights_and_state(optimizer).items() if "betas" not in k},
        {k: v for k, v in weights_and_state(other).items() if "betas" not in k},
    )
