"""Gradient release: the ordinary step, bit for bit, in backward (SPEC.md, "Gradient release")."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from childtune_kernels import FusedChildAdamW
from childtune_kernels.step_plan import StepPlan
from tests.released_runs import DTYPES, KINDS, STEPS, loss_of, model_and_optimizer, train, trainable
from tests.snapshots import assert_identical, weights_and_state

OPS = ("child_adamw",)
FP32 = torch.float32

pytestmark = pytest.mark.usefixtures("one_thread")


def check_release(kind: str, dtype: torch.dtype, backend: str | None) -> None:
    """A released run is the ordinary one, every update of it is made in backward, gradients are gone."""
    model, ordinary = model_and_optimizer(kind, dtype, backend)
    first = weights_and_state(ordinary)
    expected: list[dict[str, Any]] = []
    ordinary.register_step_post_hook(lambda *_: expected.append(weights_and_state(ordinary)))
    train(model, ordinary)

    model, optimizer = model_and_optimizer(kind, dtype, backend)
    assert_identical(weights_and_state(optimizer), first)

    def after_backward(step: int) -> None:
        assert all(parameter.grad is None for parameter in trainable(optimizer))
        assert_identical(weights_and_state(optimizer), expected[step])

    with optimizer.release_gradients():
        train(model, optimizer, after_backward)
    found = weights_and_state(optimizer)
    assert_identical(found, expected[-1])
    steps = [int(optimizer.state[parameter]["step"]) for parameter in trainable(optimizer)]
    assert steps == [STEPS] * len(steps)
    weights = [name for name in first if name.endswith(" weight")]
    assert not any(torch.equal(found[name], first[name]) for name in weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_the_ordinary_step(kind: str, dtype: str, backend: str) -> None:
    check_release(kind, DTYPES[dtype], backend)


def no_update(run: Callable[[StepPlan], None], plan: StepPlan) -> None:
    if len(plan.rows) > 1:
        run(plan)


def two_updates(run: Callable[[StepPlan], None], plan: StepPlan) -> None:
    for _ in range(2 if len(plan.rows) == 1 else 1):
        run(plan)


def unchanged(run: Callable[[StepPlan], None], plan: StepPlan) -> None:
    run(plan)


@pytest.mark.parametrize("fault", [no_update, two_updates, unchanged])
def test_the_check_finds_faults(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = StepPlan.run
    monkeypatch.setattr(StepPlan, "run", lambda plan, *_: fault(run, plan))
    if fault is unchanged:
        check_release("both", FP32, None)
        return
    with pytest.raises(AssertionError):
        check_release("both", FP32, None)


INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)


@pytest.mark.parametrize("compiler", ["aot_eager", INDUCTOR])
def test_a_compiled_model_trains_alike(compiler: str) -> None:
    if compiler == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    outcomes = []
    for released in (False, True):
        torch._dynamo.reset()
        model, optimizer = model_and_optimizer("both")
        if released:
            optimizer.release_gradients()
        train(model, optimizer, forward=torch.compile(model, backend=compiler))  # type: ignore[arg-type]
        outcomes.append(weights_and_state(optimizer))
    torch._dynamo.reset()
    assert_identical(*outcomes)


def test_step_hooks_run_and_schedulers_do_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    model, optimizer = model_and_optimizer("plain")
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.release_gradients()
    train(model, optimizer)
    assert seen == ["pre", "post"] * STEPS
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


def copies(optimizer: FusedChildAdamW) -> Sequence[FusedChildAdamW]:
    return copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))


def test_copies_are_not_released_and_the_original_still_is() -> None:
    model, optimizer = model_and_optimizer("both")
    optimizer.release_gradients()
    train(model, optimizer, steps=2)
    before = weights_and_state(optimizer)
    copied = copies(optimizer)
    pickle.dumps(model)
    loss_of(copy.deepcopy(model), 1).backward()
    for other in copied:
        assert other._gradient_release is None
        assert "_step_supports_amp_scaling" not in vars(other)
        assert_identical(weights_and_state(other), before)
        parameter = other.param_groups[0]["params"][0]
        parameter.square().sum().backward()
        assert parameter.grad is not None
        assert_identical(weights_and_state(other), before)
        other.step()
    assert_identical(*map(weights_and_state, copied))
    assert_identical(weights_and_state(optimizer), before)
    loss_of(model, 2).backward()
    assert all(parameter.grad is None for parameter in trainable(optimizer))


def test_a_warm_iteration_writes_no_row_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the plans of one parameter nor those of all: a gradient in the one is none in the other."""
    model, optimizer = model_and_optimizer("both")
    optimizer.release_gradients()
    train(model, optimizer, steps=2)
    written: list[str] = []
    monkeypatch.setattr(
        StepPlan, "_refresh_rows", lambda plan, moved: written.append(plan.rows[0].label)
    )
    train(model, optimizer, steps=2)
    assert written == []


