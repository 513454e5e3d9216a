"""What the grid says: a table over all tasks, one of every p, sentences on differences, and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetuning.report import draw_seeds, mean_and_deviation, paired_difference
from glue_tasks.grid import TITLES, Configuration, Grid, Run, Settings
from glue_tasks.results import Scores

_COLOURS = {"vanilla": "#4c566a", "ct_f": "#2a78b5", "ct_f_scaled": "#5b9a47", "ct_d": "#e07b39"}


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Args:
        title: its head.
        task: whose runs.
        choose, show: the score that decides between configurations, and the one that is reported.
    """

    title: str
    task: str
    choose: str
    show: str


@dataclass(frozen=True)
class Entry:
    """A configuration's figures, one a seed."""

    configuration: Configuration
    figures: tuple[float, ...]


@dataclass(frozen=True)
class MethodResult:
    """What came out for a method in a column.

    Args:
        method: a key of ``TITLES``.
        tried: number of configurations that it was chosen from.
        chosen: the one that is best on the choosing score.
        by_share: for each p the best of its learning rates.
    """

    method: str
    tried: int
    chosen: Entry
    by_share: tuple[Entry, ...]


def columns_of(settings: dict[str, Settings], hold_out: bool) -> list[Column]:
    """The columns: a task each, and after it the sets of a transfer."""
    choose, show = ("first_half", "second_half") if hold_out else ("validation", "validation")
    columns = []
    for task, own in settings.items():
        columns.append(Column(task, task, choose, show))
        columns += [
            Column(f"{task} > {name}", task, choose, f"on {name}") for name, _ in own.evaluate_on
        ]
    return columns


def results_of(
    column: Column, grid: Grid, settings: Settings, scores: dict[str, Scores]
) -> list[MethodResult]:
    """Choose each method's configuration; those whose runs are not all finished are left out."""
    found = []
    for method in grid.methods:
        finished = []
        for configuration in grid.configurations(method):
            runs = [Run(column.task, configuration, seed, settings) for seed in range(grid.seeds)]
            if all(run.key in scores for run in runs):
                finished.append((configuration, [scores[run.key] for run in runs]))
        if not finished:
            continue
        shares = dict.fromkeys(configuration.reserve_p for configuration, _ in finished)
        by_share = [
            _best([pair for pair in finished if pair[0].reserve_p == share], column)
            for share in shares
        ]
        found.append(MethodResult(method, len(finished), _best(finished, column), tuple(by_share)))
    return found


def summary(columns: dict[str, list[MethodResult]]) -> str:
    """A row a method, with the number of configurations tried: mean and deviation over seeds."""
    methods = dict.fromkeys(each.method for results in columns.values() for each in results)
    rows = [["method", "tried", *columns, *(["average"] if len(columns) > 1 else [])]]
    for method in methods:
        own = [
            next((each for each in results if each.method == method), None)
            for results in columns.values()
        ]
        tried = dict.fromkeys(str(each.tried) for each in own if each is not None)
        cells = ["" if each is None else mean_and_deviation(each.chosen.figures) for each in own]
        row = [TITLES[method], "/".join(tried), *cells]
        if len(columns) > 1:
            means = [statistics.mean(each.chosen.figures) for each in own if each is not None]
            row.append(f"{statistics.mean(means):.1f}" if len(means) == len(own) else "")
        rows.append(row)
    return _aligned(rows)


def details(results: Sequence[MethodResult]) -> str:
    """A row for each method and p at its best learning rate; `*` marks the method's choice."""
    rows = [["", "method", "p", "rate", "mean", "best", "deviation", "seeds"]]
    for result in results:
        for entry in result.by_share:
            chosen, figures = entry.configuration, entry.figures
            rows.append(
                [
                    "*" if entry == result.chosen else "",
                    TITLES[chosen.method],
                    "" if chosen.reserve_p is None else f"{chosen.reserve_p:g}",
                    f"{chosen.learning_rate:g}",
                    f"{statistics.mean(figures):.1f}",
                    f"{max(figures):.1f}",
                    f"{statistics.stdev(figures):.1f}" if len(figures) > 1 else "",
                    str(len(figures)),
                ]
            )
    return _aligned(rows)


def verdicts(results: Sequence[MethodResult]) -> list[str]:
    """A sentence on each method's difference to vanilla, paired by seed."""
    baseline = next((each for each in results if each.method == "vanilla"), None)
    said = []
    for result in results:
        if baseline is not None and result is not baseline:
            text, shown = paired_difference(result.chosen.figures, baseline.chosen.figures)
            said.append(f"{TITLES[result.method]} against vanilla: {text}{shown}")
    return said


def caveats(results: Sequence[MethodResult], hold_out: bool) -> list[str]:
    """What a reader must know before quoting a figure."""
    said = ["GLUE's test labels are not public: these are figures of validation sets."]
    if hold_out:
        said.append(
            "Configurations are chosen on one half of the validation set, reported on the other."
        )
    else:
        said.append(
            "Configurations are chosen on the validation set that is reported, so every figure is too high, "
            "the more so the more were tried; --hold-out chooses on one half of it and reports the other."
        )
    tried = {result.method: result.tried for result in results}
    if len(set(tried.values())) > 1:
        counts = ", ".join(f"{TITLES[method]} {count}" for method, count in tried.items())
        said.append(
            f"Configurations tried: {counts}. --vanilla-learning-rates gives vanilla as many as the others."
        )
    return said


def save_plot(columns: dict[str, list[MethodResult]], caption: str, path: Path) -> None:
    """Draw a panel a column: every seed's figure, mean and deviation of each method; write a PNG."""
    # Figure and canvas by hand: pyplot would ask the machine for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = max(len(results) for results in columns.values())
    size = (2 + 3.2 * len(columns), 1.5 + 0.6 * rows)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for axes, (title, results) in zip(panels, columns.items(), strict=True):
        for row, result in enumerate(results):
            colour = _COLOURS[result.method]
            draw_seeds(axes, row, result.chosen.figures, colour, dot=22, text=9)
        names = [_name_on_plot(result) for result in results]
        axes.set_yticks(range(len(results)), names, size=9)
        axes.set_ylim(len(results) - 0.5, -0.62)
        axes.set_title(title, size=11)
        axes.grid(axis="x", color="#e4e7ec")
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_visible(False)
    figure.supxlabel(caption, size=8, color="#5a6270")
    figure.savefig(path, dpi=130)


def _name_on_plot(result: MethodResult) -> str:
    share = result.chosen.configuration.reserve_p
    name = {"ct_f_scaled": "CT_F, scaled"}.get(result.method, TITLES[result.method])
    return name if share is None else f"{name} ({share:g})"


def _best(among: Sequence[tuple[Configuration, list[Scores]]], column: Column) -> Entry:
    # Of equal ones the first: the smallest p and rate where the options give them so.
    means = [statistics.mean(row[column.choose] for row in rows) for _, rows in among]
    chosen, rows = among[means.index(max(means))]
    return Entry(chosen, tuple(row[column.show] for row in rows))


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if place > 1 else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
