"""The passes of a radix selection over named scores, which never leave their device (SPEC.md, eq. 15).

What a pass finds (a digit, how many are still to be taken) goes into the next as a tensor without dimensions:
on a device the host waits for nothing before it reads the report of the whole selection. On CPUs, where a
number costs nothing to read, the bracket of a large selection fits the processor's caches.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .rank_values import agreed
from .score_parts import ScoreParts

# A sample of so many keys says between which two the k-th lies, but for one selection in ten
# thousand (four standard deviations on either side); if not, the passes over digits find it. Two reads of
# memory take the place of four, which pays from some millions of elements on.
_SAMPLE = 1 << 18
_DEVIATIONS = 4
_WORTH_A_SAMPLE = 1 << 23
_BYTES_OF_BINS = 1 << 24  # of all threads together

# On devices a larger sample is as quick, and leaves fewer scores between the bracket's ends.
_TIMES_ON_DEVICE = 4
_BITS_OF_BINS = 20

_GREATEST_KEY = (1 << 31) - 1
_DIGITS = ((20, 11), (10, 10), (0, 10))  # (shift, bits) of the key's digits, the highest first


def refuse_unordered(
    scores: Mapping[str, Tensor], refused: Sequence[int], over: ScoreParts | None = None
) -> None:
    """Raise for the first tensor that holds what cannot be ordered; ``refused`` counts by tensor.

    With ``over`` they are counts of all ranks, and the error is raised on all of them.

    Raises:
        ValueError: names the parameter, the first such value, and where it is.
    """
    if over is not None and any(refused):
        with agreed():
            _refuse_own(scores, refused, over)
    else:
        _refuse_own(scores, refused, over)


def _refuse_own(
    scores: Mapping[str, Tensor], refused: Sequence[int], over: ScoreParts | None
) -> None:
    for (label, value), count in zip(scores.items(), refused, strict=True):
        if count:
            flat = value.view(-1)
            found = (~(flat >= 0) | flat.isinf()).nonzero()
            if over is not None and not len(found):
                continue  # they are another rank's, which says so
            at = int(found[0])
            element = at if over is None else over.element_of(label, at)
            raise ValueError(
                f"Fisher information of {label}: {float(flat[at])} at element {element} ({count} such "
                "values); NaN, infinite and negative values have no place in an order: leave out the batch "
                "that made them"
            )


Number = int | Tensor
NOT_FOUND = -1


class Place(NamedTuple):
    """Where the k-th element lies: its key, how many of that key are taken, and how many there are.

    Ints in host memory; on a device int64 tensors without dimensions, which nobody has read. ``taken`` is
    ``NOT_FOUND`` where the sample misled: then the place must be found without one.
    """

    key: Number
    taken: Number
    equal: Number

    def on(self, device: torch.device) -> Tensor:
        """The three numbers in one tensor."""
        unread = [each for each in self if isinstance(each, Tensor)]
        return torch.stack(unread) if unread else torch.tensor(self, device=device)


def place_of(
    scores: Mapping[str, Tensor],
    k: int,
    largest: bool,
    backend: str | None,
    over: ScoreParts | None = None,
) -> Place:
    """Where the k-th score (k >= 1) lies, for the host to know.

    Raises:
        ValueError: a NaN, infinite or negative score.
    """
    values = list(scores.values())
    place, refused = find_place(values, k, largest, backend, over=over)
    *counts, key, taken, equal = torch.cat([refused, place.on(values[0].device)]).tolist()
    refuse_unordered(scores, counts, over)
    if taken == NOT_FOUND:
        place, _ = find_place(values, k, largest, backend, by_sample=False)
        key, taken, equal = place.on(values[0].device).tolist()
    return Place(key, taken, equal)


def find_place(
    values: list[Tensor],
    k: int,
    largest: bool,
    backend: str | None,
    *,
    by_sample: bool = True,
    over: ScoreParts | None = None,
) -> tuple[Place, Tensor]:
    """Where the k-th score (k >= 1) lies, and how many scores of each tensor cannot be ordered.

    The place has a meaning only where all can. On a device the host reads nothing, so that a sample may
    have misled; ``by_sample=False`` does without. With ``over`` it is a collective, and the place that
    among the scores of all ranks.
    """
    if over is not None:
        return _place_by_digits(values, k, largest, backend, over)
    total = sum(value.numel() for value in values)
    if by_sample and total >= _WORTH_A_SAMPLE:
        if not _is_host_memory(values, backend):
            return _place_in_unread_bracket(values, k, total, largest, backend)
        found = _place_in_bracket(values, k, total, largest, backend)
        if found is not None:
            return found
    return _place_by_digits(values, k, largest, backend)


def _is_host_memory(values: list[Tensor], backend: str | None) -> bool:
    """Whether the host reads a number at no cost; Triton's interpreter goes the way of the devices."""
    return values[0].device.type == "cpu" and backend != "triton"


