"""Training with and without gradient release: models, settings, and what is compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from childtune_kernels import FusedChildAdamW

from .columns import device_of
from .tuned_models import Model, base_model, child_of

STEPS = 4

# The settings of the optimizer; `masked` is not an option, and says whether there is a fixed mask.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "CT_F": {"reserve_p": 0.3},
    "CT_D dense": {"masked": True, "child_state": "dense"},
    "CT_D compact": {"masked": True, "child_state": "compact"},
    "both": {"masked": True, "reserve_p": 0.3},
    "both original": {"masked": True, "reserve_p": 0.3, "convention": "original"},
    "CT_D decaying": {"masked": True, "freeze_non_child": False, "maximize": True},
}
DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def model_and_optimizer(
    kind: str, dtype: torch.dtype = torch.float32, backend: str | None = None
) -> tuple[Model, FusedChildAdamW]:
    """A model with tied weights, a frozen layer and a dense head; two groups, in an order of their own."""
    options = dict(KINDS[kind])
    model = base_model(dtype).to(device_of(backend))
    model.output.weight = model.embedding.weight
    named = [(name, p) for name, p in model.named_parameters() if not name.startswith("frozen.")]
    groups: list[dict[str, Any]] = [
        {"params": named[2:], "weight_decay": 0.3},
        {"params": named[:2], "lr": 0.02},
    ]
    mask = child_of(model).to(device_of(backend)) if options.pop("masked", False) else None
    optimizer = FusedChildAdamW(
        groups, lr=0.05, child_mask=mask, seed=5, backend=backend, **options
    )
    return model, optimizer


def loss_of(model: nn.Module, batch: int) -> Tensor:
    """The same loss for the same weights and the same number of a batch."""
    generator = torch.Generator().manual_seed(batch)
    device = next(model.parameters()).device
    tokens = torch.randint(0, 40, (16,), generator=generator).to(device)
    loss: Tensor = model(tokens).float().pow(2).mean()
    return loss


def train(
    model: nn.Module,
    optimizer: FusedChildAdamW,
    after_backward: Callable[[int], None] = lambda step: None,
    steps: int = STEPS,
    forward: nn.Module | None = None,
) -> None:
    """A loop as scripts have it, with a scheduler."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))
    for step in range(steps):
        loss_of(model if forward is None else forward, step).backward()
        after_backward(step)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def trainable(optimizer: FusedChildAdamW) -> list[Tensor]:
    """All parameters of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
