"""What scripts do between steps, with gradient release and without: the same results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from childtune_kernels import FusedChildAdamW, random_child
from tests.released_runs import STEPS, loss_of, model_and_optimizer, train, trainable
from tests.snapshots import assert_identical, weights_and_state
from tests.toy_parameters import random_tensor
from tests.tuned_models import child_of

pytestmark = pytest.mark.usefixtures("one_thread")


def both_runs(
    act: Callable[[nn.Module, FusedChildAdamW, int], None], kind: str = "both"
) -> list[FusedChildAdamW]:
    """Four iterations of something, in an ordinary run and in a released one, that end alike."""
    optimizers = []
    for released in (False, True):
        model, optimizer = model_and_optimizer(kind)
        if released:
            optimizer.release_gradients()
        for step in range(STEPS):
            optimizer.zero_grad()
            act(model, optimizer, step)
        optimizers.append(optimizer)
    assert_identical(*map(weights_and_state, optimizers))
    return optimizers


def set_by_hand(model: Any, optimizer: FusedChildAdamW, step: int) -> None:
    loss_of(model, step).backward()
    optimizer.step()
    optimizer.zero_grad()
    for index, parameter in enumerate(trainable(optimizer)):
        parameter.grad = random_tensor(parameter.shape, 50 * step + index)
    optimizer.step()
    assert all(parameter.grad is not None for parameter in trainable(optimizer))


def two_losses(model: Any, optimizer: FusedChildAdamW, step: int) -> None:
    """The head's gradients come in a backward of their own, over others set by hand; not in every step."""
    if step != 1:
        hidden = model.output(model.embedding(torch.arange(7) + step)).detach()
        model.head.bias.grad = torch.ones(3)
        model.head(hidden).square().mean().backward()
    model.inner(model.embedding(torch.arange(9))).square().mean().backward()
    optimizer.step()


def frozen_for_a_while(model: Any, optimizer: FusedChildAdamW, step: int) -> None:
    model.inner.requires_grad_(step not in (1, 2))
    loss_of(model, step).backward()
    assert optimizer._gradient_release is None or model.inner.weight.grad is None
    optimizer.step()


def group_added_later(model: Any, optimizer: FusedChildAdamW, step: int) -> None:
    if step == 1:
        named = [(f"frozen.{name}", p) for name, p in model.frozen.named_parameters()]
        model.frozen.requires_grad_(True)
        child = random_child(dict(named), 0.5, seed=1)
        optimizer.add_param_group({"params": named, "child_mask": child, "lr": 0.3})
    loss_of(model, step).backward()
    if step >= 1:
        assert (model.frozen.weight.grad is None) == (optimizer._gradient_release is not None)
    optimizer.step()


def child_changed(model: Any, optimizer: FusedChildAdamW, step: int) -> None:
    if step >= 1:
        mask = child_of(model)
        optimizer.set_child_mask([~mask, None, mask][step - 1], "reset" if step == 3 else "keep")
    loss_of(model, step).backward()
    optimizer.step()


def state_loaded(model: Any, optimizer: FusedChildAdamW, step: int) -> None:
    loss_of(model, step).backward()
    optimizer.step()
    if step == 1:
        other_model, other = model_and_optimizer("CT_D dense")
        train(other_model, other, steps=2)
        optimizer.load_state_dict(other.state_dict())
        assert optimizer.param_groups[0]["reserve_p"] == 1.0


def state_replaced_by_hand(model: Any, optimizer: FusedChildAdamW, step: int) -> None:
    if step == 2:
        for parameter in trainable(optimizer):
            optimizer.state[parameter] = {
                name: value.clone() for name, value in optimizer.state[parameter].items()
            }
        optimizer.param_groups.reverse()
    loss_of(model, step).backward()
    optimizer.step()


def group_replaced_by_hand(model: Any, optimizer: FusedChildAdamW, step: int) -> None:
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.01 * (step + 1), "seed": 6}
    loss_of(model, step).backward()
    optimizer.step()


def weights_moved(model: Any, optimizer: FusedChildAdamW, step: int) -> None:
    for parameter in trainable(optimizer):
        parameter.data = parameter.data.clone()
    loss_of(model, step).backward()
    optimizer.step()


def closure(model: Any, optimizer: FusedChildAdamW, step: int) -> None:
    def evaluate() -> Any:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss

    assert float(torch.as_tensor(optimizer.step(evaluate)).detach()) > 0


@pytest.mark.parametrize(
    "act",
    [
        set_by_hand, two_losses, frozen_for_a_while, group_added_later, child_changed, state_loaded,
        state_replaced_by_hand, group_replaced_by_hand, weights_moved, closure,
    ],
)  # fmt: skip
def test_what_scripts_do_works_while_released(act: Any) -> None:
    ordinary, released = both_runs(act)
    assert released._gradient_release is not None
    counts = {int(ordinary.state[parameter]["step"]) for parameter in trainable(ordinary)}
    assert max(counts) >= 1


def test_a_frozen_parameter_stays_frozen_and_is_released_once_it_trains() -> None:
    outcomes = []
    for released in (False, True):
        model, optimizer = model_and_optimizer("both")
        model.inner.requires_grad_(False)
        if released:
            optimizer.release_gradients()
        assert not model.inner.weight.requires_grad
        train(model, optimizer, steps=2)
        assert not model.inner.weight.requires_grad
        assert int(optimizer.state[model.inner.weight]["step"]) == 0
        model.inner.requires_grad_(True)
        loss_of(model, 3).backward()
        assert (model.inner.weight.grad is None) == released
        optimizer.step()
        assert int(optimizer.state[model.inner.weight]["step"]) == 1
        outcomes.append(weights_and_state(optimizer))
    assert_identical(*outcomes)


def test_parameters_put_in_and_taken_out_by_hand() -> None:
    """A new one is updated by step() at first, and by backward from then on; a former one never again."""
    model, optimizer = model_and_optimizer("plain")
    optimizer.release_gradients()
    group = optimizer.param_groups[0]
    place = [parameter is model.head.bias for parameter in group["params"]].index(True)
    old, new = model.head.bias, nn.Parameter(model.head.bias.detach().clone())
    group["params"][place], model.head.bias = new, new
    optimizer.state[new] = optimizer.state.pop(old)
    for step in range(2):
        loss_of(model, step).backward()
        (old * 2).sum().backward()
        assert (new.grad is None) == (step == 1)
        assert old.grad is not None
        assert torch.equal(old.grad, torch.full((3,), 2.0 + 2 * step))
        optimizer.step()
        optimizer.zero_grad()
        assert int(optimizer.state[new]["step"]) == step + 1
    assert not torch.equal(new, old)
    assert not old._post_accumulate_grad_hooks
