"""Which parameters FisherAccumulator measures: patterns, tied and frozen weights, wrappers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from childtune_kernels import FisherAccumulator

from .fisher_models import (
    DENSE,
    ENCODER,
    EXCLUDED,
    Classifier,
    assert_equal_sums,
    data,
    examples,
    loss_of,
    recorded,
    squares_by_loop,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_patterns_choose_the_scope() -> None:
    model = Classifier()
    fisher = FisherAccumulator(model, exclude=EXCLUDED)
    assert fisher.names == ENCODER
    assert fisher.dense_names == DENSE
    assert FisherAccumulator(model, include="encoder*").names == ENCODER
    assert FisherAccumulator(model, ["encoder*", "c*"], "*bias").names == [
        "encoder.0.weight",
        "encoder.2.weight",
        "classifier.weight",
    ]
    whole = FisherAccumulator(model)
    assert whole.names == [name for name, _ in model.named_parameters()]
    assert whole.dense_names == frozenset()


def test_frozen_parameters_are_nowhere() -> None:
    model = Classifier()
    model.encoder[0].requires_grad_(False)
    model.embeddings.requires_grad_(False)
    fisher = recorded(model, exclude=EXCLUDED)
    assert fisher.names == ENCODER[2:]
    assert fisher.dense_names == {"classifier.weight", "classifier.bias"}
    assert set(fisher.child_mask(0.5).names) == {*fisher.names, *fisher.dense_names}


class Tied(nn.Module):
    """A head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(5, 4)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embeddings.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.middle(self.embeddings(tokens).mean(1)).tanh())
        return logits


def test_a_tied_weight_is_one_parameter_under_its_first_name() -> None:
    model = Tied()
    batch = (torch.tensor([[1, 2, 3]]), torch.tensor([4]))
    fisher = FisherAccumulator(model)
    assert fisher.names == ["embeddings.weight", "middle.weight", "middle.bias"]
    with fisher.recording():
        loss_of(model, batch).backward()
    expected = squares_by_loop(model, [batch])
    assert_equal_sums(fisher.sums, expected)
    by_function = FisherAccumulator(model)
    by_function.record_examples(loss_of, batch)
    for name, total in by_function.sums.items():
        torch.testing.assert_close(total, expected[name])


@pytest.mark.parametrize("pattern", ["embeddings*", "head*"])
def test_any_name_of_a_tied_weight_decides(pattern: str) -> None:
    out = FisherAccumulator(Tied(), exclude=pattern)
    assert out.names == ["middle.weight", "middle.bias"]
    assert out.dense_names == {"embeddings.weight"}
    assert FisherAccumulator(Tied(), include=pattern).names == ["embeddings.weight"]


class Wrapper(nn.Module):
    """Names everything anew, as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.module(tokens)
        return logits


def test_wrappers_prefixes_are_no_part_of_names() -> None:
    wrapped = Wrapper(Classifier())
    by_backward = recorded(wrapped, include="encoder*")
    by_function = FisherAccumulator(wrapped, include="encoder*")
    by_function.record_examples(loss_of, data())
    for fisher in (by_backward, by_function):
        assert fisher.names == ENCODER
        assert fisher.dense_names == DENSE
        for name, total in squares_by_loop(wrapped.module, examples()).items():
            if name in ENCODER:
                torch.testing.assert_close(fisher.sums[name], total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"exclude": "*embedings*"},
            r"'\*embedings\*' matches no parameter; near it are embeddings\.w",
        ),
        ({"exclude": ["encoder*", "clasifier"]}, r"'clasifier' .* near it are classifier\.weight"),
        (
            {"include": "Encoder*"},
            r"include: the pattern 'Encoder\*' matches no parameter.*encoder\.0",
        ),
        ({"include": "classifier*", "exclude": "c*"}, "leave no trainable parameter in scope"),
        ({"include": []}, "leave no trainable parameter in scope; the model has embeddings"),
        ({"offload": "disk"}, "offload='disk' is unknown"),
        ({"backend": "fast"}, "backend='fast' is unknown"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FisherAccumulator(Classifier(), **options)  # type: ignore[arg-type]


def test_models_that_cannot_be_measured_are_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, not list"):
        FisherAccumulator(list(Classifier().parameters()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="exclude=7 must be"):
        FisherAccumulator(Classifier(), exclude=7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="list of patterns"):
        FisherAccumulator(Classifier(), include=[7])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="none that trains"):
        FisherAccumulator(Classifier().requires_grad_(False))
    with pytest.raises(ValueError, match=r"weight: dtype torch\.complex64"):
        FisherAccumulator(nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="weight: a Parameter on meta has no memory"):
        FisherAccumulator(nn.Linear(2, 2, device="meta"))
    twice = nn.Module()
    twice.module, twice.weight = nn.Linear(2, 2), nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="label 'weight' stands for two parameters"):
        FisherAccumulator(twice)
