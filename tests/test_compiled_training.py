"""torch.compile around the model, the step, or both: the same run, one graph break, no recompilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import lr_scheduler

from childtune_kernels import FusedChildAdamW, OptionScheduler

from .snapshots import assert_identical, untouched, weights_and_state
from .toy_parameters import random_tensor

STEPS = 10
WHAT = ["model", "optimizer.step", "both", "whole step", "whole step and schedulers"]
QUICK = [("whole step and schedulers", "schedulers"), ("both", "hand")]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def small_model() -> nn.Module:
    made = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))
    with torch.no_grad():
        for index, parameter in enumerate(made.parameters()):
            parameter.copy_(random_tensor(parameter.shape, index))
    return made


def run(
    compiled: Callable[[str, Any], Any], lr: float | Tensor = 0.1, by_hand: bool = False
) -> tuple[dict[str, Any], list[int]]:
    """Ten steps with new learning rates and reserve_p; the end, and the frames compiled after each."""
    model = small_model()
    optimizer = FusedChildAdamW(model.named_parameters(), lr=lr, reserve_p=0.5, seed=1)
    schedulers: list[Any] = []
    if not by_hand:
        schedulers = [
            lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
            OptionScheduler(optimizer, "reserve_p", lambda step: 0.5 + 0.03 * step),
        ]
    forward: Any = compiled("model", model)
    update = compiled("optimizer.step", optimizer.step)

    def step(inputs: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = forward(inputs).square().mean()
        loss.backward()
        update()
        return loss

    def step_and_schedule(inputs: Tensor) -> Tensor:
        loss = whole(inputs)
        for scheduler in schedulers:
            scheduler.step()
        return loss

    whole = compiled("whole step", step)
    everything = compiled("whole step and schedulers", step_and_schedule)
    frames = []
    for number in range(STEPS):
        everything(random_tensor((4, 6), 50 + number))
        if by_hand:
            optimizer.param_groups[0]["lr"] *= 0.9
            optimizer.param_groups[0]["reserve_p"] += 0.03
        frames.append(counters["frames"]["total"])
    return weights_and_state(optimizer), frames


def compiling(what: str, backend: str) -> Callable[[str, Any], Any]:
    """Compiles what is asked for, and leaves everything else."""
    chosen = ("model", "optimizer.step") if what == "both" else (what,)
    return lambda name, it: torch.compile(it, backend=backend) if name in chosen else it


def eager(name: str, it: Any) -> Any:
    del name
    return it


@pytest.mark.parametrize(
    ("what", "moved_by"),
    [
        pytest.param(what, moved_by, marks=[] if (what, moved_by) in QUICK else pytest.mark.slow)
        for what in WHAT
        for moved_by in ("schedulers", "schedulers of a tensor", "hand")
    ],
)
def test_compiled_runs_are_the_eager_one(what: str, moved_by: str) -> None:
    def rate() -> Any:
        return torch.tensor(0.1, dtype=torch.float64) if "tensor" in moved_by else 0.1

    expected, _ = run(eager, rate(), moved_by == "hand")
    assert not counters["frames"]
    found, frames = run(compiling(what, "aot_eager"), rate(), moved_by == "hand")
    assert_identical(found, expected)
    assert frames[0] > 0
    assert frames[1:] == [frames[1]] * (STEPS - 1)  # whatever lr and reserve_p are
    assert counters["stats"]["unique_graphs"] == (what != "optimizer.step")  # the model's alone
    updates = [reason for reason in counters["graph_break"] if "_update" in reason]
    assert len(updates) == (what != "model")


def test_a_step_that_must_not_break_the_graph_is_refused_whole() -> None:
    model = small_model()
    optimizer = FusedChildAdamW(model.named_parameters(), lr=0.1)
    model(random_tensor((4, 6), 1)).sum().backward()
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    with untouched(optimizer), pytest.raises(torch._dynamo.exc.Unsupported, match="_update"):
        step()
    optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["optimizer.step", "whole step"])
def test_runs_compiled_by_inductor(what: str) -> None:
    """Its kernels round a model's gradients otherwise: the step is compared beside the same model."""

    def model_too(name: str, it: Any) -> Any:
        return torch.compile(it) if name in ("model", what) else it

    expected, _ = run(compiling("model", "inductor"))
    torch._dynamo.reset()
    counters.clear()
    found, frames = run(model_too)
    assert_identical(found, expected)
    assert frames[1:] == [frames[1]] * (STEPS - 1)
