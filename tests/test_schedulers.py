"""Schedules of learning rates, betas and reserve_p: AdamW's trajectory, and a plan that stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler, swa_utils

from childtune_kernels import FusedChildAdamW, OptionScheduler
from childtune_kernels.step_plan import StepPlan
from childtune_kernels.step_planner import StepPlanner
from tests.columns import placed
from tests.ops.transcription import keep_bits, key_of
from tests.snapshots import assert_identical, identical, untouched, weights_and_state
from tests.toy_parameters import give_gradients, random_tensor, toy_parameters, train

OPS = ("child_adamw",)
STEPS = 12

Make = Callable[[Optimizer], Any]
SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda n: 1 / (1 + n), lambda n: 0.9**n]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda n: 0.8 + 0.01 * n),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.25, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=10, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=STEPS),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[3],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.5, anneal_epochs=6),
}
CYCLES_MOMENTUM = {"CyclicLR", "OneCycleLR"}
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


def doubles(backend: str | None) -> dict[str, Parameter]:
    """The toy parameters in fp64, each with a gradient, where a backend is tested."""
    parameters = {
        name: Parameter(placed(parameter.detach(), backend))
        for name, parameter in toy_parameters(torch.float64).items()
    }
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    return parameters


def fill_gradients(parameters: Mapping[str, Parameter], step: int) -> None:
    """New gradients in the memory of the old ones."""
    for index, parameter in enumerate(parameters.values()):
        assert parameter.grad is not None
        parameter.grad.copy_(random_tensor(parameter.shape, 100 * step + index, torch.float64))


def two_groups(parameters: Mapping[str, Parameter]) -> list[dict[str, Any]]:
    pairs = list(parameters.items())
    return [{"params": pairs[:2]}, {"params": pairs[2:], "weight_decay": 0.3}]


def scheduled(
    optimizer: Optimizer, parameters: Mapping[str, Parameter], make: Make
) -> list[list[tuple[float, float]]]:
    """Steps under a scheduler; the learning rate and beta1 of each group at each of them."""
    scheduler = make(optimizer)
    followed = []
    for step in range(STEPS):
        groups = optimizer.param_groups
        followed.append([(float(group["lr"]), float(group["betas"][0])) for group in groups])
        fill_gradients(parameters, step)
        optimizer.step()
        if step < STEPS - 1:
            is_plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*[1.0] * is_plateau)  # a loss that no longer falls
    return followed


@pytest.fixture
def planning(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often plans were made, and their rows checked and written."""
    counts: Counter[str] = Counter()

    def counted(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    counted(StepPlanner, "_make_plans")
    counted(StepPlan, "_refresh_rows")
    counted(StepPlan, "_take_seed")
    return counts


def watch_plans(optimizer: FusedChildAdamW) -> None:
    """From the first step on every step must have the same plan, with the same rows in its table."""
    seen: list[Any] = []

    def look(*_: Any) -> None:
        (plan,) = optimizer._planner.plans or []
        if not seen:
            seen[:] = plan, plan.row_table, plan.row_table.clone()
        assert seen[0] is plan
        assert seen[1] is plan.row_table
        assert torch.equal(seen[1], seen[2])

    optimizer.register_step_post_hook(look)


def test_the_table_names_every_scheduler_of_torch() -> None:
    assert {*SCHEDULERS} == {*lr_scheduler.__all__} - {"LRScheduler"} | {"SWALR"}


@every_scheduler
@pytest.mark.parametrize("lr_is_tensor", [False, True], ids=["float", "tensor"])
def test_a_scheduler_gives_the_trajectory_of_adamw_and_the_plan_stands(
    name: str, lr_is_tensor: bool, backend: str, planning: Counter[str]
) -> None:
    ours, theirs = doubles(backend), doubles(backend)
    start = {key: parameter.detach().clone() for key, parameter in ours.items()}

    def rate() -> Any:
        return torch.tensor(0.1, dtype=torch.float64) if lr_is_tensor else 0.1

    optimizer = FusedChildAdamW(two_groups(ours), lr=rate(), backend=backend)
    adamw = torch.optim.AdamW(two_groups(theirs), lr=rate(), foreach=False)
    watch_plans(optimizer)
    followed = scheduled(optimizer, ours, SCHEDULERS[name])
    assert followed == scheduled(adamw, theirs, SCHEDULERS[name])
    assert len({lr for ((lr, _), *_) in followed}) > 1
    assert (len({beta for ((_, beta), *_) in followed}) > 2) == (name in CYCLES_MOMENTUM)
    assert planning == {"_make_plans": 1, "_refresh_rows": 1}
    for key, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[key], rtol=1e-12, atol=1e-14)
        assert parameter.numel() == 0 or not torch.equal(parameter, start[key])


