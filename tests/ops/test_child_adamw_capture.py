"""Steps in CUDA graphs: replays equal eager steps bit for bit, and what cannot be replayed is refused.

Without a GPU a recording of launches takes the place of the graph: it runs nothing while it records, and the
same launches, with the same arguments, at every replay.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from operator import is_
from typing import Any

import pytest
import torch
from torch import Tensor

from childtune_kernels import ChildMask, FusedChildAdamW, graph_capture

from ..cases import assert_same_bits, generator_of, random_values
from ..columns import device_of

DEVICE = device_of("triton")

pytestmark = [pytest.mark.launches, pytest.mark.usefixtures("one_thread")]

SIZES = {"words": (67, 130), "runs": (5000,), "plain": (31, 33), "small": (3,), "empty": (0,)}
STEPS = 3


class Recording:
    """What stands for a CUDA graph where there is none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.launches: list[Callable[[], Any]] = []

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        from childtune_kernels.backends.triton import launch

        with self.monkeypatch.context() as patch:
            patch.setattr(graph_capture, "is_capturing", lambda device: True)
            for name in ("launch", "send_"):
                patch.setattr(launch, name, self._recorder(getattr(launch, name)))
            yield

    def _recorder(self, function: Callable[..., Any]) -> Callable[..., None]:
        return lambda *arguments, **more: self.launches.append(
            functools.partial(function, *arguments, **more)
        )

    def replay(self) -> None:
        for launched in self.launches:
            launched()


class CudaGraph:
    """A real one, another at every capture: torch's graphs are captured once."""

    def __init__(self) -> None:
        self.graphs: list[torch.cuda.CUDAGraph] = []

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            yield
        self.graphs.append(graph)

    def replay(self) -> None:
        self.graphs[-1].replay()


Graph = Recording | CudaGraph


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Graph:
    return CudaGraph() if DEVICE.type == "cuda" else Recording(monkeypatch)


class Run:
    """A few parameters with static gradients, as a captured training step has them."""

    def __init__(self, dtype: torch.dtype, column: str, *, masked: bool, **options: Any) -> None:
        self.dtype = dtype
        self.parameters = {
            name: torch.nn.Parameter(random_values(sizes, dtype, "capture", name).to(DEVICE))
            for name, sizes in SIZES.items()
        }
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self.lr = torch.tensor(1e-2, device=DEVICE)
        self.optimizer = FusedChildAdamW(
            self.parameters.items(),
            options.pop("lr", self.lr),
            child_mask=self._mask() if masked else None,
            reserve_p=0.3,
            seed=5,
            backend=column,
            **{"capturable": True, **options},
        )

    def _mask(self) -> ChildMask:
        drawn = {
            name: torch.rand(sizes, generator=generator_of("capture child", name)) < 0.4
            for name, sizes in SIZES.items()
            if name != "plain"
        }
        drawn["runs"] = torch.arange(5000) % 1000 < 300
        children = {name: child.to(DEVICE) for name, child in drawn.items()}
        return ChildMask.from_dense(children, dense=["plain"])

    def next_gradients(self, step: int) -> None:
        for name, parameter in self.parameters.items():
            values = random_values(parameter.shape, self.dtype, "capture", name, step)
            assert parameter.grad is not None
            parameter.grad.copy_(values)

    def outcome(self) -> dict[str, Tensor]:
        return {
            f"{name} {key}": tensor.detach().cpu()
            for name, parameter in self.parameters.items()
            for key, tensor in (("weight", parameter), *self.optimizer.state[parameter].items())
        }


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "child"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_equal_eager_steps(
    dtype: torch.dtype, masked: bool, column: str, graph: Graph
) -> None:
    """Steps and masks advance, and a learning rate on the device is read at every replay."""
    eager, replayed = (Run(dtype, column, masked=masked) for _ in range(2))
    for step in range(1 + STEPS):
        for run in (eager, replayed):
            run.next_gradients(step)
            run.lr.fill_(1e-2 / (1 + step))
        eager.optimizer.step()
        if step == 0:
            replayed.optimizer.step()
            continue
        if step == 1:
            before = replayed.outcome()
            with graph.capture():
                replayed.optimizer.step()
            assert_same_bits(replayed.outcome(), before)
        graph.replay()
    assert_same_bits(replayed.outcome(), eager.outcome())


