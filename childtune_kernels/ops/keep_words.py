"""Op keep_words: Bernoulli keep bits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import registry
from ..plan_row import IndexMap

KEEP_ALL = 1 << 32


def keep_words(
    numel: int,
    element_map: IndexMap,
    key: int,
    step: int | Tensor,
    threshold: int,
    purpose: int = 0,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> Tensor:
    """The Bernoulli keep bits of one tensor in one step (SPEC.md, eq. 1 to 5).

    Args:
        numel: number of local elements.
        element_map: from local indexes to element indexes.
        key: 64-bit Philox key, k0 in the low word (``labels.philox_key``).
        step: the parameter's step count, 1 on its first update; used modulo 2**32. An int64 tensor of no
            dimension on ``device`` is read by the kernel: no host waits for it.
        threshold: T of eq. 3, 1 .. 2**32.
        purpose: the fourth counter word.

    Returns:
        int32 mask words of shape ``[ceil(numel / 32)]``; bits past the end are 0.

    Raises:
        ValueError: a threshold outside 1 .. 2**32, or a step tensor of another kind or device.
    """
    if not 1 <= threshold <= KEEP_ALL:
        raise ValueError(f"threshold={threshold} must be between 1 and 2**32")
    device = torch.device(device)
    if isinstance(step, Tensor) and (
        step.dtype != torch.int64 or step.dim() != 0 or step.device.type != device.type
    ):
        raise ValueError(
            f"step of {step.dtype} {tuple(step.shape)} on {step.device}: expected int64 of no dimension "
            f"on {device}, or an int"
        )
    choice = registry.choose("keep_words", device, backend)
    words: Tensor = choice.module.keep_words(
        numel, element_map, key, step, purpose, threshold, device
    )
    return words
