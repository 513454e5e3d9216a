"""Who steps side by side: AdamW of torch, Child-Tuning as it is usually written, and FusedChildAdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from .child_mask import ChildMask
from .model_shapes import ModelShapes, Shapes
from .optimizer import FusedChildAdamW
from .selection import random_child
from .unfused import UnfusedChildTuning, direct_mask

NamedParameters = Sequence[tuple[str, Tensor]]

RUN = 256  # elements, whole cache lines
TORCH_FUSED, TORCH_DEFAULT = "torch-fused", "torch-default"
#: Everybody's name, in the order of a table.
NAMES = (TORCH_FUSED, TORCH_DEFAULT, "unfused", "plain", "ct_f", "ct_d", "ct_d_runs")
# A small rate: what the weights become is of no interest, but they stay finite.
_OPTIONS: dict[str, Any] = {"lr": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
_BYTES_OF_INDICES = 2  # at most, for each child element, beside a bit for every element


@dataclass(frozen=True)
class Entrant:
    """An optimizer that takes part.

    Attributes:
        name: one of ``NAMES``.
        title: what it is, in words.
        build: makes it over named parameters.
        ours: whether it is this package's.
        child: the share of the elements that its fixed child holds; None without one.
    """

    name: str
    title: str
    build: Callable[[NamedParameters], Optimizer]
    ours: bool = False
    child: float | None = None

    def dense_bytes(self, dtype: torch.dtype) -> int:
        """Bytes a parameter that moments and master take where every weight has them."""
        if not self.ours:
            return 2 * dtype.itemsize
        return 8 if dtype == torch.float32 else 8 + 2  # fp32 moments, an int16 of a split master

    def own_bytes(self, dtype: torch.dtype) -> float:
        """Bytes a parameter of state that cannot be another entrant's, too: those of compact state."""
        if self.child is None:
            return 0.0
        return self.child * (self.dense_bytes(dtype) + _BYTES_OF_INDICES) + 1 / 8


def entrants_of(
    names: Sequence[str], device: torch.device, dtype: torch.dtype, reserve_p: float, density: float
) -> list[Entrant]:
    """Those who take part, the one that all others are measured against first.

    That is torch's fused AdamW or, on a device where there is none, torch's default.

    Args:
        names: of ``NAMES``; the first one is there, named or not.
        device: where the tensors lie.
        dtype: of weights and gradients.
        reserve_p: CT_F's and the unfused step's share of kept gradient elements.
        density: of CT_D's child.
    """
    share = f"p = {reserve_p:g}"
    child, runs = f"CT_D at density {density:g}", f"in runs of {RUN}"
    everybody = (
        Entrant(TORCH_FUSED, "torch's fused AdamW", _adamw(fused=True)),
        Entrant(TORCH_DEFAULT, "torch's AdamW by default", _adamw()),
        Entrant("unfused", f"unfused Child-Tuning at {share}", _unfused(reserve_p)),
        Entrant("plain", "plain FusedChildAdamW", _ours(), True),
        Entrant("ct_f", f"CT_F at {share}", _ours(reserve_p=reserve_p), True),
        Entrant("ct_d", child, _with_child(density, 1), True, density),
        Entrant("ct_d_runs", f"{child} {runs}", _with_child(density, RUN), True, density),
    )
    base = TORCH_FUSED if _has_fused(device, dtype) else TORCH_DEFAULT
    wanted = {base, *names} - ({TORCH_FUSED} - {base})
    return [entrant for entrant in everybody if entrant.name in wanted]


def bytes_needed(model: ModelShapes, entrants: Sequence[Entrant], dtype: torch.dtype) -> int:
    """Bytes that measuring takes at its peak, by an estimate from above.

    Weights, gradients and the moments of equal kind are there once, for all; every fixed child's state is
    its own. Beside them stand the moments of an optimizer that is being made, before it shares the
    others', and what an unfused step makes on its way.
    """
    dense = [entrant for entrant in entrants if entrant.child is None]
    shared = {entrant.dense_bytes(dtype) for entrant in dense}
    a_parameter = (
        2 * dtype.itemsize + sum(shared) + sum(each.own_bytes(dtype) for each in entrants)
        + max(shared)
    )  # fmt: skip
    return int(a_parameter * model.parameters) + 6 * 4 * model.largest


def run_child(shapes: Shapes, density: float, run: int = 1, seed: int = 0) -> ChildMask:
    """A random child of whole runs: each run of ``run`` neighbouring elements is in it or out of it.

    Args:
        shapes: parameter name → shape.
        density: the share of the runs in the child, in (0, 1]; a tensor's last run may be short.
        run: elements in a run.
        seed: of the draw.
    """
    if run == 1:
        return random_child(shapes, density, seed)
    numels = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    runs = random_child({name: (-(-n // run),) for name, n in numels.items()}, density, seed)
    return ChildMask.from_dense(
        {
            name: runs.dense(name).repeat_interleave(run)[: numels[name]].view(shape)
            for name, shape in shapes.items()
        }
    )


def _has_fused(device: torch.device, dtype: torch.dtype) -> bool:
    parameter = torch.zeros(1, device=device, dtype=dtype, requires_grad=True)
    parameter.grad = torch.zeros_like(parameter)
    try:
        AdamW([parameter], fused=True).step()
    except RuntimeError:  # it names the devices that have one
        return False
    return True


def _adamw(**options: Any) -> Callable[[NamedParameters], Optimizer]:
    return lambda named: AdamW([parameter for _, parameter in named], **_OPTIONS, **options)


def _unfused(reserve_p: float) -> Callable[[NamedParameters], Optimizer]:
    return lambda named: UnfusedChildTuning(
        [parameter for _, parameter in named],
        reserve_p=reserve_p,
        sample_mask=direct_mask,
        **_OPTIONS,
    )


def _ours(**options: Any) -> Callable[[NamedParameters], Optimizer]:
    return lambda named: FusedChildAdamW(named, seed=0, **_OPTIONS, **options)


def _with_child(density: float, run: int) -> Callable[[NamedParameters], Optimizer]:
    def build(named: NamedParameters) -> Optimizer:
        shapes: Shapes = {name: tuple(parameter.shape) for name, parameter in named}
        return _ours(child_mask=run_child(shapes, density, run))(named)

    return build
