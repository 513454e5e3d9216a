"""What the comparison of precisions says: a table, a verdict, sentences, a plot and a JSON file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogFormatter

from childtune_kernels.report.canvas import QUIET, Canvas, Margins
from childtune_kernels.report.text_table import aligned, percent
from finetuning.precision import FP32, NONE, SPLIT, Precision, PrecisionResult
from finetuning.report import mean_and_deviation, paired_difference

_COLOURS = ("#a9afba", "#2a78b5", "#e07b39", "#5b9a47", "#b5334d")


def precision_table(results: Sequence[PrecisionResult], last_steps: int) -> str:
    """A row a precision: accuracy with its deviation over seeds, loss, bytes, and how far weights moved.

    Bytes are those of the weight and of its state. ``moved`` is the 2-norm in per cent of fp32's, it and
    ``unchanged`` are of the weights of the encoder's layers, in full precision.

    Args:
        results: of one learning rate, fp32 among them.
        last_steps: the loss is the mean over so many steps at the end.
    """
    far = result_of(FP32, results).mean_of("moved")
    header = (
        "weights and moments",
        "accuracy %",
        "last loss",
        "bytes a weight",
        "moved %",
        "unchanged %",
    )
    rows = [
        (
            result.precision.title,
            mean_and_deviation(result.accuracies),
            f"{result.last_loss(last_steps):.4f}",
            f"{result.mean_of('weight_bytes'):.0f} + {result.mean_of('state_bytes'):.1f}",
            f"{100 * result.mean_of('moved') / far:.1f}",
            percent(result.mean_of("unchanged")),
        )
        for result in results
    ]
    return aligned([header, *rows])


def within_deviation(reference: Sequence[float], other: Sequence[float]) -> bool:
    """Whether the means differ by no more than the reference's standard deviation.

    Raises:
        statistics.StatisticsError: a reference of one number, which has no deviation.
    """
    difference = statistics.mean(other) - statistics.mean(reference)
    return abs(difference) <= statistics.stdev(reference)


def verdict(results: Sequence[PrecisionResult]) -> str:
    """Whether bf16 with split masters reaches fp32's accuracy, within the deviation of fp32's seeds."""
    reference, split = (result_of(each, results).accuracies for each in (FP32, SPLIT))
    difference = statistics.mean(split) - statistics.mean(reference)
    rate = results[0].learning_rate
    said = f"{SPLIT.title} differs from fp32 by {difference:+.2f} points"
    if len(reference) < 2:
        return f"Verdict at {rate:.1e}: open. {said}; one seed has no deviation to hold it against."
    deviation = f"{statistics.stdev(reference):.2f}, the deviation of fp32's seeds"
    if within_deviation(reference, split):
        return f"Verdict at {rate:.1e}: yes. {said}, within {deviation}."
    return f"Verdict at {rate:.1e}: no. {said}, more than {deviation}."


def differences(results: Sequence[PrecisionResult]) -> list[str]:
    """A sentence for every bf16 precision: its accuracy against fp32's, paired by seed."""
    said = []
    for result in results:
        if result.precision != FP32:
            against = paired_difference(result.accuracies, result_of(FP32, results).accuracies)
            said.append(f"{result.precision.title} against fp32: {''.join(against)}")
    return said


def stagnation(results: Sequence[PrecisionResult], last_steps: int) -> str:
    """How far bf16 without masters gets, and how many of its weights stay where they were."""
    reference, bare = result_of(FP32, results), result_of(NONE, results)
    share = bare.mean_of("moved") / reference.mean_of("moved")
    return (
        f"{NONE.title} at learning rate {bare.learning_rate:.1e}: {percent(bare.mean_of('unchanged'))} % of "
        f"the layers' weights end as they began (fp32: {percent(reference.mean_of('unchanged'))} %), all "
        f"together move {share:.0%} as far as in fp32; last loss {bare.last_loss(last_steps):.4f} "
        f"(fp32: {reference.last_loss(last_steps):.4f})."
    )


def result_of(precision: Precision, results: Sequence[PrecisionResult]) -> PrecisionResult:
    """The result of this precision."""
    return next(result for result in results if result.precision == precision)


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Means over ``width`` neighbours, of each place from the first that has so many before it."""
    return [statistics.fmean(values[end - width : end]) for end in range(width, len(values) + 1)]


def save_loss_plot(
    found: Sequence[Sequence[PrecisionResult]], width: int, caption: str, path: Path
) -> None:
    """Draw the training loss by step, axes for each learning rate, and write a PNG.

    Args:
        found: what ``compare_precisions`` gave.
        width: steps that are averaged.
        caption: a line under the plot.
        path: where to write.
    """
    canvas = Canvas(Margins(0.75, 0.25, 1.0, 0.85), 7.4, [2.7] * len(found), gap=0.75)
    for axes, results in zip(canvas.axes, found, strict=True):
        _draw_losses(axes, results, width)
    canvas.axes[-1].set_xlabel("step", fontsize=9, color=QUIET)
    canvas.titles(
        "Fine-tuning in bf16, by how the weights are kept",
        f"training loss, mean over {width} steps and all seeds; test accuracy, mean ± deviation",
        caption,
    )
    canvas.write(path)


def save_precisions(
    found: Sequence[Sequence[PrecisionResult]], about: dict[str, object], path: Path
) -> None:
    """Write settings and every measured figure as JSON."""
    rows = [
        {
            "precision": result.precision.title,
            "learning_rate": result.learning_rate,
            "runs": [asdict(run) for run in result.runs],
        }
        for results in found
        for result in results
    ]
    path.write_text(json.dumps({**about, "results": rows}, indent=2) + "\n", encoding="utf-8")


def _draw_losses(axes: Any, results: Sequence[PrecisionResult], width: int) -> None:
    for result, colour in zip(results, _COLOURS, strict=True):
        by_step = [
            statistics.fmean(losses)
            for losses in zip(*(r.losses for r in result.runs), strict=True)
        ]
        values = smoothed(by_step, min(width, len(by_step)))
        first = len(by_step) - len(values) + 1
        # What matches fp32 lies upon its line: that one is broad, so that both are seen.
        broad = result.precision == FP32
        axes.plot(
            range(first, len(by_step) + 1),
            values,
            color=colour,
            lw=5 if broad else 1.3,
            label=f"{result.precision.title}: {mean_and_deviation(result.accuracies)} %",
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    axes.set_title(
        f"learning rate {results[0].learning_rate:.1e}", loc="left", fontsize=10, color=QUIET
    )
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    axes.grid(color="#e4e7ec")
    axes.set_axisbelow(True)
    axes.tick_params(length=0, which="both", labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
