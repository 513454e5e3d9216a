"""Op observe: what decides whether a plan's rows still hold (SPEC.md, "The plan")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def observe(tensors: Sequence[Tensor]) -> Tensor:
    """Address and digest of each tensor (contract: ops.observe)."""
    rows = []
    for tensor in tensors:
        address = tensor.data_ptr()
        looks = (tensor.dtype, tensor.device, tensor.shape, tensor.stride(), address == 0)
        rows.append((address, hash(looks)))
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 2)
