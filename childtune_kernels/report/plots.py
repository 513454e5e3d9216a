"""Pictures of masks, as PNG files; matplotlib (the extra ``plots``) is imported when one is drawn."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .densities import Densities, Share
from .fisher_spectrum import FisherSpectrum, sentences
from .overlaps import Overlaps
from .text_table import percent

REMEDY = "pictures need matplotlib, which is not installed: pip install matplotlib"
# Light to dark in blues and greens: the order survives a black-and-white printer.
_COLOURS = "YlGnBu"
_ABSENT, _QUIET, _INK = "#eceef1", "#5a6270", "#1c2430"
_REST, _CHILD, _LINE = "#c5ccd6", "#2a78b5", "#c2410c"
_DPI = 150
_CELL_WIDTH, _CELL_HEIGHT = 0.40, 0.27  # inches
_LETTER = 0.075  # inches of a letter in 8 points, a little more than most
_LONGEST_NAME = 44


def check_available() -> None:
    """Refuse before any work where no picture can be drawn.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeError(REMEDY) from error


def plot_densities(found: Densities, path: str | os.PathLike[str], title: str = "child") -> None:
    """Draw a heat map of density, kinds of weight by layers, and the parameters outside layers.

    Args:
        found: what ``densities`` counted.
        path: the PNG to write.
        title: what the mask is called in the picture.

    Raises:
        RuntimeError: matplotlib is not installed.
        ValueError: no parameter has mask bits.
        FileNotFoundError: no such directory.
    """
    if not found.cells and not found.outside:
        raise ValueError("no parameter has mask bits: there is no density to draw")
    rows, columns = len(found.kinds) + 1, len(found.layers) + 1
    names = [*found.kinds, *found.outside]
    heights = [rows * _CELL_HEIGHT] if found.layers else []
    heights += [len(found.outside) * _CELL_HEIGHT] if found.outside else []
    width = max(columns, 8) * _CELL_WIDTH
    figure, write = _figure(
        left=_width_of(names, 0.35), right=0.95, top=0.72,
        bottom=(0.2 if found.outside else 0.55) + 0.25 * bool(found.dense_names),
        width=width, heights=heights, gap=0.75 if found.layers else 0.4,
    )  # fmt: skip
    axes = iter(figure.axes)
    every = [*found.cells.values(), *found.outside.values()]
    peak = max((s.density for s in every if s.numel), default=0.0) or 1.0
    if found.layers:
        main = next(axes)
        grid = [[found.cells.get((kind, layer)) for layer in found.layers] for kind in found.kinds]
        for kind, row in zip(found.kinds, grid, strict=True):
            row.append(found.of_kind(kind))
        every_layer = [found.of_layer(layer) for layer in found.layers]
        image = _draw_shares(main, [*grid, [*every_layer, sum(every_layer, Share())]], peak)
        main.set_xticks(range(columns), [*map(str, found.layers), "all"], fontsize=8)
        main.set_yticks(range(rows), [*map(_short, found.kinds), "all"], fontsize=8)
        main.set_xlabel("layer", fontsize=9, color=_QUIET)
        for line in (main.axhline, main.axvline):
            line((rows if line == main.axhline else columns) - 1.5, color="white", lw=4)
    if found.outside:
        below = next(axes)
        image = _draw_outside(below, found, peak, width / _CELL_WIDTH)
    _colour_bar(figure, image, "density, %")
    total = found.total
    _titles(figure, f"Density of {title}",
            f"{total.child:,} of {total.numel:,} elements in scope, {percent(total.density)} %; "
            "figures in %")  # fmt: skip
    if found.dense_names:
        _footnote(figure, f"{len(found.dense_names)} more parameters train densely")
    write(path)


def plot_overlaps(found: Overlaps, path: str | os.PathLike[str]) -> None:
    """Draw the overlap matrix with its figures, and under it what chance alone would give.

    Raises:
        RuntimeError: matplotlib is not installed.
        FileNotFoundError: no such directory.
    """
    count, size = len(found.names), 0.52
    longest = _width_of(found.names, 0.0)
    figure, write = _figure(
        left=max(_width_of(found.names, 0.35), 1.2), right=0.95, top=0.72,
        bottom=0.25 + 0.64 * longest, width=max(count * size, 2.6),
        heights=[count * size, 0.8 * size], gap=0.16,
    )  # fmt: skip
    main, chance = figure.axes
    image = _draw(main, found.shares, 1.0, 9)
    main.set_yticks(range(count), map(_short, found.names), fontsize=8)
    main.set_xticks([])
    _draw(chance, [found.densities], 1.0, 9)
    chance.set_yticks([0], ["by chance"], fontsize=8, color=_QUIET)
    chance.set_xticks(range(count), map(_short, found.names), fontsize=8, rotation=40, ha="right",
                      rotation_mode="anchor")  # fmt: skip
    _colour_bar(figure, image, "|row ∩ column| / |row|, %")
    _titles(figure, "What children share", "share of the row's child in the column's, %")
    write(path)


