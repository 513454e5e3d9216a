"""Optimizers side by side: who steps, what is shared, and what the rounds come to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from childtune_kernels import contenders, machine, registry, side_by_side
from childtune_kernels.contenders import NAMES, Entrant, bytes_needed, entrants_of, run_child
from childtune_kernels.model_shapes import ModelShapes, transformer_of
from childtune_kernels.side_by_side import measure

CPU = torch.device("cpu")
SMALL = ModelShapes("made for a test", {"w": (300, 70), "layers.0.b": (33,), "e": (0, 3), "s": ()})


pytestmark = pytest.mark.usefixtures("one_thread")


def entrants(*names: str, dtype: torch.dtype = torch.float32) -> list[Entrant]:
    return entrants_of(names or NAMES, CPU, dtype, 0.3, 0.1)


def test_ratios_follow_from_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {
        "torch-fused": {0: 1.0, 1: 2.0, 2: 4.0},
        "unfused": {1: 20.0},
        "ct_d": {0: 0.5, 1: 1.0, 2: 1.0},
    }

    def pretended(contenders: Mapping[str, Any], *_: object, **options: Any) -> Any:
        assert set(contenders) == set(times)
        assert options["least"] == side_by_side.LEAST_ROUNDS
        assert not contenders["torch-fused"].slow
        return times

    monkeypatch.setattr(side_by_side, "interleave", pretended)
    base, unfused, child = measure(
        SMALL, entrants("torch-fused", "unfused", "ct_d"), CPU, torch.float32, 1.0
    ).measured
    assert (base.seconds[1], base.of_base) == (2.0, (1.0, 1.0, 1.0))
    assert (unfused.of_base, unfused.rounds) == ((10.0, 10.0, 10.0), 1)
    assert child.of_base == (0.375, 0.5, 0.5)


def test_moments_of_equal_kind_are_there_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is the memory that the estimate counts; a child's own moments are its optimizer's."""
    optimizers: dict[str, Optimizer] = {}

    def pretended(contenders: Mapping[str, Any], *_: object, **__: object) -> Any:
        optimizers.update({name: each.step.__self__ for name, each in contenders.items()})
        for each in contenders.values():
            each.step()
        return {name: {0: 1.0} for name in contenders}

    monkeypatch.setattr(side_by_side, "interleave", pretended)
    measure(SMALL, entrants(), CPU, torch.float32, 1.0)
    for key, holders in {"exp_avg": 5, "exp_avg_sq": 5, "child_exp_avg": 2}.items():
        states = [
            next(state for p, state in each.state.items() if p.numel() == 21_000)
            for each in optimizers.values()
        ]
        held = [state[key].data_ptr() for state in states if key in state]
        assert len(held) == holders
        assert len(set(held)) == (2 if key == "child_exp_avg" else 1)
        finite = [bool(state[key].isfinite().all()) for state in states if key in state]
        assert all(finite)


def test_slow_ones_leave_most_rounds_to_the_others() -> None:
    counts = dict.fromkeys(("base", "quick", "slow"), 0)

    def step_of(name: str) -> Any:
        def step() -> None:
            counts[name] += 1

        return step

    first = {"base": 1.0, "quick": 0.5, "slow": 30.0}
    steps = {name: step_of(name) for name in counts}
    side_by_side._rounds(steps, first, "base", CPU, 0.02)
    assert counts["base"] == counts["quick"] >= side_by_side.LEAST_ROUNDS
    assert counts["slow"] == -(-counts["base"] // 20)
    counts["base"] = 0
    side_by_side._rounds(steps, {**first, "base": 900.0}, "base", CPU, 1e-9)
    assert counts["base"] == side_by_side.LEAST_ROUNDS, "the base takes part in every round"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everybody_steps_and_the_estimate_of_memory_covers_it(dtype: torch.dtype) -> None:
    model = transformer_of(120_000)
    everybody = entrants(dtype=dtype)
    found = measure(model, everybody, CPU, dtype, 0.01)
    assert [each.name for each in found.measured] == list(NAMES)
    assert found.sound
    assert all(math.isfinite(each.seconds[1]) and each.rounds > 0 for each in found.measured)
    state = {each.name: each.state_bytes / model.parameters for each in found.measured}
    ours, theirs = (8, 8) if dtype == torch.float32 else (10, 4)
    assert state["torch-fused"] == pytest.approx(theirs, rel=0.01)
    assert state["plain"] == state["ct_f"] == pytest.approx(ours, rel=0.01)
    assert 0.1 * ours < state["ct_d"] < 0.1 * ours + 0.4
    # Moments of one kind are there once; the transient of a second set comes on top.
    held = 2 * dtype.itemsize + sum({ours, theirs}) + state["ct_d"] + state["ct_d_runs"]
    needed = bytes_needed(model, everybody, dtype) - 24 * model.largest
    assert held + ours < needed / model.parameters < 1.2 * (held + ours)


def test_the_child_of_runs() -> None:
    shapes = {"a": (40, 100), "b": (300,), "c": ()}
    mask = run_child(shapes, 0.25, 256)
    runs = {"a": 16, "b": 2, "c": 1}
    chosen = 0
    for name, count in runs.items():
        bits = mask.dense(name).flatten()
        for run in bits.split(256):
            assert run.all() or not run.any()
            chosen += bool(run.any())
        assert len(bits.split(256)) == count
    assert chosen == round(0.25 * sum(runs.values()))


def test_a_device_without_a_fused_adamw_has_another_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "_has_fused", lambda *_: False)
    assert [each.name for each in entrants("ct_f")] == ["torch-default", "ct_f"]
    assert [each.name for each in entrants("torch-fused", "ct_f")] == ["torch-default", "ct_f"]


def test_the_reference_is_told_from_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = registry.Choice("child_adamw", "reference", True, "plain PyTorch")
    absent = registry.Choice("child_adamw", "cpp", False, "no C++ compiler was found")
    for_gpus = registry.Choice("child_adamw", "triton", False, "for GPUs", on_request=True)
    monkeypatch.setattr(registry, "survey", lambda device: [for_gpus, absent, choice])
    assert side_by_side._absent(choice, CPU) == "cpp: no C++ compiler was found"
    assert side_by_side._absent(absent, CPU) == ""


def test_memory_that_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  90 kB\nMemAvailable:       40 kB\n")
    monkeypatch.setattr(machine, "_MEMORY", meminfo)
    monkeypatch.setattr(machine, "_GROUP", tmp_path)
    assert machine.available_bytes(CPU) == 40 * 1024
    for name, content in {
        "max": "30000",
        "current": "25000",
        "stat": "file 9\ninactive_file 500",
    }.items():
        (tmp_path / f"memory.{name}").write_text(content + "\n")
    assert machine.available_bytes(CPU) == 5500
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_bytes(CPU) == 40 * 1024
    monkeypatch.setattr(machine, "_MEMORY", tmp_path / "nowhere")
    assert machine.available_bytes(CPU) is None
