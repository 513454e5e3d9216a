"""State dicts from torch.optim.AdamW and back to it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import AdamW

from childtune_kernels import FusedChildAdamW
from tests.child_states import state_in_full
from tests.snapshots import identical
from tests.test_state_dict import saved_and_loaded
from tests.toy_parameters import SHAPES, give_gradients, toy_mask, toy_parameters, train

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "for loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "maximize": {"maximize": True},
}
OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}


def entries(parameters: dict[str, Parameter], named: bool) -> Any:
    return list(parameters.items()) if named else list(parameters.values())


def trained_adamw(
    dtype: torch.dtype = torch.float32, steps: int = 3, named: bool = False, **options: Any
) -> tuple[dict[str, Parameter], AdamW]:
    parameters = toy_parameters(dtype)
    optimizer = AdamW(entries(parameters, named), **OPTIONS, **options)
    train(optimizer, parameters, range(steps))
    return parameters, optimizer


def copied(parameters: dict[str, Parameter]) -> dict[str, Parameter]:
    return {name: Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("named", [False, True])
def test_a_run_of_adamw_is_continued(variant: str, steps: int, named: bool) -> None:
    parameters, adamw = trained_adamw(steps=steps, named=named, **VARIANTS[variant])
    ours = copied(parameters)
    optimizer = FusedChildAdamW(entries(ours, named))
    optimizer.load_state_dict(saved_and_loaded(adamw.state_dict()))
    for option, value in OPTIONS.items():
        assert optimizer.param_groups[0][option] == value
    assert optimizer.param_groups[0]["maximize"] == (variant == "maximize")
    train(adamw, parameters, range(steps, steps + 4))
    train(optimizer, ours, range(steps, steps + 4))
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, parameters[name], rtol=1e-6, atol=1e-6)
        assert int(optimizer.state[parameter]["step"]) == steps + 4


@pytest.mark.parametrize("saved_with_names", [False, True])
@pytest.mark.parametrize("loaded_with_names", [False, True])
def test_names_are_needed_on_neither_side(saved_with_names: bool, loaded_with_names: bool) -> None:
    parameters, adamw = trained_adamw(named=saved_with_names)
    ours = copied(parameters)
    optimizer = FusedChildAdamW(entries(ours, loaded_with_names))
    labels = list(optimizer.param_groups[0]["param_names"])
    optimizer.load_state_dict(
        adamw.state_dict(), relabel=saved_with_names and not loaded_with_names
    )
    assert optimizer.param_groups[0]["param_names"] == labels
    for name, parameter in ours.items():
        theirs = adamw.state[parameters[name]]
        assert identical(optimizer.state[parameter]["exp_avg"], theirs["exp_avg"])
        assert identical(optimizer.state[parameter]["exp_avg_sq"], theirs["exp_avg_sq"])


@pytest.mark.parametrize("variant", ["default", "foreach", "fused"])
def test_the_moments_of_bf16_parameters_are_widened(variant: str) -> None:
    parameters, adamw = trained_adamw(torch.bfloat16, **VARIANTS[variant])
    ours = copied(parameters)
    optimizer = FusedChildAdamW(ours.items())
    optimizer.load_state_dict(saved_and_loaded(adamw.state_dict()))
    for name, parameter in ours.items():
        theirs, state = adamw.state[parameters[name]], optimizer.state[parameter]
        assert theirs["exp_avg"].dtype == torch.bfloat16
        assert identical(state["exp_avg"], theirs["exp_avg"].float())
        assert identical(state["exp_avg_sq"], theirs["exp_avg_sq"].float())
        assert not state["master_remainder"].any()
        assert (state["step"].dtype, int(state["step"])) == (torch.int64, 3)
    train(optimizer, ours, range(3, 5))


def test_mask_seed_and_the_other_options_stay() -> None:
    parameters, adamw = trained_adamw()
    ours = copied(parameters)
    mask = toy_mask(ours, dense=["scale"])
    own: dict[str, Any] = {"reserve_p": 0.4, "freeze_non_child": False, "convention": "original",
                           "correct_bias": False, "child_state": "compact"}  # fmt: skip
    optimizer = FusedChildAdamW(ours.items(), child_mask=mask, seed=5, **own)
    optimizer.load_state_dict(adamw.state_dict())
    group = optimizer.param_groups[0]
    assert {option: group[option] for option in own} == own
    assert group["seed"] == 5
    assert group["differentiable"] is False
    assert "decoupled_weight_decay" not in group
    for name in mask.words:
        state = state_in_full(ours[name], optimizer.state[ours[name]])
        assert identical(state["mask_words"], mask.words[name])


@pytest.mark.parametrize("child_state", ["compact", "dense"])
def test_moments_outside_the_child_are_cleared(child_state: str) -> None:
    parameters, adamw = trained_adamw()
    ours = copied(parameters)
    mask = toy_mask(ours, dense=["scale"])
    optimizer = FusedChildAdamW(ours.items(), child_mask=mask, child_state=child_state)
    optimizer.load_state_dict(adamw.state_dict())
    for name, parameter in ours.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            theirs = adamw.state[parameters[name]][moment]
            child = mask.dense(name) if name in mask.words else torch.ones_like(theirs) > 0
            state = state_in_full(parameter, optimizer.state[parameter])
            assert identical(state[moment], torch.where(child, theirs, 0.0))
    assert bool(
        state_in_full(ours["layer.weight"], optimizer.state[ours["layer.weight"]])["exp_avg"].any()
    )


def test_the_state_of_adamw_is_only_read() -> None:
    parameters, adamw = trained_adamw()
    before = copy.deepcopy(adamw.state_dict())
    ours = copied(parameters)
    optimizer = FusedChildAdamW(ours.items(), child_mask=toy_mask(ours), lr=0.1)
    optimizer.load_state_dict(adamw.state_dict())
    train(optimizer, ours, range(2))
    for index, entry in adamw.state_dict()["state"].items():
        for name, tensor in entry.items():
            assert identical(tensor, before["state"][index][name])


def test_a_scheduler_of_adamw_is_carried_over() -> None:
    parameters = toy_parameters()
    adamw = AdamW(parameters.values(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(adamw, lambda epoch: 0.5)
    optimizer = FusedChildAdamW(copied(parameters).values())
    optimizer.load_state_dict(adamw.state_dict())
    assert optimizer.param_groups[0]["initial_lr"] == 0.1
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_adamw_continues_our_run(dtype: torch.dtype, steps: int, named: bool, fused: bool) -> None:
    ours = toy_parameters(dtype)
    listed = entries(ours, named)
    groups = [{"params": listed[:2], **OPTIONS}, {"params": listed[2:], "lr": 0.02}]
    optimizer = FusedChildAdamW(groups)
    train(optimizer, ours, range(steps))
    theirs = copied(ours)
    listed = entries(theirs, named)
    adamw = AdamW([{"params": listed[:2]}, {"params": listed[2:]}], fused=fused)
    saved = saved_and_loaded(optimizer.to_adamw_state_dict())
    assert ("param_names" in saved["param_groups"][0]) == named
    adamw.load_state_dict(saved)
    assert adamw.param_groups[0]["betas"] == (0.8, 0.95)
    assert [group["lr"] for group in adamw.param_groups] == [0.05, 0.02]
    assert not {"reserve_p", "seed", "convention"} & adamw.param_groups[0].keys()
    train(optimizer, ours, range(steps, steps + 4))
    train(adamw, theirs, range(steps, steps + 4))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    for name, parameter in ours.items():
        torch.testing.assert_close(theirs[name], parameter, rtol=tolerance, atol=tolerance)
        assert float(adamw.state[theirs[name]]["step"]) == steps + 4


def test_there_and_back_again() -> None:
    ours = toy_parameters()
    mask = toy_mask(ours)
    optimizer = FusedChildAdamW(ours.items(), child_mask=mask, lr=0.1)
    train(optimizer, ours, range(3))
    back_parameters = copied(ours)
    back = FusedChildAdamW(back_parameters.items(), child_mask=mask)
    back.load_state_dict(optimizer.to_adamw_state_dict())
    train(optimizer, ours, range(3, 5))
    train(back, back_parameters, range(3, 5))
    assert all(identical(ours[name], back_parameters[name]) for name in SHAPES)


def test_the_exported_state_of_bf16_parameters_loads() -> None:
    ours = toy_parameters(torch.bfloat16)
    optimizer = FusedChildAdamW(ours.items(), child_mask=toy_mask(ours), lr=0.1)
    train(optimizer, ours, range(3))
    exported = optimizer.to_adamw_state_dict()
    assert all(e.keys() == {"step", "exp_avg", "exp_avg_sq"} for e in exported["state"].values())
    theirs = copied(ours)
    adamw = AdamW(theirs.items())
    adamw.load_state_dict(exported)
    give_gradients(theirs, 9)
    adamw.step()
    for name, parameter in theirs.items():
        assert float(adamw.state[parameter]["step"]) == 4, name
