"""The passes of a radix selection over named scores, which never leave their device (SPEC.md, eq. 15)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops

_DIGITS = ((20, 11), (10, 10), (0, 10))  # (shift, bits) of the key's digits, the highest first


def refuse_unordered(scores: Mapping[str, Tensor], refused: Tensor) -> None:
    """Raise for the first tensor that holds what cannot be ordered.

    Raises:
        ValueError: names the parameter, the first such value, and where it is.
    """
    for (label, value), count in zip(scores.items(), refused.tolist(), strict=True):
        if count:
            flat = value.view(-1)
            at = int((~(flat >= 0) | flat.isinf()).nonzero()[0])
            raise ValueError(
                f"Fisher information of {label}: {float(flat[at])} at element {at} ({count} such values); "
                "NaN, infinite and negative values have no place in an order: leave out the batch that made "
                "them"
            )


class Place(NamedTuple):
    """Where the k-th element lies: its key, how many of that key are taken, and how many there are."""

    key: int
    taken: int
    equal: int


def place_of(scores: Mapping[str, Tensor], k: int, largest: bool, backend: str | None) -> Place:
    """Where the k-th score (k >= 1) lies. Only histograms leave the tensors' device.

    Raises:
        ValueError: a NaN, infinite or negative score.
    """
    values = list(scores.values())
    key, taken, equal = 0, k, 0
    for shift, bits in _DIGITS:
        counts, refused = ops.digit_histogram(values, shift, bits, key, backend)
        if shift + bits == 31:
            refuse_unordered(scores, refused)
        counts = counts.cpu()
        ordered = counts.flip(0) if largest else counts
        reached = ordered.cumsum(0)
        at = int(torch.searchsorted(reached, taken))
        equal = int(ordered[at])
        taken -= int(reached[at]) - equal
        key = key << bits | ((1 << bits) - 1 - at if largest else at)
    return Place(key, taken, equal)


def words_up_to(
    place: Place, values: list[Tensor], largest: bool, backend: str | None
) -> list[Tensor]:
    """The mask words of the first scores in the order, up to the k-th."""
    if place.taken == place.equal:
        beyond = place.key - 1 if largest else place.key + 1
        return ops.select_words(values, beyond, largest, backend=backend)[0]
    words, ties = ops.select_words(values, place.key, largest, backend=backend)
    before = ties.cumsum(0) - ties
    quotas = (place.taken - before).clamp(min=0).minimum(ties)
    ops.take_ties_(values, words, place.key, quotas, backend=backend)
    return words


def value_of(key: int) -> float:
    """The number whose key this is."""
    value: float = struct.unpack("<f", struct.pack("<I", key))[0]
    return value


def first_key_from(bound: float) -> int:
    """The key of the smallest fp32 number that is not below ``bound``."""
    nearest = struct.pack("<f", bound)
    key: int = struct.unpack("<I", nearest)[0]
    return key + (struct.unpack("<f", nearest)[0] < bound)
