"""Op fisher_accumulate: sums of squared gradients (SPEC.md, eq. 13)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fisher_accumulate_(sums: Sequence[Tensor], gradients: Sequence[Tensor], scale: float) -> None:
    """Add every scaled squared gradient to its sums (contract: ops.fisher_accumulate_)."""
    for total, gradient in zip(sums, gradients, strict=True):
        single = gradient.to(torch.float32)
        total.add_((single * single).mul_(scale))
