"""A handful of small named parameters of awkward shapes, with gradients and masks that repeat."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from childtune_kernels import ChildMask

SHAPES: dict[str, tuple[int, ...]] = {
    "embedding.weight": (7, 5),
    "layer.weight": (5, 33),
    "layer.bias": (33,),
    "nothing": (0, 3),
    "scale": (),
}


def random_tensor(shape: Iterable[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def toy_parameters(dtype: torch.dtype = torch.float32) -> dict[str, Parameter]:
    """One parameter of each shape, under its name."""
    return {
        name: Parameter(random_tensor(shape, 100 + index, dtype))
        for index, (name, shape) in enumerate(SHAPES.items())
    }


def toy_mask(
    parameters: Mapping[str, Tensor], seed: int = 7, dense: Iterable[str] = ()
) -> ChildMask:
    """A mask of about half of the elements; ``dense`` parameters train densely."""
    dense = set(dense)
    masked = {
        name: random_tensor(parameter.shape, seed + index) > 0
        for index, (name, parameter) in enumerate(parameters.items())
        if name not in dense
    }
    return ChildMask.from_dense(masked, dense)


def give_gradients(parameters: Mapping[str, Parameter], step: int) -> None:
    """New gradients, which depend on name and step only."""
    for name, parameter in parameters.items():
        seed = 1000 * step + sum(name.encode())
        parameter.grad = random_tensor(parameter.shape, seed, parameter.dtype).to(parameter.device)


def train(optimizer: Optimizer, parameters: Mapping[str, Parameter], steps: Iterable[int]) -> None:
    """Step through gradients that depend on name and step number only."""
    for step in steps:
        give_gradients(parameters, step)
        optimizer.step()
