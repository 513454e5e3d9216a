"""The methods under comparison: AdamW, Child-Tuning F (task-free) and Child-Tuning D (task-driven)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from childtune_kernels import ChildMask, FisherAccumulator, FusedChildAdamW, lr_for
from finetuning.children import CHILDREN
from finetuning.labelled_text import InputError

METHOD_NAMES = ("adamw", "ct_f", *CHILDREN)
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Args:
        name: one of METHOD_NAMES.
        reserve_p: share of gradient elements (ct_f) or encoder weights (ct_d, controls) that are kept.
        backend: backend of FusedChildAdamW, None for its own choice.
    """

    name: str
    reserve_p: float = 1.0
    backend: str | None = None

    @property
    def title(self) -> str:
        """The name as the table and the plot write it."""
        if self.name == "adamw":
            return "AdamW"
        names = {"ct_f": "CT_F", "ct_d": "CT_D"}
        name = names.get(self.name) or f"control: {CHILDREN[self.name]}"
        return f"{name} (p={self.reserve_p:g})"

    def learning_rates(self, for_adamw: Sequence[float]) -> list[float]:
        """As many learning rates to try as for AdamW, for Child-Tuning moved up by 1/sqrt(p).

        At the same rate CT_F moves every weight sqrt(p) as far as AdamW, and CT_D moves a share p of
        the weights as far, which again is sqrt(p) in the norm of the whole step.
        """
        if self.name == "adamw":
            return list(for_adamw)
        return [lr_for(self.reserve_p, rate) for rate in for_adamw]

    def optimizer(
        self, model: nn.Module, learning_rate: float, seed: int, child: ChildMask | None
    ) -> torch.optim.Optimizer:
        """The optimizer over all of the model's parameters.

        Args:
            model: what is tuned.
            learning_rate: peak of the schedule.
            seed: of CT_F's masks.
            child: the child network of a method of CHILDREN, else None.
        """
        if self.name == "adamw":
            return torch.optim.AdamW(
                model.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True
            )
        return self.fused_optimizer(model, learning_rate, seed, child)

    def fused_optimizer(
        self,
        model: nn.Module,
        learning_rate: float,
        seed: int,
        child: ChildMask | None,
        **storage: Any,
    ) -> FusedChildAdamW:
        """FusedChildAdamW, for AdamW too: without a mask.

        Args:
            model: what is tuned.
            learning_rate: peak of the schedule.
            seed: of CT_F's masks.
            child: the child network of a method of CHILDREN, else None.
            storage: how weights and moments are kept: ``master_weight``, ``state_dtype``.
        """
        return FusedChildAdamW(
            model.named_parameters(),
            lr=learning_rate,
            weight_decay=WEIGHT_DECAY,
            reserve_p=self.reserve_p if self.name == "ct_f" else 1.0,
            child_mask=child,
            seed=seed,
            backend=self.backend,
            **storage,
        )


def check_backend(backend: str | None, device: torch.device) -> None:
    """Step and record once on a toy, to learn now what would fail after pretraining.

    Raises:
        InputError: this backend does not run on this device.
    """
    toy = nn.Linear(2, 2, device=device)
    toy(torch.ones(2, device=device)).sum().backward()
    try:
        Method("ct_f", 0.5, backend).optimizer(toy, 1e-3, seed=0, child=None).step()
        FisherAccumulator(toy, backend=backend).accumulate()
    except RuntimeError as error:
        raise InputError(f"--backend {backend} on --device {device}: {error}") from None


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, the mean over the batch."""
    return functional.cross_entropy(logits, labels)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state, counted alike for every optimizer."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
