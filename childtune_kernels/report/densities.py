"""How dense a child is, by layer and by kind of weight."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .. import ops
from ..child_mask import ChildMask
from ..progress import progress_of
from .text_table import aligned, percent

MOST_KINDS = 64
LAYERS_A_BLOCK = 12


@dataclass(frozen=True)
class Share:
    """Child elements among all elements of some weights."""

    child: int = 0
    numel: int = 0

    @property
    def density(self) -> float:
        """``child / numel``; NaN where there are no elements."""
        return self.child / self.numel if self.numel else math.nan

    def __add__(self, other: Share) -> Share:
        return Share(self.child + other.child, self.numel + other.numel)


@dataclass(frozen=True)
class Densities:
    """Densities of a child by kind of weight and layer number.

    Attributes:
        kinds: kinds of weight inside layers, in the mask's order.
        layers: layer numbers, ascending.
        cells: (kind, layer) → share; no entry where a layer has no such weight with bits.
        outside: label → share, of parameters that belong to no layer.
        dense_names: labels that train densely; they have no bits and count nowhere.
    """

    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    cells: Mapping[tuple[str, int], Share]
    outside: Mapping[str, Share]
    dense_names: tuple[str, ...]

    @property
    def total(self) -> Share:
        """All elements in scope."""
        return _sum([*self.cells.values(), *self.outside.values()])

    def of_kind(self, kind: str) -> Share:
        """One kind of weight over all layers."""
        return _sum(share for (name, _), share in self.cells.items() if name == kind)

    def of_layer(self, layer: int) -> Share:
        """One layer over all its weights."""
        return _sum(share for (_, number), share in self.cells.items() if number == layer)


def densities(mask: ChildMask) -> Densities:
    """Count a mask's bits by layer and kind of weight.

    The layer is the first component of a label that is a number, the kind is what follows it:
    ``encoder.layer.3.attention.self.query.weight`` is ``attention.self.query.weight`` in layer 3. In a
    model with several stacks of layers (an encoder and a decoder), kinds are written with their stack, as
    ``encoder.block.*.layer.0.SelfAttention.q.weight``. Where that gives more than 64 kinds (a mixture of
    experts), later numbers become ``*`` too and their counts are added.
    """
    mask.require_whole("densities")
    places = {label: _split(label) for label in mask.words}
    inside = {label: place for label, place in places.items() if place is not None}
    several_stacks = len({stack for stack, _, _ in inside.values()}) > 1
    kinds = {
        label: f"{stack}.*.{rest}".lstrip(".") if several_stacks else rest
        for label, (stack, _, rest) in inside.items()
    }
    if len(set(kinds.values())) > MOST_KINDS:
        kinds = {label: re.sub(r"\b\d+\b", "*", kind) for label, kind in kinds.items()}
    cells: dict[tuple[str, int], Share] = {}
    outside: dict[str, Share] = {}
    for label, words in progress_of(mask.words.items(), "counting", len(mask.words)):
        share = Share(ops.count_mask(words), mask.shapes[label].numel())
        if label in inside:
            place = kinds[label], inside[label][1]
            cells[place] = cells.get(place, Share()) + share
        else:
            outside[label] = share
    return Densities(
        tuple(dict.fromkeys(kinds.values())),
        tuple(sorted({layer for _, layer, _ in inside.values()})),
        cells,
        outside,
        tuple(sorted(mask.dense_names)),
    )


def densities_table(found: Densities) -> str:
    """Plain text: kinds of weight by layer in blocks of columns, and the parameters outside layers."""
    parts = []
    blocks = range(0, len(found.layers), LAYERS_A_BLOCK)
    if found.layers:
        parts.append("density in %, by kind of weight (rows) and layer (columns)")
    parts += [_block(found, found.layers[at : at + LAYERS_A_BLOCK]) for at in blocks]
    if found.outside:
        rows = [("outside layers" if found.layers else "parameter", "elements", "child", "%")]
        rows += [_counted(label, share) for label, share in found.outside.items()]
        parts.append(aligned(rows))
    if not parts:
        return "no parameter has mask bits"
    return "\n\n".join(parts)


def _block(found: Densities, layers: tuple[int, ...]) -> str:
    rows = [["layer", *map(str, layers), "all"]]
    for kind in found.kinds:
        shares = [found.cells.get((kind, layer)) for layer in layers]
        rows.append([kind, *map(_cell, shares), _cell(found.of_kind(kind))])
    every = _sum(found.cells.values())
    rows.append(["all", *(_cell(found.of_layer(layer)) for layer in layers), _cell(every)])
    return aligned(rows)


def _cell(share: Share | None) -> str:
    return percent(share.density) if share is not None and share.numel else "-"


def _counted(title: str, share: Share) -> tuple[str, str, str, str]:
    return title, f"{share.numel:,}", f"{share.child:,}", _cell(share)


def _split(label: str) -> tuple[str, int, str] | None:
    """What stands before the layer number, the number, and what follows; None without a number."""
    components = label.split(".")
    for at, component in enumerate(components):
        if component.isascii() and component.isdigit():
            return ".".join(components[:at]), int(component), ".".join(components[at + 1 :])
    return None


def _sum(shares: Iterable[Share]) -> Share:
    return sum(shares, Share())
