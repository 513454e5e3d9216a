"""How much several children share: the overlap matrix (the paper's Figure 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..child_mask import ChildMask
from ..progress import progress_of
from .text_table import aligned, percent


@dataclass(frozen=True)
class Overlaps:
    """Shares of children in one another.

    Attributes:
        names: the children's names, in the given order.
        densities: the density of each. It is also what a random child of that density shares with any
            other on average, so the measure of a column: what is above it is more than chance.
        shares: row a, column b: |a ∩ b| / |a|.
    """

    names: tuple[str, ...]
    densities: tuple[float, ...]
    shares: tuple[tuple[float, ...], ...]


def overlaps(masks: Mapping[str, ChildMask]) -> Overlaps:
    """Compare every mask with every other.

    Args:
        masks: name → mask, all of the same scope.

    Raises:
        ValueError: no mask, an empty child, or masks of different scopes.
    """
    if not masks:
        raise ValueError("overlaps of no mask; give at least one")
    counts = {}
    for name, mask in masks.items():
        counts[name] = mask.count()
        if counts[name] == 0:
            raise ValueError(f"{name} is an empty child: its overlap is undefined; leave it out")
    names = tuple(masks)
    pairs = [(a, b) for at, a in enumerate(names) for b in names[at + 1 :]]
    common = {(name, name): count for name, count in counts.items()}
    for a, b in progress_of(pairs, "comparing", len(pairs)):
        try:
            common[a, b] = common[b, a] = (masks[a] & masks[b]).count()
        except ValueError as error:
            raise ValueError(f"{a} and {b}: {error}") from error
    return Overlaps(
        names,
        tuple(mask.density() for mask in masks.values()),
        tuple(tuple(common[a, b] / counts[a] for b in names) for a in names),
    )


def overlaps_table(found: Overlaps) -> str:
    """Plain text: the matrix in per cent, and what chance alone would give in each column."""
    rows = [["child", *found.names]]
    rows += [
        [name, *map(percent, shares)]
        for name, shares in zip(found.names, found.shares, strict=True)
    ]
    rows.append(["by chance", *map(percent, found.densities)])
    note = "A random child shares its own density with any other, on average: the last row."
    return (
        f"share of the row's child that is in the column's too, in %\n\n{aligned(rows)}\n\n{note}"
    )
