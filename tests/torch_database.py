"""torch's own database of optimizer inputs: what it says of AdamW, and parameters to go with it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tests.columns import placed
from tests.toy_parameters import random_tensor

SHAPES = {"weight": (10, 5), "bias": (5,), "scale": (), "nothing": (0, 4), "last": (3, 4, 2)}


@functools.cache
def adamw_entry() -> Any:
    """The OptimizerInfo of AdamW.

    Importing the database freezes the flags of torch.backends for the whole process; they are freed again.
    """
    was_frozen = torch.backends.flags_frozen()
    from torch.testing._internal import common_optimizers

    if not was_frozen:
        torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    assert torch.backends.flags_frozen() == was_frozen
    (entry,) = (info for info in common_optimizers.optim_db if info.optim_cls is torch.optim.AdamW)
    return entry


def parameters(dtype: torch.dtype, backend: str | None) -> dict[str, Parameter]:
    """One parameter of each shape where a backend is tested."""
    return {
        name: Parameter(placed(random_tensor(shape, index, dtype), backend))
        for index, (name, shape) in enumerate(SHAPES.items())
    }


def give_gradients(members: dict[str, Parameter], step: int) -> None:
    """New gradients, which depend on position and step only."""
    for index, parameter in enumerate(members.values()):
        gradient = random_tensor(parameter.shape, 100 * (step + 1) + index, parameter.dtype)
        parameter.grad = gradient.to(parameter.device)


def _one_tensor_a_group(members: dict[str, Parameter]) -> Any:
    return [{"params": parameter} for parameter in members.values()]


def _groups_of_their_own(members: dict[str, Parameter]) -> Any:
    tensors = list(members.values())
    return [
        {"params": tensors[:2], "lr": 0.02, "betas": (0.8, 0.95)},
        {"params": tensors[2:], "weight_decay": 0.3, "eps": 1e-6},
    ]


def _named_groups(members: dict[str, Parameter]) -> Any:
    pairs = list(members.items())
    return [{"params": pairs[:3]}, {"params": iter(pairs[3:]), "lr": 0.03}]


#: The ways in which an optimizer is given its parameters.
WAYS = {
    "list": lambda members: list(members.values()),
    "iterator": lambda members: iter(members.values()),
    "named": lambda members: members.items(),
    "one tensor a group": _one_tensor_a_group,
    "groups": _groups_of_their_own,
    "named groups": _named_groups,
}


def pairs_of_state(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The moments of every parameter, under the names that AdamW has for them."""
    members = (member for group in optimizer.param_groups for member in group["params"])
    for index, member in enumerate(members):
        for name in ("exp_avg", "exp_avg_sq"):
            yield f"{name} of {index}", optimizer.state[member][name]
