"""to_adamw_state_dict(groups=...): into an AdamW of other groups, which are found by tensor or by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import AdamW

from childtune_kernels import FusedChildAdamW
from tests.child_states import state_in_full
from tests.snapshots import identical, untouched
from tests.test_saved_groups import BODY, HEAD, entries, in_two_groups
from tests.test_state_dict import saved_and_loaded
from tests.test_state_dict_interchange import copied
from tests.toy_parameters import SHAPES, toy_mask, toy_parameters, train

Parameters = dict[str, Parameter]
ORDER = ("scale", "layer.weight", "embedding.weight", "nothing", "layer.bias")


def trained(**options: Any) -> tuple[Parameters, FusedChildAdamW]:
    parameters = toy_parameters()
    optimizer = in_two_groups(
        parameters, {"weight_decay": 0.3}, {"weight_decay": 0.0, "tag": "head"}, **options
    )
    optimizer.param_groups[0]["tag"] = "body"
    train(optimizer, parameters, range(3))
    return parameters, optimizer


def one_each(parameters: Parameters, named: bool, **options: Any) -> AdamW:
    """An AdamW with a group a parameter, in another order."""
    return AdamW(
        [
            {"params": entries(parameters, (name,)) if named else [parameters[name]]}
            for name in ORDER
        ],
        lr=7.0,
        **options,
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("found_by", ["tensor", "name", "both"])
def test_state_and_options_go_where_the_parameters_are(found_by: str, masked: bool) -> None:
    mask = toy_mask(toy_parameters(), dense=["scale"]) if masked else None
    parameters, optimizer = trained(child_mask=mask)
    theirs = copied(parameters) if found_by == "name" else parameters
    adamw = one_each(theirs, named=found_by != "tensor")
    with untouched(optimizer):
        saved = optimizer.to_adamw_state_dict(groups=adamw.param_groups)
    adamw.load_state_dict(saved_and_loaded(saved))
    for name, group in zip(ORDER, adamw.param_groups, strict=True):
        assert group["weight_decay"] == (0.3 if name in BODY else 0.0)
        assert (group["lr"], group["tag"]) == (0.1, "body" if name in BODY else "head")
        assert group.get("param_names") == (None if found_by == "tensor" else [name])
        assert not {"reserve_p", "seed", "convention", "child_state"} & group.keys()
        found = adamw.state[theirs[name]]
        expected = state_in_full(parameters[name], optimizer.state[parameters[name]])
        assert float(found["step"]) == 3
        assert identical(found["exp_avg"], expected["exp_avg"])
        assert identical(found["exp_avg_sq"], expected["exp_avg_sq"])


def test_tensors_decide_where_this_optimizer_has_no_names() -> None:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.values(), lr=0.1)
    train(optimizer, parameters, range(2))
    adamw = one_each(parameters, named=True)
    adamw.load_state_dict(optimizer.to_adamw_state_dict(groups=adamw.param_groups))
    for parameter in parameters.values():
        found = adamw.state[parameter]["exp_avg"]
        assert identical(found, optimizer.state[parameter]["exp_avg"])


def test_how_the_other_steps_stays_its_own() -> None:
    parameters, optimizer = trained()
    adamw = one_each(parameters, named=True, fused=True)
    adamw.load_state_dict(optimizer.to_adamw_state_dict(groups=adamw.param_groups))
    assert all(group["fused"] is True for group in adamw.param_groups)
    train(adamw, parameters, range(3, 4))
    adamw.load_state_dict(in_two_groups(parameters, {}, {}).to_adamw_state_dict(adamw.param_groups))


def without_a_parameter(parameters: Parameters) -> Any:
    return AdamW(entries(parameters, ORDER[1:])).param_groups


def with_one_more(parameters: Parameters) -> Any:
    more = {**parameters, "more": Parameter(torch.ones(2))}
    return AdamW([{"params": [item]} for item in more.items()]).param_groups


def with_a_name_twice(parameters: Parameters) -> Any:
    groups = one_each(copied(parameters), named=True).param_groups
    groups[1]["param_names"] = ["scale"]
    groups[1]["params"] = groups[0]["params"]
    return groups


def of_another_shape(parameters: Parameters) -> Any:
    return AdamW(entries({**parameters, "scale": Parameter(torch.ones(2))})).param_groups


REFUSED: dict[str, tuple[Callable[[Parameters], Any], str]] = {
    "one too few": (without_a_parameter, "labels differ: AdamW lacks scale; build both with the same"),
    "one too many": (with_one_more, "labels differ: this optimizer lacks more; build both with"),
    "a name twice": (with_a_name_twice, "AdamW has scale more than once"),
    "another shape": (of_another_shape, r"groups\[0\]: scale has shape \(2,\), here \(\); build both"),
    "neither tensor nor name": (
        lambda parameters: one_each(copied(parameters), named=False).param_groups,
        r"groups\[0\]: parameter 0 is none of this optimizer's and has no name; build the AdamW",
    ),
    "amsgrad": (
        lambda parameters: one_each(parameters, named=True, amsgrad=True).param_groups,
        r"amsgrad=True \(groups\[0\]\) is not supported",
    ),
    "one group for two decays": (
        lambda parameters: AdamW(parameters.items()).param_groups,
        r"weight_decay differs in this optimizer: 0\.3 for embedding\.weight, 0\.0 for layer\.bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_groups_that_do_not_fit_are_refused(what: str) -> None:
    parameters, optimizer = trained()
    groups_of, message = REFUSED[what]
    groups = groups_of(parameters)
    with untouched(optimizer), pytest.raises(ValueError, match=message):
        optimizer.to_adamw_state_dict(groups=groups)


ALTERED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "steps are numbers": lambda entry: entry.update(step=3),
    "steps are floats": lambda entry: entry.update(step=3.0),
    "steps are fp64": lambda entry: entry.update(step=torch.tensor(3.0, dtype=torch.float64)),
    "steps are int64": lambda entry: entry.update(step=torch.tensor(3)),
    "steps have a dimension": lambda entry: entry.update(step=torch.tensor([3.0])),
    "no entry yet": lambda entry: entry.clear(),
}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("what", [None, *ALTERED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_way_in_which_adamw_counts(what: str | None, named: bool, dtype: torch.dtype) -> None:
    """capturable=True keeps steps in fp32 on the device; older versions of torch counted in numbers."""
    parameters = toy_parameters(dtype)
    listed = [entries(parameters, names) for names in (BODY, HEAD)]
    groups = [{"params": each if named else [p for _, p in each]} for each in listed]
    adamw = AdamW(groups, lr=torch.tensor(0.125), foreach=False)
    train(adamw, parameters, range(3))
    saved = saved_and_loaded(adamw.state_dict())
    saved["param_groups"][1] |= {"capturable": True, "lr": 0.25}
    if what is not None:
        ALTERED[what](saved["state"][2])
    ours = copied(parameters)
    optimizer = in_two_groups(ours, {}, {})
    optimizer.load_state_dict(saved)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.125, 0.25]
    assert not any(group["capturable"] for group in optimizer.param_groups)
    for name, parameter in ours.items():
        state, theirs = optimizer.state[parameter], adamw.state[parameters[name]]
        fresh = what == "no entry yet" and name == HEAD[0]
        assert state["step"].dtype == torch.int64
        assert int(state["step"]) == (0 if fresh else 3)
        expected = torch.zeros_like(theirs["exp_avg"]) if fresh else theirs["exp_avg"]
        assert identical(state["exp_avg"], expected.float())
    train(optimizer, ours, range(3, 4))


def test_a_fresh_adamw_resets_a_run() -> None:
    """Its state is empty: nothing has been stepped yet."""
    parameters, optimizer = trained()
    adamw = AdamW(parameters.items(), lr=0.5, weight_decay=0.0)
    with pytest.warns(UserWarning, match=r"differ no longer in weight_decay .0\.3 with"):
        optimizer.load_state_dict(saved_and_loaded(adamw.state_dict()))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    for name in SHAPES:
        state = optimizer.state[parameters[name]]
        assert int(state["step"]) == 0
        assert not bool(state["exp_avg"].any())
