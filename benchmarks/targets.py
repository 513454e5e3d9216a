"""What the package means to reach on a CPU; shown as met or missed, never a failing test."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from childtune_kernels.rounds import MINIMAL_ROUNDS

from .cases import BERT_BASE, BERT_LARGE, LARGE_TENSOR, LARGE_TENSOR_APART, SMALL_TENSORS
from .contests import checkpoint, clipping, fisher, selection
from .variants import (
    CT_D,
    CT_D_RUNS,
    CT_D_SPARSE,
    CT_D_SPARSEST,
    CT_D_VARIANTS,
    CT_F,
    CT_F_SPLIT,
    PLAIN,
    Variant,
)

_MIB = 2**20
# What a clock has a part in, and so the number of rounds.
_TIMED = ("seconds", "ratio", "speedup", "rate", "share_of_copy", "host")


@dataclass(frozen=True)
class Target:
    """A bound on one figure of one variant on one case, or of one competitor in one contest."""

    case: str
    variant: str
    measure: str
    bound: float
    at_least: bool = False

    def verdict(self, record: dict[str, Any] | None) -> dict[str, Any]:
        """The target, the figure, and whether it is met."""
        value = None if record is None else record.get(self.measure)
        if record is None or value is None:
            verdict = "not measured"
        elif record["rounds"] < MINIMAL_ROUNDS and self.measure.startswith(_TIMED):
            verdict = f"fewer than {MINIMAL_ROUNDS} rounds"
        else:
            met = value >= self.bound if self.at_least else value <= self.bound
            verdict = "met" if met else "missed"
        return {
            "case": self.case,
            "variant": self.variant,
            "measure": self.measure,
            "bound": self.bound,
            "at_least": self.at_least,
            "value": value,
            "verdict": verdict,
        }


def _grouped(variant: Variant) -> str:
    return variant.with_group_each().name


def clipping_targets(contest: str) -> tuple[Target, Target]:
    """What clipping and a loss scale may cost, wherever it is measured."""
    return (
        Target(contest, clipping.CLIPPED.name, clipping.TO_STEP_AND_READ.measure, 1.10),
        Target(contest, clipping.SCALED.name, clipping.TO_STEP.measure, 1.02),
    )


_LARGE, _BASE = LARGE_TENSOR.name, BERT_BASE.name
_SMALL = SMALL_TENSORS.name
_SELECTION = selection.BERT_LARGE.name

CPU_TARGETS = (
    Target(_LARGE, CT_F.name, "ratio_to_fused", 1.10),
    Target(LARGE_TENSOR_APART.name, CT_F.name, "ratio_to_fused", 1.10),
    Target(_BASE, CT_F.name, "ratio_to_fused", 1.10),
    *(
        Target(case.name, CT_F_SPLIT.name, "ratio_to_fused", 1.25)
        for case in (LARGE_TENSOR, LARGE_TENSOR_APART)
    ),
    Target(_LARGE, CT_F.name, "speedup_over_unfused", 25, at_least=True),
    Target(_BASE, CT_F.name, "speedup_over_unfused", 25, at_least=True),
    *(
        Target(case.name, variant.name, "ratio_to_fused", bound)
        for case in (LARGE_TENSOR, LARGE_TENSOR_APART)
        for variant, bound in (
            (CT_D, 0.80),
            (CT_D_SPARSE, 0.62),
            (CT_D_SPARSEST, 0.32),
            (CT_D_RUNS, 0.22),
        )
    ),
    Target(_LARGE, CT_D.name, "state_bytes_per_parameter", 8 * CT_D.kept + 0.26),
    *(
        Target(_LARGE, variant.name, "state_bytes_per_parameter", 10 * variant.kept + 0.01)
        for variant in (CT_D_SPARSE, CT_D_SPARSEST, CT_D_RUNS)
    ),
    Target(_SMALL, PLAIN.name, "ratio_to_fused", 0.40),
    Target(_SMALL, CT_F.name, "ratio_to_fused", 0.40),
    Target(_SMALL, _grouped(PLAIN), "ratio_to_one_group", 1.5),
    Target(_SMALL, _grouped(CT_F), "ratio_to_one_group", 1.5),
    *(
        Target(case.name, variant.name, "peak_total_bytes", _MIB)
        for case in (LARGE_TENSOR, LARGE_TENSOR_APART, BERT_BASE, BERT_LARGE, SMALL_TENSORS)
        for variant in (PLAIN, CT_F, *CT_D_VARIANTS)
    ),
    Target(_SELECTION, selection.SELECT.name, "seconds", 0.7),
    Target(_SELECTION, selection.SELECT.name, "peak_total_bytes", 50e6),
    Target(selection.OTHERS.name, selection.SELECT.name, "ratio_to_kthvalue", 0.25),
    Target(
        selection.OTHERS.name,
        selection.SELECT.name,
        "speedup_over_percentile",
        20,
        at_least=True,
    ),
    *(
        Target(contest.name, fisher.OURS.name, "rate_to_add", 0.8, at_least=True)
        for contest in fisher.CONTESTS
    ),
    *(target for contest in clipping.CONTESTS for target in clipping_targets(contest.name)),
    Target(checkpoint.BASE.name, checkpoint.TENTH.name, "share_of_weights", 0.17),
)
TARGETS: dict[str, tuple[Target, ...]] = {"cpu": CPU_TARGETS}


def verdicts(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets of the records' devices, for the cases that were measured."""
    known = {(r["device"], r["case"], r["variant"]): r for r in records}
    cases = {(device, case) for device, case, _ in known}
    return [
        target.verdict(known.get((device, target.case, target.variant)))
        for device, targets in TARGETS.items()
        for target in targets
        if (device, target.case) in cases
    ]


