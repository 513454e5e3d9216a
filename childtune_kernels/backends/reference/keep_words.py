"""Op keep_words: the Bernoulli keep bits of one tensor as mask words (SPEC.md, eq. 1 to 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .bitmask import pack_mask
from .philox import keep_mask, mapped_indexes


def keep_words(
    numel: int,
    element_map: Any,
    key: int,
    step: int | Tensor,
    purpose: int,
    threshold: int,
    device: torch.device,
) -> Tensor:
    """Keep bits as mask words (contract: ops.keep_words)."""
    elements = mapped_indexes(numel, element_map.base, element_map.levels, device)
    return pack_mask(keep_mask(elements, key, int(step), threshold, purpose))
