"""Mask words of parameters that are spread over ranks: counted, gathered, cut (SPEC.md, section 10)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from . import ops, rank_values, sharding
from .sharding import Placed


def counts_of_whole(own: Mapping[str, int], parts: Mapping[str, Placed]) -> dict[str, int]:
    """Of a count of each parameter's part the sum over the ranks that it is spread over, replicas once.

    A collective of the ranks of each mesh. Counts of labels that are not in ``parts`` stay as they are.
    """
    counts = dict(own)
    by_way: list[tuple[Placed, list[str]]] = []
    for label in own:
        placed = parts.get(label)
        if placed is None or placed.device_mesh.get_coordinate() is None:
            continue
        way = next((labels for other, labels in by_way if _is_summed_alike(other, placed)), None)
        if way is None:
            by_way.append((placed, [label]))
        else:
            way.append(label)
    for placed, labels in by_way:
        total = torch.tensor([own[label] for label in labels], dtype=torch.int64, device="cpu")
        for dim in _sharded_dims(placed):
            total = rank_values.counts_over_ranks(total, placed.device_mesh.get_group(dim))
        counts.update(zip(labels, total.tolist(), strict=True))
    return counts


def _sharded_dims(placed: Placed) -> list[int]:
    return [dim for dim, each in enumerate(placed.placements) if not each.is_replicate()]


def _is_summed_alike(one: Placed, other: Placed) -> bool:
    return one.device_mesh == other.device_mesh and _sharded_dims(one) == _sharded_dims(other)


def whole_words(label: str, words: Tensor, placed: Placed) -> Tensor:
    """The mask words of a whole parameter, of all ranks' words of its parts; a collective of its mesh.

    Raises:
        RuntimeError: this rank is not in the mesh.
    """
    if placed.device_mesh.get_coordinate() is None:
        raise RuntimeError(
            f"{sharding.described(label, placed)}: rank {torch.distributed.get_rank()} has no part of it; "
            "gather on ranks of the mesh"
        )
    bits = ops.unpack_mask(words, sharding.part_shape(label, placed)).to(torch.uint8)
    whole = sharding.placed_by(bits.to(placed.device_mesh.device_type), placed)
    return ops.pack_mask(sharding.whole_of(whole).to(words.device, torch.bool))


def digest(words: Tensor) -> str:
    """By which ranks compare mask words."""
    return hashlib.sha256(words.contiguous().cpu().numpy().tobytes()).hexdigest()[:12]


def words_placed(
    label: str, words: Tensor, placed: Placed | None, wanted: Placed | None
) -> Tensor | None:
    """Words as they are, or those of this rank's part of whole words; None where only a gather would do."""
    if placed == wanted:
        return words
    if placed is None and wanted is not None:
        return sharding.words_of_part(label, words, wanted)
    return None
