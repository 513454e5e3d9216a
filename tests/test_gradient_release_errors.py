"""What gradient release refuses: with a reason, and before anything is written (SPEC.md, "Errors")."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from childtune_kernels import FusedChildAdamW, graph_capture
from tests.released_runs import loss_of, model_and_optimizer, train, trainable
from tests.snapshots import assert_identical, untouched, weights_and_state
from tests.tuned_models import child_of

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def unwritten(optimizer: FusedChildAdamW) -> Iterator[None]:
    """Neither weights nor state change in the block, nor options; gradients may come."""
    before, options = weights_and_state(optimizer), repr(optimizer.param_groups)
    yield
    assert_identical(weights_and_state(optimizer), before)
    assert repr(optimizer.param_groups) == options


def test_accumulation_is_refused_and_so_is_its_rest() -> None:
    model, optimizer = model_and_optimizer("both")
    optimizer.release_gradients()
    train(model, optimizer, steps=1)
    loss_of(model, 1).backward()
    loss = loss_of(model, 2)
    with unwritten(optimizer):
        with pytest.raises(
            RuntimeError, match=r"gradient of head\.\w+ came a second time before step"
        ):
            loss.backward()
        # Part of the gradients of that backward must not go into a step of its own.
        with pytest.raises(RuntimeError, match=r"came a second time.*compact_gradients=True"):
            optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
    train(model, optimizer, steps=2)
    assert int(optimizer.state[model.head.bias]["step"]) == 4


def test_zero_grad_begins_another_iteration_too() -> None:
    model, optimizer = model_and_optimizer("plain")
    optimizer.release_gradients()
    for _ in range(2):
        loss_of(model, 0).backward()
        optimizer.zero_grad()
    assert int(optimizer.state[model.head.bias]["step"]) == 2


def test_a_second_gradient_set_by_hand_is_refused() -> None:
    model, optimizer = model_and_optimizer("plain")
    optimizer.release_gradients()
    loss_of(model, 0).backward()
    model.head.bias.grad = torch.ones(3)
    with (
        untouched(optimizer),
        pytest.raises(RuntimeError, match=r"gradient of head\.bias came a sec"),
    ):
        optimizer.step()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_weight_that_checkpointed_segments_share(reentrant: bool) -> None:
    """Its gradient comes twice in one reentrant backward: the second is refused, not added to a step."""
    layer = nn.Linear(4, 4)
    optimizer = FusedChildAdamW(layer.named_parameters())
    optimizer.release_gradients()
    hidden = torch.ones(2, 4, requires_grad=True)
    for _ in range(2):
        hidden = checkpoint(layer, hidden, use_reentrant=reentrant)
    if reentrant:
        with pytest.raises(RuntimeError, match=r"came a second time.*use_reentrant=False"):
            hidden.sum().backward()
    else:
        hidden.sum().backward()
    assert [int(optimizer.state[p]["step"]) for p in layer.parameters()] in ([1, 1], [1, 0], [0, 1])


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_a_gradient_scaler_is_refused(compact: bool, unscaled: bool) -> None:
    model, optimizer = model_and_optimizer("both")
    optimizer.release_gradients(compact_gradients=compact)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(loss_of(model, 0)).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    done = "" if compact else r"; gradients of \S+ and \d+ others have been applied, scaled"
    with (
        untouched(optimizer),
        pytest.raises(RuntimeError, match=rf"GradScaler.*only after backward{done}\. Use bf16"),
    ):
        scaler.step(optimizer)


def test_a_scaler_that_does_nothing_is_none() -> None:
    model, optimizer = model_and_optimizer("both")
    optimizer.release_gradients()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert int(optimizer.state[model.head.bias]["step"]) == 1


@pytest.mark.parametrize("had", [None, True])
def test_what_a_scaler_reads_is_put_back(had: bool | None) -> None:
    _, optimizer = model_and_optimizer("plain")
    if had is not None:
        optimizer._step_supports_amp_scaling = had
    before = dict(vars(optimizer))
    optimizer.release_gradients().remove()
    assert vars(optimizer) == before


@pytest.mark.parametrize(("option", "value"), [("max_grad_norm", 1.0), ("skip_nonfinite", True)])
@pytest.mark.parametrize("group", [0, 1])
def test_options_that_need_all_gradients(option: str, value: Any, group: int) -> None:
    model, optimizer = model_and_optimizer("both")
    optimizer.param_groups[group][option] = value
    with untouched(optimizer), pytest.raises(ValueError, match=rf"{option}=.* needs all gradients"):
        optimizer.release_gradients()
    assert optimizer._gradient_release is None
    optimizer.param_groups[group][option] = None if value is not True else False
    optimizer.release_gradients()
    optimizer.param_groups[group][option] = value
    loss = loss_of(model, 0)
    with unwritten(optimizer), pytest.raises(ValueError, match=rf"{option}=.* needs all gradients"):
        loss.backward()
    with unwritten(optimizer), pytest.raises(ValueError, match=rf"{option}=.* needs all gradients"):
        optimizer.step()


def test_an_option_that_appears_during_backward_is_refused_at_the_next_gradient() -> None:
    model, optimizer = model_and_optimizer("plain")
    optimizer.release_gradients()
    embedding = model.embedding.weight

    def appear(_: object) -> None:
        optimizer.param_groups[1]["max_grad_norm"] = 1.0

    model.head.bias.register_post_accumulate_grad_hook(appear)
    assert any(embedding is parameter for parameter in optimizer.param_groups[1]["params"])
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0 .group of"):
        loss_of(model, 0).backward()
    assert int(optimizer.state[model.head.bias]["step"]) == 1
    assert int(optimizer.state[embedding]["step"]) == 0


@pytest.mark.parametrize("compact", [False, True])
def test_a_capture_is_refused(compact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = model_and_optimizer("both")
    optimizer.release_gradients(compact_gradients=compact)
    train(model, optimizer, steps=1)
    loss = loss_of(model, 1)
    monkeypatch.setattr(graph_capture, "is_capturing", lambda device: True)
    with unwritten(optimizer):
        with pytest.raises(RuntimeError, match=r"capture into a CUDA graph.*remove.. the handle"):
            loss.backward()
        with pytest.raises(RuntimeError, match=r"capture into a CUDA graph.*remove.. the handle"):
            optimizer.step()


def test_after_a_capture_it_cannot_begin() -> None:
    model, optimizer = model_and_optimizer("plain")
    train(model, optimizer, steps=1)
    assert optimizer._planner.plans
    optimizer._planner.captures.add(optimizer._planner.plans, [])
    with untouched(optimizer), pytest.raises(RuntimeError, match=r"release_gradients.. after step"):
        optimizer.release_gradients()
    assert optimizer._gradient_release is None
    assert not any(parameter._post_accumulate_grad_hooks for parameter in trainable(optimizer))


def test_one_release_at_a_time() -> None:
    model, optimizer = model_and_optimizer("both")
    handle = optimizer.release_gradients()
    for compact in (False, True):
        with pytest.raises(RuntimeError, match=r"active already; remove.. its handle"):
            optimizer.release_gradients(compact)
    loss_of(model, 0).backward()
    assert int(optimizer.state[model.head.bias]["step"]) == 1
    handle.remove()
    optimizer.release_gradients().remove()


def test_compact_gradients_need_a_fixed_mask() -> None:
    _, optimizer = model_and_optimizer("CT_F")
    with pytest.raises(
        ValueError, match=r"compact_gradients=True .* no parameter has a fixed mask"
    ):
        optimizer.release_gradients(compact_gradients=True)
    assert optimizer._gradient_release is None


def set_mask(model: Any, optimizer: FusedChildAdamW) -> None:
    optimizer.set_child_mask(~child_of(model))


def load(model: Any, optimizer: FusedChildAdamW) -> None:
    optimizer.load_state_dict(model_and_optimizer("both")[1].state_dict())


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("exchange", [set_mask, load])
def test_state_is_not_exchanged_in_the_middle_of_an_iteration(
    exchange: Callable[[Any, FusedChildAdamW], None], compact: bool
) -> None:
    model, optimizer = model_and_optimizer("both")
    handle = optimizer.release_gradients(compact_gradients=compact)
    loss_of(model, 0).backward()
    past = "are kept" if compact else "have been applied"
    kept = handle.kept_bytes
    with (
        untouched(optimizer),
        pytest.raises(RuntimeError, match=rf"in the middle of an iteration .* {past}; call"),
    ):
        exchange(model, optimizer)
    assert handle.kept_bytes == kept
    optimizer.zero_grad()
    exchange(model, optimizer)


def test_bad_options_are_found_before_the_first_update() -> None:
    """Of a group too whose gradients come later in backward."""
    model, optimizer = model_and_optimizer("both")
    optimizer.release_gradients()
    train(model, optimizer, steps=1)
    optimizer.param_groups[1]["lr"] = -1.0
    loss = loss_of(model, 1)
    with unwritten(optimizer), pytest.raises(ValueError, match=r"lr=-1\.0"):
        loss.backward()


def test_missing_state_is_found_before_the_first_update() -> None:
    model, optimizer = model_and_optimizer("both")
    optimizer.release_gradients()
    train(model, optimizer, steps=1)
    del optimizer.state[model.embedding.weight]
    loss = loss_of(model, 1)
    with (
        unwritten(optimizer),
        pytest.raises(ValueError, match=r"state of embedding\.weight is miss"),
    ):
        loss.backward()


@pytest.mark.parametrize("compact", [False, True])
def test_a_gradient_that_does_not_fit_surfaces_from_backward(compact: bool) -> None:
    embedding = nn.Embedding(40, 16, sparse=True)
    optimizer = FusedChildAdamW(
        embedding.named_parameters(),
        child_mask=child_of(embedding),  # type: ignore[arg-type]
    )
    optimizer.release_gradients(compact_gradients=compact)
    loss = embedding(torch.arange(5)).square().sum()
    with (
        unwritten(optimizer),
        pytest.raises(ValueError, match=r"gradient of weight: layout .*spars"),
    ):
        loss.backward()
    with (
        unwritten(optimizer),
        pytest.raises(ValueError, match=r"gradient of weight: layout .*spars"),
    ):
        optimizer.step()


def test_a_backward_that_fails_can_be_left_behind() -> None:
    """What came before the failure has been applied; the loop goes on."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(context: Any, *gradients: Any) -> Any:
            raise ArithmeticError("no gradient")

    first, last = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = FusedChildAdamW([("first", first), ("last", last)])
    optimizer.release_gradients()
    with pytest.raises(ArithmeticError):
        (Fails.apply(first) * last).sum().backward()
    assert [int(optimizer.state[p]["step"]) for p in (first, last)] == [0, 1]
    optimizer.zero_grad()
    (first * last).sum().backward()
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in (first, last)] == [1, 2]