@pytest.mark.parametrize("clip", ["before_mask", "after_mask"])
def test_replays_clip_and_skip(clip: str, column: str, graph: Graph) -> None:
    """The norm is taken anew by every replay, and one replay finds a NaN."""
    options: dict[str, Any] = {"max_grad_norm": 0.5, "skip_nonfinite": True, "clip": clip}
    eager, replayed = (Run(torch.bfloat16, column, masked=True, **options) for _ in range(2))
    norms = []
    for step in range(1 + STEPS):
        for run in (eager, replayed):
            run.next_gradients(step)
            grad = run.parameters["small"].grad
            assert grad is not None
            grad[1] = torch.nan if step == 2 else 1 + step
        eager.optimizer.step()
        if step == 0:
            replayed.optimizer.step()
            continue
        if step == 1:
            with graph.capture():
                replayed.optimizer.step()
        graph.replay()
        found, expected = (run.optimizer.last_grad_norm for run in (replayed, eager))
        assert found is not None
        assert expected is not None
        assert_same_bits({"norm": found.cpu()}, {"norm": expected.cpu()})
        norms.append(float(found))
        assert bool(replayed.optimizer.step_was_skipped) == (step == 2)
    assert len(set(map(str, norms))) == STEPS
    assert_same_bits(replayed.outcome(), eager.outcome())
    assert int(replayed.optimizer.state[replayed.parameters["small"]]["step"]) == STEPS


def test_eager_steps_between_replays(column: str, graph: Graph) -> None:
    """With gradients elsewhere, which the graph must neither take over nor lose its own to."""
    eager, mixed = (Run(torch.float32, column, masked=True) for _ in range(2))
    own = [parameter.grad for parameter in mixed.parameters.values()]
    others = [torch.empty_like(parameter) for parameter in mixed.parameters.values()]
    for step in range(6):
        replayed = step in (1, 3, 4)
        for parameter, grad in zip(
            mixed.parameters.values(), own if replayed else others, strict=True
        ):
            parameter.grad = grad
        for run in (eager, mixed):
            run.next_gradients(step)
        eager.optimizer.step()
        if step == 1:
            with graph.capture():
                mixed.optimizer.step()
        if replayed:
            graph.replay()
        else:
            mixed.optimizer.step()
    assert_same_bits(mixed.outcome(), eager.outcome())


def test_tensor_options_equal_numbers(column: str) -> None:
    """fp32 and fp64, read on the device, give what the same numbers give."""
    for dtype in (torch.float32, torch.float64):
        lr, decay = (torch.tensor(value, dtype=dtype, device=DEVICE) for value in (3e-3, 0.1))
        tensors = Run(torch.float32, column, masked=True, lr=lr, weight_decay=decay)
        numbers = Run(
            torch.float32, column, masked=True, lr=float(lr), weight_decay=float(decay)
        )  # fmt: skip
        for step in range(2):
            for run in (tensors, numbers):
                run.next_gradients(step)
                run.optimizer.step()
        assert_same_bits(tensors.outcome(), numbers.outcome())


def captured(column: str, graph: Graph) -> Run:
    """A run that has been captured after its first step."""
    run = Run(torch.float32, column, masked=False)
    run.optimizer.step()
    with graph.capture():
        run.optimizer.step()
    return run


def check_refused(run: Run, graph: Graph, error: type[Exception], message: str) -> None:
    """The capture fails, and nothing of the optimizer has changed."""
    before = run.outcome()
    with pytest.raises(error, match=message), graph.capture():
        run.optimizer.step()
    assert_same_bits(run.outcome(), before)


