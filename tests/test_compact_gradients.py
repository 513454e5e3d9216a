"""Gradients of the child alone between micro-batches: the ordinary step with their sums, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from childtune_kernels import FusedChildAdamW, child_layout, ops
from childtune_kernels.step_plan import StepPlan
from tests.child_states import LAYOUTS, lay_out_children
from tests.released_runs import DTYPES, KINDS, STEPS, loss_of, model_and_optimizer, trainable
from tests.snapshots import assert_identical, snapshot, untouched, weights_and_state
from tests.toy_parameters import give_gradients, random_tensor, toy_mask, toy_parameters
from tests.tuned_models import Model

OPS = ("child_adamw",)
MICRO_BATCHES = 3
MASKED = [kind for kind, options in KINDS.items() if "masked" in options]

pytestmark = pytest.mark.usefixtures("one_thread")


def has_mask(optimizer: FusedChildAdamW, parameter: Tensor) -> bool:
    return child_layout.has_child(optimizer.state[parameter])


def summed_by_hand(model: Model, optimizer: FusedChildAdamW, step: int) -> None:
    """An ordinary step with gradients summed in the type of the update, where there is a mask."""
    sums: dict[Tensor, Tensor] = {}
    for micro in range(MICRO_BATCHES):
        loss_of(model, 10 * step + micro).backward()
        for parameter in trainable(optimizer):
            if parameter.grad is None or not has_mask(optimizer, parameter):
                continue
            gradient = parameter.grad.to(ops.compute_dtype(parameter.dtype))
            sums[parameter] = sums[parameter] + gradient if micro else gradient
            parameter.grad = None
    for parameter, gradient in sums.items():
        parameter.grad_dtype = gradient.dtype
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()
    for parameter in sums:
        parameter.grad_dtype = parameter.dtype


def released(model: Model, optimizer: FusedChildAdamW, step: int) -> None:
    """The same with compact gradients; what is kept is the child's share, and nothing is updated yet."""
    if optimizer._gradient_release is None:
        optimizer.release_gradients(compact_gradients=True)
    handle = optimizer._gradient_release
    assert handle is not None
    before = weights_and_state(optimizer)
    masked = [parameter for parameter in trainable(optimizer) if has_mask(optimizer, parameter)]
    share = sum(
        child_layout.child_count(optimizer.state[parameter])
        * ops.compute_dtype(parameter.dtype).itemsize
        for parameter in masked
    )
    for micro in range(MICRO_BATCHES):
        loss_of(model, 10 * step + micro).backward()
        assert all(parameter.grad is None for parameter in masked)
        assert model.head.weight.grad is not None
        assert handle.kept_bytes == share > 0
    assert_identical(weights_and_state(optimizer), before)
    optimizer.step()
    assert handle.kept_bytes == 0
    assert all(parameter.grad is None for parameter in masked)
    assert {parameter.grad_dtype for parameter in masked} == {masked[0].dtype}
    optimizer.zero_grad()


Way = Callable[[Model, FusedChildAdamW, int], None]


def outcome(
    way: Way,
    kind: str,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    layout: str | None = None,
) -> dict[str, Any]:
    model, optimizer = model_and_optimizer(kind, dtype, backend)
    if layout is not None:
        lay_out_children(optimizer, layout)
    first = weights_and_state(optimizer)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for step in range(STEPS):
        way(model, optimizer, step)
        schedule.step()
    found = weights_and_state(optimizer)
    assert not any(torch.equal(found[name], first[name]) for name in first if "weight" in name[-7:])
    assert {int(optimizer.state[parameter]["step"]) for parameter in trainable(optimizer)} == {
        STEPS
    }
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MASKED)
def test_it_equals_the_step_with_summed_gradients(kind: str, dtype: str, backend: str) -> None:
    found = outcome(released, kind, DTYPES[dtype], backend)
    assert_identical(found, outcome(summed_by_hand, kind, DTYPES[dtype], backend))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_child(layout: str, backend: str) -> None:
    found = outcome(released, "CT_D compact", torch.bfloat16, backend, layout)
    assert_identical(
        found, outcome(summed_by_hand, "CT_D compact", torch.bfloat16, backend, layout)
    )


def accumulated(model: Model, optimizer: FusedChildAdamW, step: int) -> None:
    """The usual loop of fp32 parameters."""
    for micro in range(MICRO_BATCHES):
        loss_of(model, 10 * step + micro).backward()
    optimizer.step()
    optimizer.zero_grad()


def last_alone(model: Model, optimizer: FusedChildAdamW, step: int) -> None:
    loss_of(model, 10 * step + MICRO_BATCHES - 1).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_fp32_equals_ordinary_accumulation_and_16_bits_do_better() -> None:
    assert_identical(outcome(released, "both"), outcome(accumulated, "both"))
    for other, dtype in ((last_alone, torch.float32), (accumulated, torch.bfloat16)):
        with pytest.raises(AssertionError):
            assert_identical(outcome(released, "both", dtype), outcome(other, "both", dtype))


def test_one_dense_gradient_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = model_and_optimizer("CT_D compact")
    optimizer.release_gradients(compact_gradients=True)
    loss_of(model, 0).backward()
    loss_of(model, 1).backward()
    dense = [parameter for parameter in trainable(optimizer) if parameter.grad is not None]
    assert {id(parameter) for parameter in dense} == {id(p) for p in model.head.parameters()}
    counts: list[int] = []
    run = StepPlan.run

    def counted(plan: StepPlan, *arguments: Any) -> None:
        if len(plan.rows) == 1:
            present = [p for p in trainable(optimizer) if p.grad is not None]
            counts.append(len(present) - len(dense))
        run(plan, *arguments)

    monkeypatch.setattr(StepPlan, "run", counted)
    optimizer.step()
    assert counts == [1] * (len(trainable(optimizer)) - len(dense))


