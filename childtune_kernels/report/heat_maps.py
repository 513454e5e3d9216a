"""Heat maps: the density of a child, and what several children share."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from .canvas import INK, QUIET, Canvas, Margins, label, width_of
from .densities import Densities, Share
from .overlaps import Overlaps
from .text_table import percent

# Light to dark: the order survives a black-and-white printer.
_COLOURS, _ABSENT = "YlGnBu", "#e9ebef"
_CELL_WIDTH, _CELL_HEIGHT, _SQUARE = 0.40, 0.27, 0.52  # inches
_NARROW = 6  # cells across where there are no layers


def plot_densities(found: Densities, path: str | os.PathLike[str], title: str = "child") -> None:
    """Draw density by kind of weight (rows) and layer (columns), and the parameters outside layers.

    Args:
        found: what ``densities`` counted.
        path: the PNG to write.
        title: what the mask is called in the picture.

    Raises:
        RuntimeError: matplotlib is not installed.
        ValueError: no parameter has mask bits.
        FileNotFoundError: no such directory.
    """
    total, notes = found.total, _notes(found)
    if not total.numel:
        raise ValueError("the mask has no elements in scope: there is no density to draw")
    heights = [_CELL_HEIGHT * (len(found.kinds) + 1)] if found.layers else []
    heights += [_CELL_HEIGHT * len(found.outside)] if found.outside else []
    cells_across = len(found.layers) + 1 if found.layers else _NARROW
    margins = Margins(
        left=0.35 + width_of([*found.kinds, *found.outside]),
        right=0.75,
        top=0.85,
        bottom=(0.2 if found.outside else 0.55) + 0.25 * bool(notes),
    )
    canvas = Canvas(margins, cells_across * _CELL_WIDTH, heights, gap=0.75)
    shares = [*found.cells.values(), *found.outside.values()]
    peak = max(share.density for share in shares if share.numel) or 1.0
    if found.layers:
        image = _draw_layers(canvas.axes[0], found, peak)
    if found.outside:
        image = _draw_outside(canvas.axes[-1], found, peak, cells_across)
    canvas.colour_bar(image)
    counts = f"{total.child:,} of {total.numel:,} elements in scope"
    canvas.titles(
        f"Density of {title}", f"in %; all together {counts}, {percent(total.density)} %", notes
    )
    canvas.write(path)


def plot_overlaps(found: Overlaps, path: str | os.PathLike[str]) -> None:
    """Draw the overlap matrix with its figures, and under it what chance alone would give.

    Args:
        found: what ``overlaps`` counted.
        path: the PNG to write.

    Raises:
        RuntimeError: matplotlib is not installed.
        FileNotFoundError: no such directory.
    """
    count, longest = len(found.names), width_of(found.names)
    slanted = longest > _SQUARE
    margins = Margins(
        left=0.35 + max(longest, width_of(["by chance"])),
        right=0.75,
        top=0.85,
        bottom=0.25 + 0.64 * longest if slanted else 0.4,
    )
    heights = [count * _SQUARE, 0.8 * _SQUARE]
    canvas = Canvas(margins, count * _SQUARE, heights, gap=0.14)
    main, chance = canvas.axes
    names = [label(name) for name in found.names]
    image = _draw(main, found.shares, peak=1.0, size=9)
    main.set_yticks(range(count), names, fontsize=8)
    main.set_xticks([])
    _draw(chance, [found.densities], peak=1.0, size=9)
    chance.set_yticks([0], ["by chance"], fontsize=8, color=QUIET)
    chance.set_xticks(range(count), names, fontsize=8)
    if slanted:
        chance.tick_params(axis="x", labelrotation=40)
        for tick in chance.get_xticklabels():
            tick.set(ha="right", rotation_mode="anchor")
    canvas.colour_bar(image)
    canvas.titles("What children share", "|row ∩ column| / |row|, in %")
    canvas.write(path)


def _draw_layers(axes: Any, found: Densities, peak: float) -> Any:
    rows: list[list[Share | None]] = [
        [*(found.cells.get((kind, layer)) for layer in found.layers), found.of_kind(kind)]
        for kind in found.kinds
    ]
    last = [found.of_layer(layer) for layer in found.layers]
    image = _draw_shares(axes, [*rows, [*last, sum(last, Share())]], peak)
    axes.set_xticks(range(len(last) + 1), [*map(str, found.layers), "all"], fontsize=8)
    axes.set_yticks(range(len(rows) + 1), [*map(label, found.kinds), "all"], fontsize=8)
    axes.set_xlabel("layer", fontsize=9, color=QUIET)
    axes.axhline(len(rows) - 0.5, color="white", lw=4)
    axes.axvline(len(last) - 0.5, color="white", lw=4)
    return image


def _draw_outside(axes: Any, found: Densities, peak: float, cells_across: int) -> Any:
    """A column of cells as wide as a layer's, with counts beside them."""
    shares = list(found.outside.values())
    image = _draw_shares(axes, [[share] for share in shares], peak)
    axes.set_xlim(-0.5, cells_across - 0.5)
    for at, share in enumerate(shares):
        counts = f"{share.child:,} of {share.numel:,}"
        axes.text(0.7, at, counts, va="center", fontsize=7, color=QUIET)
    axes.set_yticks(range(len(shares)), [label(name) for name in found.outside], fontsize=8)
    axes.set_xticks([])
    if found.layers:
        axes.set_title("outside layers", loc="left", fontsize=9, color=QUIET)
    return image


def _notes(found: Densities) -> str:
    notes = []
    if len(found.cells) < len(found.kinds) * len(found.layers):
        notes.append("grey: no such weight in this layer, or one that trains densely")
    if found.dense_names:
        notes.append(f"{len(found.dense_names)} more parameters train densely")
    return "; ".join(notes)


def _draw_shares(axes: Any, rows: Sequence[Sequence[Share | None]], peak: float) -> Any:
    values = [[cell.density if cell is not None else math.nan for cell in row] for row in rows]
    return _draw(axes, values, peak, size=7)


def _draw(axes: Any, values: Sequence[Sequence[float]], peak: float, size: int) -> Any:
    """Cells coloured from 0 to ``peak``, each with its figure in per cent; NaN is a grey blank."""
    from matplotlib import colormaps

    colours = colormaps[_COLOURS].with_extremes(bad=_ABSENT)
    hundreds = [[100 * value for value in row] for row in values]
    image = axes.imshow(hundreds, cmap=colours, vmin=0, vmax=100 * peak, aspect="auto")
    for at, row in enumerate(values):
        for column, value in enumerate(row):
            if not math.isnan(value):
                ink = "white" if value > 0.55 * peak else INK
                place = {"ha": "center", "va": "center"}
                axes.text(column, at, _figures(value), fontsize=size, color=ink, **place)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for line in range(1, len(values)):
        axes.axhline(line - 0.5, color="white", lw=0.6)
    for line in range(1, len(values[0])):
        axes.axvline(line - 0.5, color="white", lw=0.6)
    return image


def _figures(share: float) -> str:
    """Per cent in two figures, which is what a cell has room for; 100 only for all."""
    hundred = 100 * share
    if hundred >= 9.95:
        return f"{hundred:.0f}" if share == 1 else f"{min(hundred, 99):.0f}"
    return f"{hundred:.1f}" if hundred >= 0.95 else percent(share)
