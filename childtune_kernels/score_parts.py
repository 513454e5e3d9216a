"""Scores whose parts lie on several ranks: what they are together, and which of equal ones come first.

What ranks tell each other during a selection is a few KB a pass: numbers of elements, and never elements.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, part_order, rank_values, sharding
from .sharding import Placed

_BOUNDS = 1 << 11  # looked at in one pass over equal elements


class ScoreParts(NamedTuple):
    """Which parts of named scores this rank has, and which of them it counts where ranks hold the same.

    Attributes:
        labels: in the order of rank 0, the same on every rank.
        placed: how each is spread; None of one that every rank holds whole.
        numels: elements of each, of the whole.
        counted: whether this rank's part is the one that is counted among its replicas.
        granularity: elements in a score.
    """

    labels: tuple[str, ...]
    placed: tuple[Placed | None, ...]
    numels: tuple[int, ...]
    counted: tuple[bool, ...]
    granularity: int = 1

    def of(self, labels: Collection[str], granularity: int = 1) -> ScoreParts:
        """The same of some labels, for scores of runs of ``granularity`` elements."""
        chosen = [at for at, label in enumerate(self.labels) if label in labels]
        return ScoreParts(
            tuple(self.labels[at] for at in chosen),
            tuple(self.placed[at] for at in chosen),
            tuple(self.numels[at] for at in chosen),
            tuple(self.counted[at] for at in chosen),
            granularity,
        )

    @property
    def candidates(self) -> int:
        """The number of scores of all ranks, replicas once."""
        return sum(-(-numel // self.granularity) for numel in self.numels)

    @property
    def sharded(self) -> dict[str, Placed]:
        """How each parameter is spread that is no plain tensor."""
        pairs = zip(self.labels, self.placed, strict=True)
        return {label: placed for label, placed in pairs if placed is not None}

    def of_counted(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The values, with none left of the tensors that this rank does not count."""
        return [
            value if counted else value.view(-1)[:0]
            for value, counted in zip(values, self.counted, strict=True)
        ]

    def summed(self, counts: Tensor) -> Tensor:
        """The sum of all ranks' int64 counts."""
        return rank_values.counts_over_ranks(counts)

    def sum_of_tensors(self, counts: Sequence[int]) -> list[int]:
        """Of a count a tensor the sum over ranks, replicas once."""
        own = [count * counted for count, counted in zip(counts, self.counted, strict=True)]
        total: list[int] = self.summed(torch.tensor(own, dtype=torch.int64, device="cpu")).tolist()
        return total

    def taken(self, held: Sequence[int], equal_words: Any, wanted: int) -> list[int]:
        """How many of its equal scores this rank takes of each tensor: the first ``wanted`` of all ranks'.

        The order is that of the tensors, then of the index in the whole (SPEC.md, eq. 15).

        Args:
            held: the number of equal scores of each tensor that this rank holds.
            equal_words: called with the position of a tensor; gives mask words of its equal scores.
            wanted: how many are taken, of all ranks'.
        """
        taken = []
        for at, (own, whole) in enumerate(zip(held, self.sum_of_tensors(held), strict=True)):
            share = min(wanted, whole)
            wanted -= share
            if share in (0, whole):
                taken.append(own if share else 0)
            else:
                taken.append(self._first(at, equal_words(at), share))
        return taken

    def _first(self, at: int, words: Tensor, share: int) -> int:
        """How many of this rank's bits are among the first ``share`` of all ranks', by index in the whole."""
        before = ops.mask_ranks(words, 32).cpu()
        words, low, high = words.cpu(), 0, -(-self.numels[at] // self.granularity)
        while high - low > 1:
            step = -(-(high - low) // _BOUNDS)
            bounds = torch.arange(low + step, high + step, step, device="cpu").clamp(max=high)
            counts = _bits_before(words, before, self._places_below(at, bounds))
            reached = self.summed(counts * self.counted[at])
            found = int(torch.searchsorted(reached, share))
            high = int(bounds[found])
            low = low if found == 0 else int(bounds[found - 1])
        places = self._places_below(at, torch.tensor([high], device="cpu"))
        return int(_bits_before(words, before, places))

    def _places_below(self, at: int, bounds: Tensor) -> Tensor:
        """How many of this rank's scores have an index in the whole below each bound."""
        placed = self.placed[at]
        if placed is None:
            return bounds
        elements = (bounds * self.granularity).clamp(max=self.numels[at])
        places = part_order.places_below(self.labels[at], placed, elements)
        return (places + self.granularity - 1) // self.granularity

    def element_of(self, label: str, place: int) -> int:
        """The index in the whole of this rank's element at ``place``."""
        placed = self.placed[self.labels.index(label)]
        return place if placed is None else part_order.element_of(label, placed, place)


def _bits_before(words: Tensor, before: Tensor, places: Tensor) -> Tensor:
    """How many bits are set before each place; ``before``: before each word."""
    at, bit = places // 32, places % 32
    if not words.numel():
        return torch.zeros_like(places)
    inside = words[at.clamp(max=words.numel() - 1)].to(torch.int64)
    levels = torch.arange(32, device=words.device)
    lower = (inside[:, None] >> levels & 1) * (levels < bit[:, None])
    return before[at] + lower.sum(1)


def parts_of(
    placed: Mapping[str, Placed | None],
    shapes: Mapping[str, torch.Size],
    asked: Mapping[str, object],
    scores: Mapping[str, Tensor] | None = None,
) -> ScoreParts:
    """What all ranks of the default group have together; a collective of them all.

    Args:
        placed: label → how it is spread, None of a plain tensor.
        shapes: label → shape of the whole.
        asked: option → value; they must be the same on all ranks.
        scores: this rank's, fp32; ranks that hold the same part must have the same.

    Raises:
        ValueError: on all ranks: other labels, shapes, placements or options on some rank than on rank 0,
            parts that are not the whole parameter together, or replicas of other scores.
    """
    mine = _Described.of(placed, shapes, asked, scores or {})
    ranks: list[_Described] = rank_values.gathered_objects(mine)
    for rank, other in enumerate(ranks):
        ranks[0].refuse_other(other, rank)
    _refuse_other_replicas(ranks)
    rank = torch.distributed.get_rank()
    counted = tuple(_counts(ranks, label)[rank] for label in ranks[0].labels)
    for label in ranks[0].labels:
        together = sum(
            other.numels[label]
            for other, counts in zip(ranks, _counts(ranks, label), strict=True)
            if counts
        )
        if together != shapes[label].numel():
            raise ValueError(
                f"{label}: the parts of all ranks have {together} elements, the parameter of shape "
                f"{tuple(shapes[label])} has {shapes[label].numel()}; give each rank's part of "
                "the same DTensor"
            )
    labels = ranks[0].labels
    return ScoreParts(
        labels,
        tuple(placed[label] for label in labels),
        tuple(shapes[label].numel() for label in labels),
        counted,
    )


class _Described(NamedTuple):
    """What a rank tells the others about its parts."""

    labels: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    placements: dict[str, str]
    meshes: list[tuple[int, ...]]
    mesh: dict[str, int]
    numels: dict[str, int]
    first: dict[str, bool]
    bits: dict[str, tuple[Any, int]]  # which elements a part has, and the sum of its scores' bits
    asked: dict[str, str]

    @classmethod
    def of(
        cls,
        placed: Mapping[str, Placed | None],
        shapes: Mapping[str, torch.Size],
        asked: Mapping[str, object],
        scores: Mapping[str, Tensor],
    ) -> _Described:
        meshes: list[tuple[int, ...]] = []
        mesh, numels, first = {}, {}, {}
        sums = _sums_of_bits(scores)
        for label, of_label in placed.items():
            numels[label], first[label] = shapes[label].numel(), True
            if of_label is not None:
                ranks = tuple(of_label.device_mesh.mesh.flatten().tolist())
                if ranks not in meshes:
                    meshes.append(ranks)
                mesh[label] = meshes.index(ranks)
                numels[label] = sharding.part_shape(label, of_label).numel()
                first[label] = sharding.is_first_replica(of_label)
        return cls(
            tuple(placed),
            {label: tuple(shapes[label]) for label in placed},
            {label: _text(of_label) for label, of_label in placed.items()},
            meshes,
            mesh,
            numels,
            first,
            {label: (_elements(label, placed[label]), sums[label]) for label in sums},
            {option: repr(value) for option, value in asked.items()},
        )

    def refuse_other(self, other: _Described, rank: int) -> None:
        """Raise where another rank does not have the same parameters, in whatever order."""
        odd = sorted(set(self.labels) ^ set(other.labels))
        if odd:
            raise ValueError(
                f"rank 0 and rank {rank} have different parameters: {', '.join(odd[:8])}; give every "
                "rank the same names"
            )
        for what in ("shapes", "placements"):
            of_first, of_other = getattr(self, what), getattr(other, what)
            for label in self.labels:
                if of_first[label] != of_other[label]:
                    raise ValueError(
                        f"{label}: {what} {of_first[label]} on rank 0 and {of_other[label]} on rank {rank}; "
                        "give every rank its part of the same parameter"
                    )
        for option, value in self.asked.items():
            if value != other.asked[option]:
                raise ValueError(
                    f"{option}={value} on rank 0 and {other.asked[option]} on rank {rank}; give every rank "
                    "the same options"
                )


def _sums_of_bits(scores: Mapping[str, Tensor]) -> dict[str, int]:
    """A number for every tensor, of one read of it, that other scores hardly have too."""
    if not scores:
        return {}
    each = [value.view(torch.int32).sum(dtype=torch.int64) for value in scores.values()]
    return dict(zip(scores, torch.stack(each).tolist(), strict=True))


def _elements(label: str, placed: Placed | None) -> Any:
    return None if placed is None else tuple(sharding.element_map_of_part(label, placed))


def _refuse_other_replicas(ranks: Sequence[_Described]) -> None:
    first: dict[tuple[str, Any], tuple[int, int]] = {}
    for rank, described in enumerate(ranks):
        for label, (elements, bits) in described.bits.items():
            holder, expected = first.setdefault((label, elements), (rank, bits))
            if bits != expected:
                raise ValueError(
                    f"{label}: rank {holder} and rank {rank} hold the same elements and have other scores "
                    "for them. Bring them together first: FisherAccumulator.reduce() adds up what ranks "
                    "have recorded, with a process_group of the replicas where the model is sharded"
                )


def _text(placed: Placed | None) -> str:
    return "none" if placed is None else f"({', '.join(map(str, placed.placements))})"


def _counts(ranks: Sequence[_Described], label: str) -> list[bool]:
    """Which ranks count a label: the first replicas, of the first mesh where several hold the parameter."""
    if label not in ranks[0].mesh:
        return [rank == 0 for rank in range(len(ranks))]
    of_rank = [described.meshes[described.mesh[label]] for described in ranks]
    first = next((mesh for rank, mesh in enumerate(of_rank) if rank in mesh), ())
    return [
        rank in first and mesh == first and ranks[rank].first[label]
        for rank, mesh in enumerate(of_rank)
    ]
