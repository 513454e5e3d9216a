"""Options of groups: every bad one is refused where it is given, and nothing has changed then."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from childtune_kernels import ChildMask, FusedChildAdamW, lr_for
from tests.snapshots import assert_identical, snapshot, untouched
from tests.toy_parameters import give_gradients, toy_mask, toy_parameters, train

NAN, INFINITY = math.nan, math.inf

# Option, bad value, what the message says besides the option's name.
BAD_OPTIONS: list[tuple[str, Any, str]] = [
    ("lr", NAN, "finite and not negative"),
    ("lr", INFINITY, "finite and not negative"),
    ("lr", -1e-3, "finite and not negative"),
    ("lr", "1e-3", "must be a number"),
    ("lr", None, "must be a number"),
    ("lr", True, "must be a number"),
    ("lr", torch.tensor([1e-3, 1e-3]), "must be a number"),
    ("lr", torch.tensor(NAN), "finite and not negative"),
    ("weight_decay", NAN, "finite and not negative"),
    ("weight_decay", INFINITY, "finite and not negative"),
    ("weight_decay", -0.1, "finite and not negative"),
    ("eps", NAN, "finite and not negative"),
    ("eps", INFINITY, "finite and not negative"),
    ("eps", -1e-8, "finite and not negative"),
    ("betas", (1.0, 0.9), r"lie in \[0, 1\)"),
    ("betas", (0.9, 1.0), r"lie in \[0, 1\)"),
    ("betas", (1.5, 0.9), r"lie in \[0, 1\)"),
    ("betas", (-0.1, 0.9), "finite and not negative"),
    ("betas", (0.9, NAN), "finite and not negative"),
    ("betas", 0.9, "must be two numbers"),
    ("betas", (0.9,), "must be two numbers"),
    ("betas", (0.9, 0.99, 0.999), "must be two numbers"),
    ("reserve_p", 0.0, "keeps no gradient element; use 1.0"),
    ("reserve_p", 1e-10, "keeps no gradient element; use 1.0"),
    ("reserve_p", 2.0**-33, "keeps no gradient element; use 1.0"),
    ("reserve_p", -0.3, "finite and not negative"),
    ("reserve_p", 1.0000001, r"lie in \(0, 1\]"),
    ("reserve_p", NAN, "finite and not negative"),
    ("reserve_p", None, "must be a number"),
    ("freeze_non_child", "yes", "must be True or False"),
    ("correct_bias", None, "must be True or False"),
    ("maximize", "no", "must be True or False"),
    ("convention", "orginal", "one of .*'torch', 'original'"),
    ("convention", None, "one of .*'torch', 'original'"),
    ("child_state", "sparse", "one of .*'dense'"),
    ("master_weight", "fp64", "one of .*'split', 'fp32', 'stochastic', 'none'"),
    ("master_weight", None, "one of .*'split', 'fp32', 'stochastic', 'none'"),
    ("state_dtype", torch.float16, "must be None, torch.float32 or torch.bfloat16"),
    ("state_dtype", "bfloat16", "must be None, torch.float32 or torch.bfloat16"),
    ("amsgrad", True, "use amsgrad=False"),
    ("differentiable", True, "use differentiable=False"),
]
IDENTITIES = [f"{option}={value}" for option, value, _ in BAD_OPTIONS]
bad_options = pytest.mark.parametrize(("option", "value", "message"), BAD_OPTIONS, ids=IDENTITIES)


def saying(option: str, message: str) -> str:
    return f"(?s){option}=.*{message}"


@bad_options
def test_the_constructor_refuses(option: str, value: Any, message: str) -> None:
    parameters = toy_parameters()
    with pytest.raises(ValueError, match=saying(option, message)):
        FusedChildAdamW(parameters.items(), **{option: value})
    FusedChildAdamW(parameters.items())


@bad_options
def test_a_group_refuses(option: str, value: Any, message: str) -> None:
    parameters = toy_parameters()
    good = {"params": [("layer.bias", parameters["layer.bias"])]}
    bad = {"params": [("scale", parameters["scale"])], option: value}
    with pytest.raises(ValueError, match=saying(option, message)):
        FusedChildAdamW([good, bad])
    optimizer = FusedChildAdamW([good])
    with untouched(optimizer), pytest.raises(ValueError, match=saying(option, message)):
        optimizer.add_param_group(bad)
    optimizer.add_param_group({"params": bad["params"]})


@bad_options
@pytest.mark.parametrize("steps_before", [0, 2])
def test_an_option_turned_bad_is_refused_at_the_step(
    option: str, value: Any, message: str, steps_before: int
) -> None:
    parameters, undisturbed = toy_parameters(), toy_parameters()
    split = ["layer.bias"], [name for name in parameters if name != "layer.bias"]
    optimizer, twin = (
        FusedChildAdamW([{"params": [(n, owner[n]) for n in names]} for names in split], lr=0.1)
        for owner in (parameters, undisturbed)
    )
    train(optimizer, parameters, range(steps_before))
    train(twin, undisturbed, range(steps_before))
    good = optimizer.param_groups[1][option]
    optimizer.param_groups[1][option] = value
    give_gradients(parameters, 10)
    with untouched(optimizer), pytest.raises(ValueError, match=saying(option, message)):
        optimizer.step()
    optimizer.param_groups[1][option] = good
    optimizer.step()
    train(twin, undisturbed, [10])
    assert_identical(*(without_identity(each) for each in (optimizer, twin)))


def without_identity(optimizer: FusedChildAdamW) -> dict[str, Any]:
    return {k: v for k, v in snapshot(optimizer).items() if not k.endswith("identity")}


@pytest.mark.parametrize("eps", [0, 0.0, 1e-50])
@pytest.mark.parametrize("masked", ["Bernoulli", "fixed"])
def test_eps_that_is_zero_in_fp32_is_refused_beside_a_mask(eps: float, masked: str) -> None:
    parameters = toy_parameters()
    mask: dict[str, Any] = (
        {"reserve_p": 0.3} if masked == "Bernoulli" else {"child_mask": toy_mask(parameters)}
    )
    message = r"eps=.* is 0 in float32; .* use eps=1e-8"
    with pytest.raises(ValueError, match=message):
        FusedChildAdamW(parameters.items(), eps=eps, **mask)
    optimizer = FusedChildAdamW(parameters.items(), **mask)
    train(optimizer, parameters, range(2))
    optimizer.param_groups[0]["eps"] = eps
    with untouched(optimizer), pytest.raises(ValueError, match=message):
        optimizer.step()


def test_eps_zero_is_allowed_without_a_mask() -> None:
    parameter = Parameter(torch.zeros(3))
    optimizer = FusedChildAdamW([parameter], lr=1.0, eps=0.0, weight_decay=0.0)
    parameter.grad = torch.tensor([1.0, -2.0, 1e-3])
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([-1.0, 1.0, -1.0]))


def test_a_mask_turned_on_beside_eps_zero_is_refused() -> None:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.items(), eps=0.0)
    give_gradients(parameters, 1)
    optimizer.param_groups[0]["reserve_p"] = 0.5
    with untouched(optimizer), pytest.raises(ValueError, match=r"eps=0\.0"):
        optimizer.step()


@pytest.mark.parametrize("seed", ["7", 7.0, True, torch.tensor(7)])
def test_a_seed_is_an_integer(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"seed=.* must be an int or None"):
        FusedChildAdamW(toy_parameters().items(), seed=seed)


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("seed", ["seven", 7.0, None])
def test_a_seed_turned_bad_is_refused_at_the_step(seed: Any, steps_before: int) -> None:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.items(), reserve_p=0.5, seed=1)
    train(optimizer, parameters, range(steps_before))
    optimizer.param_groups[0]["seed"] = seed
    with untouched(optimizer), pytest.raises(ValueError, match=f"seed={seed!r}"):
        optimizer.step()
    optimizer.param_groups[0]["seed"] = 1
    optimizer.step()


@pytest.mark.parametrize("backend", ["cuda", "", "CPP"])
def test_an_unknown_backend(backend: str) -> None:
    with pytest.raises(ValueError, match=f"backend={backend!r} is unknown; use one of .*cpp"):
        FusedChildAdamW(toy_parameters().items(), backend=backend)


@pytest.mark.parametrize(("option", "value"), [("seed", 7), ("backend", "reference")])
def test_seed_and_backend_do_not_differ_by_group(option: str, value: Any) -> None:
    parameter = Parameter(torch.ones(3))
    message = f"{option}={value!r} .group 0. cannot differ by group; give it to the constructor"
    with pytest.raises(ValueError, match=message):
        FusedChildAdamW([{"params": [parameter], option: value}])


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("weight_decy", "weight_decay"),
        ("weightdecay", "weight_decay"),
        ("beta", "betas"),
        ("reserve_P", "reserve_p"),
        ("convetion", "convention"),
        ("freeze_nonchild", "freeze_non_child"),
        ("maximise", "maximize"),
        ("correct_biases", "correct_bias"),
        ("master_weights", "master_weight"),
        ("child_masks", "child_mask"),
    ],
)
def test_a_misspelt_option_of_a_group(key: str, meant: str) -> None:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW([("scale", parameters["scale"])])
    group = {"params": [("layer.bias", parameters["layer.bias"])], key: 0.1}
    message = f"group key {key!r} .group 1. is no option; did you mean {meant!r}"
    with untouched(optimizer), pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)


def test_keys_of_others_may_stand_in_a_group() -> None:
    group = {"params": [Parameter(torch.ones(3))], "initial_lr": 0.1, "layer": 3, "name": "head"}
    optimizer = FusedChildAdamW([group])
    assert optimizer.param_groups[0]["layer"] == 3


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0},
        {"lr": Fraction(1, 1000), "weight_decay": 0, "betas": [0, 0.0]},
        {"lr": torch.tensor([1e-3])},
        {"reserve_p": 2.0**-32},
        {"reserve_p": 1},
        {"eps": 1e-50},
        {"betas": (1 - 2.0**-53, 1 - 2.0**-53)},
        {"amsgrad": False, "fused": True, "foreach": False},
        {"seed": -(2**70)},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(options: dict[str, Any]) -> None:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.items(), **options)
    train(optimizer, parameters, range(2))
    assert all(bool(parameter.isfinite().all()) for parameter in parameters.values())
    assert int(optimizer.state[parameters["scale"]]["step"]) == 2


def test_one_bad_group_of_many_is_named() -> None:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW([{"params": [pair]} for pair in parameters.items()])
    train(optimizer, parameters, range(1))
    optimizer.param_groups[2]["lr"] = NAN
    with untouched(optimizer), pytest.raises(ValueError, match=r"group of layer\.bias"):
        optimizer.step()


def test_every_option_stands_in_every_group() -> None:
    parameters = toy_parameters()
    mask = toy_mask(parameters)
    optimizer = FusedChildAdamW(
        [{"params": [pair]} for pair in parameters.items()], child_mask=mask
    )
    options = {"lr", "betas", "eps", "weight_decay", "reserve_p", "freeze_non_child", "convention",
               "correct_bias", "maximize", "child_state", "master_weight", "state_dtype",
               "seed"}  # fmt: skip
    for group in optimizer.param_groups:
        assert options <= group.keys()
        assert not any(isinstance(value, ChildMask) for value in group.values())


def test_lr_for_is_the_square_root_law() -> None:
    assert lr_for(1.0, 3e-5) == 3e-5
    assert lr_for(0.25, 0.5) == 1.0
    assert lr_for(0.3, 2e-5) == pytest.approx(2e-5 / math.sqrt(0.3), rel=1e-15)


@pytest.mark.parametrize(
    ("reserve_p", "lr", "message"),
    [
        (0.0, 0.1, "reserve_p=0.0"),
        (1.1, 0.1, "reserve_p=1.1"),
        (NAN, 0.1, "reserve_p=nan"),
        (0.5, NAN, "lr=nan"),
        (0.5, -0.1, "lr=-0.1"),
    ],
)
def test_lr_for_refuses(reserve_p: float, lr: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lr_for(reserve_p, lr)
