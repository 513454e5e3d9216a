"""A result as a person reads it: Markdown, and a picture where matplotlib is installed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from childtune_kernels.report.text_table import milliseconds

from .. import targets
from ..figures import size, table, with_quartiles

Result = dict[str, Any]

_COLOURS = {"torch": "#6b7280", "other": "#15803d", "unfused": "#c2410c", "childtune": "#1d4ed8"}


def slug_of(result: Result) -> str:
    """The device's name as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", result["environment"]["device_name"].lower()).strip("-")


def section(result: Result, picture: str | None = None) -> str:
    """The Markdown of a result."""
    environment = result["environment"]
    commit = (result["commit"] or "unknown")[:12] + (
        " with uncommitted changes" if result["dirty"] else ""
    )
    lines = [f"## {environment['device_name']}", ""]
    if result["tiny"]:
        lines += ["**Not a measurement**: a tiny run on a CPU, kernels interpreted.", ""]
    lines += [
        f"Measured on {result['date']} at commit {commit}: childtune_kernels "
        f"{environment['childtune_kernels']} ({environment['kernel']}), torch {environment['torch']}, "
        f"CUDA {environment['cuda']}, Triton {environment['triton']}, Python {environment['python']}, "
        f"{environment['platform']}.",
        "",
        *([result["note"], ""] if result["note"] and not result["tiny"] else []),
        *_proof(result),
        *_bandwidth(result),
    ]
    if picture is not None:
        lines += [f"![Time of a step by variant]({picture})", ""]
    if result["targets"]:
        lines += ["### Targets", "", *targets.table(result["targets"]), ""]
    for case, title in result["titles"].items():
        rows = [dict(_step(record)) for record in result["records"] if record["case"] == case]
        if rows:
            lines += [f"### {title}", "", *table(rows), ""]
    lines += list(_contests(result))
    if result["sweep"]:
        lines += ["### Configurations", "", *configurations(result["sweep"]), ""]
    lines += list(_left_out(result))
    return "\n".join(lines)


def _proof(result: Result) -> Iterator[str]:
    proof = result.get("proof")
    if proof is None:
        yield "Whether the results are right is not known yet."
    else:
        outcomes = [module["outcome"] for module in proof["modules"]]
        kinds = ", ".join(
            f"{outcomes.count(kind)} {kind}"
            for kind in dict.fromkeys(outcomes)
            if kind != "no tests"
        )
        equal = sum(each["equal"] for each in proof["self_check"])
        yield (
            f"Against the reference, bit for bit: self-check {equal} of {len(proof['self_check'])} equal; "
            f"modules of the test table: {kinds or 'none run'}."
            + (f" {proof['why']}." if proof["why"] else "")
        )
        waits = proof.get("waits", [])
        waiting = [each["setting"] for each in waits if each["waits"]]
        yield (
            f"Warm steps that wait for nothing: {len(waits) - len(waiting)} of {len(waits)}"
            + (f"; not so: {', '.join(waiting)}." if waiting else ".")
        )
    yield ""


def _bandwidth(result: Result) -> Iterator[str]:
    for record in result.get("copy", []):
        yield (
            f"- a copy of {size(record['bytes'] // 2)}: {record['bytes_per_second'] / 1e9:,.0f} GB/s"
        )
    yield ""


def _step(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "variant", record["title"]
    yield "ms", milliseconds(record["seconds"])
    yield "bytes a parameter", f"{record['bytes_per_parameter']:.3g}"
    yield "GB/s", f"{record['effective_bytes_per_second'] / 1e9:,.0f}"
    yield "of a copy", f"{record['share_of_copy']:.1%}"
    yield "time / torch fused", with_quartiles(record, "ratio_to_fused")
    yield "unfused / time", with_quartiles(record, "speedup_over_unfused")
    yield "time / one group", with_quartiles(record, "ratio_to_one_group")
    yield "ms from idle", milliseconds(record["seconds_from_idle"])
    yield "CPU µs a tensor", f"{record['host_us_per_tensor']:.2f}"
    new_lr = record.get("host_us_per_tensor_new_lr")
    yield "with a new lr", "" if new_lr is None else f"{new_lr:.2f}"
    yield "state bytes a parameter", f"{record['state_bytes_per_parameter']:.3g}"
    yield "extra memory", size(record["peak_tensor_bytes"])
    yield "rounds", str(record["rounds"])


def _contests(result: Result) -> Iterator[str]:
    for case, title in result["titles"].items():
        rows = [
            {
                "competitor": record["variant"],
                "ms": milliseconds(record["seconds"]),
                "of a copy": f"{record['share_of_copy']:.1%}" if "share_of_copy" in record else "",
                "extra memory": size(record["peak_tensor_bytes"]),
                "rounds": str(record["rounds"]),
            }
            for record in result["contest_records"]
            if record["case"] == case
        ]
        if rows:
            yield from (f"### {title}", "", *table(rows), "")


def configurations(records: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of Markdown: an op's configurations, the fastest of each variant first."""
    rows = [
        {
            "op": record["op"],
            "step": record["of"],
            "tile": str(record["tile"]),
            "warps": str(record["num_warps"]),
            "ms": f"{record['seconds'] * 1e3:.3f}",
            "of a copy": f"{record['share_of_copy']:.1%}" if "share_of_copy" in record else "",
            "time / present": f"{record['ratio_to_present']:.3f}"
            if "ratio_to_present" in record
            else "",
            "": "present" if record["present"] else "",
        }
        for record in sorted(records, key=lambda each: (each["op"], each["of"], each["seconds"]))
    ]
    if rows:
        yield from table(rows)


def _left_out(result: Result) -> Iterator[str]:
    sections = [
        f"- {name}: {entry['state']}, {entry.get('reason', '')}"
        for name, entry in result["sections"].items()
        if entry["state"] != "done"
    ]
    faults = [
        f"- {fault['variant']} on {fault['case']}: {fault['reason'].splitlines()[0]}"
        for fault in result["faults"]
    ]
    if sections or faults:
        yield from ("### Without figures", "", *sections, *faults, "")


def draw(result: Result, path: Path) -> bool:
    """Draw the time of a step by variant; False where matplotlib is missing or there is nothing to draw."""
    cases = list(dict.fromkeys(record["case"] for record in result["records"]))
    if find_spec("matplotlib") is None or not cases:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [sum(r["case"] == case for r in result["records"]) for case in cases]
    figure, axes = pyplot.subplots(
        len(cases), 1, figsize=(8, 0.8 * len(cases) + 0.24 * sum(heights)), height_ratios=heights,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for case, axis in zip(cases, axes[:, 0], strict=True):
        records = [record for record in result["records"] if record["case"] == case]
        for height, record in enumerate(records):
            colour = _COLOURS[record["family"]]
            low, high = (1e3 * quartile for quartile in record["seconds_quartiles"])
            axis.plot([low, high], [height, height], color=colour, linewidth=2)
            axis.plot([1e3 * record["seconds"]], [height], "o", color=colour)
        axis.set_xscale("log")
        axis.set_yticks(range(len(records)), [r["title"] for r in records], fontsize=8)
        axis.set_ylim(len(records) - 0.4, -0.6)
        axis.set_title(result["titles"][case], fontsize=10, loc="left")
        axis.set_xlabel("ms a step", fontsize=8)
        axis.grid(axis="x", which="both", alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
