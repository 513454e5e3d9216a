"""Recording: one outermost backward is one record, whatever happens inside and around it."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from childtune_kernels import FisherAccumulator

from .fisher_models import (
    ENCODER,
    EXCLUDED,
    Classifier,
    assert_equal_sums,
    data,
    examples,
    loss_of,
    squares_by_loop,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Raises(torch.autograd.Function):
    """Passes values through; its backward raises."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise ZeroDivisionError("in backward")


def raises(values: Tensor) -> Tensor:
    result: Tensor = Raises.apply(values)
    return result


def layers(count: int = 3) -> nn.ModuleList:
    torch.manual_seed(3)
    return nn.ModuleList(nn.Linear(5, 5) for _ in range(count))


def inputs(index: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(2, 5, generator=generator).requires_grad_()


def plain(model: nn.ModuleList, index: int) -> Tensor:
    values = inputs(index)
    for layer in model:
        values = layer(values).tanh()
    return values.sum()


def segment(layer: nn.Module, values: Tensor) -> Tensor:
    result: Tensor = layer(values).tanh()
    return result


def checkpointed(model: nn.ModuleList, index: int, reentrant: bool) -> Tensor:
    """Every layer in a checkpoint of its own, so that no gradient arrives in the outermost backward."""
    values = inputs(index)
    for layer in model:
        values = checkpoint(segment, layer, values, use_reentrant=reentrant)
    return values.sum()


def nested(model: nn.ModuleList, index: int, reentrant: bool) -> Tensor:
    """Checkpoints within a checkpoint, and the last layer outside of all."""

    def first_two(values: Tensor) -> Tensor:
        for layer in model[:2]:
            values = checkpoint(segment, layer, values, use_reentrant=reentrant)
        return values

    values = checkpoint(first_two, inputs(index), use_reentrant=reentrant)
    return segment(model[2], values).sum()


def branched(model: nn.ModuleList, index: int, reentrant: bool) -> Tensor:
    """Two checkpoints side by side, and gradients that arrive before and after them."""
    start = segment(model[0], inputs(index))
    branches = [
        checkpoint(segment, model[1], start, use_reentrant=reentrant),
        segment(model[2], start),
    ]
    return (branches[0] * branches[1]).sum()


# Counting


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("forward", [checkpointed, nested, branched])
def test_a_backward_inside_a_backward_is_no_record(forward: Any, reentrant: bool) -> None:
    model = layers()
    fisher = FisherAccumulator(model)
    with fisher.recording():
        for index in range(4):
            forward(model, index, reentrant).backward()
            assert fisher.records == index + 1
    expected = squares_by_loop(model, range(4), lambda m, i: forward(m, i, False))
    assert_equal_sums(fisher.sums, expected)


def test_a_graph_that_is_kept_is_recorded_twice() -> None:
    model = Classifier()
    once, twice = FisherAccumulator(model), FisherAccumulator(model)
    loss = loss_of(model, examples()[0])
    with once.recording():
        loss.backward(retain_graph=True)
    with twice.recording():
        loss.backward(retain_graph=True)
        loss.backward()
    assert (once.records, twice.records) == (1, 2)
    assert_equal_sums(twice.sums, {name: total * 2 for name, total in once.sums.items()})


def test_a_graph_of_gradients_is_recorded_like_any_other() -> None:
    model = Classifier()
    fisher = FisherAccumulator(model)
    with pytest.warns(UserWarning, match="create_graph"), fisher.recording():
        loss_of(model, examples()[0]).backward(create_graph=True)
    assert_equal_sums(fisher.sums, squares_by_loop(model, examples()[:1]))
    assert not any(total.requires_grad for total in fisher.sums.values())


def test_a_weight_that_is_used_twice_arrives_once() -> None:
    model = nn.Linear(5, 5)
    fisher = FisherAccumulator(model)
    with fisher.recording():
        model(model(inputs())).sum().backward()
    expected = squares_by_loop(model, [0], lambda m, _: m(m(inputs())).sum())
    assert_equal_sums(fisher.sums, expected)


def test_a_backward_that_reaches_only_dense_parameters_is_a_record_of_zeros() -> None:
    model = Classifier()
    fisher = FisherAccumulator(model, include="classifier*")
    with fisher.recording():
        model.get_parameter(ENCODER[0]).sum().backward()
    assert fisher.records == 1
    assert fisher.without_gradient == fisher.names


def test_what_is_no_backward_of_parameters_is_no_record() -> None:
    model = Classifier()
    fisher = FisherAccumulator(model)
    with fisher.recording():
        torch.autograd.grad(loss_of(model, examples()[0]), list(model.parameters()))
        inputs().sum().backward()
    assert fisher.records == 0


def test_backwards_of_another_thread_count() -> None:
    model = Classifier()
    fisher = FisherAccumulator(model)
    with fisher.recording():
        for example in examples(3):
            worker = threading.Thread(
                target=lambda at: loss_of(model, at).backward(), args=(example,)
            )
            worker.start()
            worker.join()
    assert fisher.records == 3
    assert_equal_sums(fisher.sums, squares_by_loop(model, examples(3)))


# Gradients


def test_gradients_are_freed_as_they_are_produced() -> None:
    model = Classifier()
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def count(parameter: Tensor) -> None:
        nonlocal most
        assert parameter.grad is not None
        alive.append(weakref.ref(parameter.grad))
        most = max(most, sum(reference() is not None for reference in alive))
        assert sum(other.grad is not None for other in model.parameters()) == 1

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    gc.collect()
    with FisherAccumulator(model, exclude=EXCLUDED).recording():
        loss_of(model, examples()[0]).backward()
    assert len(alive) == 7
    assert most == 1


def test_what_stood_in_grad_is_put_back() -> None:
    model = Classifier()
    loss_of(model, data()).backward()
    model.encoder[0].bias.grad = None
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    values = {name: grad.clone() for name, grad in before.items() if grad is not None}

    def check() -> None:
        for name, parameter in model.named_parameters():
            assert parameter.grad is before[name]
            assert parameter.grad is None or torch.equal(parameter.grad, values[name])

    fisher = FisherAccumulator(model, exclude=EXCLUDED)
    with fisher.recording():
        for example in examples():
            loss_of(model, example).backward()
    check()
    assert_equal_sums(
        fisher.sums,
        {n: s for n, s in squares_by_loop(model, examples()).items() if n in ENCODER},
    )
    with pytest.raises(ZeroDivisionError), fisher.recording():
        raises(loss_of(model, examples()[0])).backward()
    check()
    loss_of(model, examples()[0]).backward()
    assert fisher.records == 8


def test_a_parameter_that_was_frozen_since_gets_no_gradient() -> None:
    model = Classifier()
    fisher = FisherAccumulator(model, exclude=EXCLUDED)
    model.get_parameter(ENCODER[1]).requires_grad_(False)
    model.classifier.requires_grad_(False)
    with fisher.recording():
        loss_of(model, examples()[0]).backward()
    assert fisher.without_gradient == [ENCODER[1]]
    assert fisher.records == 1


# What is refused


def shared_segments(layer: nn.Linear, reentrant: bool) -> Tensor:
    values = checkpoint(segment, layer, inputs(), use_reentrant=reentrant)
    result: Tensor = checkpoint(segment, layer, values, use_reentrant=reentrant)
    return result.sum()


def test_a_gradient_in_parts_names_the_remedy() -> None:
    layer = nn.Linear(5, 5)
    fisher = FisherAccumulator(layer)
    with (
        pytest.raises(
            RuntimeError, match=r"bias arrived twice within one backward.*use_reentrant=False"
        ),
        fisher.recording(),
    ):
        shared_segments(layer, True).backward()
    for read in (lambda: fisher.sums, lambda: fisher.records, lambda: fisher.child_mask(0.3)):
        with pytest.raises(RuntimeError, match=r"stopped half-way.*reset\(\)"):
            read()
    fisher.reset()
    with fisher.recording():
        shared_segments(layer, False).backward()
    expected = squares_by_loop(layer, [0], lambda m, _: shared_segments(m, False))
    assert_equal_sums(fisher.sums, expected)


def half_way(model: nn.ModuleList) -> Tensor:
    """The gradient of the last layer arrives, then backward raises."""
    values = raises(segment(model[0], inputs()))
    return segment(model[2], values).sum()


def test_a_backward_that_stops_half_way_spoils_the_sums() -> None:
    model = layers()
    fisher = FisherAccumulator(model)
    with pytest.raises(ZeroDivisionError), fisher.recording():  # noqa: PT012
        plain(model, 0).backward()
        half_way(model).backward()
    for use in (
        lambda: fisher.values(),
        lambda: fisher.accumulate(),
        lambda: fisher.merge(FisherAccumulator(model)),
        lambda: FisherAccumulator(model).merge(fisher),
        lambda: fisher.recording().__enter__(),
        lambda: fisher.save("nowhere"),
        lambda: fisher.record_examples(loss_of, data()),
        lambda: fisher.without_gradient,
    ):
        with pytest.raises(RuntimeError, match="stopped half-way"):
            use()
    assert "stopped half-way" in repr(fisher)


def test_an_error_that_somebody_has_caught_is_not_forgotten() -> None:
    model = layers()
    fisher = FisherAccumulator(model)
    with pytest.raises(RuntimeError, match="stopped half-way"), fisher.recording():  # noqa: PT012
        with pytest.raises(ZeroDivisionError):
            half_way(model).backward()
        with pytest.raises(RuntimeError, match="stopped half-way"):
            fisher.records  # noqa: B018
    fisher.reset()
    with pytest.raises(RuntimeError, match="had not come to its end"), fisher.recording():  # noqa: PT012
        with pytest.raises(ZeroDivisionError):
            half_way(model).backward()
        segment(model[1], inputs()).sum().backward()
    with pytest.raises(RuntimeError, match="stopped half-way"):
        fisher.values()


def test_an_error_before_any_gradient_does_no_harm() -> None:
    model = layers()
    fisher = FisherAccumulator(model)
    with fisher.recording():
        plain(model, 0).backward()
        for bad in (raises(plain(model, 1)), plain(model, 1) + torch.tensor([1.0, 2.0])):
            with pytest.raises((ZeroDivisionError, RuntimeError)):
                bad.backward()
        plain(model, 1).backward()
    with pytest.raises(ZeroDivisionError), fisher.recording():
        raises(plain(model, 1)).backward()
    assert fisher.records == 2
    assert_equal_sums(fisher.sums, squares_by_loop(model, range(2), plain))


class Sparse(nn.Module):
    """An embedding with sparse gradients, and a layer whose gradient may come before or after."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(4, 5, sparse=True)
        self.layer = nn.Linear(5, 5)


def test_sparse_gradients_are_refused_by_name() -> None:
    model = Sparse()
    fisher = FisherAccumulator(model)
    message = r"gradient of rows\.weight: layout torch\.sparse_coo.*sparse=False.*exclude"
    with fisher.recording():
        with pytest.raises(ValueError, match=message):
            model.rows(torch.tensor([1])).sum().backward()
        model.layer(inputs()).sum().backward()
    assert fisher.records == 1
    model.rows(torch.tensor([1])).sum().backward()
    model.layer(inputs()).sum().backward()
    before = {name: total.clone() for name, total in fisher.sums.items()}
    with pytest.raises(ValueError, match=message):
        fisher.accumulate()
    assert all(torch.equal(total, before[name]) for name, total in fisher.sums.items())
    excluded = FisherAccumulator(model, exclude="rows*")
    with excluded.recording():
        model.layer(model.rows(torch.tensor([1]))).sum().backward()
    assert excluded.records == 1


def test_one_recording_at_a_time() -> None:
    model = Classifier()
    fisher, other = FisherAccumulator(model), FisherAccumulator(model)
    with fisher.recording() as inside:
        assert inside is fisher
        for use in (
            lambda: fisher.recording().__enter__(),
            lambda: fisher.accumulate(),
            lambda: fisher.reset(),
            lambda: fisher.record_examples(loss_of, data()),
        ):
            with pytest.raises(RuntimeError, match="is recording"):
                use()
    with (
        pytest.raises(RuntimeError, match="a second accumulator that records"),
        fisher.recording(),
        other.recording(),
    ):
        loss_of(model, examples()[0]).backward()
    assert other.records == 0


def test_hooks_are_gone_afterwards() -> None:
    model = Classifier()
    fisher = FisherAccumulator(model)
    with fisher.recording():
        checkpointed(layers(), 0, True).backward()
        loss_of(model, examples()[0]).backward()
    for parameter in model.parameters():
        assert not parameter._post_accumulate_grad_hooks
    loss_of(model, examples()[0]).backward()
    assert fisher.records == 1
    assert all(parameter.grad is not None for parameter in model.parameters())
