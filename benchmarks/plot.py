"""The picture of a result: how long a step takes by variant, a panel a case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .cases import BYTES_PER_PARAMETER, CASES, Case
from .variants import variants_of

_COLOURS = {"torch": "#6b7280", "unfused": "#c2410c", "childtune": "#1d4ed8"}


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the cases of a result side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["axes.formatter.min_exponent"] = 5  # 10, not 10¹

    records = result["records"]
    cases = [case for case in CASES.values() if any(r["case"] == case.name for r in records)]
    heights = [sum(r["case"] == case.name for r in records) for case in cases]
    figure, axes = pyplot.subplots(
        len(cases),
        1,
        figsize=(8, 0.8 * len(cases) + 0.27 * sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for case, axis in zip(cases, axes[:, 0], strict=True):
        _draw(axis, case, {r["variant"]: r for r in records if r["case"] == case.name})
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw(axis: Any, case: Case, records: dict[str, dict[str, Any]]) -> None:
    """Dots with quartiles on a logarithmic axis: unfused steps are tens of times slower."""
    shown = [variant for variant in variants_of(case) if variant.name in records]
    by_tensor = case.limit == "tensors"
    divisor = case.tensors * 1e-6 if by_tensor else case.parameters * 1e-9
    for height, variant in enumerate(shown):
        record = records[variant.name]
        median = record["seconds"] / divisor
        low, high = (quartile / divisor for quartile in record["seconds_quartiles"])
        colour = _COLOURS[variant.family]
        axis.plot([low, high], [height, height], color=colour, linewidth=2)
        axis.plot([median], [height], "o", color=colour)
        axis.annotate(
            f"{median:.3g}",
            (median, height),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color=colour,
        )
    if not by_tensor:
        copy = next(iter(records.values()))["copy_bytes_per_second"]
        axis.axvline(
            BYTES_PER_PARAMETER / copy * 1e9,
            color="#9ca3af",
            linestyle="--",
            linewidth=1,
            label=f"{BYTES_PER_PARAMETER} bytes at the speed of a copy",
        )
        axis.legend(loc="lower right", fontsize=7, frameon=False)
    axis.set_xscale("log")
    axis.margins(x=0.08)
    axis.set_yticks(range(len(shown)), [variant.title for variant in shown], fontsize=8)
    axis.set_ylim(len(shown) - 0.4, -0.8)
    axis.set_title(case.title, fontsize=10, loc="left")
    axis.set_xlabel("µs a tensor" if by_tensor else "ns a parameter", fontsize=8)
    axis.tick_params(axis="x", which="both", labelsize=8)
    axis.grid(axis="x", which="both", alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)
