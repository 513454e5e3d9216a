"""How a step gets onto a device: one prologue, a launch a combination, and only what has changed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from childtune_kernels import ChildMask, FusedChildAdamW, OptionScheduler

from ..columns import device_of

DEVICE = device_of("triton")

pytestmark = [pytest.mark.launches, pytest.mark.usefixtures("one_thread")]

SIZES = {"matrix": (33, 70), "vector": (129,), "scalar": (), "empty": (0, 3), "image": (3, 5, 4, 6)}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was launched, and each table sent, since the counter was last cleared."""
    from childtune_kernels.backends.triton import device_plan, launch

    counts: Counter[str] = Counter()
    launched, sent = launch.launch, device_plan.DevicePlan._send

    def counted(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        counts[kernel.fn.__name__.strip("_").removesuffix("_kernel")] += 1
        launched(kernel, programs, *arguments, **options)

    def counted_send(plan: Any, name: str, table: Tensor) -> bool:
        changed = sent(plan, name, table)
        counts[name] += changed
        return changed

    monkeypatch.setattr(launch, "launch", counted)
    monkeypatch.setattr(device_plan.DevicePlan, "_send", counted_send)
    return counts


def named_parameters(prefix: str, dtype: torch.dtype = torch.float32) -> list[tuple[str, Tensor]]:
    """Parameters of several shapes and memory formats, with gradients."""
    members: list[tuple[str, Tensor]] = []
    for name, sizes in SIZES.items():
        parameter = torch.nn.Parameter(torch.ones(sizes, dtype=dtype, device=DEVICE))
        if name == "image":
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        parameter.grad = torch.ones_like(parameter)
        members.append((f"{prefix}.{name}", parameter))
    return members


def stepped(optimizer: FusedChildAdamW, watched: Counter[str]) -> dict[str, int]:
    watched.clear()
    optimizer.step()
    return dict(+watched)


def test_a_launch_serves_all_groups(column: str, watched: Counter[str]) -> None:
    """Whatever their options, as long as types and mask kind agree."""
    groups: list[dict[str, Any]] = [
        {"params": named_parameters("first")},
        {"params": named_parameters("second"), "lr": 0.1, "convention": "original"},
        {"params": named_parameters("third"), "weight_decay": 0.0, "maximize": True},
    ]
    optimizer = FusedChildAdamW(groups, backend=column)
    expected = {"step_scalars": 1, "child_adamw_dense": 1}
    assert stepped(optimizer, watched) == {**expected, "rows": 1, "groups": 1}
    assert stepped(optimizer, watched) == expected


def test_a_launch_a_combination(column: str, watched: Counter[str]) -> None:
    """Types, Bernoulli masks, and layouts of a child."""
    body = named_parameters("body")
    drawn = {name: torch.rand(p.shape, device=DEVICE) < 0.5 for name, p in body}
    drawn["body.image"] = torch.zeros(SIZES["image"], dtype=torch.bool, device=DEVICE)
    drawn["body.vector"] = torch.arange(129, device=DEVICE) < 64
    groups: list[dict[str, Any]] = [
        {"params": named_parameters("plain")},
        {"params": named_parameters("drawn"), "reserve_p": 0.3},
        {"params": named_parameters("half", torch.bfloat16)},
        {"params": body, "child_mask": ChildMask.from_dense(drawn)},
        {"params": named_parameters("decays", torch.float32), "child_mask": None},
    ]
    optimizer = FusedChildAdamW(groups, backend=column)
    found = stepped(optimizer, watched)
    assert found["step_scalars"] == 1
    assert found["child_adamw_dense"] == 3  # plain and decays together, drawn, half
    assert found["child_adamw_words"] == 1
    assert 1 <= found["child_adamw_segments"] <= 2  # runs and indices


def test_only_what_has_changed_is_sent(column: str, watched: Counter[str]) -> None:
    members = named_parameters("a")
    optimizer = FusedChildAdamW(members, backend=column)
    launches = {"step_scalars": 1, "child_adamw_dense": 1}
    stepped(optimizer, watched)
    optimizer.param_groups[0]["lr"] = 0.5
    assert stepped(optimizer, watched) == {**launches, "groups": 1}
    elsewhere = [torch.ones_like(parameter) for _, parameter in members]
    for (_, parameter), grad in zip(members, elsewhere, strict=True):
        parameter.grad = grad
    assert stepped(optimizer, watched) == {**launches, "rows": 1}
    members[0][1].grad = None
    assert stepped(optimizer, watched) == {**launches, "rows": 1}
    assert stepped(optimizer, watched) == launches


def test_schedules_send_numbers_alone(column: str, watched: Counter[str]) -> None:
    """Of learning rate, betas and reserve_p: rows stay, launches too."""
    optimizer = FusedChildAdamW(named_parameters("a"), reserve_p=0.3, backend=column)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=8)
    keeps = OptionScheduler(optimizer, "reserve_p", lambda step: 0.3 + 0.05 * step)
    launches = {"step_scalars": 1, "child_adamw_dense": 1}
    assert stepped(optimizer, watched) == {**launches, "rows": 1, "groups": 1}
    for _ in range(5):
        rates.step()
        keeps.step()
        assert stepped(optimizer, watched) == {**launches, "groups": 1}
    assert stepped(optimizer, watched) == launches


def test_launches_are_planned_anew_only_for_other_ones(
    column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where gradients move or are missing, nor for other numbers; but for Bernoulli masks."""
    from childtune_kernels.backends.triton import device_plan

    planned: list[int] = []
    original = device_plan.DevicePlan._plan_launches

    def counted(plan: Any, *tables: Any) -> None:
        planned.append(1)
        original(plan, *tables)

    monkeypatch.setattr(device_plan.DevicePlan, "_plan_launches", counted)
    members = named_parameters("a")
    optimizer = FusedChildAdamW(members, backend=column)
    optimizer.step()
    assert len(planned) == 1
    members[0][1].grad = None
    members[1][1].grad = torch.ones_like(members[1][1])
    optimizer.param_groups[0].update(lr=0.5, weight_decay=0.3, reserve_p=1.0)
    optimizer.step()
    assert len(planned) == 1
    optimizer.param_groups[0]["reserve_p"] = 0.5
    optimizer.step()
    assert len(planned) == 2


@pytest.mark.parametrize("failing", ["_plan_launches", "_send"])
def test_a_failure_while_planning_leaves_nothing_stale(
    failing: str, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that failed can be taken again, and is the one that was asked for."""
    from childtune_kernels.backends.triton import device_plan

    members, expected = named_parameters("a"), named_parameters("a")
    optimizers = [FusedChildAdamW(each, seed=3, backend=column) for each in (members, expected)]
    for optimizer in optimizers:
        optimizer.step()
        optimizer.param_groups[0]["reserve_p"] = 0.3
    with monkeypatch.context() as patch:

        def fail(plan: Any, *arguments: Any) -> bool:
            if arguments[0] == "rows":
                return True
            raise torch.OutOfMemoryError

        patch.setattr(device_plan.DevicePlan, failing, fail)
        with pytest.raises(torch.OutOfMemoryError):
            optimizers[0].step()
    for optimizer in optimizers:
        optimizer.step()
    for (_, parameter), (_, other) in zip(members, expected, strict=True):
        assert torch.equal(parameter, other)