@pytest.mark.parametrize("end", ["remove", "with", "an error"])
def test_after_the_end_everything_is_ordinary(end: str) -> None:
    model, optimizer = model_and_optimizer("both")
    train(model, optimizer, steps=1)  # a scheduler leaves its marks
    attributes = set(vars(optimizer))
    if end == "remove":
        handle = optimizer.release_gradients()
        train(model, optimizer, steps=2)
        handle.remove()
    elif end == "with":
        with optimizer.release_gradients():
            train(model, optimizer, steps=2)
    else:
        train(model, optimizer, steps=2)
        with pytest.raises(ArithmeticError), optimizer.release_gradients():
            raise ArithmeticError
    assert set(vars(optimizer)) == attributes
    before = weights_and_state(optimizer)
    for _ in range(2):  # accumulated
        loss_of(model, 2).backward()
    assert_identical(weights_and_state(optimizer), before)
    assert all(parameter.grad is not None for parameter in trainable(optimizer))
    assert not any(parameter._post_accumulate_grad_hooks for parameter in trainable(optimizer))


def test_a_handle_ends_its_own_release_alone() -> None:
    model, optimizer = model_and_optimizer("plain")
    old = optimizer.release_gradients()
    old.remove()
    new = optimizer.release_gradients()
    old.remove()
    assert optimizer._gradient_release is new
    loss_of(model, 0).backward()
    assert int(optimizer.state[model.head.bias]["step"]) == 1


def test_hooks_end_with_the_optimizer() -> None:
    """A script that builds another optimizer for the model does not train with both."""
    model, optimizer = model_and_optimizer("plain")
    release = weakref.ref(optimizer.release_gradients())
    train(model, optimizer, steps=1)
    gone = weakref.ref(optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    del optimizer
    gc.collect()
    assert gone() is None
    assert release() is None
    loss_of(model, 1).backward()
    assert model.head.weight.grad is not None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_autograd_notices_that_a_weight_was_updated_too_early() -> None:
    """Where backward still needs the old weight, it says so instead of using the new one."""
    weight, factor = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = FusedChildAdamW([("weight", weight), ("factor", factor)])
    optimizer.release_gradients()
    product = weight * weight
    loss = (product.detach() * weight).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def live_bytes(references: Sequence[weakref.ref[Tensor]]) -> int:
    """Bytes of all tensors that are still there, a storage counted once."""
    found = [tensor for reference in references if (tensor := reference()) is not None]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in found}.values())


@pytest.mark.parametrize("released", [False, True])
def test_one_gradient_lives_at_a_time(released: bool) -> None:
    """Twelve layers: counted whenever a gradient has been accumulated, before it is used."""
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(12)))
    optimizer = FusedChildAdamW(model.named_parameters())
    gradients: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def count(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradients.append(weakref.ref(parameter.grad))
        alive.append(live_bytes(gradients))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    if released:
        optimizer.release_gradients()
    for _ in range(2):
        model(torch.ones(2, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert max(alive) == (model[0].weight.nbytes if released else total)
    assert len(alive) == 2 * 24
    assert live_bytes(gradients) == 0
