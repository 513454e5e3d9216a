"""The percentile rule of the original code, a control beside the exact selection (SPEC.md, "Selection")."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from . import ops
from .radix_select import first_key_from, place_of, value_of
from .score_parts import ScoreParts


def percentile_words(
    scores: Mapping[str, Tensor], reserve_p: float, backend: str | None, over: ScoreParts | None
) -> dict[str, Tensor]:
    """Every element at or above the percentile (SPEC.md, "Selection", in double precision throughout).

    The host reads the places between which the percentile lies: a control, not the way of training.
    """
    held = sum(value.numel() for value in scores.values())
    numel = held if over is None else over.candidates
    if numel == 0:
        return {
            label: torch.zeros(0, dtype=torch.int32, device=value.device)
            for label, value in scores.items()
        }
    position = (numel - 1) * (100 * (1 - float(reserve_p)) / 100)
    rank = math.floor(position)
    place = place_of(scores, rank + 1, False, backend, over)
    lower = upper = value_of(int(place.key))
    if place.taken == place.equal and rank + 1 < numel:
        upper = value_of(int(place_of(scores, rank + 2, False, backend, over).key))
    part, step = position - rank, upper - lower
    percentile = lower + step * part if part < 0.5 else upper - step * (1 - part)
    words, _ = ops.select_words(
        list(scores.values()), first_key_from(percentile) - 1, True, backend=backend
    )
    return dict(zip(scores, words, strict=True))
