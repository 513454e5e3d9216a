"""Saving and resuming: a run that was interrupted continues bit for bit (SPEC.md, section 5)."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from childtune_kernels import FusedChildAdamW, registry
from tests.child_states import LAYOUTS, lay_out_children
from tests.snapshots import assert_identical, bits, identical, weights_and_state
from tests.toy_parameters import toy_mask, toy_parameters, train

STEPS = 6
DTYPES = {
    "fp32": (torch.float32, "auto"),
    "fp64": (torch.float64, "auto"),
    "bf16 with masters": (torch.bfloat16, "auto"),
    "bf16 alone": (torch.bfloat16, "none"),
    "fp16 with masters": (torch.float16, "fp32"),
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "CT_F": {"reserve_p": 0.3},
    "CT_D": {"masked": True},
    "CT_D in dense state": {"masked": True, "child_state": "dense"},
    "both": {"reserve_p": 0.3, "masked": True},
}
OTHER_OPTIONS: dict[str, Any] = {
    "betas": (0.8, 0.95),
    "eps": 1e-6,
    "weight_decay": 0.1,
    "convention": "original",
    "correct_bias": False,
    "maximize": True,
    "freeze_non_child": False,
}


def saved_and_loaded(content: Any) -> Any:
    """Through a file's bytes, read as torch.load reads them by default."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def optimizer_of(
    parameters: dict[str, Parameter], masked: bool = False, **options: Any
) -> FusedChildAdamW:
    mask = toy_mask(parameters, dense=["scale"]) if masked else None
    return FusedChildAdamW(
        parameters.items(), **{"lr": 0.1, "seed": 1, "child_mask": mask, **options}
    )


def reloaded_weights(parameters: dict[str, Parameter]) -> dict[str, Parameter]:
    content = saved_and_loaded({name: p.detach() for name, p in parameters.items()})
    return {name: Parameter(tensor) for name, tensor in content.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 1, 3, STEPS - 1])
def test_a_resumed_run_equals_the_uninterrupted_one(kind: str, dtype: str, at: int) -> None:
    """The resuming script passes no mask, another seed and no option at all."""
    stored, master_weight = DTYPES[dtype]
    parameters = toy_parameters(stored)
    optimizer = optimizer_of(parameters, master_weight=master_weight, **KINDS[kind])
    train(optimizer, parameters, range(at))
    saved = saved_and_loaded(optimizer.state_dict())
    resumed_parameters = reloaded_weights(parameters)
    state_kind = {"child_state": optimizer.param_groups[0]["child_state"]}
    resumed = FusedChildAdamW(resumed_parameters.items(), seed=99, **state_kind)
    resumed.load_state_dict(saved)
    assert_identical(weights_and_state(optimizer), weights_and_state(resumed))
    train(optimizer, parameters, range(at, STEPS))
    train(resumed, resumed_parameters, range(at, STEPS))
    assert_identical(weights_and_state(optimizer), weights_and_state(resumed))
    assert int(resumed.state[resumed_parameters["scale"]]["step"]) == STEPS


@pytest.mark.parametrize("backends", [(None, "reference"), ("reference", None)])
def test_a_run_may_be_resumed_on_another_backend(backends: tuple[str | None, str | None]) -> None:
    parameters, twin = toy_parameters(), toy_parameters()
    optimizer = optimizer_of(parameters, True, reserve_p=0.3, backend=backends[0])
    train(optimizer, parameters, range(3))
    resumed_parameters = reloaded_weights(parameters)
    resumed = FusedChildAdamW(resumed_parameters.items(), backend=backends[1])
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    train(resumed, resumed_parameters, range(3, STEPS))
    train(optimizer_of(twin, True, reserve_p=0.3), twin, range(STEPS))
    assert all(identical(resumed_parameters[name], twin[name]) for name in twin)
    chosen = registry.choose("child_adamw", "cpu", backends[1]).backend
    assert chosen in resumed.summary()


def test_every_option_comes_from_the_state_dict() -> None:
    parameters = toy_parameters()
    optimizer = optimizer_of(parameters, True, reserve_p=0.3, **OTHER_OPTIONS)
    train(optimizer, parameters, range(2))
    resumed_parameters = reloaded_weights(parameters)
    resumed = FusedChildAdamW(resumed_parameters.items())
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for option, value in {"lr": 0.1, "seed": 1, "reserve_p": 0.3, **OTHER_OPTIONS}.items():
        assert resumed.param_groups[0][option] == value
    train(optimizer, parameters, range(2, 4))
    train(resumed, resumed_parameters, range(2, 4))
    assert_identical(weights_and_state(optimizer), weights_and_state(resumed))


