"""Compact state through a run: densities, conversions, changes of the child, memory (SPEC.md, section 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from childtune_kernels import ChildMask, FusedChildAdamW, child_layout
from tests.child_states import LAYOUTS, lay_out_children, state_in_full
from tests.columns import placed
from tests.snapshots import assert_identical, untouched, weights_and_state
from tests.toy_parameters import give_gradients, random_tensor, toy_mask, toy_parameters, train

pytestmark = pytest.mark.usefixtures("one_thread")

OPS = ("child_adamw",)
NUMEL = 70_001  # two stretches of indices, eighteen of words, a tail
NAME = "layer.weight"
ONE_BIT = 1 / NUMEL
DENSITIES = [0.0, ONE_BIT, 0.02, 0.1, 0.124, 0.126, 0.3, 0.5, 0.9, 1.0]


def child_of(density: float, run: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(int(1000 * density) + run)
    if density == ONE_BIT:
        child = torch.zeros(NUMEL, dtype=torch.bool)
        child[65_999] = True
        return child
    return (torch.rand(-(-NUMEL // run), generator=generator) < density).repeat_interleave(run)[
        :NUMEL
    ]


def weight(dtype: torch.dtype, backend: str | None = None) -> dict[str, Parameter]:
    return {NAME: Parameter(placed(random_tensor((NUMEL,), 3, dtype), backend))}


def outcome(parameters: Mapping[str, Parameter], optimizer: FusedChildAdamW) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, parameter in parameters.items():
        found[f"{name} weight"] = parameter.detach().cpu().clone()
        for key, tensor in state_in_full(parameter, optimizer.state[parameter]).items():
            found[f"{name} {key}"] = tensor.clone()
    return found


@pytest.mark.parametrize(
    ("density", "run", "dtype"),
    [
        *((density, 1, torch.float32) for density in DENSITIES),
        *((density, 40, torch.float32) for density in (0.02, 0.3)),
        *((density, 1, torch.bfloat16) for density in (0.02, 0.3, 1.0)),
    ],
)
def test_compact_equals_dense_at_every_density(
    density: float, run: int, dtype: torch.dtype, column: str
) -> None:
    """In the layout that the optimizer chooses, and in the others."""
    mask = ChildMask.from_dense({NAME: child_of(density, run)})
    outcomes = []
    for child_state, layout in [
        ("dense", None),
        ("compact", None),
        *(("compact", at) for at in LAYOUTS),
    ]:
        parameters = weight(dtype, column)
        optimizer = FusedChildAdamW(
            parameters.items(), lr=0.1, weight_decay=0.3, child_mask=mask, child_state=child_state,
            reserve_p=0.7, seed=4, backend=column,
        )  # fmt: skip
        if layout is not None:
            lay_out_children(optimizer, layout)
            assert child_layout.layout_of(optimizer.state[parameters[NAME]]) == layout
        train(optimizer, parameters, range(2))
        optimizer.param_groups[0]["reserve_p"] = 1.0
        train(optimizer, parameters, range(2, 4))
        outcomes.append(outcome(parameters, optimizer))
    for found in outcomes[1:]:
        assert_identical(found, outcomes[0])
    moved = outcomes[0][f"{NAME} weight"] != random_tensor((NUMEL,), 3, dtype)
    child = child_of(density, run)
    assert not bool((moved & ~child).any())
    assert int(moved.sum()) >= 0.9 * int(child.sum())  # of bf16 weights the largest do not move


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("saved_as", "loaded_as"), [("dense", "compact"), ("compact", "dense"), ("compact", "auto")]
)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.4, 1.0])
def test_saved_states_become_what_the_loading_optimizer_asks_for(
    density: float, saved_as: str, loaded_as: str, dtype: torch.dtype
) -> None:
    mask = ChildMask.from_dense({NAME: child_of(density)})
    options: dict[str, Any] = {"lr": 0.1, "seed": 3, "weight_decay": 0.2}
    parameters = weight(dtype)
    optimizer = FusedChildAdamW(
        parameters.items(), child_mask=mask, child_state=saved_as, **options
    )
    train(optimizer, parameters, range(2))
    saved = optimizer.state_dict()
    twins = {name: Parameter(p.detach().clone()) for name, p in parameters.items()}
    resumed = FusedChildAdamW(twins.items(), child_state=loaded_as)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["child_state"] == loaded_as
    assert child_layout.is_compact(resumed.state[twins[NAME]]) == (loaded_as != "dense")
    assert_identical(outcome(twins, resumed), outcome(parameters, optimizer))
    train(optimizer, parameters, range(2, 4))
    train(resumed, twins, range(2, 4))
    assert_identical(outcome(twins, resumed), outcome(parameters, optimizer))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_without_mask_words_is_that_of_the_optimizers_child(layout: str) -> None:
    """As flat state dicts of torch.distributed.checkpoint bring it."""
    parameters, mask = weight(torch.float32), ChildMask.from_dense({NAME: child_of(0.2)})
    optimizer = FusedChildAdamW(parameters.items(), child_mask=mask)
    train(optimizer, parameters, range(2))
    lay_out_children(optimizer, layout)
    saved = optimizer.state_dict()
    assert not saved["state"][0].keys() & {"child_ranks", "child_indices", "child_runs"}
    del saved["state"][0]["mask_words"]
    twins = {name: Parameter(p.detach().clone()) for name, p in parameters.items()}
    resumed = FusedChildAdamW(twins.items(), child_mask=mask)
    with pytest.warns(UserWarning, match="tells no masks"):
        resumed.load_state_dict(saved)
    train(optimizer, parameters, range(2, 4))
    train(resumed, twins, range(2, 4))
    assert torch.equal(twins[NAME], parameters[NAME])
    unmasked = FusedChildAdamW(weight(torch.float32).items())
    with untouched(unmasked), pytest.raises(ValueError, match="child without mask_words"):
        unmasked.load_state_dict(saved)
    another = ChildMask.from_dense({NAME: child_of(0.3)})
    masked = FusedChildAdamW(weight(torch.float32).items(), child_mask=another)
    with (
        untouched(masked),
        pytest.warns(UserWarning, match="tells no masks"),
        pytest.raises(ValueError, match="expected shape"),
    ):
        masked.load_state_dict(saved)


def masked_by_hand(
    state: Mapping[str, Tensor], old: Tensor, new: Tensor, weight: Tensor
) -> dict[str, Tensor]:
    """What ``new_state="keep"`` means, element by element."""
    kept: dict[str, Tensor] = {"step": state["step"].clone()}
    for name in ("exp_avg", "exp_avg_sq"):
        kept[name] = torch.where(old & new, state[name], 0.0)
    if "master_remainder" in state:
        kept["master_remainder"] = torch.where(old & new, state["master_remainder"], 0)
    if "master_weight" in state:
        kept["master_weight"] = torch.where(old & new, state["master_weight"], weight.float())
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("child_state", ["compact", "dense"])
def test_a_new_child_keeps_the_state_of_what_stays(child_state: str, dtype: torch.dtype) -> None:
    parameters = toy_parameters(dtype)
    first, second = (
        toy_mask(parameters, 7, dense=["scale"]),
        toy_mask(parameters, 99, dense=["layer.bias"]),
    )
    optimizer = FusedChildAdamW(
        parameters.items(), lr=0.1, child_mask=first, child_state=child_state
    )
    train(optimizer, parameters, range(3))
    before = {name: state_in_full(p, optimizer.state[p]) for name, p in parameters.items()}
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer.set_child_mask(second)
    for name, parameter in parameters.items():
        everything = torch.ones(parameter.shape, dtype=torch.bool)
        old = everything if name == "scale" else first.dense(name)
        new = everything if name == "layer.bias" else second.dense(name)
        expected = masked_by_hand(before[name], old, new, parameter.detach())
        found = state_in_full(parameter, optimizer.state[parameter])
        words = found.pop("mask_words", None)
        assert (words is None) == (name == "layer.bias")
        assert words is None or torch.equal(words, second.words[name])
        assert_identical(found, expected)
        assert torch.equal(parameter, weights[name])
    give_gradients(parameters, 5)
    optimizer.step()
    for name in second.words:
        still = ~second.dense(name)
        assert torch.equal(parameters[name].detach()[still], weights[name][still])
    assert bool((parameters["layer.bias"] != weights["layer.bias"]).all())


def test_changes_of_the_child_are_the_same_in_both_states() -> None:
    """A run through three children, with a save and a load between them."""
    outcomes = []
    for child_state in ("compact", "dense"):
        parameters = toy_parameters(torch.bfloat16)
        masks = [toy_mask(parameters, seed, dense=["scale"]) for seed in (1, 20, 300)]
        optimizer = FusedChildAdamW(
            parameters.items(),
            lr=0.1,
            child_mask=masks[0],
            child_state=child_state,
            seed=2,
            reserve_p=0.6,
        )
        train(optimizer, parameters, range(2))
        optimizer.set_child_mask(masks[1])
        train(optimizer, parameters, range(2, 4))
        twins = {name: Parameter(p.detach().clone()) for name, p in parameters.items()}
        resumed = FusedChildAdamW(twins.items(), child_state=child_state)
        resumed.load_state_dict(optimizer.state_dict())
        resumed.set_child_mask(masks[2])
        train(resumed, twins, range(4, 6))
        resumed.set_child_mask(masks[0], new_state="reset")
        train(resumed, twins, range(6, 8))
        outcomes.append(outcome(twins, resumed))
    assert_identical(*outcomes)


def test_reset_is_a_new_optimizer() -> None:
    parameters = toy_parameters(torch.bfloat16)
    mask = toy_mask(parameters, 50)
    optimizer = FusedChildAdamW(parameters.items(), lr=0.1, child_mask=toy_mask(parameters), seed=6)
    train(optimizer, parameters, range(3))
    optimizer.set_child_mask(mask, new_state="reset")
    twins = {name: Parameter(p.detach().clone()) for name, p in parameters.items()}
    fresh = FusedChildAdamW(twins.items(), lr=0.1, child_mask=mask, seed=6)
    assert_identical(weights_and_state(optimizer), weights_and_state(fresh))
    train(optimizer, parameters, range(3, 5))
    train(fresh, twins, range(3, 5))
    assert_identical(weights_and_state(optimizer), weights_and_state(fresh))


def test_without_a_mask_everything_trains() -> None:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.items(), lr=0.1, child_mask=toy_mask(parameters))
    train(optimizer, parameters, range(2))
    optimizer.set_child_mask(None)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    train(optimizer, parameters, range(2, 3))
    assert all(bool((p != before[name]).all()) for name, p in parameters.items())
    assert all(
        state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in optimizer.state.values()
    )


@pytest.mark.parametrize(
    ("mask", "new_state", "message"),
    [
        ("partial", "keep", "child_mask: it does not know"),
        ("other shape", "keep", "has shape"),
        ("no mask", "keep", "must be a ChildMask"),
        ("good", "zero", "new_state='zero' must be 'keep' or 'reset'"),
    ],
)
def test_a_child_that_does_not_fit_changes_nothing(mask: str, new_state: str, message: str) -> None:
    parameters = toy_parameters()
    good = toy_mask(parameters)
    masks: dict[str, Any] = {
        "good": good,
        "partial": ChildMask.from_dense({"layer.bias": torch.ones(33) > 0}),
        "other shape": ChildMask.from_dense({name: torch.ones(3, 3) > 0 for name in parameters}),
        "no mask": {"layer.bias": torch.ones(33) > 0},
    }  # fmt: skip
    optimizer = FusedChildAdamW(parameters.items(), lr=0.1, child_mask=good)
    train(optimizer, parameters, range(2))
    with untouched(optimizer), pytest.raises(ValueError, match=message):
        optimizer.set_child_mask(masks[mask], new_state=new_state)
    train(optimizer, parameters, range(2, 3))


def test_set_child_mask_needs_an_eps() -> None:
    """A dropped element would be 0/0 in its first step."""
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.items(), eps=0.0)
    with (
        untouched(optimizer),
        pytest.raises(ValueError, match=r"eps=0\.0 .group 0. is 0 in float32"),
    ):
        optimizer.set_child_mask(toy_mask(parameters))


def test_masters_of_the_child_cannot_take_decay_outside_it() -> None:
    parameters = toy_parameters(torch.bfloat16)
    mask = toy_mask(parameters)
    remedy = (
        "freeze_non_child=False with compact state, a weight of torch.bfloat16.*child_state='dense'"
    )
    with pytest.raises(ValueError, match=remedy):
        FusedChildAdamW(
            parameters.items(), child_mask=mask, child_state="compact", freeze_non_child=False
        )
    chosen = FusedChildAdamW(parameters.items(), child_mask=mask, freeze_non_child=False)
    assert not any(map(child_layout.is_compact, chosen.state.values()))
    optimizer = FusedChildAdamW(parameters.items(), child_mask=mask)
    train(optimizer, parameters, range(1))
    optimizer.param_groups[0]["freeze_non_child"] = False
    with untouched(optimizer), pytest.raises(ValueError, match=remedy):
        optimizer.step()
    optimizer.set_child_mask(mask)  # "auto" is dense from here on
    train(optimizer, parameters, range(1, 2))


def test_child_state_changed_by_hand_is_refused_until_the_state_follows() -> None:
    parameters = toy_parameters()
    mask = toy_mask(parameters)
    optimizer = FusedChildAdamW(parameters.items(), lr=0.1, child_mask=mask)
    train(optimizer, parameters, range(2))
    optimizer.param_groups[0]["child_state"] = "dense"
    with (
        untouched(optimizer),
        pytest.raises(ValueError, match=r"is compact, .*set_child_mask after"),
    ):
        optimizer.step()
    before = outcome(parameters, optimizer)
    optimizer.set_child_mask(mask)
    assert not any(map(child_layout.is_compact, optimizer.state.values()))
    assert_identical(outcome(parameters, optimizer), before)
    train(optimizer, parameters, range(2, 3))
