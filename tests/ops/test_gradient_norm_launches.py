"""How a norm gets onto a device: what is sent, what is launched, and steps in CUDA graphs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from childtune_kernels import FusedChildAdamW

from ..cases import assert_same_bits, random_values
from ..columns import device_of
from .test_child_adamw_capture import DEVICE, Graph, Run, graph
from .test_gradient_norm import assert_same, norm_of, plan_of, refreshed, sized
from .test_gradient_norm_plans import sharded

__all__ = ["graph"]  # a fixture

pytestmark = [pytest.mark.launches, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was launched, and anything was sent to the device."""
    from childtune_kernels.backends.triton import launch

    counts: Counter[str] = Counter()
    launched = launch.launch

    def counted(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        counts[kernel.fn.__name__.strip("_").removesuffix("_kernel")] += programs > 0
        launched(kernel, programs, *arguments, **options)

    def counted_call(name: str) -> Any:
        function = getattr(launch, name)

        def call(*arguments: Any) -> Any:
            counts["sent"] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(launch, "launch", counted)
    for name in ("upload", "send_"):
        monkeypatch.setattr(launch, name, counted_call(name))
    return counts


def run_of(column: str, masked: bool, dtype: torch.dtype = torch.float32) -> tuple[Run, Any]:
    run = Run(dtype, column, masked=masked)
    run.next_gradients(0)
    return run, plan_of(run.optimizer, column)


@pytest.mark.parametrize("after_mask", [False, True])
def test_nothing_is_sent_twice(after_mask: bool, column: str, watched: Counter[str]) -> None:
    """A launch for each type and mask kind, whatever the number of tensors."""
    run, plan = run_of(column, masked=True)
    expected = refreshed(plan, after_mask)
    watched.clear()
    assert refreshed(plan, after_mask) == expected
    # A Bernoulli mask over all, a fixed one over all but a tensor.
    assert +watched == {
        "gradient_norm": 2 if after_mask else 1,
        "gradient_norm_again": 1,
    }
    run.next_gradients(1)
    watched.clear()
    assert refreshed(plan, after_mask) != expected
    assert not watched["sent"]


def test_the_step_that_follows_sends_nothing_more(column: str, watched: Counter[str]) -> None:
    _, plan = run_of(column, masked=True)
    refreshed(plan, True)
    watched.clear()
    with torch.no_grad():
        plan.run()
    assert watched["child_adamw_dense"] == 1
    assert not watched["sent"]


def norm_and_step(plan: Any, after_mask: bool, capturing: bool) -> Tensor:
    with torch.no_grad():
        plan.refresh()
        sums = norm_of(plan, after_mask, capturing=capturing)
        plan.run(None, capturing)
    return sums


@pytest.mark.parametrize("after_mask", [False, True])
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "child"])
def test_replays_do_what_eager_steps_do(
    masked: bool, after_mask: bool, column: str, graph: Graph
) -> None:
    """With eager steps between them, which have gradients elsewhere and other launches."""
    (captured, plan), (eager, other) = (run_of(column, masked) for _ in range(2))
    expected = norm_and_step(other, after_mask, False)
    assert torch.equal(norm_and_step(plan, after_mask, False), expected)
    with graph.capture():
        sums = norm_and_step(plan, after_mask, True)
    seen = [expected.tolist()]
    for step in range(1, 4):
        for run in (captured, eager):
            run.next_gradients(step)
        if step == 2:
            kept = {name: p.grad for name, p in captured.parameters.items()}
            for name, parameter in captured.parameters.items():
                parameter.grad = random_values(parameter.shape, torch.float32, name).to(DEVICE)
            refreshed(plan, not after_mask)
            captured.parameters["small"].grad = None
            refreshed(plan, after_mask)
            for name, parameter in captured.parameters.items():
                parameter.grad = kept[name]
        graph.replay()
        assert sums.tolist() == norm_and_step(other, after_mask, False).tolist()
        assert_same_bits(captured.outcome(), eager.outcome())
        seen.append(sums.tolist())
    assert len({each[0] for each in seen}) == len(seen)


def test_captures_that_nothing_is_ready_for_are_refused(column: str, graph: Graph) -> None:
    def refused(plan: Any, after_mask: bool, says: str) -> None:
        with graph.capture(), pytest.raises(RuntimeError, match=says):
            norm_and_step(plan, after_mask, True)

    _, plan = run_of(column, masked=True)
    refused(plan, False, "took no norm of the gradients")
    refused(plan, True, "no norm after them")
    with torch.no_grad():
        plan.refresh()
        plan.run()
    refused(plan, False, "took no norm of the gradients")
    norm_and_step(plan, False, False)
    refused(plan, True, "no norm after them")
    norm_and_step(plan, True, False)
    refused(plan, False, "or another one")
    with graph.capture():
        norm_and_step(plan, True, True)
    refused(plan, True, "once outside the graph")
    norm_and_step(plan, True, False)
    with graph.capture():
        norm_and_step(plan, True, True)


def test_tables_of_a_capture_are_left_to_one_step_alone(column: str, graph: Graph) -> None:
    """A norm whose step never came: what was recorded for it is good for nothing."""
    _, plan = run_of(column, masked=False)
    norm_and_step(plan, False, False)
    with graph.capture():
        norm_of(plan, False, capturing=True)
    refused = pytest.raises(RuntimeError, match="once outside the graph")
    with graph.capture(), refused:
        norm_of(plan, False, capturing=True)
    with graph.capture(), pytest.raises(RuntimeError, match="once outside the graph"):
        plan.run(capturing=True)


@pytest.mark.parametrize("width", [32, 64])
def test_columns_are_read_in_parts(
    width: int, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GPUs do it where elements lie anywhere; the interpreter takes all columns at a time."""
    from childtune_kernels.backends.triton import gradient_norm

    if device_of(column).type == "cpu":
        monkeypatch.setattr(gradient_norm, "_any_width", lambda generation: width)
    plans = [sharded("rows_unaligned", torch.float32, each) for each in (column, "reference")]
    for after_mask in (False, True):
        found, expected = (refreshed(plan, after_mask) for plan in plans)
        assert_same(found, expected)


def test_many_types_take_a_launch_each(column: str, watched: Counter[str]) -> None:
    parameters: dict[str, Tensor] = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for name, parameter in sized((70, 0, 4097), dtype, column).items():
            parameters[f"{dtype} {name}"] = parameter
    plan = plan_of(FusedChildAdamW(list(parameters.items()), backend=column), column)
    refreshed(plan, False)
    assert watched["gradient_norm"] == 4
    assert device_of(column) == plan.device
