"""The order of the elements of a part among those of the whole parameter (SPEC.md, section 10)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import sharding
from .sharding import Placed


def places_below(label: str, placed: Placed, bounds: Tensor) -> Tensor:
    """How many elements of this rank's part have an index in the whole below each bound.

    Local indexes ascend with those of the whole, so the elements below a bound are the first ones.

    Args:
        bounds: int64 of one dimension, 0 .. numel of the whole.

    Returns:
        int64, as many.
    """
    if placed.device_mesh.get_coordinate() is None:
        return torch.zeros_like(bounds)
    if not placed.shape:
        return bounds.clamp(max=1)
    positions = sharding.positions_of(label, placed)
    sizes = [len(of_dim) for of_dim in positions]
    below, rest = torch.zeros_like(bounds), bounds
    among = torch.ones_like(bounds, dtype=torch.bool)
    for dim, (of_dim, stride) in enumerate(
        zip(positions, sharding.strides_of(placed), strict=True)
    ):
        at, rest = rest // max(stride, 1), rest % max(stride, 1)
        if isinstance(of_dim, range):
            smaller = (at - of_dim.start).clamp(0, len(of_dim))
            held = (at >= of_dim.start) & (at < of_dim.stop)
        else:
            held_positions = torch.tensor(of_dim, dtype=torch.int64, device=bounds.device)
            smaller = torch.searchsorted(held_positions, at)
            held = torch.isin(at, held_positions)
        below += among * smaller * math.prod(sizes[dim + 1 :])
        among &= held
    return below


def element_of(label: str, placed: Placed, place: int) -> int:
    """The index in the whole of a local element."""
    element = 0
    dimensions = zip(sharding.positions_of(label, placed), sharding.strides_of(placed), strict=True)
    for of_dim, stride in reversed(list(dimensions)):
        place, at = divmod(place, len(of_dim))
        element += of_dim[at] * stride
    return element


def check_runs(label: str, placed: Placed, granularity: int) -> None:
    """Refuse a part that holds some elements of a run of ``granularity``, and not all of them.

    Raises:
        ValueError: names the parameter and its placements.
    """
    numel = sharding.part_shape(label, placed).numel()
    index_map = sharding.element_map_of_part(label, placed)
    base, (*outer, (size, stride)) = index_map.base, index_map.levels
    is_last = not outer and base + size == placed.shape.numel()
    starts = [base, *(step for count, step in outer if count > 1)]
    whole = stride == 1 or size == 1
    if numel and not (
        whole
        and all(start % granularity == 0 for start in starts)
        and (size % granularity == 0 or is_last)
    ):
        raise ValueError(
            f"granularity={granularity}: {sharding.described(label, placed)} has runs of {granularity} "
            "consecutive elements that are cut by a border between ranks; use a granularity that divides "
            "the parts (a divisor of a row's length), granularity=1, or a mask of the whole parameters"
        )