def test_capture_needs_capturable(column: str, graph: Graph) -> None:
    run = Run(torch.float32, column, masked=False, lr=1e-2, capturable=False)
    run.optimizer.step()
    check_refused(run, graph, RuntimeError, "capturable=True")


def test_capture_needs_a_first_step(column: str, graph: Graph) -> None:
    """And is refused before anything is computed: during a capture nothing would be."""
    run = Run(torch.float32, column, masked=False)
    steps = [state["step"] for state in run.optimizer.state.values()]
    check_refused(run, graph, RuntimeError, "outside the graph")
    left = [state["step"] for state in run.optimizer.state.values()]
    assert all(map(is_, left, steps))


def test_what_a_graph_uses_stays_alive(column: str, graph: Graph) -> None:
    """Whatever later steps use: tables, numbers and chunk maps, gradients, tensor options."""
    run = captured(column, graph)
    weight = run.parameters["plain"]
    assert run.optimizer._planner.plans is not None
    plan = run.optimizer._planner.plans[0].kept["device_plan"]
    used = [
        plan.draws,
        plan.count,
        *plan.scalars.values(),
        *(each.chunks for each in plan.launches),
    ]
    alive = [weakref.ref(tensor) for tensor in (*used, weight.grad, run.lr)]
    del used, plan
    if isinstance(graph, Recording):  # which holds what it was given; a graph holds nothing
        graph.launches.clear()
    weight.grad = torch.zeros_like(weight)
    run.optimizer.defaults["lr"] = run.lr = torch.tensor(0.5, device=DEVICE)
    run.optimizer.param_groups[0].update(lr=run.lr, reserve_p=1.0)
    run.optimizer.step()
    gc.collect()
    assert all(reference() is not None for reference in alive)


def test_capture_needs_every_gradient(column: str, graph: Graph) -> None:
    run = Run(torch.float32, column, masked=False)
    run.optimizer.step()
    run.parameters["plain"].grad = None
    check_refused(run, graph, ValueError, "no gradient .plain.")


def test_a_second_capture_needs_a_step_between(column: str, graph: Graph) -> None:
    run = captured(column, graph)
    check_refused(run, graph, RuntimeError, "before each capture")
    run.optimizer.step()


def test_what_a_step_launches_must_stand(column: str, graph: Graph) -> None:
    """The first step drew masks; the captured one would need kernels that are not planned."""
    run = Run(torch.float32, column, masked=False)
    run.optimizer.step()
    run.optimizer.param_groups[0]["reserve_p"] = 1.0
    check_refused(run, graph, RuntimeError, "the last step was another one")
    run.optimizer.step()
    with graph.capture():
        run.optimizer.step()


def test_moved_weights_are_refused(column: str, graph: Graph) -> None:
    run = captured(column, graph)
    run.optimizer.step()
    weight = run.parameters["plain"]
    weight.data = weight.data.clone()
    before = run.outcome()
    with pytest.raises(RuntimeError, match="parameter plain lies elsewhere"):
        run.optimizer.step()
    assert_same_bits(run.outcome(), before)


def test_state_that_a_graph_uses_stays(column: str, graph: Graph) -> None:
    run = captured(column, graph)
    state = run.optimizer.state_dict()
    for change, name in (
        (lambda: run.optimizer.load_state_dict(state), "load_state_dict"),
        (lambda: run.optimizer.set_child_mask(None), "set_child_mask"),
        (lambda: run.optimizer.add_param_group({"params": []}), "add_param_group"),
    ):
        with pytest.raises(RuntimeError, match=f"{name} after step"):
            change()
    run.optimizer.step()


def test_options_on_the_device_have_one_element(column: str) -> None:
    lr = torch.tensor([1e-2, 1e-3], device=DEVICE)
    with pytest.raises(ValueError, match="lr="):
        Run(torch.float32, column, masked=False, lr=lr).optimizer.step()
    half = torch.tensor(1e-2, dtype=torch.float16, device=DEVICE)
    with pytest.raises(ValueError, match="float32 or float64"):
        Run(torch.float32, column, masked=False, lr=half).optimizer.step()