def test_groups_and_unnamed_parameters_resume() -> None:
    parameters = toy_parameters()

    def grouped(of: dict[str, Parameter], **options: Any) -> FusedChildAdamW:
        listed = list(of.values())
        return FusedChildAdamW(
            [{"params": listed[:2], **options}, {"params": listed[2:]}], lr=0.1, seed=1
        )

    optimizer = grouped(parameters, reserve_p=0.4, weight_decay=0.3)
    train(optimizer, parameters, range(3))
    resumed_parameters = reloaded_weights(parameters)
    resumed = grouped(resumed_parameters)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    train(optimizer, parameters, range(3, STEPS))
    train(resumed, resumed_parameters, range(3, STEPS))
    assert_identical(weights_and_state(optimizer), weights_and_state(resumed))


def test_a_group_added_after_resuming_draws_the_masks_of_the_first_run() -> None:
    """Gradual unfreezing: the seed of the state dict is the seed of what comes later, too."""
    results = []
    for interrupted in (False, True):
        parameters = toy_parameters()
        late = {"layer.weight": parameters.pop("layer.weight")}
        optimizer = FusedChildAdamW(parameters.items(), lr=0.1, reserve_p=0.5, seed=1)
        train(optimizer, parameters, range(2))
        if interrupted:
            saved = saved_and_loaded(optimizer.state_dict())
            optimizer = FusedChildAdamW(parameters.items(), lr=0.1, reserve_p=0.5, seed=99)
            optimizer.load_state_dict(saved)
        optimizer.add_param_group({"params": late.items()})
        train(optimizer, parameters | late, range(2, 4))
        results.append(weights_and_state(optimizer))
    assert_identical(*results)


def test_a_seed_changed_between_steps_resumes() -> None:
    """Whatever a changed seed does, the state dict must tell of it."""
    parameters = toy_parameters()
    optimizer = optimizer_of(parameters, reserve_p=0.5)
    train(optimizer, parameters, range(2))
    optimizer.param_groups[0]["seed"] = 2
    train(optimizer, parameters, range(2, 3))
    resumed_parameters = reloaded_weights(parameters)
    resumed = FusedChildAdamW(resumed_parameters.items())
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    train(optimizer, parameters, range(3, STEPS))
    train(resumed, resumed_parameters, range(3, STEPS))
    assert_identical(weights_and_state(optimizer), weights_and_state(resumed))


