"""What would make a kernel write beside the child, or outside the parameter, is refused; so is a lost run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter

from childtune_kernels import ChildMask, FusedChildAdamW, apply_child, child_diff, save_child
from tests.child_states import LAYOUTS, lay_out_children
from tests.columns import placed
from tests.snapshots import assert_identical, untouched, weights_and_state
from tests.toy_parameters import random_tensor, toy_mask, toy_parameters, train

OPS = ("child_adamw",)


def compact(
    shape: tuple[int, ...], layout: str, density: float = 0.3
) -> tuple[Parameter, FusedChildAdamW]:
    parameter = Parameter(random_tensor(shape, 1))
    mask = ChildMask.from_dense(
        {"w": torch.rand(shape, generator=torch.Generator().manual_seed(2)) < density}
    )
    optimizer = FusedChildAdamW([("w", parameter)], lr=0.1, child_mask=mask)
    lay_out_children(optimizer, layout)
    return parameter, optimizer


def step_with_ones(parameter: Tensor, optimizer: FusedChildAdamW) -> None:
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("stepped_before", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", ["shrunk", "grown", "transposed", "flattened"])
def test_a_parameter_of_another_shape_is_refused(
    layout: str, change: str, stepped_before: bool
) -> None:
    parameter, optimizer = compact((40, 50), layout)
    if stepped_before:
        step_with_ones(parameter, optimizer)
    memory = torch.zeros(8000)
    parameter.data = {
        "shrunk": memory[:10],
        "grown": memory[:6000].view(60, 100),
        "transposed": memory[:2000].view(50, 40),
        "flattened": memory[:2000],
    }[change]
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(
        ValueError, match=r"state of w was made for shape \(40, 50\), the parameter has"
    ):
        optimizer.step()
    assert not memory.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(50, 40), (2000,), (40, 51)])
def test_state_of_another_shape_is_not_loaded(shape: tuple[int, ...], layout: str) -> None:
    _, saved = compact((40, 50), layout)
    parameter, optimizer = compact(shape, layout)
    with (
        untouched(optimizer),
        pytest.raises(ValueError, match=r"shape \(40, 50\)|for 2040 elements"),
    ):
        optimizer.load_state_dict(saved.state_dict())
    step_with_ones(parameter, optimizer)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_exchanged_by_hand_for_one_of_no_child_is_refused(layout: str) -> None:
    parameter, optimizer = compact((40, 50), layout)
    step_with_ones(parameter, optimizer)
    state = optimizer.state[parameter]
    name = {"words": "child_ranks", "indices": "child_indices", "runs": "child_runs"}[layout]
    good = state[name]
    state[name] = good.clone()
    state[name].view(-1)[0] += 7
    with (
        untouched(optimizer),
        pytest.raises(ValueError, match="child of w is not written as layout"),
    ):
        step_with_ones(parameter, optimizer)
    state[name] = good
    step_with_ones(parameter, optimizer)


@pytest.mark.parametrize(("saved", "loading"), [(0.3, 0.05), (0.05, 0.3), (None, 0.3), (0.3, None)])
def test_flat_state_dicts_of_another_child_are_refused_in_plain_words(
    saved: float | None, loading: float | None
) -> None:
    """A flat state dict is read by the keys of the optimizer that loads it."""

    def made(density: float | None) -> tuple[nn.Module, FusedChildAdamW]:
        torch.manual_seed(0)
        model = nn.Linear(40, 50, bias=False)
        mask = None
        if density is not None:
            mask = ChildMask.from_dense({"weight": torch.rand(50, 40) < density})
        return model, FusedChildAdamW(model.named_parameters(), child_mask=mask)

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    content = get_optimizer_state_dict(*made(saved), options=options)
    model, optimizer = made(loading)
    if (saved, loading) == (0.05, 0.3):
        # The mask words are not among the live keys there, and come from the saved layout.
        with pytest.warns(UserWarning, match="mask of weight differs"):
            set_optimizer_state_dict(model, optimizer, content, options=options)
        return
    with untouched(optimizer), pytest.raises((ValueError, KeyError), match=r"weight"):
        set_optimizer_state_dict(model, optimizer, content, options=options)


@pytest.fixture
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("default_device")
def test_another_default_device_disturbs_nobody(tmp_path: Path) -> None:
    model, base = (nn.Linear(30, 20, device="cpu") for _ in range(2))
    with torch.no_grad():
        for parameter, other in zip(base.parameters(), model.parameters(), strict=True):
            parameter.copy_(other)
    half = torch.arange(600, device="cpu").view(20, 30) % 3 == 0
    mask = ChildMask.from_dense({"weight": half}, dense=["bias"])
    optimizer = FusedChildAdamW(model.named_parameters(), lr=0.1, child_mask=mask)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(child_diff(base, model).dense("weight"), half)
    save_child(tmp_path / "child.safetensors", model, mask, optimizer=optimizer)
    apply_child(base, tmp_path / "child.safetensors")
    assert all(map(torch.equal, base.parameters(), model.parameters()))


def trained_linear(**options: Any) -> tuple[nn.Module, ChildMask, FusedChildAdamW]:
    model = nn.Linear(30, 20)
    mask = ChildMask.from_dense({"weight": torch.rand(20, 30) < 0.3}, dense=["bias"])
    optimizer = FusedChildAdamW(model.named_parameters(), lr=0.1, child_mask=mask, **options)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, mask, optimizer


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    "how", ["set_child_mask", "without a mask for a while", "decay set to 0", "frozen late"]
)
def test_a_run_that_wrote_outside_its_child_is_not_saved_as_one(
    how: str, resumed: bool, tmp_path: Path
) -> None:
    decays = how in ("decay set to 0", "frozen late")
    model, mask, optimizer = trained_linear(freeze_non_child=not decays, weight_decay=0.1)
    if how == "set_child_mask":
        mask = ChildMask.from_dense({"weight": torch.rand(20, 30) < 0.3}, dense=["bias"])
        optimizer.set_child_mask(mask)
    elif how == "without a mask for a while":
        optimizer.set_child_mask(None)
        optimizer.step()
        optimizer.set_child_mask(mask)
    elif how == "decay set to 0":
        optimizer.param_groups[0]["weight_decay"] = 0.0
    else:
        optimizer.param_groups[0]["freeze_non_child"] = True
    if resumed:
        saved = optimizer.state_dict()
        optimizer = FusedChildAdamW(model.named_parameters())
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"wrote weights outside the present child .*child_diff"):
        save_child(tmp_path / "child.safetensors", model, mask, optimizer=optimizer)
    assert not list(tmp_path.iterdir())


def test_a_child_chosen_before_the_first_step_is_no_change(tmp_path: Path) -> None:
    model = nn.Linear(30, 20)
    mask = ChildMask.from_dense({"weight": torch.rand(20, 30) < 0.3}, dense=["bias"])
    optimizer = FusedChildAdamW(model.named_parameters())
    optimizer.set_child_mask(mask)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_child(tmp_path / "child.safetensors", model, mask, optimizer=optimizer)


def test_what_is_made_in_inference_mode_can_be_trained() -> None:
    parameters = toy_parameters()
    with torch.inference_mode():
        optimizer = FusedChildAdamW(
            parameters.items(), child_mask=toy_mask(parameters), backend="reference"
        )
    train(optimizer, parameters, range(1))
    saved = optimizer.state_dict()
    with torch.inference_mode():
        optimizer.load_state_dict(saved)
    train(optimizer, parameters, range(1, 2))
    with torch.inference_mode():
        optimizer.set_child_mask(toy_mask(parameters, 3))
    train(optimizer, parameters, range(2, 3))


def test_a_child_that_fits_the_first_group_alone_changes_neither() -> None:
    parameters = toy_parameters()
    groups = [{"params": [pair]} for pair in parameters.items()]
    optimizer = FusedChildAdamW(groups, lr=0.1, child_mask=toy_mask(parameters))
    train(optimizer, parameters, range(2))
    last = list(parameters)[-1]
    partial = toy_mask({name: p for name, p in parameters.items() if name != last}, 40)
    with (
        untouched(optimizer),
        pytest.raises(ValueError, match=f"child_mask: no name of it matches {last}"),
    ):
        optimizer.set_child_mask(partial)
    train(optimizer, parameters, range(2, 3))


def test_masters_outside_the_child_come_through_a_load() -> None:
    """Of 16-bit weights that decay outside the child: the master holds what rounding would lose."""
    parameters = toy_parameters(torch.bfloat16)
    mask = toy_mask(parameters)
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.01, "freeze_non_child": False}
    optimizer = FusedChildAdamW(parameters.items(), child_mask=mask, **options)
    train(optimizer, parameters, range(3))
    state = optimizer.state[parameters["layer.weight"]]
    outside = ~mask.dense("layer.weight")
    lost = state["master_remainder"] != 0
    assert lost[outside].float().mean() > 0.9
    twins = {name: Parameter(p.detach().clone()) for name, p in parameters.items()}
    resumed = FusedChildAdamW(twins.items(), freeze_non_child=False, child_mask=mask)
    resumed.load_state_dict(optimizer.state_dict())
    assert_identical(weights_and_state(resumed), weights_and_state(optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decay_beside_runs_that_are_cut_into_units(dtype: torch.dtype, column: str) -> None:
    """Runs of more than 4096 elements, which several threads share, and gaps between them."""
    child = torch.zeros(40_000, dtype=torch.bool)
    for start, end in ((5, 10_000), (10_003, 14_099), (20_000, 39_990)):
        child[start:end] = True
    outcomes = []
    for child_state in ("dense", "compact"):
        parameter = Parameter(placed(random_tensor((40_000,), 1, dtype), column))
        optimizer = FusedChildAdamW(
            [("w", parameter)], lr=0.1, weight_decay=0.5, freeze_non_child=False, backend=column,
            child_mask=ChildMask.from_dense({"w": child}), child_state=child_state, master_weight="none",
        )  # fmt: skip
        assert ("child_runs" in optimizer.state[parameter]) == (child_state == "compact")
        for step in range(3):
            parameter.grad = placed(random_tensor((40_000,), 5 + step, dtype), column)
            optimizer.step()
        outcomes.append({"w": parameter.detach()})
    assert_identical(*outcomes)
