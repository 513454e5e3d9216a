"""The Markdown of contests: a table a contest, and one for all layouts of compact state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from childtune_kernels.report.text_table import milliseconds

from .contests import CONTESTS, Contest
from .contests.layouts import LAYOUTS, TORCH
from .figures import size, table, with_quartiles

Record = dict[str, Any]
Records = dict[str, Record]

_TITLES = {
    "selection": "Selection of a child",
    "fisher": "Fisher accumulation",
    "clipping": "Clipping and scaling within the step",
    "sharded": "Sharded parameters",
    "checkpoint": "Child checkpoints",
    "layouts": "Layouts of compact state",
}
_NOTES = {
    "selection": (
        "The values are squares of normal numbers, of another size in every tensor. *Extra memory* is "
        "what a run needs beside them and the mask that it returns. `torch.kthvalue` has the values "
        "joined beforehand and finds the threshold alone; NumPy's percentile is the original code's rule, "
        "and its time holds the way to NumPy, the joining and the comparison."
    ),
    "fisher": (
        "Both read two tensors and write one: 12 bytes an element, with bf16 gradients 10. `torch.add` is "
        "called tensor by tensor, as it has no form for several tensors that writes into given ones. "
        "Rates are bytes a second."
    ),
    "clipping": (
        "Steps of CT_F at p = 0.3: as it is, with `max_grad_norm`, and with what a `GradScaler` hands over. "
        "*Read* is the faster one, by its median, of the two reads of all gradients. torch's way reads the "
        "gradients, reads and writes them to clip, and then steps without a mask."
    ),
    "sharded": (
        "A step over many small tensors, where the host's work counts and the elements hardly do: plain "
        "tensors, and DTensors on a mesh of this process alone, whose parts are whole. All step weights of "
        "their own."
    ),
    "checkpoint": "Bytes of the file over bytes of the weights in scope: the encoder's.",
    "layouts": (
        "A step on one tensor of 2²⁵ elements over a step of torch's fused AdamW, by layout; the fastest "
        "is bold, † marks the one that the package takes. Runs are as a granularity selects them, so "
        "that neighbours join."
    ),
}


def sections(records: Sequence[Record]) -> Iterator[str]:
    """Lines of Markdown for all contests that were measured."""
    by_contest: dict[str, Records] = {}
    for record in records:
        by_contest.setdefault(record["case"], {})[record["variant"]] = record
    measured = [contest for contest in CONTESTS.values() if contest.name in by_contest]
    for family, title in _TITLES.items():
        contests = [contest for contest in measured if contest.family == family]
        if not contests:
            continue
        yield from (f"### {title}", "", _NOTES[family], "")
        if family == "layouts":
            yield from table([dict(_layout_columns(by_contest[each.name])) for each in contests])
            yield ""
            continue
        for contest in contests:
            yield from (f"#### {contest.title}", "")
            yield from table(_rows(contest, by_contest[contest.name]))
            yield ""


def _rows(contest: Contest, records: Records) -> list[dict[str, str]]:
    return [
        dict(_columns(contest, each.title, records[each.name]))
        for each in contest.competitors
        if each.name in records
    ]


def _columns(contest: Contest, title: str, record: Record) -> Iterator[tuple[str, str]]:
    yield contest.family, title
    if "file_bytes" in record:
        yield "file", size(record["file_bytes"])
        yield "weights in scope", size(record["weight_bytes"])
        yield "file / weights", f"{record['share_of_weights']:.4f}"
        return
    yield "ms", milliseconds(record["seconds"])
    yield "quartiles", "–".join(map(milliseconds, record["seconds_quartiles"]))
    yield "ns an element", f"{record['ns_per_element']:.2f}"
    if "effective_bytes_per_second" in record:
        yield "GB/s", f"{record['effective_bytes_per_second'] / 1e9:.1f}"
    for comparison in contest.comparisons:
        yield comparison.title, with_quartiles(record, comparison.measure)
    if contest.memory:
        yield "extra memory", size(record["peak_total_bytes"])
    yield "rounds", str(record["rounds"])


def _layout_columns(records: Records) -> Iterator[tuple[str, str]]:
    found = [records[name] for name in LAYOUTS if name in records]
    some = found[0]
    run = "scattered" if some["run"] == 1 else f"in runs of {some['run']}"
    yield "child", f"{some['density'] * 100:g} %, {run}"
    yield "mean run", f"{some['mean_run']:.1f}"
    by = "ratio_to_fused" if all("ratio_to_fused" in record for record in found) else "seconds"
    fastest = min(found, key=lambda record: float(record[by]))
    for name in LAYOUTS:
        record = records.get(name)
        if record is None:
            yield name, ""
            continue
        cell = with_quartiles(record, "ratio_to_fused")
        if record is fastest:
            cell = f"**{cell}**"
        yield name, cell + (" †" if record["suitable"] else "")
    for name in LAYOUTS:
        record = records.get(name)
        yield (
            f"{name}: state bytes a parameter",
            f"{record['state_bytes_per_parameter']:.2f}" if record else "",
        )
    if TORCH.name in records:
        yield "torch fused, ms", milliseconds(records[TORCH.name]["seconds"])
    yield "rounds", str(some["rounds"])
