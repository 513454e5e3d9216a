"""Op master_weight: fp32 masters, and the weights and remainders that they are kept as.

For what happens once in a run (state dicts, masters by name): plain PyTorch serves every device.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from .. import registry


def _serving(tensor: Tensor) -> ModuleType:
    return registry.choose("master_weight", tensor.device, "reference").module


def joined_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 masters (SPEC.md, eq. 17) of bf16 weights and int16 remainders of the same shape."""
    joined: Tensor = _serving(weight).joined_master(weight, remainder)
    return joined


def current_master(weight: Tensor, master: Tensor) -> Tensor:
    """Eq. 12: fp32 masters, or the 16-bit weights of the same shape where these were written since."""
    current: Tensor = _serving(weight).current_master(weight, master)
    return current


def remainder_of(master: Tensor) -> Tensor:
    """The int16 remainders (eq. 17) that go with weights to which fp32 masters were rounded by eq. 12."""
    remainder: Tensor = _serving(master).remainder_of(master)
    return remainder
