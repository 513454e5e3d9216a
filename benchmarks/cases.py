"""What is measured: the tensors of real models, one large tensor, and many small ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

DTYPE = torch.float32
#: A step reads weight, gradient and two moments and writes all but the gradient.
BYTES_PER_PARAMETER = 7 * DTYPE.itemsize

_MINIATURE_TENSORS = 24
_MINIATURE_ELEMENTS = 16_411


@dataclass(frozen=True)
class BertSizes:
    """The sizes in a BERT config from which its parameter shapes follow."""

    hidden: int
    layers: int
    vocabulary: int = 30_522
    positions: int = 512
    types: int = 2

    def encoder_shapes(self) -> Shapes:
        """The shapes of the layers alone: what Child-Tuning usually measures and masks."""
        shapes = self.shapes()
        return {name: shape for name, shape in shapes.items() if name.startswith("encoder.")}

    def shapes(self) -> Shapes:
        """Parameter name → shape, as ``transformers.BertModel`` with its pooler has them."""
        hidden, intermediate = self.hidden, 4 * self.hidden
        shapes: Shapes = {
            "embeddings.word_embeddings.weight": (self.vocabulary, hidden),
            "embeddings.position_embeddings.weight": (self.positions, hidden),
            "embeddings.token_type_embeddings.weight": (self.types, hidden),
            "embeddings.LayerNorm.weight": (hidden,),
            "embeddings.LayerNorm.bias": (hidden,),
        }
        for layer in range(self.layers):
            at = f"encoder.layer.{layer}"
            modules: Shapes = {
                "attention.self.query": (hidden, hidden),
                "attention.self.key": (hidden, hidden),
                "attention.self.value": (hidden, hidden),
                "attention.output.dense": (hidden, hidden),
                "attention.output.LayerNorm": (hidden,),
                "intermediate.dense": (intermediate, hidden),
                "output.dense": (hidden, intermediate),
                "output.LayerNorm": (hidden,),
            }
            for name, shape in modules.items():
                shapes[f"{at}.{name}.weight"] = shape
                shapes[f"{at}.{name}.bias"] = shape[:1]
        shapes["pooler.dense.weight"] = (hidden, hidden)
        shapes["pooler.dense.bias"] = (hidden,)
        return shapes


def checked_shapes(name: str, shapes: Shapes, tensors: int, elements: int) -> Shapes:
    """The shapes.

    Raises:
        ValueError: there are not so many tensors of so many elements in all.
    """
    found = sum(math.prod(shape) for shape in shapes.values())
    if (len(shapes), found) != (tensors, elements):
        raise ValueError(
            f"{name} has {len(shapes)} tensors and {found:,} elements instead of {tensors} and "
            f"{elements:,}"
        )
    return shapes


def miniature_of(shapes: Shapes) -> Shapes:
    """The first tensors, cut along their first axis: small enough for the reference to check."""
    first = list(shapes.items())[:_MINIATURE_TENSORS]
    return {
        name: (max(1, min(size, _MINIATURE_ELEMENTS // math.prod(rest))), *rest)
        for name, (size, *rest) in first
    }


@dataclass(frozen=True)
class Case:
    """A set of tensors to step.

    ``tensors`` and ``parameters`` are the counts that ``shapes`` must give. ``rounds`` is how often each
    variant steps. ``limit`` is what a good step is limited by. ``grouped``: variants with a group a
    tensor are measured beside those with one group. ``bf16``: variants with bf16 weights are measured beside
    those of fp32. ``option``: measured only with this option.
    """

    name: str
    title: str
    make_shapes: Callable[[], Shapes]
    tensors: int
    parameters: int
    rounds: int
    limit: Literal["bytes", "tensors"]
    grouped: bool = False
    bf16: bool = False
    option: str | None = None

    def shapes(self) -> Shapes:
        """Parameter name → shape.

        Raises:
            ValueError: they are not the tensors that the case is known to have.
        """
        return checked_shapes(self.name, self.make_shapes(), self.tensors, self.parameters)

    def miniature(self) -> Shapes:
        """The first tensors, cut along their first axis: small enough for the reference to check."""
        return miniature_of(self.shapes())


LARGE_TENSOR = Case(
    name="large_tensor",
    title="One tensor of 2²⁵ elements",
    make_shapes=lambda: {"weight": (2**25,)},
    tensors=1,
    parameters=33_554_432,
    rounds=51,
    limit="bytes",
    bf16=True,
)
# Tensors of 2²⁵ fp32 elements, allocated one after another, lie 2²⁷ + 2¹² bytes apart. At that distance
# weight, gradient and moments push each other out of Zen's first-level cache (docs/performance.md), and
# torch's fused step takes twice as long. Here they lie elsewhere.
LARGE_TENSOR_APART = Case(
    name="large_tensor_apart",
    title="One tensor of 2²⁵ + 2¹⁴ elements",
    make_shapes=lambda: {"weight": (2**25 + 2**14,)},
    tensors=1,
    parameters=33_570_816,
    rounds=51,
    limit="bytes",
    bf16=True,
)
BERT_BASE = Case(
    name="bert_base",
    title="BERT-base, 199 tensors",
    make_shapes=BertSizes(hidden=768, layers=12).shapes,
    tensors=199,
    parameters=109_482_240,
    rounds=31,
    limit="bytes",
)
BERT_LARGE = Case(
    name="bert_large",
    title="BERT-large, 391 tensors",
    make_shapes=BertSizes(hidden=1024, layers=24).shapes,
    tensors=391,
    parameters=335_141_888,
    rounds=25,
    limit="bytes",
    option="--bert-large",
)
SMALL_TENSORS = Case(
    name="small_tensors",
    title="400 tensors of 1,000 elements",
    make_shapes=lambda: {f"layers.{index}.bias": (1_000,) for index in range(400)},
    tensors=400,
    parameters=400_000,
    rounds=301,
    limit="tensors",
    grouped=True,
)
CASES = {
    case.name: case
    for case in (LARGE_TENSOR, LARGE_TENSOR_APART, BERT_BASE, BERT_LARGE, SMALL_TENSORS)
}


class Workload:
    """The tensors of a case on a device, which all variants step in turn.

    One set of weights, gradients and moments serves every variant: a case then fits into memory, and no
    variant has luckier pages than another. What the weights become is of no interest here.
    """

    def __init__(
        self,
        shapes: Shapes,
        device: torch.device,
        seed: int = 0,
        dtype: torch.dtype = DTYPE,
    ) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device = device
        self.dtype = dtype
        self.named = [
            (name, torch.nn.Parameter(self._random(shape))) for name, shape in shapes.items()
        ]
        self.set_gradients()

    def _random(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(
            tuple(shape), generator=self.generator, device=self.device, dtype=self.dtype
        )

    def set_gradients(self) -> None:
        """Give every parameter a new random gradient."""
        for _, parameter in self.named:
            parameter.grad = self._random(parameter.shape)

    def share_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer, which may have stepped, use the moments and remainders of those before it."""
        if not optimizer.state:
            optimizer.step()  # torch's optimizers make their state in the first step
        moments = self.__dict__.setdefault("_moments", {})
        for name, parameter in self.named:
            state = optimizer.state[parameter]
            for key in ("exp_avg", "exp_avg_sq", "master_remainder"):
                if key in state:  # compact moments have other names and are an optimizer's own
                    kind = (name, key, state[key].dtype)
                    state[key] = moments.setdefault(kind, state[key])
