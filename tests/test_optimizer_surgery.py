"""Groups, parameters and state exchanged by hand between steps: it takes effect, or it is refused.

torch.optim's optimizers look at all of them anew at every step, and scripts rely on it (to reset the
moments, to freeze a group, to enlarge an embedding).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from childtune_kernels import FusedChildAdamW
from tests.snapshots import identical, untouched
from tests.toy_parameters import give_gradients, toy_parameters, train


def two_groups(parameters: dict[str, Parameter]) -> FusedChildAdamW:
    pairs = list(parameters.items())
    groups: list[dict[str, Any]] = [{"params": pairs[:2]}, {"params": pairs[2:]}]
    optimizer = FusedChildAdamW(groups, lr=0.1, weight_decay=0.0)
    train(optimizer, parameters, range(2))
    give_gradients(parameters, 2)
    return optimizer


def stepped_or_refused(optimizer: FusedChildAdamW, culprit: str) -> bool:
    """Whether the step was made; where not, the message names the culprit."""
    refusal = None
    try:
        optimizer.step()
    except ValueError as error:
        refusal = str(error)
    assert refusal is None or culprit in refusal
    return refusal is None


def pop_group(optimizer: FusedChildAdamW) -> None:
    del optimizer.param_groups[1]


def other_list_of_groups(optimizer: FusedChildAdamW) -> None:
    optimizer.param_groups = optimizer.param_groups[:1]


def empty_group(optimizer: FusedChildAdamW) -> None:
    optimizer.param_groups[1]["params"] = []
    optimizer.param_groups[1]["param_names"] = []


def shorten_group(optimizer: FusedChildAdamW) -> None:
    del optimizer.param_groups[1]["params"][:]
    del optimizer.param_groups[1]["param_names"][:]


@pytest.mark.parametrize("take", [pop_group, other_list_of_groups, empty_group, shorten_group])
def test_parameters_taken_out_are_not_trained(take: Callable[[FusedChildAdamW], None]) -> None:
    parameters = toy_parameters()
    optimizer = two_groups(parameters)
    taken = [parameters[name] for name in list(parameters)[2:]]
    before = [parameter.detach().clone() for parameter in taken]
    take(optimizer)
    stepped_or_refused(optimizer, "group")
    assert all(identical(p.detach(), old) for p, old in zip(taken, before, strict=True))


def test_a_parameter_put_in_the_place_of_another_is_trained() -> None:
    """As for an embedding that has grown: a new Parameter under the old name."""
    parameters = toy_parameters()
    optimizer = two_groups(parameters)
    old, new = parameters["layer.weight"], Parameter(torch.ones(6, 33))
    optimizer.param_groups[0]["params"][1] = new
    new.grad = torch.ones_like(new)
    before = old.detach().clone()
    if stepped_or_refused(optimizer, "layer.weight"):
        assert bool((new != 1.0).all())
    assert identical(old.detach(), before)


def test_a_group_put_in_the_place_of_another_counts() -> None:
    parameters = toy_parameters()
    optimizer = two_groups(parameters)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer.param_groups[1] = {**optimizer.param_groups[1], "lr": 0.0}
    stepped_or_refused(optimizer, "group")
    for name in list(parameters)[2:]:
        assert identical(parameters[name].detach(), before[name]), name


def clear(optimizer: FusedChildAdamW) -> None:
    optimizer.state.clear()


def new_dictionary(optimizer: FusedChildAdamW) -> None:
    optimizer.state = defaultdict(dict)


@pytest.mark.parametrize("forget", [clear, new_dictionary])
def test_state_that_was_cleared_is_not_used(forget: Callable[[FusedChildAdamW], None]) -> None:
    parameters, fresh = toy_parameters(), toy_parameters()
    optimizer = two_groups(parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            fresh[name].copy_(parameter)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    forget(optimizer)
    if stepped_or_refused(optimizer, "state"):
        again = FusedChildAdamW(fresh.items(), lr=0.1, weight_decay=0.0)
        train(again, fresh, [2])
        assert all(identical(parameters[name], fresh[name]) for name in fresh)
        assert len(optimizer.state_dict()["state"]) == len(parameters)
    else:
        assert all(identical(parameters[name].detach(), before[name]) for name in before)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_an_entry_of_the_state_put_in_the_place_of_another_is_used(steps_before: int) -> None:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.items(), lr=0.1)
    train(optimizer, parameters, range(steps_before))
    bias = parameters["layer.bias"]
    entry = {name: torch.zeros_like(tensor) for name, tensor in optimizer.state[bias].items()}
    optimizer.state[bias] = entry
    give_gradients(parameters, 3)
    if stepped_or_refused(optimizer, "layer.bias"):
        assert int(optimizer.state[bias]["step"]) == 1
        assert bool(optimizer.state[bias]["exp_avg"].all())


def test_what_was_refused_is_refused_again() -> None:
    """A plan that could not be made is not taken for one of the step before."""
    parameters = toy_parameters()
    optimizer = two_groups(parameters)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    del optimizer.state[parameters["layer.bias"]]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"state of layer\.bias is missing"):
            optimizer.step()
    assert all(identical(parameters[name].detach(), before[name]) for name in before)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_state_seen_as_another_type_where_it_lies_is_refused(key: str) -> None:
    parameters = toy_parameters()
    optimizer = two_groups(parameters)
    state = optimizer.state[parameters["layer.bias"]]
    whole = state[key]
    state[key] = whole.view(torch.float64 if key == "step" else torch.int32)
    for _ in range(2):
        with untouched(optimizer), pytest.raises(ValueError, match=r"layer\.bias"):
            optimizer.step()
    state[key] = whole
    optimizer.step()
    assert int(state["step"]) == 3


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_gradient_negated_where_it_lies_counts(backend: str | None) -> None:
    weights = []
    for negate in (torch._neg_view, torch.neg):
        parameter = Parameter(torch.ones(3))
        optimizer = FusedChildAdamW([parameter], lr=0.1, backend=backend)
        parameter.grad = torch.ones(3)
        optimizer.step()
        parameter.grad = negate(parameter.grad)
        optimizer.step()
        weights.append(parameter.detach())
    assert identical(*weights)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_options_given_again_as_other_objects_change_nothing(backend: str | None) -> None:
    """A scheduler writes a new float at every step: the same value is the same run."""
    runs = []
    for rewrite in (True, False):
        parameters = toy_parameters()
        optimizer = FusedChildAdamW(parameters.items(), lr=0.1, backend=backend)
        for step in range(4):
            if rewrite:
                optimizer.param_groups[0]["lr"] = float(str(optimizer.param_groups[0]["lr"]))
            if step == 2:
                optimizer.param_groups[0]["weight_decay"] = 0.5
            train(optimizer, parameters, [step])
        runs.append(parameters)
    assert all(identical(runs[0][name], runs[1][name]) for name in runs[0])


def test_options_taken_back_after_a_refusal_count_again() -> None:
    """The first group was right and the second refused: the very objects of before come back."""
    runs = []
    for disturbed in (True, False):
        parameters = toy_parameters()
        optimizer = two_groups(parameters)
        optimizer.step()
        if disturbed:
            before = [dict(group) for group in optimizer.param_groups]
            optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["eps"] = 0.5, -1.0
            with untouched(optimizer), pytest.raises(ValueError, match="eps=-1"):
                optimizer.step()
            for group, old in zip(optimizer.param_groups, before, strict=True):
                group.update(old)
        train(optimizer, parameters, [3])
        runs.append(parameters)
    assert all(identical(runs[0][name], runs[1][name]) for name in runs[0])


def test_weights_moved_back_after_a_refusal_are_written_again() -> None:
    first, second = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = FusedChildAdamW([first, second], lr=0.1, weight_decay=0.0)
    first.grad, second.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    weight, gradient = first.data, second.grad
    first.data = weight.clone()
    second.grad = None
    second.grad_dtype = None
    second.grad = torch.ones(3).half()
    with untouched(optimizer), pytest.raises(ValueError, match="gradient of #1"):
        optimizer.step()
    first.data, second.grad = weight, gradient
    optimizer.step()
    torch.testing.assert_close(weight, torch.full((3,), 0.8))