def test_rolling_back_in_the_same_optimizer() -> None:
    parameters = toy_parameters()
    optimizer = optimizer_of(parameters, True, reserve_p=0.5)
    train(optimizer, parameters, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    train(optimizer, parameters, range(2, 4))
    first = weights_and_state(optimizer)
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    train(optimizer, parameters, range(2, 4))
    assert_identical(first, weights_and_state(optimizer))


def test_a_loaded_state_is_not_tied_to_where_it_came_from() -> None:
    parameters = toy_parameters(torch.bfloat16)
    optimizer = optimizer_of(parameters, True)
    train(optimizer, parameters, range(2))
    state_dict = optimizer.state_dict()
    other_parameters = toy_parameters(torch.bfloat16)
    other = FusedChildAdamW(other_parameters.items())
    other.load_state_dict(state_dict)
    before = weights_and_state(optimizer)
    given = {key: bits(value).clone() for key, value in flat(state_dict).items()}
    train(other, other_parameters, range(2))
    assert_identical(before, weights_and_state(optimizer))
    assert all(torch.equal(given[key], bits(value)) for key, value in flat(state_dict).items())
    loaded = weights_and_state(other)
    for tensor in flat(state_dict).values():
        tensor.zero_()
    assert_identical(loaded, weights_and_state(other))


def flat(state_dict: dict[str, Any]) -> dict[tuple[int, str], torch.Tensor]:
    return {
        (index, name): tensor
        for index, entry in state_dict["state"].items()
        for name, tensor in entry.items()
    }


def test_what_a_state_dict_holds() -> None:
    parameters = toy_parameters(torch.bfloat16)
    optimizer = optimizer_of(parameters, True, child_state="dense")
    state_dict = optimizer.state_dict()
    assert state_dict.keys() == {"state", "param_groups"}
    assert state_dict["param_groups"][0]["param_names"] == list(parameters)
    for entry, (name, parameter) in zip(
        state_dict["state"].values(), parameters.items(), strict=True
    ):
        kept = {"step": torch.int64, "exp_avg": torch.float32, "exp_avg_sq": torch.float32,
                "master_remainder": torch.int16, "mask_words": torch.int32}  # fmt: skip
        if name == "scale":
            del kept["mask_words"]
        assert {key: tensor.dtype for key, tensor in entry.items()} == kept
        assert entry["exp_avg"].shape == entry["master_remainder"].shape == parameter.shape
        assert entry["step"].shape == ()


def test_what_a_state_dict_holds_of_compact_state() -> None:
    """Names that AdamW cannot take for its own, and mask words whatever the layout."""
    parameters = toy_parameters(torch.bfloat16)
    mask = toy_mask(parameters, dense=["scale"])
    for layout in LAYOUTS:
        optimizer = optimizer_of(parameters, True, master_weight="fp32")
        lay_out_children(optimizer, layout)
        entries = optimizer.state_dict()["state"].values()
        for entry, (name, parameter) in zip(entries, parameters.items(), strict=True):
            if name == "scale":
                assert entry.keys() == {"step", "exp_avg", "exp_avg_sq", "master_weight"}
                continue
            assert not {"exp_avg", "exp_avg_sq", "master_weight"} & entry.keys()
            assert torch.equal(entry["mask_words"], mask.words[name])
            for key in ("child_exp_avg", "child_exp_avg_sq", "child_master_weight"):
                assert entry[key].dtype == torch.float32
                assert entry[key].shape == (mask.count(name),)
            master = parameter.detach().float()[mask.dense(name)]
            assert torch.equal(entry["child_master_weight"], master)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_is_cast_to_the_type_of_the_weights(dtype: torch.dtype) -> None:
    parameters = toy_parameters(dtype)
    optimizer = optimizer_of(parameters, True, reserve_p=0.5)
    train(optimizer, parameters, range(3))
    exp_avg = optimizer.state[parameters["layer.weight"]]["child_exp_avg"]
    assert not torch.equal(exp_avg, exp_avg.to(dtype).float())
    other_parameters = reloaded_weights(parameters)
    other = FusedChildAdamW(other_parameters.items())
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert_identical(weights_and_state(optimizer), weights_and_state(other))


def mask_warnings(given: Any, saved: dict[str, Any]) -> list[str]:
    optimizer = FusedChildAdamW(toy_parameters().items(), child_mask=given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(saved)
    return [str(warning.message) for warning in caught]


def test_another_mask_at_construction_draws_a_warning() -> None:
    parameters = toy_parameters()
    mask = toy_mask(parameters)
    masked = FusedChildAdamW(parameters.items(), child_mask=mask).state_dict()
    unmasked = FusedChildAdamW(toy_parameters().items()).state_dict()
    assert mask_warnings(None, masked) == []
    assert mask_warnings(mask, masked) == []
    for saved in (masked, unmasked):
        messages = mask_warnings(~mask if saved is masked else mask, saved)
        assert any("mask of layer.weight differs" in message for message in messages)
        assert all("the saved one is used" in message for message in messages)


def test_the_saved_mask_is_used_when_another_was_given() -> None:
    parameters = toy_parameters()
    mask = toy_mask(parameters)
    saved = FusedChildAdamW(parameters.items(), child_mask=mask).state_dict()
    other = FusedChildAdamW(parameters.items(), lr=0.1, child_mask=~mask)
    with pytest.warns(UserWarning, match="the saved one is used"):
        other.load_state_dict(saved)
    start = parameters["layer.weight"].detach().clone()
    train(other, parameters, range(1))
    assert torch.equal(parameters["layer.weight"] != start, mask.dense("layer.weight"))


def test_hooks_of_state_dicts() -> None:
    parameters = toy_parameters()
    optimizer = optimizer_of(parameters)
    seen: list[str] = []

    def before_saving(_: Optimizer) -> None:
        seen.append("before saving")

    def after_saving(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append("after saving")
        return {**state_dict, "note": "kept"}

    def before_loading(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(f"before loading {state_dict['note']}")
        groups = [{**group, "lr": 0.5} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    def after_loading(loaded: Optimizer) -> None:
        seen.append(f"after loading {loaded.param_groups[0]['lr']}")

    optimizer.register_state_dict_pre_hook(before_saving)
    optimizer.register_state_dict_post_hook(after_saving)
    optimizer.register_load_state_dict_pre_hook(before_loading)
    optimizer.register_load_state_dict_post_hook(after_loading)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert saved["param_groups"][0]["lr"] == 0.1
    assert seen == ["before saving", "after saving", "before loading kept", "after loading 0.5"]


def test_schedulers_resume() -> None:
    results = []
    for interrupted in (False, True):
        parameters = toy_parameters()
        optimizer = optimizer_of(parameters, reserve_p=0.5)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=9)
        for step in range(8):
            if interrupted and step == 4:
                saved = saved_and_loaded([optimizer.state_dict(), scheduler.state_dict()])
                optimizer = FusedChildAdamW(parameters.items(), lr=7.0)
                scheduler = torch.optim.lr_scheduler.OneCycleLR(
                    optimizer, max_lr=0.2, total_steps=9
                )
                optimizer.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
            train(optimizer, parameters, [step])
            scheduler.step()
        results.append(weights_and_state(optimizer))
    assert_identical(*results)
