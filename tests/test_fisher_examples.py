"""Gradients of single examples by torch.func: the same sums as a loop, for any chunk."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from childtune_kernels import FisherAccumulator

from .fisher_models import Classifier, data, loss_of

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 11


def recorded(
    model: nn.Module, chunk: int | None = None, batch: Any = None, loss: Any = loss_of
) -> FisherAccumulator:
    fisher = FisherAccumulator(model)
    fisher.record_examples(loss, data(COUNT) if batch is None else batch, chunk)
    return fisher


def loop_in_double(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Mean squares of each example's gradient, everything in fp64."""
    double = copy.deepcopy(model).double()
    named = dict(double.named_parameters())
    means = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    for at in range(len(batch[0])):
        example = (batch[0][at : at + 1], batch[1][at : at + 1])
        gradients = torch.autograd.grad(loss_of(double, example), list(named.values()))
        for mean, gradient in zip(means.values(), gradients, strict=True):
            mean += gradient**2 / len(batch[0])
    return means


@pytest.mark.parametrize("chunk", [1, 2, 5, COUNT, 100, None])
def test_every_chunk_equals_a_loop_in_double(chunk: int | None) -> None:
    """In an fp64 model gradients err by 1e-15, so only the fp32 sums of 11 squares do: (11 + 3) · 2⁻²⁴."""
    model = Classifier(torch.float64)
    fisher = recorded(model, chunk)
    expected = loop_in_double(model, data(COUNT))
    assert (fisher.records, fisher.examples, fisher.kind) == (COUNT, COUNT, "per example")
    for name, value in fisher.values().items():
        assert value.any()
        torch.testing.assert_close(value.double(), expected[name], rtol=14 * 2.0**-24, atol=1e-30)


def test_a_batch_mean_is_another_quantity() -> None:
    """The check above would find it."""
    model = Classifier(torch.float64)
    fisher = FisherAccumulator(model)
    with fisher.recording(COUNT):
        loss_of(model, data(COUNT)).backward()
    expected = loop_in_double(model, data(COUNT))
    for name, value in fisher.values().items():
        assert not torch.allclose(value.double(), expected[name], rtol=0.1, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sums_of_recording_up_to_the_type(dtype: torch.dtype) -> None:
    """Batched products may sum in another order: each gradient errs by some of its type's epsilons."""
    model = Classifier(dtype)
    by_function, by_backward = recorded(model, 4), FisherAccumulator(model)
    with by_backward.recording():
        for at in range(COUNT):
            loss_of(model, tuple(part[at : at + 1] for part in data(COUNT))).backward()  # type: ignore[arg-type]
    for name, total in by_backward.sums.items():
        error = (by_function.sums[name] - total).abs().max()
        assert error <= 32 * torch.finfo(dtype).eps * total.max(), name


Pair = namedtuple("Pair", ["tokens", "classes"])


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x, y: [x, y], lambda e: e),
        (lambda x, y: {"x": x, "more": (y,)}, lambda e: (e["x"], e["more"][0])),
        (lambda x, y: OrderedDict(x=x, y=y), lambda e: (e["x"], e["y"])),
        (lambda x, y: UserDict(x=x, y=y), lambda e: (e["x"], e["y"])),
        (Pair, lambda e: (e.tokens, e.classes)),
    ],
)
def test_batches_of_many_shapes(wrap: Callable[..., Any], unwrap: Callable[..., Any]) -> None:
    model = Classifier()
    seen: list[torch.Size] = []

    def loss(model: Callable[..., Any], example: Any) -> Tensor:
        tokens, classes = unwrap(example)
        seen.append(tokens.shape)
        return loss_of(model, (tokens, classes))

    found = recorded(model, 4, wrap(*data(COUNT)), loss)
    for name, total in recorded(model, 4).sums.items():
        assert torch.equal(found.sums[name], total)
    assert set(seen) == {torch.Size([1, 4])}


def test_a_tensor_alone_is_a_batch_and_a_loss_may_have_a_dimension() -> None:
    model = nn.Linear(4, 1)
    batch = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    fisher = recorded(model, None, batch, lambda model, example: model(example).sum(1))
    torch.testing.assert_close(fisher["weight"], (batch**2).mean(0, keepdim=True))
    assert torch.equal(fisher["bias"], torch.ones(1))


