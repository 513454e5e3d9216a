"""The methods under comparison: AdamW, Child-Tuning F (task-free) and Child-Tuning D (task-driven)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from childtune_kernels import ChildMask, FusedChildAdamW, lr_for
from finetuning.labelled_text import InputError

METHOD_NAMES = ("adamw", "ct_f", "ct_d")
WEIGHT_DECAY = 0.01

LossOfRows = Callable[[nn.Module, Sequence[int]], Tensor]


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Args:
        name: one of METHOD_NAMES.
        reserve_p: share of gradient elements (ct_f) or encoder weights (ct_d) that are kept.
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
        return f"{'CT_F' if self.name == 'ct_f' else 'CT_D'} (p={self.reserve_p:g})"

    def learning_rates(self, for_adamw: Sequence[float]) -> list[float]:
        """As many learning rates to try as for AdamW, for Child-Tuning moved up by 1/sqrt(p).

        At the same rate CT_F moves every weight sqrt(p) as far as AdamW, and CT_D moves a share p of
        the weights as far, which again is sqrt(p) in the norm of the whole step.
        """
        if self.name == "adamw":
            return list(for_adamw)
        return [lr_for(self.reserve_p, rate) for rate in for_adamw]

    def find_child(
        self, model: nn.Module, loss_of_rows: LossOfRows, rows: Sequence[int]
    ) -> ChildMask | None:
        """The child network that CT_D trains, found on the training rows; None for other methods."""
        if self.name != "ct_d":
            return None
        fisher = fisher_information(model, loss_of_rows, rows)
        return select_child(model, fisher, self.reserve_p)

    def optimizer(
        self, model: nn.Module, learning_rate: float, seed: int, child: ChildMask | None
    ) -> torch.optim.Optimizer:
        """The optimizer over all of the model's parameters.

        Args:
            model: what is tuned.
            learning_rate: peak of the schedule.
            seed: of CT_F's masks.
            child: what ``find_child`` gave.
        """
        if self.name == "adamw":
            return torch.optim.AdamW(
                model.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True
            )
        return FusedChildAdamW(
            model.named_parameters(),
            lr=learning_rate,
            weight_decay=WEIGHT_DECAY,
            reserve_p=self.reserve_p if self.name == "ct_f" else 1.0,
            child_mask=child,
            seed=seed,
            backend=self.backend,
        )


def check_backend(backend: str | None, device: torch.device) -> None:
    """Take one step of FusedChildAdamW on a toy, to learn now what would fail after pretraining.

    Raises:
        InputError: this backend does not run on this device.
    """
    toy = nn.Linear(2, 2, device=device)
    toy(torch.ones(2, device=device)).sum().backward()
    try:
        Method("ct_f", 0.5, backend).optimizer(toy, 1e-3, seed=0, child=None).step()
    except RuntimeError as error:
        raise InputError(f"--backend {backend} on --device {device}: {error}") from None


def encoder_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the encoder's layers, by name: those inside an ``nn.ModuleList``.

    Embeddings, norms around the layers and the classifier's head are not among them.

    Raises:
        InputError: the model has no ``nn.ModuleList``.
    """
    lists = tuple(
        name + "." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
    )
    inside = {name: p for name, p in model.named_parameters() if name.startswith(lists)}
    if not inside:
        raise InputError(
            f"{type(model).__name__} keeps no layers in an nn.ModuleList, so ct_d cannot tell its "
            "encoder from its embeddings; leave ct_d out of --methods"
        )
    return inside


def fisher_information(
    model: nn.Module, loss_of_rows: LossOfRows, rows: Sequence[int]
) -> dict[str, Tensor]:
    """Diagonal empirical Fisher information of the encoder: the mean of squared gradients.

    One example at a time and without dropout, as in the paper: the square of a batch's mean
    gradient is something else than the mean of the examples' squares.

    Returns:
        Parameter name → fp32 tensor of the parameter's shape.
    """
    encoder = encoder_parameters(model)
    fisher = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in encoder.items()}
    model.eval()
    for row in rows:
        loss = loss_of_rows(model, [row])
        gradients = torch.autograd.grad(loss, list(encoder.values()))
        for total, gradient in zip(fisher.values(), gradients, strict=True):
            total.addcmul_(gradient.float(), gradient.float(), value=1 / len(rows))
    return fisher


def select_child(model: nn.Module, fisher: dict[str, Tensor], reserve_p: float) -> ChildMask:
    """The child network: the share ``reserve_p`` of the encoder's weights with the largest Fisher.

    Exactly round(reserve_p * N) weights of all N together; every other parameter trains densely.
    """
    values = torch.cat([tensor.flatten() for tensor in fisher.values()])
    kept = torch.zeros_like(values, dtype=torch.bool)
    kept[values.topk(max(1, int(reserve_p * len(values) + 0.5))).indices] = True
    pieces = kept.split([tensor.numel() for tensor in fisher.values()])
    masks = {
        name: piece.view_as(tensor)
        for (name, tensor), piece in zip(fisher.items(), pieces, strict=True)
    }
    dense = [name for name, _ in model.named_parameters() if name not in masks]
    return ChildMask.from_dense(masks, dense=dense)


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
