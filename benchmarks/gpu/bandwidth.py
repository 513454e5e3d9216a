"""How fast memory is: copies of large tensors, read plus written bytes a second."""

from __future__ import annotations

from typing import Any

import torch

from childtune_kernels.rounds import Contender, interleave, quartiles

from .setting import Setting

_SIZES = (2**28, 2**30, 2**32)
_TINY_SIZES = (2**14,)
_ROUNDS = 25


def copy_contender(source_bytes: int, device: torch.device) -> Contender:
    """A copy of a tensor of so many bytes."""
    source = torch.ones(source_bytes // 4, device=device)
    target = torch.empty_like(source)
    return Contender(lambda: target.copy_(source))


def measure_copies(setting: Setting) -> list[dict[str, Any]]:
    """A record a size: the largest is what memory can do."""
    records = []
    for size in _TINY_SIZES if setting.tiny else _SIZES:
        contenders = {"copy": copy_contender(size, setting.device)}
        times = list(interleave(contenders, _ROUNDS, setting.device)["copy"].values())
        first, median, third = quartiles(times)
        records.append(
            {
                "bytes": 2 * size,
                "seconds": median,
                "seconds_quartiles": [first, third],
                "bytes_per_second": 2 * size / median,
            }
        )
    return records
