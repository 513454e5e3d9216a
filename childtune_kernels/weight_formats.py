"""How 16-bit weights and moments are kept: masters, remainders, types (SPEC.md, eq. 12, 17 and 18)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import child_layout, ops

#: What a 16-bit weight's master is kept in, by kind: fp32 (SPEC.md, eq. 12) or an int16 remainder (eq. 17).
MASTERS = {"fp32": "master_weight", "split": "master_remainder"}
MASTER_DTYPES = {"master_weight": torch.float32, "master_remainder": torch.int16}
MASTER_NAMES = {"fp32": "an fp32 master weight", "split": "a master remainder", "none": "no master"}

State = Mapping[str, Tensor]


def key(name: str, compact: bool) -> str:
    """The name of a moment or master weight in a state; AdamW must not take a compact one for its own."""
    return f"child_{name}" if compact else name


def master_kind(parameter: Tensor, master_weight: str) -> str:
    """What a parameter's ``master_weight`` option comes to: "fp32", "split", "stochastic" or "none"."""
    if parameter.dtype not in ops.HALF_TYPES:
        return "none"
    if master_weight == "auto":
        return "split" if parameter.dtype == torch.bfloat16 else "fp32"
    return master_weight


def kept_master(state: State) -> str:
    """The kind of master that a state holds: "fp32", "split" or "none"."""
    for kind, name in MASTERS.items():
        if name in state or key(name, True) in state:
            return kind
    return "none"


def moment_dtype(parameter: Tensor, state_dtype: torch.dtype | None) -> torch.dtype:
    """The type of a parameter's moments under this ``state_dtype`` option."""
    compute = ops.compute_dtype(parameter.dtype)
    return compute if state_dtype is None else state_dtype


def master_of(parameter: Tensor) -> Tensor:
    """The fp32 master of a 16-bit weight, row-major."""
    return parameter.detach().to(torch.float32, memory_format=torch.contiguous_format)


def decays_exactly(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether more than the stored 16-bit weight takes its decay: a master, or random rounding."""
    return master_kind(parameter, group["master_weight"]) != "none"


def with_masters_of(
    parameter: Tensor, state: State, kind: str, words: Tensor | None
) -> dict[str, Tensor]:
    """A state whose masters are kept as another kind keeps them; ``words``: of its child."""
    old = kept_master(state)
    compact = child_layout.is_compact(state)
    changed = dict(state)
    if old == kind or old == "none":
        return changed
    masters = changed.pop(key(MASTERS[old], compact))
    if kind == "split":
        changed[key("master_remainder", compact)] = _remainder_of(masters)
    elif kind == "fp32":
        weights = parameter.detach()
        if compact:
            assert words is not None
            weights = child_layout.gather_child(weights, words)
        changed[key("master_weight", compact)] = _fp32_master_of(weights, masters)
    return changed


def _remainder_of(master: Tensor) -> Tensor:
    """The remainders (eq. 17) that go with weights to which fp32 masters were rounded by eq. 12.

    It is a matter of the master alone: the weights may be loaded later. Ties, half of which eq. 12 rounds
    towards zero, come back one fp32 place nearer to it.
    """
    weight, remainder = ops.split_master(master)
    tied = (weight != master.to(torch.bfloat16)) & ~master.isnan()
    return torch.where(tied, torch.full_like(remainder, 2**15 - 1), remainder)


def _fp32_master_of(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 masters of weights and remainders (eq. 17), such that eq. 12 rounds them to these weights.

    Ties that it rounds to the other side would count as written by somebody, half a place of bf16 away: they
    come one fp32 place nearer to their weight.
    """
    master = ops.joined_master(weight, remainder)
    tied = (master.to(weight.dtype) != weight) & ~master.isnan()
    return torch.where(tied, ops.joined_master(weight, remainder + 1), master)


def full_precision(parameter: Tensor, state: State) -> Tensor:
    """A 16-bit parameter in fp32, with all the precision that its state holds; others themselves."""
    kind, weight = kept_master(state), parameter.detach()
    if parameter.dtype not in ops.HALF_TYPES:
        return weight
    if kind == "none":
        return master_of(parameter)
    compact = child_layout.is_compact(state)
    words = child_layout.mask_words(state, parameter.numel())
    stored = child_layout.gather_child(weight, words) if compact and words is not None else weight
    masters = state[key(MASTERS[kind], compact)]
    current = (ops.joined_master if kind == "split" else ops.current_master)(stored, masters)
    if not compact or words is None:
        return current
    return child_layout.scatter_child_(master_of(parameter), current, words)


def check_types(label: str, parameter: Tensor, group: Mapping[str, Any]) -> None:
    """Refuse formats that are not for a parameter's type.

    Raises:
        ValueError: names the parameter and the option.
    """
    kind = master_kind(parameter, group["master_weight"])
    if kind in ("split", "stochastic") and parameter.dtype != torch.bfloat16:
        why = (
            "16 bits more do not hold its master"
            if kind == "split"
            else "it is not rounded at random"
        )
        raise ValueError(
            f"master_weight={kind!r} is for bfloat16, and {label} is of {parameter.dtype}: {why}; "
            "use master_weight='fp32' or 'auto' in its group"
        )
    if group["state_dtype"] is not None and parameter.dtype == torch.float64:
        raise ValueError(
            f"state_dtype={group['state_dtype']} is not for {label}, which is of {parameter.dtype}; use "
            "state_dtype=None in its group"
        )
