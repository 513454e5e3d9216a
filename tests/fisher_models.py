"""Small models, data and plain loops for the tests of Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from childtune_kernels import FisherAccumulator

from .cases import generator_of
from .columns import CPU

CLASSES = 3
EXCLUDED = ("*embeddings*", "classifier*")
ENCODER = ["encoder.0.weight", "encoder.0.bias", "encoder.2.weight", "encoder.2.bias"]
DENSE = {"embeddings.weight", "classifier.weight", "classifier.bias"}


class Classifier(nn.Module):
    """An embedding, two layers and a head; small enough for plain loops."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(11, 6, dtype=dtype)
        self.encoder = nn.Sequential(
            nn.Linear(6, 9, dtype=dtype), nn.Tanh(), nn.Linear(9, 6, dtype=dtype)
        )
        self.classifier = nn.Linear(6, CLASSES, dtype=dtype)
        generator = generator_of("classifier")
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.encoder(self.embeddings(tokens).mean(1)).tanh())
        return logits


def data(count: int = 8, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Tokens and classes of some examples."""
    generator = generator_of("data", count)
    tokens = torch.randint(11, (count, 4), generator=generator)
    classes = torch.randint(CLASSES, (count,), generator=generator)
    return tokens.to(device), classes.to(device)


def examples(count: int = 8, device: torch.device = CPU) -> list[tuple[Tensor, Tensor]]:
    """The same, one by one, with a first dimension of 1."""
    tokens, classes = data(count, device)
    return [(tokens[at : at + 1], classes[at : at + 1]) for at in range(count)]


def loss_of(model: Callable[..., Any], example: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy; serves recording and record_examples."""
    return functional.cross_entropy(model(example[0]), example[1])


def squares_by_loop(
    model: nn.Module, batches: Iterable[Any], loss: Callable[..., Tensor] = loss_of
) -> dict[str, Tensor]:
    """fp32 sums of squares of every trainable parameter, operation by operation."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named.items()}
    for batch in batches:
        gradients = torch.autograd.grad(loss(model, batch), list(named.values()), allow_unused=True)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            if gradient is not None:
                total += gradient.float() * gradient.float()
    return sums


def assert_equal_sums(found: Any, expected: dict[str, Tensor]) -> None:
    """Every sum, bit for bit; and none of them is all zeros by mistake."""
    assert found.keys() == expected.keys()
    for name, total in expected.items():
        assert total.any(), name
        assert torch.equal(found[name], total), name


def recorded(model: nn.Module, count: int = 8, **options: Any) -> FisherAccumulator:
    """An accumulator that has recorded some examples one by one."""
    fisher = FisherAccumulator(model, **options)
    device = next(model.parameters()).device
    with fisher.recording():
        for example in examples(count, device):
            loss_of(model, example).backward()
    return fisher