def plot_fisher_spectrum(
    found: FisherSpectrum, path: str | os.PathLike[str], title: str = "child"
) -> None:
    """Draw the histogram of Fisher information, the child's part of it and its threshold.

    Args:
        found: what ``fisher_spectrum`` counted.
        path: the PNG to write.
        title: what the mask is called in the picture.

    Raises:
        RuntimeError: matplotlib is not installed.
        FileNotFoundError: no such directory.
    """
    figure, write = _figure(left=0.8, right=0.3, top=1.05, bottom=0.65, width=8.0, heights=[3.4])
    (axes,) = figure.axes
    first = math.log10(found.edges[0]) if found.edges else 0.0
    # The first edge may be the smallest fp32 number: that one bin is drawn as wide as the others.
    places = [max(math.log10(edge), math.log10(found.edges[1]) - 0.1) if edge < math.inf
              else math.log10(found.edges[-2]) + 0.1 for edge in found.edges]  # fmt: skip
    shares = [100 * count / found.numel for count in found.counts]
    inside = [100 * count / found.numel for count in found.child_counts]
    if places:
        first = places[0]
        axes.stairs(shares, places, fill=True, color=_REST, label="not in the child")
        axes.stairs(inside, places, fill=True, color=_CHILD, label="in the child")
    last = places[-1] if places else 1.0
    _draw_zeros(axes, found, first - 0.07 * max(last - first, 1.0), 0.02 * max(last - first, 1.0))
    if found.threshold:
        axes.axvline(math.log10(found.threshold), color=_LINE, lw=1.3, ls="--",
                     label=f"threshold {found.threshold:.3g}")  # fmt: skip
    axes.set_ylabel("elements, % of the scope", fontsize=9, color=_QUIET)
    axes.set_xlabel("Fisher information of an element, logarithmic", fontsize=9, color=_QUIET)
    axes.grid(axis="y", color="#e4e7ec")
    axes.set_axisbelow(True)
    axes.set_ylim(0, _height_of(found))
    axes.tick_params(labelsize=8, length=3, color=_QUIET)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, fontsize=8, frameon=False)
    _titles(figure, f"Fisher information and {title}", sentences(found)[0])
    write(path)


def _draw_outside(axes: Any, found: Densities, peak: float, cells_wide: float) -> Any:
    """A column of cells as wide as a layer's, with counts beside them."""
    shares = list(found.outside.values())
    image = _draw_shares(axes, [[share] for share in shares], peak)
    axes.set_xlim(-0.5, cells_wide - 0.5)
    for at, share in enumerate(shares):
        axes.text(0.7, at, f"{share.child:,} of {share.numel:,}", va="center", fontsize=7,
                  color=_QUIET)  # fmt: skip
    axes.set_yticks(range(len(shares)), map(_short, found.outside), fontsize=8)
    axes.set_xticks([])
    title = "outside layers" if found.layers else "parameters"
    axes.set_title(title, loc="left", fontsize=9, color=_QUIET)
    return image


def _draw_zeros(axes: Any, found: FisherSpectrum, place: float, half: float) -> None:
    """A bar of its own for elements without Fisher, and ticks at decades for the others."""
    ticks: list[float] = []
    if found.edges:
        low = math.ceil(math.log10(max(found.edges[0], 1e-39)) - 0.01)
        high = math.floor(math.log10(min(found.edges[-1], 1e39)) + 0.01)
        step = max(1, math.ceil((high - low) / 12))
        ticks = [decade for decade in range(low, high + 1) if decade % step == 0]
    labels = [f"$10^{{{decade}}}$" for decade in ticks]
    if found.zeros:
        share, inside = found.zeros / found.numel, found.child_zeros / found.numel
        axes.bar([place], [100 * share], 2 * half, color=_REST)
        axes.bar([place], [100 * inside], 2 * half, color=_CHILD)
        top = min(100 * share, _height_of(found))
        cut = " (cut)" if top < 100 * share else ""
        axes.annotate(f"{percent(share)} %{cut}", (place, top), xytext=(0, 2), fontsize=8,
                      textcoords="offset points", ha="center", color=_QUIET)  # fmt: skip
        ticks, labels = [place, *ticks], ["0", *labels]
    axes.set_xticks(ticks, labels)


