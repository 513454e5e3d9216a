"""torch's database of optimizer inputs, run against FusedChildAdamW: what AdamW takes and refuses.

Plain (p = 1) it is compared with ``torch.optim.AdamW``, masked with the reference, bit for bit.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from childtune_kernels import FusedChildAdamW

from .columns import device_of
from .snapshots import assert_identical, snapshot, untouched, weights_and_state
from .torch_database import WAYS, adamw_entry, give_gradients, pairs_of_state, parameters

pytest.importorskip("expecttest", reason="torch's database needs expecttest (extra dev)")

OPS = ("child_adamw",)
STEPS = 12
INPUTS = {each.desc: each.kwargs for each in adamw_entry().optim_inputs_func(device="cpu")}
SERVED = {description: kwargs for description, kwargs in INPUTS.items() if "amsgrad" not in kwargs}
FLAGS: dict[str, dict[str, Any]] = {
    "no flag": {},
    **{flag: {flag: True} for flag in ("foreach", "fused")},
    "no flag is set": dict.fromkeys(adamw_entry().supported_impls, False),
}

every_input = pytest.mark.parametrize("description", SERVED)
every_way = pytest.mark.parametrize("way", WAYS)


def test_the_database_is_what_these_tests_expect() -> None:
    """Inputs and flags that a new version of torch adds are looked at before they pass."""
    assert {*INPUTS} - {*SERVED} == {"amsgrad"}
    assert {*SERVED} == {"default", "non-default lr", "nonzero weight_decay", "maximize"}
    assert {*adamw_entry().supported_impls} == {"foreach", "differentiable", "fused"}


def trained(
    make: Callable[..., Optimizer],
    members: dict[str, Parameter],
    way: str,
    **options: Any,
) -> Optimizer:
    """An optimizer of the members after its steps; in some a parameter has no gradient."""
    optimizer = make(WAYS[way](members), **options)
    for step in range(STEPS):
        give_gradients(members, step)
        if step in (0, 3):
            members["bias"].grad = None
        optimizer.step()
    return optimizer


@every_input
@every_way
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_plain_it_is_adamw(description: str, way: str, dtype: torch.dtype, backend: str) -> None:
    options = SERVED[description]
    rtol, atol = {torch.float64: (1e-12, 1e-15), torch.float32: (2e-6, 2e-7)}[dtype]
    ours, theirs = parameters(dtype, backend), parameters(dtype, backend)
    start = copy.deepcopy(ours)
    optimizer = trained(FusedChildAdamW, ours, way, backend=backend, **options)
    adamw = trained(torch.optim.AdamW, theirs, way, foreach=False, **options)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=rtol, atol=atol)
        assert parameter.numel() == 0 or not torch.equal(parameter, start[name])
    moments = [dict(pairs_of_state(each)) for each in (optimizer, adamw)]
    torch.testing.assert_close(*moments, rtol=rtol, atol=atol)


@every_input
@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_it_is_the_reference(
    description: str, way: str, dtype: torch.dtype, column: str
) -> None:
    runs = []
    for backend in ("reference", column):
        members = parameters(dtype, backend)
        optimizer = trained(
            FusedChildAdamW, members, way, reserve_p=0.4, seed=1, backend=backend,
            **SERVED[description],
        )  # fmt: skip
        run = weights_and_state(optimizer)
        runs.append({name: value.cpu() for name, value in run.items()})
    assert_identical(*runs)


@every_input
@pytest.mark.parametrize("flag", FLAGS)
def test_flags_of_implementations_change_no_bit(description: str, flag: str) -> None:
    runs = []
    for flags in (FLAGS[flag], {}):
        members = parameters(torch.float32, None)
        options: dict[str, Any] = {"reserve_p": 0.4, "seed": 1, **SERVED[description]}
        runs.append(
            weights_and_state(trained(FusedChildAdamW, members, "named", **options, **flags))
        )
    assert_identical(*runs)


@pytest.mark.parametrize("flag", ["amsgrad", "differentiable"])
def test_what_is_not_served_is_refused(flag: str) -> None:
    options: dict[str, Any] = {flag: True}
    with pytest.raises(ValueError, match=f"{flag}=True .* use {flag}=False"):
        FusedChildAdamW(parameters(torch.float32, None).values(), **options)


ERRORS = {
    each.optimizer_error_input.desc: each.optimizer_error_input
    for each in adamw_entry().optim_error_inputs_func(device="cpu", dtype=torch.float32)
}


@pytest.mark.parametrize("description", ERRORS)
def test_inputs_that_adamw_refuses_are_refused(description: str) -> None:
    given = ERRORS[description]
    params = parameters(torch.float32, None).values() if given.params is None else given.params
    with pytest.raises((ValueError, TypeError)):
        FusedChildAdamW(params, **given.kwargs)


def test_flags_that_exclude_each_other_are_refused() -> None:
    """The database has these for GPUs alone."""
    for flags in ({"foreach": True, "fused": True}, {"fused": True, "differentiable": True}):
        with pytest.raises(ValueError, match=r"fused=True and foreach=True|differentiable=True"):
            FusedChildAdamW(parameters(torch.float32, None).values(), **flags)  # type: ignore[arg-type]


@pytest.mark.launches
@pytest.mark.skipif(device_of("triton").type != "cuda", reason="needs a GPU")
def test_inputs_for_gpus_are_served_or_refused(column: str) -> None:
    """Those with ``capturable``: tensor betas and amsgrad are refused, the others are AdamW."""
    served = 0
    for each in adamw_entry().optim_inputs_func(device="cuda"):
        options = each.kwargs
        ours, theirs = (parameters(torch.float64, column) for _ in range(2))
        refused = "amsgrad=" if options.get("amsgrad") else "betas=" if "betas" in options else None
        if refused is not None:
            with pytest.raises(ValueError, match=refused):
                trained(FusedChildAdamW, ours, "list", backend=column, **options)
            continue
        # torch's capturable step takes its bias corrections from an fp32 number of steps.
        rtol = 1e-6 if options.get("capturable") else 1e-12
        trained(FusedChildAdamW, ours, "list", backend=column, **options)
        trained(torch.optim.AdamW, theirs, "list", foreach=False, **options)
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter, theirs[name], rtol=rtol, atol=1e-15)
        served += 1
    assert served > len(SERVED)


SCHEDULERS = adamw_entry().scheduler_inputs


@pytest.mark.parametrize("index", range(len(SCHEDULERS)))
def test_the_schedulers_of_the_database(index: int, backend: str) -> None:
    """Each list of them together, over a loss of their own, as torch tests them."""
    results = []
    for ours in (True, False):
        members = parameters(torch.float64, backend)
        optimizer: Optimizer = (
            FusedChildAdamW(members.values(), lr=0.05, backend=backend)
            if ours
            else torch.optim.AdamW(members.values(), lr=0.05)
        )
        schedulers = [constructor(optimizer) for constructor in SCHEDULERS[index]]
        for step in range(2 * STEPS):
            give_gradients(members, step)
            loss = float(members["scale"].detach())
            optimizer.step()
            for scheduler in schedulers:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*[loss] * plateau)
        results.append((members, optimizer.param_groups[0]["lr"]))
    (found, lr), (theirs, expected) = results
    assert lr == pytest.approx(expected, rel=1e-9)
    assert lr != 0.05
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-11, atol=1e-14)


@every_input
def test_a_state_dict_is_read_as_weights_alone_and_says_the_same_twice(description: str) -> None:
    members = parameters(torch.float32, None)
    optimizer = trained(FusedChildAdamW, members, "named groups", **SERVED[description])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    saved = optimizer.state_dict()
    assert loaded["param_groups"] == saved["param_groups"] == optimizer.state_dict()["param_groups"]
    torch.testing.assert_close(loaded["state"], saved["state"], rtol=0, atol=0)
    assert [*loaded["state"]] == list(range(len(members)))
    with untouched(optimizer):
        optimizer.load_state_dict(loaded)
    for key in ("foreach", "maximize", "capturable", "differentiable"):
        del loaded["param_groups"][0][
            key
        ]  # as a state that was saved before there was such an option
    before = weights_and_state(optimizer)
    optimizer.load_state_dict(loaded)
    assert_identical(before, weights_and_state(optimizer))


@every_input
def test_copies_have_all_public_attributes_and_everything_is_printed(description: str) -> None:
    members = parameters(torch.float32, None)
    optimizer = trained(FusedChildAdamW, members, "groups", **SERVED[description])
    twin = copy.deepcopy(optimizer)
    public = [{n for n in vars(each) if not n.startswith("_")} for each in (optimizer, twin)]
    assert public[0] == public[1] == {n for n in vars(torch.optim.AdamW(members.values()))
                                      if not n.startswith("_")}  # fmt: skip
    assert repr(twin) == repr(optimizer)
    for option in optimizer.param_groups[0].keys() - {"params"}:
        assert f"    {option}: " in repr(optimizer)
    assert snapshot(twin).keys() == snapshot(optimizer).keys()
