"""FusedChildAdamW among the other parts of a training loop: schedulers, scalers, clipping, hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler

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


Scheduler = Callable[[Optimizer], Any]
SCHEDULERS: dict[str, Scheduler] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.1),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[3],
    ),
}
CHANGES_BETAS: dict[str, Scheduler] = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=8),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
}


def scheduled(
    optimizer: Optimizer, parameters: dict[str, Parameter], scheduler: Scheduler
) -> list[tuple[float, float]]:
    """Eight steps under a scheduler; the learning rate and beta1 of each."""
    schedule = scheduler(optimizer)
    followed = []
    for step in range(8):
        group = optimizer.param_groups[0]
        followed.append((float(group["lr"]), float(group["betas"][0])))
        train(optimizer, parameters, [step])
        if step < 7:
            schedule.step()
    return followed


@pytest.mark.parametrize("name", [*SCHEDULERS, *CHANGES_BETAS])
def test_schedulers_do_what_they_do_for_adamw(name: str) -> None:
    ours, theirs = toy_parameters(), toy_parameters()
    scheduler = (SCHEDULERS | CHANGES_BETAS)[name]
    followed = scheduled(FusedChildAdamW(ours.values(), lr=0.1), ours, scheduler)
    expected = scheduled(torch.optim.AdamW(theirs.values(), lr=0.1), theirs, scheduler)
    assert followed == expected
    assert len({lr for lr, _ in followed}) > 2
    assert (len({beta for _, beta in followed}) > 2) == (name in CHANGES_BETAS)
    for key, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_move_a_learning_rate_that_is_a_tensor(name: str) -> None:
    with_tensor, with_float = toy_parameters(), toy_parameters()
    lr = torch.tensor(0.1, dtype=torch.float64)
    optimizer = FusedChildAdamW(with_tensor.values(), lr=lr)
    scheduled(optimizer, with_tensor, SCHEDULERS[name])
    scheduled(FusedChildAdamW(with_float.values(), lr=0.1), with_float, SCHEDULERS[name])
    for key, parameter in with_tensor.items():
        torch.testing.assert_close(parameter, with_float[key], rtol=1e-6, atol=1e-7)


def test_a_learning_rate_tensor_changed_in_place_takes_effect() -> None:
    parameters = toy_parameters()
    lr = torch.tensor(0.1)
    optimizer = FusedChildAdamW(parameters.values(), lr=lr)
    train(optimizer, parameters, range(2))
    lr.zero_()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    train(optimizer, parameters, [2])
    assert all(identical(parameters[name].detach(), before[name]) for name in before)
    lr.fill_(float("nan"))
    with untouched(optimizer), pytest.raises(ValueError, match=r"lr=.*finite"):
        optimizer.step()


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