def _height_of(found: FisherSpectrum) -> float:
    """The top of the axis, in per cent: many zeros must not flatten the histogram beside them."""
    tallest = max(found.counts, default=0)
    top = min(found.zeros, 2 * tallest) if tallest else found.zeros
    return 108 * max(top, tallest) / found.numel


def _draw_shares(axes: Any, grid: Sequence[Sequence[Share | None]], peak: float) -> Any:
    values = [
        [cell.density if cell is not None and cell.numel else math.nan for cell in row]
        for row in grid
    ]
    return _draw(axes, values, peak, 7)


def _draw(axes: Any, values: Sequence[Sequence[float]], peak: float, size: int) -> Any:
    """Cells coloured from 0 to ``peak``, each with its figure in per cent; NaN is a grey blank."""
    from matplotlib import colormaps

    colours = colormaps[_COLOURS].with_extremes(bad=_ABSENT)
    hundreds = [[100 * value for value in row] for row in values]
    image = axes.imshow(hundreds, cmap=colours, vmin=0, vmax=100 * peak, aspect="auto")
    for at, row in enumerate(values):
        for column, value in enumerate(row):
            if not math.isnan(value):
                axes.text(column, at, _figures(value), ha="center", va="center", fontsize=size,
                          color="white" if value > 0.55 * peak else _INK)  # fmt: skip
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for line in range(1, len(values)):
        axes.axhline(line - 0.5, color="white", lw=0.6)
    for line in range(1, len(values[0])):
        axes.axvline(line - 0.5, color="white", lw=0.6)
    return image


def _figures(share: float) -> str:
    """Per cent in two figures, which is what a cell has room for."""
    hundred = 100 * share
    if hundred >= 9.95 or hundred == 0:
        return f"{hundred:.0f}"
    return f"{hundred:.1f}" if hundred >= 0.95 else percent(share)


def _figure(
    *, left: float, right: float, top: float, bottom: float, width: float,
    heights: Sequence[float], gap: float = 0.0,
) -> tuple[Any, Callable[[str | os.PathLike[str]], None]]:  # fmt: skip
    """A figure with axes under one another, all sizes in inches, and what writes it."""
    check_available()
    # Figure and canvas by hand: pyplot would ask the machine for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (
        left + width + right,
        top + sum(heights) + gap * (len(heights) - 1) + bottom,
    )
    figure = Figure(figsize=size, facecolor="white")
    FigureCanvasAgg(figure)
    edge = size[1] - top
    for height in heights:
        figure.add_axes(
            (left / size[0], (edge - height) / size[1], width / size[0], height / size[1])
        )
        edge -= height + gap

    def write(path: str | os.PathLike[str]) -> None:
        target = Path(path)
        if not target.parent.is_dir():
            raise FileNotFoundError(f"{target.parent} is no directory; make it first")
        # In memory first: a failure while drawing leaves no half-written picture.
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=_DPI)
        target.write_bytes(drawn.getvalue())

    return figure, write


def _colour_bar(figure: Any, image: Any, title: str) -> None:
    """A colour bar beside the first axes, of a size that does not depend on theirs."""
    box = figure.axes[0].get_position()
    width, height = figure.get_size_inches()
    tall = min(box.height, 2.4 / height)
    place = (box.x1 + 0.15 / width, box.y1 - tall, 0.13 / width, tall)
    bar = figure.colorbar(image, cax=figure.add_axes(place))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=0)
    bar.set_label(title, fontsize=8, color=_QUIET)


def _titles(figure: Any, title: str, subtitle: str) -> None:
    width, height = figure.get_size_inches()
    figure.text(0.15 / width, 1 - 0.14 / height, title, va="top", fontsize=13, weight="bold",
                color=_INK)  # fmt: skip
    figure.text(0.15 / width, 1 - 0.42 / height, subtitle, va="top", fontsize=9, color=_QUIET)


def _footnote(figure: Any, text: str) -> None:
    width, height = figure.get_size_inches()
    figure.text(0.15 / width, 0.1 / height, text, va="bottom", fontsize=8, color=_QUIET)


def _width_of(names: Sequence[str], margin: float) -> float:
    """Inches that the longest of the names takes as a label."""
    return margin + _LETTER * max((len(_short(name)) for name in names), default=0)


def _short(name: str) -> str:
    """The name, its middle left out where it is too long for a label."""
    if len(name) <= _LONGEST_NAME:
        return name
    half = _LONGEST_NAME // 2
    return f"{name[: half - 1]}…{name[-half:]}"