def test_buffers_and_gradients_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    model(torch.ones(2, 4)).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    batch = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))

    def loss(model: Callable[..., Any], example: Tensor) -> Tensor:
        result: Tensor = (model(example) ** 2).sum()
        return result

    fisher = recorded(model, 2, batch, loss)
    assert fisher["0.weight"].any()
    model.train()
    with pytest.raises(RuntimeError, match=r"torch\.func cannot run.*batch norm.*model\.eval\(\)"):
        fisher.record_examples(loss, batch)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is old for p, old in zip(model.parameters(), gradients, strict=True))
    assert fisher.records == 5


class Counting(nn.Module):
    """Assigns its buffer anew in every call."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, values: Tensor) -> Tensor:
        self.calls = self.calls + values.detach().sum()
        result: Tensor = self.layer(values)
        return result


def test_a_buffer_that_is_assigned_anew_is_put_back() -> None:
    model = Counting()
    before = model.calls
    recorded(model, 2, torch.ones(5, 4), lambda model, example: model(example))
    assert model.calls is before
    assert before == 0


def test_random_numbers_are_refused_and_not_drawn() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    fisher = FisherAccumulator(model)
    state = torch.get_rng_state()

    def loss(model: Callable[..., Any], example: Tensor) -> Tensor:
        result: Tensor = model(example).sum()
        return result

    with pytest.raises(RuntimeError, match=r"dropout draws random numbers.*call model\.eval\(\)"):
        fisher.record_examples(loss, torch.ones(3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert fisher.records == 0


class Branching(nn.Module):
    """Control flow that depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, values: Tensor) -> Tensor:
        return self.layer(values) if values.sum() > 0 else values


def test_a_model_that_cannot_be_mapped_names_recording() -> None:
    fisher = FisherAccumulator(Branching())
    with pytest.raises(
        RuntimeError, match=r"fisher\.recording\(examples_per_backward=1\).*0 of this"
    ):
        fisher.record_examples(lambda model, example: model(example).sum(), torch.ones(3, 4))


def test_what_was_recorded_before_an_error_is_counted() -> None:
    calls = 0

    def loss(model: Callable[..., Any], example: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("no more")
        return loss_of(model, example)

    model = Classifier()
    fisher = FisherAccumulator(model)
    with pytest.raises(RuntimeError, match=r"no more.*8 of this batch's 11 examples are recorded"):
        fisher.record_examples(loss, data(COUNT), chunk=4)
    assert fisher.records == 8
    first = recorded(model, 4, tuple(part[:8] for part in data(COUNT)))
    for name, total in first.sums.items():
        assert torch.equal(fisher.sums[name], total)


@pytest.mark.parametrize(
    ("batch", "chunk", "error", "message"),
    [
        ((torch.ones(3, 4), torch.ones(2)), None, ValueError, "all as many; found 2, 3"),
        ((torch.ones(3, 4), torch.tensor(1.0)), None, ValueError, "all as many; found 0, 3"),
        (torch.ones(0, 4), None, ValueError, "one or more"),
        ([], None, ValueError, "found no tensor"),
        ({"x": torch.ones(3, 4), "y": [1, 2, 3]}, None, TypeError, "holds a int; give tensors"),
        (torch.ones(3, 4), 0, ValueError, "chunk=0 must be"),
        (torch.ones(3, 4), 2.0, ValueError, r"chunk=2\.0 must be"),
        (torch.ones(3, 4), True, ValueError, "chunk=True must be"),
    ],
)
def test_batches_and_chunks_that_do_not_fit(
    batch: Any, chunk: Any, error: type[Exception], message: str
) -> None:
    fisher = FisherAccumulator(nn.Linear(4, 4))
    with pytest.raises(error, match=message):
        fisher.record_examples(lambda model, example: model(example).sum(), batch, chunk)
    assert fisher.records == 0


def test_a_loss_must_be_one_number() -> None:
    fisher = FisherAccumulator(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"loss_fn gave \(1, 4\) for one example"):
        fisher.record_examples(lambda model, example: model(example), torch.ones(3, 4))
    with pytest.raises(ValueError, match="loss_fn gave float"):
        fisher.record_examples(lambda model, example: 1.0, torch.ones(3, 4))  # type: ignore[arg-type,return-value]