def _place_by_digits(
    values: list[Tensor],
    k: int,
    largest: bool,
    backend: str | None,
    over: ScoreParts | None = None,
) -> tuple[Place, Tensor]:
    device = values[0].device
    near = _is_host_memory(values, backend)
    key: Number = 0 if near else torch.zeros((), dtype=torch.int64, device=device)
    taken: Number = k if near else torch.full((), k, dtype=torch.int64, device=device)
    equal = taken
    refused = torch.zeros(len(values), dtype=torch.int64, device=device)
    counted = values if over is None else over.of_counted(values)
    for shift, bits in _DIGITS:
        counts, found = ops.digit_histogram(counted, shift, bits, key, backend)
        if over is not None:
            counts = over.summed(counts)
        if shift + bits == 31:
            refused = found
            if over is not None:
                refused = over.summed(refused)
        at, taken, equal = _bin_of(counts, taken, largest)
        key = (key << bits) + at
    return Place(key, taken, equal), refused


def _place_in_bracket(
    values: list[Tensor], k: int, total: int, largest: bool, backend: str | None
) -> tuple[Place, Tensor] | None:
    """The same by a bracket that a sample gives; None where there is none, or the k-th lies outside."""
    bracket = _bracket(values, k / total, largest, backend)
    if bracket is None:
        return None
    low, high = bracket
    most_bins = _BYTES_OF_BINS // (4 * torch.get_num_threads())
    shift = ((high - low) // most_bins).bit_length()
    counts, above, refused = ops.bracket_histogram(values, low, high, shift, backend)
    before = int(above) if largest else total - int(above) - int(counts.sum())
    if not before < k <= before + int(counts.sum()):
        return None
    at, taken, equal = _near_bin_of(counts, k - before, largest)
    key = low + (at << shift)
    if shift:
        last = min(key + (1 << shift) - 1, high)
        counts, _, _ = ops.bracket_histogram(values, key, last, 0, backend)
        at, taken, equal = _near_bin_of(counts, taken, largest)
        key += at
    return Place(key, taken, equal), refused


def _place_in_unread_bracket(
    values: list[Tensor], k: int, total: int, largest: bool, backend: str | None
) -> tuple[Place, Tensor]:
    """The same on a device, where the bracket may reach to either end of all keys."""
    sample = _sample(values, _TIMES_ON_DEVICE * _SAMPLE)
    keys = (sample.view(torch.int32) & _GREATEST_KEY).sort(descending=largest).values
    first, last = _ranks_around(keys.numel(), k / total)
    ends = [
        keys[rank - 1].to(torch.int64)
        if 1 <= rank <= keys.numel()
        else keys.new_full((), end).long()
        for rank, end in ((first, largest * _GREATEST_KEY), (last, (not largest) * _GREATEST_KEY))
    ]
    low, high = ends[::-1] if largest else ends
    levels = torch.arange(_BITS_OF_BINS, 31, device=keys.device)
    shift = ((high - low) >> levels > 0).sum()
    counts, above, refused = ops.bracket_histogram(
        values, low, high, shift, backend, bins=1 << _BITS_OF_BINS
    )
    inside = counts.sum()
    before = above if largest else total - above - inside
    at, taken, equal = _unread_bin_of(counts, k - before, largest)
    key = low + (at << shift)
    # A second look at one bin, where it holds several keys; else at none.
    again = shift > 0
    end = torch.minimum(key + (1 << shift) - 1, high)
    nearer, _, _ = ops.bracket_histogram(
        values, key * again, (end + 1) * again - 1, shift * 0, backend,
        bins=1 << (31 - _BITS_OF_BINS),
    )  # fmt: skip
    looked = _unread_bin_of(nearer, taken, largest)
    key = torch.where(again, key + looked[0], key)
    taken = torch.where(again, looked[1], taken)
    equal = torch.where(again, looked[2], equal)
    found = (before < k) & (k <= before + inside)
    return Place(key, torch.where(found, taken, NOT_FOUND), equal), refused


def _sample(values: list[Tensor], size: int) -> Tensor:
    """About so many of all scores, evenly spread."""
    # Odd, so that no power of two in a tensor's shape makes it meet the same columns over and over.
    stride = sum(value.numel() for value in values) // size | 1
    return torch.cat([value.view(-1)[::stride] for value in values])


def _ranks_around(count: int, share: float) -> tuple[int, int]:
    """The ranks in a sample of ``count`` between which a share of all scores ends; they may lie outside."""
    middle = count * share
    margin = _DEVIATIONS * math.sqrt(middle * (1 - share)) + _DEVIATIONS
    return int(middle - margin), int(middle + margin) + 1


def _bracket(
    values: list[Tensor], share: float, largest: bool, backend: str | None
) -> tuple[int, int] | None:
    """The keys between which a share of all scores ends, as a sample has it; None too near to an end."""
    sample = _sample(values, _SAMPLE)
    ranks = _ranks_around(sample.numel(), share)
    if ranks[0] < 1 or ranks[1] > sample.numel():
        return None
    keys = [_place_by_digits([sample], rank, largest, backend)[0].key for rank in ranks]
    ends = [int(key) for key in keys]
    return min(ends), max(ends)


def _bin_of(counts: Tensor, k: Number, largest: bool) -> tuple[Number, Number, Number]:
    """The bin of the k-th element, how many of the bin's are among the first k, and how many it holds."""
    of = _near_bin_of if isinstance(k, int) else _unread_bin_of
    return of(counts, k, largest)  # type: ignore[arg-type]


def _unread_bin_of(counts: Tensor, k: Tensor, largest: bool) -> tuple[Tensor, Tensor, Tensor]:
    ordered = counts.flip(0) if largest else counts
    reached = ordered.cumsum(0)
    # Where scores were refused the k-th may lie beyond all bins.
    at = torch.searchsorted(reached, k.view(1)).clamp(max=counts.numel() - 1)
    equal = ordered.gather(0, at)
    taken = k - reached.gather(0, at) + equal
    if largest:
        at = counts.numel() - 1 - at
    return at.view(()), taken.view(()), equal.view(())


def _near_bin_of(counts: Tensor, k: int, largest: bool) -> tuple[int, int, int]:
    ordered = counts.flip(0) if largest else counts
    reached = ordered.cumsum(0)
    at = min(int(torch.searchsorted(reached, k)), counts.numel() - 1)
    equal = int(ordered[at])
    return counts.numel() - 1 - at if largest else at, k - int(reached[at]) + equal, equal


def words_up_to(
    place: Place,
    values: list[Tensor],
    largest: bool,
    backend: str | None,
    over: ScoreParts | None = None,
) -> list[Tensor]:
    """The mask words of the first scores in the order, up to the k-th; of a device the host reads nothing.

    With ``over`` the order is that of all ranks' scores, the host reads, and it is a collective.
    """
    # Where all of the key are taken it lies beyond a threshold, and no ties are left.
    key, taken, equal = place if over is None else Place(*map(int, place))
    step = 1 if largest else -1
    threshold: Number
    wanted: Number
    if isinstance(taken, Tensor):
        whole = taken == equal
        threshold, wanted = key - whole * step, taken * ~whole
    else:
        threshold, wanted = (key - step, 0) if taken == equal else (key, taken)
    words, ties = ops.select_words(values, threshold, largest, backend=backend)
    if isinstance(wanted, Tensor) or wanted > 0:
        if over is None:
            before = ties.cumsum(0) - ties
            quotas = (wanted - before).clamp(min=0).minimum(ties)
        else:
            quotas = _quotas_over_ranks(
                values, words, ties, int(threshold), int(wanted), step, over
            )
        ops.take_ties_(values, words, threshold, quotas, backend=backend)
    return words


def _quotas_over_ranks(
    values: list[Tensor],
    words: list[Tensor],
    ties: Tensor,
    threshold: int,
    wanted: int,
    step: int,
    over: ScoreParts,
) -> Tensor:
    """How many ties this rank takes in each of its units, of ``wanted`` on all ranks."""

    def equal_words(at: int) -> Tensor:
        from_threshold, _ = ops.select_words([values[at]], threshold - step, step > 0)
        return from_threshold[0] ^ words[at]

    by_tensor = ties.split([-(-value.numel() // ops.SCORE_UNIT) for value in values])
    taken = over.taken([int(units.sum()) for units in by_tensor], equal_words, wanted)
    quotas = [
        (own - (units.cumsum(0) - units)).clamp(min=0).minimum(units)
        for own, units in zip(taken, by_tensor, strict=True)
    ]
    return torch.cat(quotas)


def value_of(key: int) -> float:
    """The number whose key this is."""
    value: float = struct.unpack("<f", struct.pack("<I", key))[0]
    return value


def first_key_from(bound: float) -> int:
    """The key of the smallest fp32 number that is not below ``bound``."""
    nearest = struct.pack("<f", bound)
    key: int = struct.unpack("<I", nearest)[0]
    return key + (struct.unpack("<f", nearest)[0] < bound)
