"""From pytest-benchmark's JSON to a dated result, and from the newest results to docs/performance.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from childtune_kernels.report.text_table import milliseconds

from . import report_contests, targets
from .cases import BYTES_PER_PARAMETER, CASES, DTYPE, Case
from .contests import CONTESTS
from .environment import ROOT
from .figures import size, table, with_quartiles
from .gpu import report as gpu_report
from .gpu.report import slug_of
from .plot import plot
from .variants import TORCH_FUSED, Variant, variants_of

Result = dict[str, Any]

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
_ORDER = [(case.name, variant.name) for case in CASES.values() for variant in variants_of(case)]
_CONTEST_ORDER = [
    (contest.name, competitor.name)
    for contest in CONTESTS.values()
    for competitor in contest.competitors
]


def slim(run: dict[str, Any]) -> Result:
    """What is kept of a run: what it ran on, and a record a variant or competitor without single rounds.

    Raises:
        ValueError: the JSON holds no benchmarks of this package.
    """
    found = {
        (b["extra_info"].get("case"), b["extra_info"].get("variant")): b["extra_info"]
        for b in run["benchmarks"]
    }
    records = [found[each] for each in _ORDER if each in found]
    contest_records = [found[each] for each in _CONTEST_ORDER if each in found]
    environment = run["machine_info"].get("environment")
    if not (records or contest_records) or environment is None:
        raise ValueError(
            "no records in this file; make it with pytest benchmarks/ --benchmark-json"
        )
    commit = run["commit_info"]
    return {
        "date": run["datetime"][:10],
        "datetime": run["datetime"],
        "commit": commit["id"],
        "dirty": commit["dirty"],
        "environment": {**environment, "pytest_benchmark": run["version"]},
        "targets": targets.verdicts([*records, *contest_records]),
        "records": records,
        "contest_records": contest_records,
    }


def newest(directory: Path) -> list[Result]:
    """The newest result of each command and kind of device; of GPUs each model."""
    results = [json.loads(path.read_text()) for path in directory.glob("*.json")]
    newest_of: dict[tuple[str, str], Result] = {}
    for result in sorted(results, key=lambda result: result["datetime"]):
        environment = result["environment"]
        device = "device_name" if _is_of_gpu_command(result) else "device"
        newest_of[result.get("kind", "pytest"), environment[device]] = result
    return list(newest_of.values())


def _is_of_gpu_command(result: Result) -> bool:
    return result.get("kind") == "gpu"


def section(result: Result, picture: str) -> str:
    """The Markdown for one device."""
    environment = result["environment"]
    commit = result["commit"][:12] + (" with uncommitted changes" if result["dirty"] else "")
    flags = " ".join(environment["compiler_flags"])
    lines = [
        f"## {environment['device_name']}, {environment['cores']} cores",
        "",
        f"Measured on {result['date']} at commit {commit}: childtune_kernels "
        f"{environment['childtune_kernels']} ({environment['kernel']}), torch {environment['torch']} "
        f"({environment['torch_cpu_capability']}), Python {environment['python']}, "
        f"{environment['threads']} threads, {environment['platform']}; "
        f"{environment['compiler'] or 'compiler unknown'}, `{flags}`.",
        "",
    ]
    if result["records"]:
        lines += [f"![Time of a step by variant]({picture})", ""]
    for case in CASES.values():
        records = {r["variant"]: r for r in result["records"] if r["case"] == case.name}
        if records:
            lines += [f"### {case.title}", "", _limit(case, records), ""]
            lines += [*_table(case, records), ""]
    lines += report_contests.sections(result.get("contest_records", []))
    lines += ["### Targets", "", *targets.table(result["targets"]), ""]
    return "\n".join(lines)


def _limit(case: Case, records: dict[str, dict[str, Any]]) -> str:
    record = records.get(TORCH_FUSED.name) or next(iter(records.values()))
    if case.limit == "tensors":
        megabytes = 4 * DTYPE.itemsize * case.parameters / 1e6
        return (
            f"The {megabytes:.1f} MB of all tensors together stay in the caches: what counts is the work a "
            "step does by the tensor and by the group before it touches an element."
        )
    copy = record["copy_bytes_per_second"]
    return (
        f"Memory is the limit: {BYTES_PER_PARAMETER} bytes a parameter at the copy's "
        f"{copy / 1e9:.1f} GB/s take {BYTES_PER_PARAMETER / copy * 1e9:.2f} ns."
    )


def _columns(case: Case, variant: Variant, record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "variant", variant.title
    yield "ms", milliseconds(record["seconds"])
    if case.limit == "tensors":
        yield "µs a tensor", f"{record['us_per_tensor']:.2f}"
    yield "ns a parameter", f"{record['ns_per_parameter']:.2f}"
    yield "GB/s", f"{record['effective_bytes_per_second'] / 1e9:.1f}"
    if case.limit == "bytes":
        yield "of a copy", f"{record['share_of_copy']:.0%}"
    yield "time / torch fused", with_quartiles(record, "ratio_to_fused")
    yield "unfused / time", with_quartiles(record, "speedup_over_unfused")
    if case.grouped:
        yield "time / one group", with_quartiles(record, "ratio_to_one_group")
    yield "state bytes a parameter", f"{record['state_bytes_per_parameter']:.3g}"
    yield "extra memory", size(record["peak_total_bytes"])
    yield "rounds", str(record["rounds"])


def _table(case: Case, records: dict[str, dict[str, Any]]) -> Iterator[str]:
    rows = [
        dict(_columns(case, variant, records[variant.name]))
        for variant in variants_of(case)
        if variant.name in records
    ]
    yield from table(rows)


def update_document(path: Path, results: list[Result]) -> None:
    """Replace what stands between the markers, and draw the pictures beside the document.

    Raises:
        ValueError: the document has not both markers; it is not written.
    """
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path} must hold {BEGIN!r} and {END!r} once each")
    sections = []
    for result in results:
        if _is_of_gpu_command(result):
            picture = path.with_name(f"{path.stem}-{slug_of(result)}.png")
            drawn = gpu_report.draw(result, picture)
            sections.append(gpu_report.section(result, picture.name if drawn else None))
            continue
        picture = path.with_name(f"{path.stem}-{result['environment']['device']}.png")
        if result["records"]:
            plot(result, picture)
        sections.append(section(result, picture.name))
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(before + BEGIN + "\n\n" + "\n".join(sections) + "\n" + END + after)


def main() -> None:
    """Keep a run, if one is given, and make the document from the newest results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "performance.md")
    options = parser.parse_args()
    if options.run is not None:
        try:
            result = slim(json.loads(options.run.read_text()))
        except (OSError, ValueError) as error:
            parser.error(f"{options.run}: {error}")
        options.results.mkdir(parents=True, exist_ok=True)
        target = options.results / f"{result['date']}-{result['environment']['device']}.json"
        target.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"wrote {target}")
    results = newest(options.results)
    if not results:
        parser.error(f"{options.results} holds no results; name a run")
    update_document(options.document, results)
    print(f"wrote {options.document}")


if __name__ == "__main__":
    main()