def lines(found: Iterable[dict[str, Any]]) -> Iterator[str]:
    """One line of text a verdict."""
    for item in found:
        bound = f"{'≥' if item['at_least'] else '≤'} {figure(item['measure'], item['bound'])}"
        value = "-" if item["value"] is None else figure(item["measure"], item["value"])
        name = title(item["measure"])
        yield (
            f"{item['case']:<23}{item['variant']:<25}{name:<22}{value:>10}   {bound:<12}"
            f"{item['verdict']}"
        )


def table(found: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Lines of a Markdown table, a row a verdict."""
    yield "| case | variant | figure | bound | measured | |"
    yield "|---|---|---|---:|---:|---|"
    for item in found:
        sign = "≥" if item["at_least"] else "≤"
        measured = "" if item["value"] is None else figure(item["measure"], item["value"])
        yield (
            f"| {item['case']} | {item['variant']} | {title(item['measure'])} | "
            f"{sign} {figure(item['measure'], item['bound'])} | {measured} | {item['verdict']} |"
        )


_TITLES = {
    "ratio_to_fused": "time / torch fused",
    "speedup_over_fused": "torch fused / time",
    "speedup_over_unfused": "unfused / time",
    "ratio_to_plain": "time / plain",
    "ratio_to_one_group": "time / one group",
    "peak_total_bytes": "extra memory",
    "state_bytes_per_parameter": "bytes a parameter",
    "seconds": "time",
    "share_of_copy": "of a copy",
    "host_us_per_tensor": "CPU time a tensor",
    "ratio_to_kthvalue": "time / kthvalue",
    "speedup_over_percentile": "percentile / time",
    "rate_to_add": "rate / torch.add",
    "share_of_weights": "file / weights",
    "ratio_to_step_and_read": "time / (step + read)",
    "ratio_to_step": "time / step",
}
MEASURES = tuple(_TITLES)


def title(measure: str) -> str:
    """A figure's name as a person reads it."""
    return _TITLES[measure]


def figure(measure: str, value: float) -> str:
    """A figure as a person reads it."""
    if measure == "state_bytes_per_parameter":
        return f"{value:.3f}"
    if measure == "share_of_weights":
        return f"{value:.4f}"
    if measure == "seconds":
        return f"{value:.3g} s"
    if measure == "share_of_copy":
        return f"{value:.1%}"
    if measure == "host_us_per_tensor":
        return f"{value:.2f} µs"
    if measure.endswith("bytes"):
        return f"{value / _MIB:.2f} MiB"
    return f"{value:.3g} ×" if value >= 10 else f"{value:.2f} ×"
