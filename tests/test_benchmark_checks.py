"""Benchmarks check before they time: what they find of masters, clipping and scales; what they compare."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import measure_contest
from benchmarks.contests import clipping
from benchmarks.correctness import fault_on
from benchmarks.variants import CT_D_SPARSE, CT_F, CT_F_SPLIT, PLAIN, PLAIN_SPLIT, SPLIT, in_bf16
from childtune_kernels import FusedChildAdamW, step_planner

CPU = torch.device("cpu")
SHAPES: dict[str, tuple[int, ...]] = {"layer.weight": (61, 67), "layer.bias": (67,)}

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEST = clipping.contest_of(
    "clipping", clipping.LARGE_TENSOR_APART, rounds=3, backend="reference"
)


def test_what_is_right_has_no_fault() -> None:
    for variant in (PLAIN_SPLIT, CT_F_SPLIT, in_bf16(CT_D_SPARSE, SPLIT)):
        assert fault_on(variant, SHAPES, CPU, "reference") is None, variant.name
    assert CONTEST.faults(SHAPES, CPU) == {}


@pytest.mark.parametrize("variant", [PLAIN_SPLIT, CT_F_SPLIT], ids=lambda each: each.name)
def test_a_remainder_that_is_lost_is_found(variant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with the reference cannot see it here: both lose it."""
    step = FusedChildAdamW.step

    def forgetful(optimizer: FusedChildAdamW) -> None:
        step(optimizer)
        for state in optimizer.state.values():
            state["master_remainder"].zero_()

    monkeypatch.setattr(FusedChildAdamW, "step", forgetful)
    assert fault_on(variant, SHAPES, CPU, "reference") is not None


def test_a_step_that_neither_clips_nor_scales_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_planner, "step_factors", lambda plans, *others: [None] * len(plans))
    faults = CONTEST.faults(SHAPES, CPU)
    assert set(faults) == {clipping.CLIPPED.name, clipping.SCALED.name, clipping.TORCH.name}
    assert "is not the masked gradient" in faults[clipping.CLIPPED.name]
    assert "is not that of max_grad_norm" in faults[clipping.TORCH.name]


def test_a_norm_that_differs_from_the_references_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = iter(range(100))
    monkeypatch.setattr(FusedChildAdamW, "last_grad_norm", property(lambda _: next(norms)))
    fault = fault_on(PLAIN, SHAPES, CPU, "reference")
    assert fault is not None
    assert "the gradients' norm is 0.0 and not 1.0" in fault


def test_clipping_is_held_against_a_step_and_the_fastest_read() -> None:
    """Round by round; the fastest read is the one with the least median."""
    seconds = {
        clipping.STEP.name: {0: 10.0, 1: 20.0, 2: 10.0},
        clipping.CLIPPED.name: {0: 12.0, 1: 33.0, 2: 24.0},
        clipping.SUM.name: {0: 2.0, 1: 2.0, 2: 2.0},
        clipping.NORM.name: {0: 1.0, 1: 3.0, 2: 3.0},
    }
    found = measure_contest._comparisons_of(CONTEST, clipping.CLIPPED, seconds)
    assert found["ratio_to_step_and_read"] == pytest.approx(33 / 22)
    assert found["ratio_to_step_and_read_plus"] == clipping.SUM.name
    assert found["ratio_to_step"] == pytest.approx(1.65)
    del seconds[clipping.SUM.name]
    found = measure_contest._comparisons_of(CONTEST, clipping.CLIPPED, seconds)
    assert found["ratio_to_step_and_read_plus"] == clipping.NORM.name
    del seconds[clipping.NORM.name]
    found = measure_contest._comparisons_of(CONTEST, clipping.CLIPPED, seconds)
    assert "ratio_to_step_and_read" not in found
    assert "ratio_to_step" in found


def test_variants_say_how_they_are_kept() -> None:
    assert (PLAIN_SPLIT.name, CT_F_SPLIT.name) == ("plain_split_bf16", "ct_f_0.3_split_bf16")
    named = [("w", torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)))]
    optimizer = CT_F_SPLIT.build(named, "reference")
    assert optimizer.state[named[0][1]]["master_remainder"].dtype == torch.int16
    assert optimizer.param_groups[0]["reserve_p"] == CT_F.kept