@pytest.mark.parametrize("lr_is_tensor", [False, True], ids=["float", "tensor"])
def test_a_learning_rate_multiplied_by_hand_takes_effect(lr_is_tensor: bool, backend: str) -> None:
    """The first group's alone; a tensor is multiplied in place."""
    ours, theirs = doubles(backend), doubles(backend)
    rate = torch.tensor(0.1, dtype=torch.float64) if lr_is_tensor else 0.1
    optimizer = FusedChildAdamW(two_groups(ours), lr=0.1, backend=backend)
    adamw = torch.optim.AdamW(two_groups(theirs), lr=0.1, foreach=False)
    optimizer.param_groups[0]["lr"] = rate
    watch_plans(optimizer)
    for step in range(STEPS):
        for each, parameters in ((optimizer, ours), (adamw, theirs)):
            fill_gradients(parameters, step)
            each.step()
            each.param_groups[0]["lr"] *= 0.5
    assert optimizer.param_groups[1]["lr"] == 0.1
    assert (optimizer.param_groups[0]["lr"] is rate) == lr_is_tensor
    for key, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[key], rtol=1e-12, atol=1e-14)


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


# reserve_p


def rising(step: int) -> float:
    return 0.1 + 0.08 * step


@pytest.mark.parametrize("by", ["scheduler", "hand", "hook"])
def test_reserve_p_follows_a_schedule(by: str, backend: str, planning: Counter[str]) -> None:
    """Without memory a kept weight moves by lr and a dropped one stays: the step shows its mask."""
    name, numel, lr = "layer.weight", 600, 0.125
    parameter = Parameter(placed(torch.zeros(numel, dtype=torch.float64), backend))
    parameter.grad = placed(random_tensor((numel,), 1, torch.float64), backend)
    optimizer = FusedChildAdamW(
        [(name, parameter)], lr, betas=(0.0, 0.0), eps=1e-12, weight_decay=0.0,
        reserve_p=rising(0), seed=3, backend=backend,
    )  # fmt: skip
    group = optimizer.param_groups[0]
    scheduler: Any = OptionScheduler(
        optimizer, "reserve_p", rising if by == "scheduler" else [None]
    )
    if by == "hook":
        optimizer.register_step_pre_hook(
            lambda o, *_: o.param_groups[0].update(
                reserve_p=rising(int(o.state[parameter]["step"]))
            )
        )
    watch_plans(optimizer)
    for step in range(STEPS - 1):
        before = parameter.detach().clone()
        optimizer.step()
        threshold = round(rising(step) * 2**32)
        kept = keep_bits(range(numel), key_of(3, name), step + 1, threshold)
        moved = (parameter.detach() - before).abs().cpu()
        expected = lr * torch.tensor(kept, dtype=torch.float64)
        torch.testing.assert_close(moved, expected, rtol=1e-6, atol=0)
        scheduler.step()
        if by == "hand":
            group["reserve_p"] = rising(step + 1)
    assert planning == {"_make_plans": 1, "_refresh_rows": 1}


