"""FusedChildAdamW among the other parts of a training loop: closures, scalers, clipping, hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from childtune_kernels import FusedChildAdamW
from tests.snapshots import assert_identical, identical, untouched, weights_and_state
from tests.toy_parameters import give_gradients, toy_parameters, train


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    parameter = Parameter(torch.tensor([1.0, -2.0]))
    optimizer = FusedChildAdamW([parameter], lr=0.1, weight_decay=0.0)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert float(torch.as_tensor(optimizer.step(closure)).detach()) == 5.0
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.9, -1.9]))
    assert optimizer.step() is None


def test_a_closure_that_fails_changes_nothing() -> None:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.items())
    give_gradients(parameters, 1)

    def closure() -> float:
        raise ArithmeticError("no loss")

    with untouched(optimizer), pytest.raises(ArithmeticError):
        optimizer.step(closure)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none: bool) -> None:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.items())
    train(optimizer, parameters, range(1))
    optimizer.zero_grad(set_to_none=to_none)
    for parameter in parameters.values():
        assert (parameter.grad is None) == to_none
        assert parameter.grad is None or not parameter.grad.any()


def test_step_hooks_run_before_and_after() -> None:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.items(), lr=0.1)
    seen: list[Tensor] = []

    def hook(_: Optimizer, __: Any, ___: Any) -> None:
        seen.append(parameters["layer.bias"].detach().clone())

    handles = [optimizer.register_step_pre_hook(hook), optimizer.register_step_post_hook(hook)]
    train(optimizer, parameters, range(1))
    assert len(seen) == 2
    assert not torch.equal(*seen)
    for handle in handles:
        handle.remove()
    train(optimizer, parameters, range(1))
    assert len(seen) == 2


def test_hooks_of_all_optimizers_run_around_those_of_one() -> None:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.items(), lr=0.1)
    other = FusedChildAdamW([nn.Parameter(torch.ones(2))])
    seen: list[str] = []

    def hook(name: str) -> Any:
        return lambda each, *_: seen.append(name if each is optimizer else "other")

    handles = [
        register_optimizer_step_pre_hook(hook("every pre")),
        register_optimizer_step_post_hook(hook("every post")),
        optimizer.register_step_pre_hook(hook("own pre")),
        optimizer.register_step_post_hook(hook("own post")),
    ]
    try:
        train(optimizer, parameters, range(1))
        other.step()
    finally:
        for handle in handles:
            handle.remove()
    train(optimizer, parameters, range(1))
    assert seen == ["every pre", "own pre", "own post", "every post", "other", "other"]


def test_a_hook_may_change_gradients_and_the_closure() -> None:
    hooked, plain = toy_parameters(), toy_parameters()
    optimizer, other = (FusedChildAdamW(p.items(), lr=0.1, seed=1) for p in (hooked, plain))
    asked: list[str] = []

    def closure_of(name: str, loss: float) -> Any:
        def closure() -> float:
            asked.append(name)
            return loss

        return closure

    def halve_gradients(*_: Any) -> None:
        for parameter in hooked.values():
            assert parameter.grad is not None
            parameter.grad = parameter.grad / 2

    def other_closure(_: Optimizer, arguments: Any, named: Any) -> Any:
        assert (len(arguments), named) == (2, {})
        return (arguments[0], closure_of("hook's", 7.0)), named

    optimizer.register_step_pre_hook(halve_gradients)
    optimizer.register_step_pre_hook(other_closure)
    give_gradients(hooked, 1)
    give_gradients(plain, 1)
    for parameter in plain.values():
        assert parameter.grad is not None
        parameter.grad.div_(2)
    assert optimizer.step(closure_of("own", 1.0)) == 7.0
    other.step()
    assert asked == ["hook's"]
    assert_identical(weights_and_state(optimizer), weights_and_state(other))


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))


def batch(step: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, step: int) -> Tensor:
    return model(batch(step)).square().mean()


def test_a_gradient_scaler_gives_the_unscaled_run() -> None:
    runs = []
    for scale in (1.0, 1024.0):
        model = small_model()
        optimizer = FusedChildAdamW(model.named_parameters(), lr=0.1, reserve_p=0.5, seed=1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()
        runs.append(weights_and_state(optimizer))
    assert_identical(*runs)


def test_a_gradient_scaler_skips_a_step_of_infinite_gradients() -> None:
    model = small_model()
    optimizer = FusedChildAdamW(model.named_parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = weights_and_state(optimizer)
    scaler.scale(loss_of(model, 0) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_identical(before, weights_and_state(optimizer))
    assert scaler.get_scale() == 1.0
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    assert int(optimizer.state[next(model.parameters())]["step"]) == 1


def test_autocast_and_bf16_weights_train() -> None:
    for model in (small_model(), small_model().bfloat16()):
        optimizer = FusedChildAdamW(model.named_parameters(), lr=0.02, reserve_p=0.5, seed=1)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, 0)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0] / 2


def test_clipping_by_norm_reaches_the_update() -> None:
    clipped, scaled = toy_parameters(), toy_parameters()
    options: dict[str, Any] = {"lr": 0.1, "eps": 0.1, "seed": 1}
    optimizer = FusedChildAdamW(clipped.items(), **options)
    other = FusedChildAdamW(scaled.items(), **options)
    for step in range(3):
        give_gradients(clipped, step)
        norm = torch.nn.utils.clip_grad_norm_(list(clipped.values()), 0.5)
        assert norm > 1
        optimizer.step()
        give_gradients(scaled, step)
        for parameter in scaled.values():
            assert parameter.grad is not None
            parameter.grad.mul_(0.5 / (norm + 1e-6))
        other.step()
    for name, parameter in clipped.items():
        torch.testing.assert_close(parameter, scaled[name])


def test_gradients_may_be_accumulated_in_place() -> None:
    """The same buffer at every step: what is in it counts, not that it has moved."""
    accumulated, fresh = toy_parameters(), toy_parameters()
    optimizer = FusedChildAdamW(accumulated.items(), lr=0.1)
    other = FusedChildAdamW(fresh.items(), lr=0.1)
    for parameter in accumulated.values():
        parameter.grad = torch.zeros_like(parameter)
    for step in range(3):
        give_gradients(fresh, step)
        for name, parameter in accumulated.items():
            gradient = fresh[name].grad
            assert parameter.grad is not None
            assert gradient is not None
            parameter.grad.copy_(gradient)
        optimizer.step()
        other.step()
    assert_identical(weights_and_state(optimizer), weights_and_state(other))


def test_two_optimizers_share_a_model() -> None:
    parameters, twin = toy_parameters(), toy_parameters()
    names = list(parameters)
    halves = [FusedChildAdamW([(n, parameters[n]) for n in part], lr=0.1, reserve_p=0.5, seed=1)
              for part in (names[:2], names[2:])]  # fmt: skip
    whole = FusedChildAdamW(twin.items(), lr=0.1, reserve_p=0.5, seed=1)
    for step in range(3):
        give_gradients(parameters, step)
        for optimizer in halves:
            optimizer.step()
        train(whole, twin, [step])
    assert all(identical(parameters[name], twin[name]) for name in names)
