"""The picture of a Fisher spectrum: a histogram, the child's part of it, and the threshold."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from dataclasses import replace
from typing import Any

from .canvas import QUIET, Canvas, Margins
from .fisher_spectrum import FisherSpectrum, sentences
from .text_table import percent, scientific

_REST, _CHILD, _THRESHOLD = "#c5ccd6", "#2a78b5", "#c2410c"
_MOST_TICKS = 12
_LEAST_BAR = 1 / 500  # of the axis's height: what is lower is less than a pixel


def plot_fisher_spectrum(
    found: FisherSpectrum, path: str | os.PathLike[str], title: str = "child"
) -> None:
    """Draw the histogram of log10(Fisher); elements without Fisher have a bar of their own.

    The axis ends where bars become too low to be seen; a footnote counts the elements beyond its ends.

    Args:
        found: what ``fisher_spectrum`` counted.
        path: the PNG to write.
        title: what the mask is called in the picture.

    Raises:
        RuntimeError: matplotlib is not installed.
        FileNotFoundError: no such directory.
    """
    beyond = sum(found.counts)
    found = _visible(found)
    beyond -= sum(found.counts)
    margins = Margins(left=0.8, right=0.3, top=1.05, bottom=0.65 + 0.2 * bool(beyond))
    canvas = Canvas(margins, 8.0, [3.4])
    (axes,) = canvas.axes
    places = _places(found)
    if places:
        axes.stairs(_percent_of_scope(found.counts, found), places, fill=True, color=_REST)
        axes.stairs(_percent_of_scope(found.child_counts, found), places, fill=True, color=_CHILD)
    start, end = (places[0], places[-1]) if places else (0.0, 1.0)
    zero, half = start - 0.06 * (end - start), 0.02 * (end - start)
    axes.set_xlim(zero - 2 * half if found.zeros else start - half, end + half)
    axes.set_ylim(0, _height(found))
    if found.zeros:
        _draw_zeros(axes, found, zero, half)
    _draw_threshold(axes, found, zero)
    ticks = _decades(found)
    labels = [f"$10^{{{decade}}}$" for decade in ticks]
    if found.zeros:
        ticks, labels = [zero, *ticks], ["0", *labels]
    axes.set_xticks(ticks, labels)
    axes.set_ylabel("elements, % of the scope", fontsize=9, color=QUIET)
    axes.set_xlabel("Fisher information of an element, ten bars a decade", fontsize=9, color=QUIET)
    axes.grid(axis="y", color="#e4e7ec")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=3, color=QUIET)
    axes.spines[["top", "right", "left"]].set_visible(False)
    _legend(axes, found)
    share = percent(beyond / found.numel)
    note = f"{beyond:,} elements ({share} %) lie beyond the ends of the axis" if beyond else ""
    canvas.titles(f"Fisher information and {title}", sentences(found)[0], note)
    canvas.write(path)


def _visible(found: FisherSpectrum) -> FisherSpectrum:
    """The spectrum without bins at its ends that nobody could see; the threshold's bin stays."""
    least = _LEAST_BAR * _height(found) / 100 * found.numel
    seen = [at for at, count in enumerate(found.counts) if count >= least]
    if found.threshold:
        seen.append(bisect_right(found.edges, found.threshold) - 1)
    if not seen:
        return found
    first, last = min(seen), max(seen) + 1
    return replace(
        found,
        edges=found.edges[first : last + 1],
        counts=found.counts[first:last],
        child_counts=found.child_counts[first:last],
    )


def _places(found: FisherSpectrum) -> list[float]:
    """log10 of the edges; the outermost bins reach to the ends of fp32 and are drawn as others are."""
    places = [math.log10(edge) if edge < math.inf else math.inf for edge in found.edges]
    if places:
        places[0] = max(places[0], places[1] - 0.1) if places[1] < math.inf else places[0]
        places[-1] = min(places[-1], places[-2] + 0.1)
    return places


def _percent_of_scope(counts: tuple[int, ...], found: FisherSpectrum) -> list[float]:
    return [100 * count / found.numel for count in counts]


def _height(found: FisherSpectrum) -> float:
    """The top of the axis in per cent: many zeros must not flatten the histogram beside them."""
    tallest = max(found.counts, default=0)
    cut = 0 < tallest < found.zeros / 3
    return 108 * (1.5 * tallest if cut else max(found.zeros, tallest)) / found.numel


def _draw_zeros(axes: Any, found: FisherSpectrum, place: float, half: float) -> None:
    share, top = 100 * found.zeros / found.numel, _height(found)
    axes.bar([place], [share], 2 * half, color=_REST)
    axes.bar([place], [100 * found.child_zeros / found.numel], 2 * half, color=_CHILD)
    text = f"{percent(share / 100)} %" + (" (cut)" if share > top else "")
    axes.annotate(text, (place, min(share, top)), xytext=(0, 3), textcoords="offset points",
                  ha="center", fontsize=8, color=QUIET, zorder=5,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0})  # fmt: skip


def _draw_threshold(axes: Any, found: FisherSpectrum, zero: float) -> None:
    if found.threshold is not None:
        place = math.log10(found.threshold) if found.threshold else zero
        axes.axvline(place, color=_THRESHOLD, lw=1.3, ls="--")


def _decades(found: FisherSpectrum) -> list[float]:
    """Exponents of ten for ticks, few enough to be read."""
    if not found.edges:
        return []
    places = _places(found)
    # Edges are rounded: a hundredth of a decade is more than that.
    low, high = math.ceil(places[0] - 0.01), math.floor(places[-1] + 0.01)
    step = max(1, math.ceil((high - low) / _MOST_TICKS))
    return [decade for decade in range(low, high + 1) if decade % step == 0]


def _legend(axes: Any, found: FisherSpectrum) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(color=_REST, label="not in the child"),
        Patch(color=_CHILD, label="in the child"),
    ]
    if found.threshold is not None:
        text = f"threshold {scientific(found.threshold)}"
        handles.append(Line2D([], [], color=_THRESHOLD, lw=1.3, ls="--", label=text))
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, fontsize=8,
                frameon=False)  # fmt: skip
