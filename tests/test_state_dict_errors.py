"""State dicts that do not fit: nothing is replaced, and the message says what differs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, NAdam, Optimizer

from childtune_kernels import FusedChildAdamW
from tests.snapshots import assert_identical, identical, untouched, weights_and_state
from tests.toy_parameters import toy_mask, toy_parameters, train

StateDict = dict[str, Any]
LAYER_WEIGHT = 1  # the index of layer.weight in a state dict


def good_state_dict(child_state: str = "dense") -> StateDict:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(
        parameters.items(), lr=0.1, reserve_p=0.5, seed=1, child_mask=toy_mask(parameters),
        child_state=child_state,
    )  # fmt: skip
    train(optimizer, parameters, range(2))
    return copy.deepcopy(optimizer.state_dict())


def refuse(
    bad: StateDict,
    message: str,
    errors: tuple[type[Exception], ...] = (ValueError,),
    **load_options: Any,
) -> None:
    """Loading raises, leaves everything untouched, and the optimizer goes on as if nothing were."""
    parameters, undisturbed = toy_parameters(), toy_parameters()
    optimizer, twin = (
        FusedChildAdamW(p.items(), lr=0.1, reserve_p=0.5, seed=1) for p in (parameters, undisturbed)
    )
    train(optimizer, parameters, range(2))
    train(twin, undisturbed, range(2))
    with untouched(optimizer), pytest.raises(errors, match=message):
        optimizer.load_state_dict(bad, **load_options)
    train(optimizer, parameters, range(2, 4))
    train(twin, undisturbed, range(2, 4))
    assert_identical(weights_and_state(optimizer), weights_and_state(twin))
    optimizer.load_state_dict(good_state_dict())


def in_state(name: str, value: Any) -> Callable[[StateDict], None]:
    return lambda saved: saved["state"][LAYER_WEIGHT].update({name: value})


def without(name: str) -> Callable[[StateDict], None]:
    return lambda saved: saved["state"][LAYER_WEIGHT].pop(name)


def in_group(name: str, value: Any) -> Callable[[StateDict], None]:
    return lambda saved: saved["param_groups"][0].update({name: value})


def without_entry(saved: StateDict) -> None:
    del saved["state"][LAYER_WEIGHT]


def drop_a_parameter(saved: StateDict) -> None:
    saved["param_groups"][0]["params"].pop()
    saved["param_groups"][0]["param_names"].pop()


def split_the_group_without_names(saved: StateDict) -> None:
    group = saved["param_groups"][0]
    del group["param_names"]
    saved["param_groups"] = [
        {**group, "params": group["params"][part]} for part in (slice(2), slice(2, None))
    ]


def name_twice(saved: StateDict) -> None:
    saved["param_groups"][0]["param_names"][2] = "layer.weight"


def group_of_adamw(saved: StateDict) -> None:
    adamw = {**AdamW([torch.zeros(1)]).defaults, "params": [], "param_names": []}
    saved["param_groups"].append(adamw)


def drop_a_name(saved: StateDict) -> None:
    saved["param_groups"][0]["param_names"].pop()


ALTERATIONS: dict[str, tuple[Callable[[StateDict], Any], str]] = {
    "a parameter too few": (
        drop_a_parameter,
        "labels differ: the state dict lacks scale; build the optimizer without them, load, and add",
    ),
    "another grouping without names": (
        split_the_group_without_names,
        r"groups of \[2, 3\] parameters, the optimizer of \[5\], and without names .*; build",
    ),
    "a name twice": (name_twice, "state dict has layer.weight more than once; give each name once"),
    "a group of AdamW": (group_of_adamw, "some are not; it was altered"),
    "a name too few": (drop_a_name, "4 .*5|param_names"),
    "no entry": (without_entry, "state of layer.weight has no step"),
    "no exp_avg": (without("exp_avg"), "state exp_avg of layer.weight is None"),
    "no exp_avg_sq": (without("exp_avg_sq"), "state exp_avg_sq of layer.weight is None"),
    "no step": (without("step"), "state of layer.weight has no step"),
    "exp_avg of another shape": (
        in_state("exp_avg", torch.zeros(33, 5)),
        r"exp_avg of layer.weight is \(33, 5\) .*; expected shape \(5, 33\)",
    ),
    "exp_avg_sq flattened": (in_state("exp_avg_sq", torch.zeros(165)), r"layer.weight is \(165,\)"),
    "exp_avg is a number": (in_state("exp_avg", 0.0), "exp_avg of layer.weight is 0.0"),
    "exp_avg is complex": (
        in_state("exp_avg", torch.zeros(5, 33, dtype=torch.complex64)),
        "exp_avg of layer.weight",
    ),
    "step is negative": (in_state("step", torch.tensor(-5)), "step"),
    "step is a fraction": (in_state("step", torch.tensor(1.5)), "step"),
    "step is NaN": (in_state("step", torch.tensor(float("nan"))), "step"),
    "step is infinite": (in_state("step", float("inf")), "step"),
    "step is None": (in_state("step", None), "step"),
    "step is text": (in_state("step", "x"), "step"),
    "two steps": (in_state("step", torch.tensor([1, 2])), "step"),
    "max_exp_avg_sq": (
        in_state("max_exp_avg_sq", torch.zeros(5, 33)),
        "layer.weight: max_exp_avg_sq of amsgrad=True is not supported",
    ),
    "another child's exp_avg": (
        in_state("child_exp_avg", torch.zeros(9)),
        r"compact state of layer.weight was made for shape None",
    ),
    "master of another shape": (
        in_state("master_weight", torch.zeros(3)),
        "master_weight of layer.weight",
    ),
    "too few words": (
        in_state("mask_words", torch.zeros(5, dtype=torch.int32)),
        r"mask of layer.weight: words .* \(5,\) for 165 elements; expected int32 and \(6,\)",
    ),
    "words of int64": (in_state("mask_words", torch.zeros(6).long()), "layer.weight: words of torch.int64"),
    "bits past the end": (
        in_state("mask_words", torch.full((6,), -1, dtype=torch.int32)),
        "mask of layer.weight: bits are set past its 165 elements",
    ),
    "words are a list": (in_state("mask_words", [0] * 6), "layer.weight"),
    "lr is NaN": (in_group("lr", float("nan")), "lr=nan .the state dict. must be finite"),
    "reserve_p is 0": (in_group("reserve_p", 0.0), "reserve_p=0.0 .the state dict."),
    "convention misspelt": (in_group("convention", "orginal"), "convention='orginal' .the state dict."),
    "amsgrad": (in_group("amsgrad", True), "amsgrad=True"),
    "eps is 0 beside a mask": (in_group("eps", 0.0), "eps=0.0 .the state dict."),
    "seed is text": (in_group("seed", "seven"), "seed='seven'"),
    "seed is missing": (lambda saved: saved["param_groups"][0].pop("seed"), "seed"),
}  # fmt: skip


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_altered_state_dicts_are_refused(alteration: str) -> None:
    alter, message = ALTERATIONS[alteration]
    saved = good_state_dict()
    alter(saved)
    if alteration == "master of another shape":
        refuse_for_bf16(saved, message)
    else:
        refuse(saved, message)


def refuse_for_bf16(saved: StateDict, message: str) -> None:
    """fp32 parameters have no master, so that theirs is not looked at."""
    optimizer = FusedChildAdamW(toy_parameters(torch.bfloat16).items())
    with untouched(optimizer), pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)


def test_the_unaltered_state_dict_loads() -> None:
    optimizer = FusedChildAdamW(toy_parameters().items())
    optimizer.load_state_dict(good_state_dict())
    assert optimizer.param_groups[0]["reserve_p"] == 0.5


@pytest.mark.parametrize("key", ["state", "param_groups"])
def test_half_a_state_dict_is_refused(key: str) -> None:
    saved = good_state_dict()
    del saved[key]
    refuse(saved, key, (KeyError, ValueError))


def trained(kind: type[Optimizer], **options: Any) -> StateDict:
    parameters = toy_parameters()
    optimizer = kind(parameters.values(), lr=0.01, **options)  # type: ignore[call-arg]
    train(optimizer, parameters, range(2))
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (AdamW, {"amsgrad": True}, "amsgrad=True, which is not supported"),
        (SGD, {}, "of another optimizer; load one of AdamW's kind"),
        (SGD, {"momentum": 0.9}, "of another optimizer; load one of AdamW's kind"),
        (Adagrad, {}, "exp_avg of embedding.weight|another optimizer"),
        (NAdam, {}, "another optimizer"),
        (Adadelta, {}, "exp_avg of embedding.weight|another optimizer"),
        (Adam, {"weight_decay": 0.1}, "weight_decay|another optimizer"),
    ],
)
def test_state_dicts_of_other_optimizers(
    kind: type[Optimizer], options: dict[str, Any], message: str
) -> None:
    refuse(trained(kind, **options), message)
    refuse(kind(toy_parameters().values(), lr=0.1, **options).state_dict(), message)  # type: ignore[call-arg]


def renamed(parameters: dict[str, Parameter]) -> dict[str, Parameter]:
    return {name.replace("layer", "block"): tensor for name, tensor in parameters.items()}


def test_other_labels_are_an_error_that_names_the_remedy() -> None:
    parameters = renamed(toy_parameters())
    optimizer = FusedChildAdamW(parameters.items(), lr=0.1)
    train(optimizer, parameters, range(1))
    message = (
        r"labels differ: the state dict lacks block\.weight, block\.bias and the optimizer lacks "
        r"layer\.weight, layer\.bias; build .*names of the saved run; .*load with relabel=True"
    )
    with untouched(optimizer), pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(good_state_dict())


def test_unnamed_and_named_labels_differ() -> None:
    saved = FusedChildAdamW(toy_parameters().values()).state_dict()
    optimizer = FusedChildAdamW(toy_parameters().items())
    with untouched(optimizer), pytest.raises(ValueError, match=r"#0 .saved. is not embedding"):
        optimizer.load_state_dict(saved)


def test_wrapped_names_in_a_state_dict_are_no_others() -> None:
    saved = good_state_dict()
    names = saved["param_groups"][0]["param_names"]
    saved["param_groups"][0]["param_names"] = [f"module._orig_mod.{name}" for name in names]
    optimizer = FusedChildAdamW(toy_parameters().items())
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"] == names


def test_relabel_loads_by_position_and_keeps_the_new_labels() -> None:
    saved = good_state_dict()
    parameters, by_label = renamed(toy_parameters()), toy_parameters()
    optimizer = FusedChildAdamW(parameters.items(), child_state="dense")
    optimizer.load_state_dict(saved, relabel=True)
    assert optimizer.param_groups[0]["param_names"] == list(parameters)
    other = FusedChildAdamW(by_label.items())
    other.load_state_dict(saved)
    for index, parameter in enumerate(parameters.values()):
        assert identical(optimizer.state[parameter]["exp_avg"], saved["state"][index]["exp_avg"])
    # Masks of the Bernoulli kind follow the labels of this optimizer.
    for each in (parameters, by_label):
        for parameter in each.values():
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    other.step()
    assert identical(parameters["embedding.weight"], by_label["embedding.weight"])
    assert not identical(parameters["block.weight"], by_label["layer.weight"])


def test_relabel_does_not_excuse_anything_else() -> None:
    saved = good_state_dict()
    without("exp_avg")(saved)
    refuse(saved, "state exp_avg of layer.weight", relabel=True)


def test_a_load_that_fails_late_leaves_no_trace() -> None:
    """The last parameter is the bad one: the others have been read by then."""
    saved = good_state_dict()
    saved["state"][4]["exp_avg"] = torch.zeros(3)
    refuse(saved, r"exp_avg of scale is \(3,\)")