def test_lr_and_reserve_p_are_scheduled_together(backend: str) -> None:
    """What LambdaLR and OptionScheduler do is what an optimizer built for each step would do."""
    scheduled_ones, by_hand = doubles(backend), doubles(backend)
    ours, twin = (
        FusedChildAdamW(two_groups(each), lr=0.1, seed=1, backend=backend)
        for each in (scheduled_ones, by_hand)
    )
    rates = lr_scheduler.LambdaLR(ours, lambda step: 1 / (1 + step))
    keeps = OptionScheduler(ours, "reserve_p", [rising, None])
    for step in range(6):
        fill_gradients(scheduled_ones, step)
        fill_gradients(by_hand, step)
        for group, p in zip(twin.param_groups, (rising(step), 1.0), strict=True):
            group.update(lr=0.1 * (1 / (1 + step)), reserve_p=p)
        assert keeps.last_values() == [rising(step), 1.0]
        ours.step()
        twin.step()
        rates.step()
        keeps.step()
    assert_identical(weights_and_state(ours), weights_and_state(twin))


def test_a_scheduled_reserve_p_resumes() -> None:
    results = []
    for interrupted in (False, True):
        parameters = toy_parameters()
        optimizer = FusedChildAdamW(parameters.items(), lr=0.1, seed=1)
        scheduler = OptionScheduler(optimizer, "reserve_p", rising)
        for step in range(8):
            if interrupted and step == 4:
                saved = optimizer.state_dict(), scheduler.state_dict()
                optimizer = FusedChildAdamW(parameters.items(), lr=7.0, seed=9)
                scheduler = OptionScheduler(optimizer, "reserve_p", rising)
                optimizer.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
                assert scheduler.last_step == 4
            train(optimizer, parameters, [step])
            scheduler.step()
        results.append(weights_and_state(optimizer))
    assert_identical(*results)


def test_option_schedulers_move_any_number_of_any_optimizer() -> None:
    parameter = Parameter(torch.ones(3))
    sgd = torch.optim.SGD([parameter], lr=0.1, momentum=0.5)
    momentum = OptionScheduler(sgd, "momentum", lambda step: 0.5 + 0.1 * step)
    decay = torch.tensor(0.0)
    adamw = FusedChildAdamW([parameter], weight_decay=decay)  # type: ignore[arg-type]
    weight_decay = OptionScheduler(adamw, "weight_decay", lambda step: 0.25 * step)
    momentum.step()
    weight_decay.step()
    assert momentum.last_values() == [0.6]
    assert adamw.param_groups[0]["weight_decay"] is decay
    assert float(decay) == 0.25
    adamw.add_param_group({"params": [Parameter(torch.ones(2))], "weight_decay": 0.7})
    weight_decay.step()
    assert [float(value) for value in weight_decay.last_values()] == [0.5, pytest.approx(0.7)]


def test_option_schedulers_refuse_what_does_not_fit() -> None:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.items(), lr=0.1)
    with pytest.raises(ValueError, match=r"option='reserve' is not in group 0; it has .*reserve_p"):
        OptionScheduler(optimizer, "reserve", rising)
    for fixed in ("seed", "param_names"):
        with pytest.raises(ValueError, match=f"option='{fixed}' stays as it is"):
            OptionScheduler(optimizer, fixed, rising)
    with pytest.raises(ValueError, match="2 functions for 1 groups"):
        OptionScheduler(optimizer, "reserve_p", [rising, rising])
    scheduler = OptionScheduler(optimizer, "reserve_p", rising)
    with pytest.raises(ValueError, match="of option 'lr', not 'reserve_p'"):
        scheduler.load_state_dict({"option": "lr", "last_step": 3})
    give_gradients(parameters, 0)
    OptionScheduler(optimizer, "reserve_p", lambda step: 1.5 + step)
    with (
        untouched(optimizer),
        pytest.raises(ValueError, match=r"reserve_p=1\.5 .*layer|reserve_p=1\.5"),
    ):
        optimizer.step()