def test_zero_grad_drops_what_is_kept() -> None:
    outcomes = []
    for dropped in (False, True):
        model, optimizer = model_and_optimizer("both")
        handle = optimizer.release_gradients(compact_gradients=True)
        if dropped:
            loss_of(model, 7).backward()
            assert handle.kept_bytes > 0
            optimizer.zero_grad()
            assert handle.kept_bytes == 0
            with untouched(optimizer):
                optimizer.step()
        loss_of(model, 0).backward()
        optimizer.step()
        outcomes.append(weights_and_state(optimizer))
    assert_identical(*outcomes)


def test_the_end_does_not_lose_what_is_kept() -> None:
    model, optimizer = model_and_optimizer("both")
    handle = optimizer.release_gradients(compact_gradients=True)
    loss_of(model, 0).backward()
    kept = handle.kept_bytes
    with (
        untouched(optimizer),
        pytest.raises(RuntimeError, match=r"remove.. while gradients of .* kept"),
    ):
        handle.remove()
    assert optimizer._gradient_release is handle
    assert handle.kept_bytes == kept
    optimizer.step()
    handle.remove()
    assert optimizer._gradient_release is None

    def fails() -> None:
        with optimizer.release_gradients(compact_gradients=True):
            loss_of(model, 0).backward()
            raise ArithmeticError

    optimizer.zero_grad()
    with pytest.raises(ArithmeticError):
        fails()
    assert optimizer._gradient_release is None


AWKWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda gradient: gradient,
    "other strides": lambda gradient: (
        gradient.t().contiguous().t() if gradient.dim() == 2 else gradient
    ),
    "negated views": lambda gradient: torch._neg_view(-gradient),
    "without storage": lambda gradient: torch._efficientzerotensor(gradient.shape),
    "an empty child": lambda gradient: gradient,
}


@pytest.mark.parametrize("child_state", ["dense", "compact"])
@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
def test_gradients_set_by_hand_of_every_kind_and_parameters_of_every_shape(
    kind: str, child_state: str
) -> None:
    """Empty and 0-d parameters, an empty child; step() takes what no hook saw, and adds it."""
    outcomes = []
    for released_too in (False, True):
        parameters = toy_parameters()
        parameters["strided"] = Parameter(random_tensor((7, 4), 3).t())
        mask = toy_mask(parameters)
        if kind == "an empty child":
            mask = mask & ~mask
        optimizer = FusedChildAdamW(
            parameters.items(),
            lr=0.1,
            child_mask=mask,
            child_state=child_state,
            freeze_non_child=False,
        )
        if released_too:
            optimizer.release_gradients(compact_gradients=True)
        for step in range(3):
            optimizer.zero_grad()
            give_gradients(parameters, step)
            for parameter in parameters.values():
                assert parameter.grad is not None
                parameter.grad = AWKWARD[kind](parameter.grad)
                if kind != "without storage":
                    (parameter * 0.5).sum().backward()
            optimizer.step()
        outcomes.append(weights_and_state(optimizer))
        assert {int(optimizer.state[p]["step"]) for p in parameters.values()} == {3}
    assert_identical(*outcomes)


def test_a_child_exchanged_by_hand_is_refused() -> None:
    model, optimizer = model_and_optimizer("both")
    optimizer.release_gradients(compact_gradients=True)
    loss_of(model, 0).backward()
    state = optimizer.state[model.inner.weight]
    name = next(name for name in child_layout.LAYOUT_KEYS if name in state)
    loss = loss_of(model, 1)
    state[name] = state[name].clone()
    before = weights_and_state(optimizer)
    for act in (optimizer.step, loss.backward, optimizer.step):
        with pytest.raises(
            RuntimeError, match=r"child of inner\.weight changed while its gradients"
        ):
            act()
    assert_identical(weights_and_state(optimizer), before)
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    optimizer.step()


def test_what_is_refused_keeps_the_sums() -> None:
    """A bad option: the step can be made once it has been corrected."""
    outcomes = []
    for mistaken in (False, True):
        model, optimizer = model_and_optimizer("both")
        optimizer.release_gradients(compact_gradients=True)
        for micro in range(MICRO_BATCHES):
            loss_of(model, micro).backward()
        if mistaken:
            optimizer.param_groups[1]["lr"] = -1.0
            before = snapshot(optimizer)
            with pytest.raises(ValueError, match=r"lr=-1\.0"):
                optimizer.step()
            assert_identical(snapshot(optimizer), before)
            optimizer.param_groups[1]["lr"] = 0.02
        optimizer.step()
        outcomes.append(weights_and_state(optimizer))
    assert_identical(*outcomes)


def test_without_a_mask_from_now_on() -> None:
    """Every parameter then keeps its ordinary gradient."""
    outcomes = []
    for compact in (False, True):
        model, optimizer = model_and_optimizer("both")
        if compact:
            optimizer.release_gradients(compact_gradients=True)
        for step in range(2):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.set_child_mask(None)
        outcomes.append(weights_and_state(optimizer))
    assert_identical(*outcomes)
