"""Op observe: where many tensors lie and what they look like."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import registry


def observe(tensors: Sequence[Tensor], choice: registry.Choice) -> Tensor:
    """Where tensors lie and what they look like, to be compared with another time.

    Args:
        tensors: dense tensors of any device.
        choice: what ``registry.choose("observe", device)`` gave.

    Returns:
        int64 ``[len(tensors), 2]``: the address, and a 64-bit digest of dtype, device, sizes, strides and
        of whether the address is null. Digests of two backends, or processes, do not compare.

    Raises:
        RuntimeError: a tensor without strides, as sparse ones are.
    """
    observed: Tensor = choice.module.observe(tensors)
    return observed
