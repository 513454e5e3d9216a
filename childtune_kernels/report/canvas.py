"""What every picture shares: sizes in inches, titles, colours, and a PNG that is written whole.

matplotlib (the extra ``plots``) is imported when something is drawn.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REMEDY = "pictures need matplotlib, which is not installed: pip install matplotlib"
QUIET, INK = "#5a6270", "#1c2430"

_DPI = 150
_LETTER = 0.068  # inches of a letter in 8 points, a little more than most
_LONGEST_LABEL = 60
_LEAST_WIDTH = 5.2  # inches, for the titles


def check_available() -> None:
    """Refuse before any work where no picture can be drawn.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeError(REMEDY) from error


def label(name: str) -> str:
    """The name, its middle left out where it is too long to stand beside a picture."""
    if len(name) <= _LONGEST_LABEL:
        return name
    half = _LONGEST_LABEL // 2
    return f"{name[: half - 1]}…{name[-half:]}"


def width_of(names: Sequence[str]) -> float:
    """Inches that the longest of the names takes as a label of 8 points."""
    return _LETTER * max((len(label(name)) for name in names), default=0)


@dataclass(frozen=True)
class Margins:
    """Inches around the axes."""

    left: float
    right: float
    top: float
    bottom: float


class Canvas:
    """A figure with axes under one another, all of one width.

    Attributes:
        figure: matplotlib's figure.
        axes: its axes, from the top.
    """

    def __init__(
        self, margins: Margins, width: float, heights: Sequence[float], gap: float = 0.0
    ) -> None:
        """Lay out the axes.

        Args:
            margins: around all axes.
            width: inches of each axes.
            heights: inches of each axes, from the top.
            gap: inches between them.

        Raises:
            RuntimeError: matplotlib is not installed.
        """
        check_available()
        # Figure and canvas by hand: pyplot would ask the machine for a display.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        across = max(margins.left + width + margins.right, _LEAST_WIDTH)
        down = margins.top + sum(heights) + gap * (len(heights) - 1) + margins.bottom
        self.figure: Any = Figure(figsize=(across, down), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.axes: list[Any] = []
        top = down - margins.top
        for height in heights:
            place = (margins.left / across, (top - height) / down, width / across, height / down)
            self.axes.append(self.figure.add_axes(place))
            top -= height + gap

    def colour_bar(self, image: Any) -> None:
        """A colour bar in per cent beside the first axes."""
        box = self.axes[0].get_position()
        across, down = self.figure.get_size_inches()
        height = min(box.height, 2.4 / down)
        place = (box.x1 + 0.15 / across, box.y1 - height, 0.13 / across, height)
        bar = self.figure.colorbar(image, cax=self.figure.add_axes(place))
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8, length=0)
        bar.ax.set_title("%", fontsize=8, color=QUIET, pad=5)

    def titles(self, title: str, subtitle: str, footnote: str = "") -> None:
        """What the picture shows, in what unit, and what else must be known."""
        across, down = self.figure.get_size_inches()
        left = 0.15 / across
        text = self.figure.text
        text(left, 1 - 0.14 / down, title, va="top", fontsize=13, weight="bold", color=INK)
        text(left, 1 - 0.42 / down, subtitle, va="top", fontsize=9, color=QUIET)
        text(left, 0.1 / down, footnote, va="bottom", fontsize=8, color=QUIET)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a PNG.

        Raises:
            FileNotFoundError: no such directory.
        """
        target = Path(path)
        if not target.parent.is_dir():
            raise FileNotFoundError(f"{target.parent} is no directory; make it first")
        # In memory first: a failure while drawing leaves no half-written picture.
        drawn = io.BytesIO()
        self.figure.savefig(drawn, format="png")
        target.write_bytes(drawn.getvalue())
