"""Masters outside a step, for state dicts and masters by name: the reference of op child_adamw serves."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from .. import registry


def _reference(tensor: Tensor) -> ModuleType:
    return registry.choose("child_adamw", tensor.device, "reference").module


def joined_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 masters (SPEC.md, eq. 17) of bf16 weights and int16 remainders of the same shape."""
    joined: Tensor = _reference(weight).joined_master(weight, remainder)
    return joined


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 weights and int16 remainders (SPEC.md, eq. 17) of fp32 masters."""
    weight, remainder = _reference(master).split_master(master)
    return weight, remainder


def current_master(weight: Tensor, master: Tensor) -> Tensor:
    """Eq. 12: fp32 masters, or the 16-bit weights of the same shape where these were written since."""
    current: Tensor = _reference(weight).current_master(weight, master)
    return current
