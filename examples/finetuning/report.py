"""What the comparison says: a table, sentences about the differences, a plot and a JSON file."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from finetuning.children import CHILDREN
from finetuning.comparison import ContenderResult

# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom; the last serves all above it.
_T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
_COLOURS = ("#4c566a", "#2a78b5", "#e07b39", "#5b9a47", "#8e6bb0")
_SCRATCH_COLOUR = "#a9afba"
_QUIET = "#5a6270"


def thread_count() -> str:
    """How many threads torch uses on the CPU, in words."""
    count = torch.get_num_threads()
    return "1 thread" if count == 1 else f"{count} threads"


def table(results: Sequence[ContenderResult]) -> str:
    """A row a contender: learning rate, accuracy with its deviation over seeds, step time, state."""
    header = ("method", "learning rate", "accuracy %", "step ms", "state bytes")
    rows = [
        (
            result.title,
            f"{result.learning_rate:.1e}" + ("*" if result.at_edge_of_grid else ""),
            f"{mean_and_deviation(result.accuracies)}",
            f"{result.step_milliseconds:.2f}",
            f"{result.state_bytes:,}",
        )
        for result in results
    ]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells)

    lines = [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]
    if any(result.at_edge_of_grid for result in results):
        lines.append("* at the edge of its grid: a value outside may be better still")
    return "\n".join(lines)


def verdicts(results: Sequence[ContenderResult]) -> list[str]:
    """Sentences on paired differences: every contender to AdamW, the Fisher child to the two controls."""
    by_method = {result.method: result for result in results if result.pretrained}
    baseline, child = by_method.get("adamw"), by_method.get("ct_d")
    said = []
    if baseline is not None:
        said += [_verdict(result, baseline) for result in results if result is not baseline]
    for control in ("ct_d_lowest", "ct_d_random"):
        if child is not None and control in by_method:
            difference, shown = paired_difference(child.accuracies, by_method[control].accuracies)
            said.append(f"Fisher child against {CHILDREN[control]}: {difference}{shown}")
    return said


def mean_and_deviation(values: Sequence[float]) -> str:
    """The mean, and the standard deviation where there is more than one value."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[str, str]:
    """How much more accurate the first is, seed by seed, and whether the seeds' noise allows to say so."""
    differences = [ours - theirs for ours, theirs in zip(first, second, strict=True)]
    mean = statistics.mean(differences)
    count = len(differences)
    if count < 2:
        return f"{mean:+.1f} points", "; one seed says nothing about noise."
    critical = _T_95[min(count - 1, len(_T_95)) - 1]
    interval = critical * statistics.stdev(differences) / math.sqrt(count)
    text = f"{mean:+.1f} ± {interval:.1f} points (paired over {count} seeds, 95 % interval)"
    if abs(mean) <= interval:
        return text, ": within noise, no difference shown."
    return text, f": {'better' if mean > 0 else 'worse'}, beyond the noise of the seeds."


def save_results(results: Sequence[ContenderResult], about: dict[str, object], path: Path) -> None:
    """Write settings and every measured figure as JSON; step times as their median."""
    rows = []
    for result in results:
        row = asdict(result)
        del row["step_seconds"]
        row |= {
            "learning_rate": result.learning_rate,
            "step_milliseconds": result.step_milliseconds,
        }
        rows.append(row)
    document = {**about, "results": rows}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def save_plot(results: Sequence[ContenderResult], caption: str, path: Path) -> None:
    """Draw accuracy with every seed's point, step time and state bytes, and write a PNG.

    Args:
        results: from top to bottom; those not pretrained are grey.
        caption: a line under the plot.
        path: where to write.
    """
    # Figure and canvas by hand: pyplot would ask the machine for a display.
    figure = Figure(figsize=(11, 1.6 + 0.62 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, time, state = figure.subplots(1, 3, sharey=True, width_ratios=[2.4, 1, 1])
    colours = _colours(results)
    _draw_accuracies(accuracy, results, colours)
    _draw_bars(time, [result.step_milliseconds for result in results], colours, "{:.2f} ms")
    _draw_bars(state, [result.state_bytes / 2**20 for result in results], colours, "{:.1f} MiB")
    accuracy.set_title("test accuracy, %: seeds, mean ± deviation", loc="left", size=10)
    time.set_title("optimizer step, median", loc="left", size=10)
    state.set_title("optimizer state", loc="left", size=10)
    figure.suptitle("Fine-tuning on few examples", x=0.01, ha="left", weight="bold", size=14)
    figure.supxlabel(caption, x=0.01, ha="left", size=9, color=_QUIET)
    figure.savefig(path, dpi=150)


def _verdict(result: ContenderResult, baseline: ContenderResult) -> str:
    if not result.pretrained:
        difference, shown = paired_difference(baseline.accuracies, result.accuracies)
        return f"Pretraining gives {baseline.title} {difference}{shown}"
    difference, shown = paired_difference(result.accuracies, baseline.accuracies)
    return f"{result.title} against {baseline.title}: {difference}{shown}"


def _colours(results: Sequence[ContenderResult]) -> list[str]:
    remaining = iter(_COLOURS)
    return [next(remaining) if result.pretrained else _SCRATCH_COLOUR for result in results]


def draw_seeds(
    axes: Axes, row: int, values: Sequence[float], colour: str, *, dot: float = 30, text: float = 10
) -> None:
    """Draw a row: every seed's value as a point, their mean and deviation behind.

    ``dot``: area of a point; ``text``: size of the mean's number; both in matplotlib's units.
    """
    mean = statistics.mean(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    axes.plot([mean - deviation, mean + deviation], [row, row], color=colour, lw=9, alpha=0.28,
              solid_capstyle="round")  # fmt: skip
    axes.plot([mean, mean], [row - 0.24, row + 0.24], color=colour, lw=2.5)
    # Seeds a little above one another: equal values stay visible.
    heights = [row + 0.05 * (seed % 5 - 2) for seed in range(len(values))]
    axes.scatter(values, heights, s=dot, color=colour, edgecolor="white", zorder=3)
    axes.annotate(f"{mean:.1f}", (mean, row - 0.27), ha="center", va="bottom", size=text,
                  color=colour, weight="bold")  # fmt: skip


def _draw_accuracies(
    axes: Axes, results: Sequence[ContenderResult], colours: Sequence[str]
) -> None:
    for row, (result, colour) in enumerate(zip(results, colours, strict=True)):
        draw_seeds(axes, row, result.accuracies, colour)
    axes.set_yticks(range(len(results)), [result.title for result in results], size=11)
    axes.set_ylim(len(results) - 0.5, -0.62)
    axes.grid(axis="x", color="#e4e7ec")
    _plain(axes)


def _draw_bars(axes: Axes, values: Sequence[float], colours: Sequence[str], label: str) -> None:
    axes.barh(range(len(values)), values, height=0.45, color=colours)
    for row, value in enumerate(values):
        axes.annotate(label.format(value), (value, row), xytext=(5, 0), textcoords="offset points",
                      va="center", size=10, color=_QUIET)  # fmt: skip
    axes.set_xlim(0, 1.45 * max(values))
    axes.set_xticks([])
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
