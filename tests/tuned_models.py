"""A small model with everything a child checkpoint must carry, tuned by a real run."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from childtune_kernels import ChildMask, FusedChildAdamW

from .snapshots import bits
from .toy_parameters import random_tensor


class Model(nn.Module):
    """Tied weights, batch norm, a frozen layer, a head that trains densely, a buffer that is not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.inner = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.output = nn.Linear(16, 40, bias=False)
        self.head = nn.Linear(40, 3)
        self.output.weight = self.embedding.weight
        self.register_buffer("scratch", torch.zeros(5), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.frozen(self.norm(self.inner(self.embedding(tokens))))
        logits: Tensor = self.head(self.output(hidden))
        return logits


@dataclass
class Run:
    """A base model, the same model after training, and what trained it."""

    base: Model
    tuned: Model
    mask: ChildMask
    optimizer: FusedChildAdamW


def base_model(dtype: torch.dtype = torch.float32) -> Model:
    """The same base at every call."""
    model = Model()
    for index, (name, parameter) in enumerate(model.named_parameters()):
        with torch.no_grad():
            parameter.copy_(random_tensor(parameter.shape, index + len(name)))
    return model.to(dtype)


def child_of(model: Model) -> ChildMask:
    """About a third of all trainable weights but the head's."""
    return ChildMask.from_dense(
        {
            name: random_tensor(parameter.shape, 50 + index) > 0.4
            for index, (name, parameter) in enumerate(model.named_parameters())
            if parameter.requires_grad and not name.startswith("head.")
        },
        dense=["head.weight", "head.bias"],
    )


def tuned_run(dtype: torch.dtype = torch.float32, steps: int = 3, **options: object) -> Run:
    """Train a copy of the base with FusedChildAdamW."""
    base = base_model(dtype)
    tuned = copy.deepcopy(base)
    mask = child_of(tuned)
    trainable = [(name, p) for name, p in tuned.named_parameters() if p.requires_grad]
    optimizer = FusedChildAdamW(trainable, lr=1e-2, child_mask=mask, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        optimizer.zero_grad()
        tokens = torch.randint(0, 40, (16,), generator=generator)
        tuned(tokens).float().pow(2).mean().backward()
        optimizer.step()
    return Run(base, tuned, mask, optimizer)


def different(first: nn.Module, second: nn.Module) -> list[str]:
    """Names in the state dicts of two models that differ in any bit."""
    one, other = first.state_dict(), second.state_dict()
    assert list(one) == list(other)
    return [name for name in one if not torch.equal(bits(one[name]), bits(other[name]))]


def flip_bit_(tensor: Tensor, index: int) -> None:
    """Flip the lowest bit of an element, as little as a weight can change."""
    pattern = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    with torch.no_grad():
        tensor.view(pattern).view(-1)[index] ^= 1
