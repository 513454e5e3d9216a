"""Clipping, Fisher accumulation and selection: the contests of the CPU, at the sizes of a GPU's memory."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..cases import Shapes
from ..contests import Contest, clipping, fisher, selection
from ..measure_contest import measure
from ..peak_memory import bytes_of, tensor_peak
from .cases import BERT_LARGE, LLAMA_1B
from .ledger import Ledger
from .setting import Setting, say

_ROUNDS = 25
# Beyond the size from which a selection begins with a sample.
_CHECKED_ELEMENTS = 1 << 24

SELECTION_ELEMENTS = 10**9
SELECTION_NAME = "select_1e9"
FISHER_NAMES = {case.name: f"fisher_{case.name}" for case in (BERT_LARGE, LLAMA_1B)}
CLIPPING_NAMES = {case.name: f"clipping_{case.name}" for case in (BERT_LARGE, LLAMA_1B)}


@dataclass(frozen=True)
class LargeContest(Contest):
    """A contest that is checked on some ten million elements."""

    def miniature(self) -> Shapes:
        """The first tensors, whole, that hold so many elements."""
        found: Shapes = {}
        elements = 0
        for name, shape in self.shapes().items():
            if elements > _CHECKED_ELEMENTS:
                break
            found[name] = shape
            elements += math.prod(shape)
        return found


def _selection(backend: str | None) -> Contest:
    shape = (2_500, 4_000)
    tensors = SELECTION_ELEMENTS // math.prod(shape)
    return LargeContest(
        name=SELECTION_NAME,
        title=f"Selection over {tensors} tensors of {math.prod(shape):,} elements",
        family="selection",
        op="topk_select",
        competitors=selection.ALL_SIZES,
        make_shapes=lambda: {f"layers.{index}.weight": shape for index in range(tensors)},
        tensors=tensors,
        elements=SELECTION_ELEMENTS,
        prepare=functools.partial(selection.prepare_all_sizes, backend=backend),
        faults=functools.partial(selection.faults_all_sizes, backend=backend),
        rounds=_ROUNDS,
    )


def _tiny(contest: Contest) -> Contest:
    shapes: Shapes = {"matrix": (37, 41), "vector": (1_100,)}
    return replace(
        contest,
        title=f"{contest.title} (in little)",
        make_shapes=lambda: shapes,
        tensors=len(shapes),
        elements=sum(math.prod(shape) for shape in shapes.values()),
        rounds=1,
    )


def contests_for(setting: Setting) -> dict[str, Contest]:
    """The contests by name."""
    backend = setting.backend("fisher_accumulate")
    found = [
        fisher.contest_of(FISHER_NAMES[case.name], case, _ROUNDS, backend)
        for case in (BERT_LARGE, LLAMA_1B)
    ]
    found.append(_selection(setting.backend("topk_select")))
    backend = setting.backend("child_adamw")
    found += [
        clipping.contest_of(CLIPPING_NAMES[case.name], case, _ROUNDS, backend)
        for case in ([BERT_LARGE] if setting.tiny else [BERT_LARGE, LLAMA_1B])
    ]
    return {contest.name: _tiny(contest) if setting.tiny else contest for contest in found}


def measure_contest(
    contest: Contest,
    setting: Setting,
    ledger: Ledger,
    unproven: Mapping[str, str],
    copy_bytes_per_second: float | None,
) -> None:
    """Check and measure the competitors of a contest; none is, where a kernel is missing or wrong."""
    reasons = [unproven.get(op) or setting.absent(op) for op in contest.ops]
    absent = next((reason for reason in reasons if reason is not None), None)
    if absent is not None:
        for competitor in contest.competitors:
            ledger.fault(contest.name, competitor.name, absent)
        return
    records = []
    for name, found in measure(contest, setting.device, None, say).items():
        if found.fault is not None or found.record is None:
            ledger.fault(contest.name, name, found.fault or "no figures")
            continue
        record: dict[str, Any] = {**found.record, "measurement": not setting.tiny}
        moved = record.get("effective_bytes_per_second")
        if moved is not None and copy_bytes_per_second is not None:
            record["share_of_copy"] = moved / copy_bytes_per_second
        records.append(record)
    _add_peaks(contest, records, setting)
    for record in records:
        share = f"{record['share_of_copy']:.1%} of a copy" if "share_of_copy" in record else ""
        say(f"  {record['variant']:<24}{record['seconds'] * 1e3:>10.3f} ms  {share}")
    ledger.put("contest_records", records, contest.name)


def _add_peaks(contest: Contest, records: list[dict[str, Any]], setting: Setting) -> None:
    """Bytes of tensors that a run needs beyond what it is given and returns."""
    steps = contest.prepare(contest.shapes(), setting.device).steps
    for record in records:
        step = steps[record["variant"]]
        returned = bytes_of(step())
        peak = tensor_peak(step, setting.device)
        record["peak_tensor_bytes"] = max(0, peak - returned)
    del steps
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
