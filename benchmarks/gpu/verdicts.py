"""What the package means to reach on an H200; shown as met or missed, never a failing command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..contests import fisher, selection
from ..targets import Target, clipping_targets
from ..variants import CT_D_RUNS, CT_D_SPARSE, CT_D_SPARSEST, CT_F, CT_F_SPLIT, PLAIN
from .cases import BERT_LARGE, GROUPS, LLAMA_1B
from .contests import CLIPPING_NAMES, FISHER_NAMES, SELECTION_NAME
from .variants import PLAIN_BF16

# Of more than 500 million parameters.
_LARGE = (LLAMA_1B.name, "llama_8b_layers")
_BERT = BERT_LARGE.name


def _targets() -> Iterator[Target]:
    for case in _LARGE:
        for variant in (PLAIN, CT_F):
            yield Target(case, variant.name, "share_of_copy", 0.95, at_least=True)
            yield Target(case, variant.name, "ratio_to_fused", 1.0)
        for variant in (PLAIN_BF16, CT_F_SPLIT):
            yield Target(case, variant.name, "share_of_copy", 0.90, at_least=True)
        yield Target(case, CT_F.name, "speedup_over_unfused", 10, at_least=True)
        yield Target(case, CT_F.name, "ratio_to_plain", 1.02)
        for variant, bound in ((CT_D_SPARSE, 2.0), (CT_D_SPARSEST, 4.0), (CT_D_RUNS, 6.0)):
            yield Target(case, variant.name, "speedup_over_fused", bound, at_least=True)
    for variant in (PLAIN, CT_F):
        yield Target(_BERT, variant.name, "ratio_to_fused", 1.0)
        for bound in (0.8, 0.5):
            yield Target(_BERT, variant.name, "host_us_per_tensor", bound)
        grouped = variant.with_group_each().name
        yield Target(GROUPS.name, grouped, "ratio_to_one_group", 1.2)
    yield Target(SELECTION_NAME, selection.SELECT.name, "seconds", 0.008)
    for case in CLIPPING_NAMES.values():
        yield from clipping_targets(case)
    for case in FISHER_NAMES.values():
        yield Target(case, fisher.OURS.name, "share_of_copy", 0.9, at_least=True)


TARGETS = tuple(_targets())


def verdicts(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every target with its figure; a tiny run's figures mean nothing, what is wrong has none."""
    records = {
        (record["case"], record["variant"]): record
        for name in ("records", "contest_records")
        for record in result[name]
    }
    wrong = {(fault["case"], fault["variant"]) for fault in result["faults"]}
    found = []
    for target in TARGETS:
        key = (target.case, target.variant)
        verdict = target.verdict(None if key in wrong else records.get(key))
        if key in wrong:
            verdict["verdict"] = "no figure: see faults"
        elif result["tiny"] and verdict["value"] is not None:
            verdict["verdict"] = "not a measurement"
        found.append(verdict)
    return found
