"""``python -m benchmarks.gpu`` without a GPU: the whole command in little, and what it does not report."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks import traffic
from benchmarks.gpu import cases, contests, proof, steps, variants, verdicts
from benchmarks.gpu.ledger import Ledger
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.waits import find_waits
from benchmarks.variants import (
    CT_D_RUNS,
    CT_D_SPARSEST,
    CT_F,
    PLAIN,
    SPLIT,
    SPLIT_MOMENTS,
    STOCHASTIC,
    STOCHASTIC_MOMENTS,
    TORCH_FUSED,
    in_bf16,
    random_child_mask,
)
from childtune_kernels import FusedChildAdamW, step_factor

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
HEAD = {
    "tiny": True, "commit": "c0ffee", "environment": {"device_name": "a CPU"}, "titles": {},
    "dirty": False,
}  # fmt: skip
CASES = cases.cases_for(CPU, tiny=True)
CONTESTS = contests.contests_for(Setting(CPU, tiny=True, deadline=0))
SECTIONS = {"tests", "copy", *CASES, *CONTESTS, "sweep"}
CHILDTUNE = {
    variant.name
    for variant in variants.variants_of(CASES["bert_large"], tiny=True)
    if variant.family == "childtune"
}

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not for this platform"
)

# Benchmarks collect garbage before they measure: what is imported first need not be looked through.
WHOLE = """
import gc, runpy
import benchmarks.gpu.steps, torch._dynamo
from tests.quick_interpreter import quicken_interpreter
quicken_interpreter()
gc.freeze()
runpy.run_module("benchmarks.gpu", run_name="__main__", alter_sys=True)
"""
# A kernel that is right for one group only; the self-check has one.
BROKEN = """
import gc, sys, torch._dynamo
from benchmarks.gpu.__main__ import main
from tests.quick_interpreter import quicken_interpreter
quicken_interpreter()
gc.freeze()
from childtune_kernels.backends.triton import child_adamw
right = child_adamw.child_adamw_
def wrong(rows, row_table, group_table, *others):
    right(rows, row_table, group_table, *others)
    if len(group_table) > 1:
        rows[0].parameter.view(-1)[0] *= 1.5
child_adamw.child_adamw_ = wrong
sys.exit(main(sys.argv[1:]))
"""


class Run(NamedTuple):
    """How a command ended, what it printed, and its result as JSON and as Markdown."""

    returncode: int
    output: str
    result: dict[str, Any]
    tables: str


def started(output: Path, *command: str) -> subprocess.Popen[str]:
    """The command on its way, its JSON in a file."""
    return subprocess.Popen(
        [sys.executable, *command, "--tiny", "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """Runs of the whole command, the sweep with it, and with a broken kernel, at the same time."""
    folder = tmp_path_factory.mktemp("gpu")
    commands = {
        "whole": ("-c", WHOLE, "--only", ",".join(sorted(SECTIONS))),
        "broken": ("-c", BROKEN, "--only", "groups_465"),
    }
    processes = {
        name: started(folder / f"{name}.json", *command) for name, command in commands.items()
    }
    found = {}
    try:
        for name, process in processes.items():
            output, _ = process.communicate(timeout=1200)
            paths = [folder / f"{name}.{kind}" for kind in ("json", "md")]
            assert all(path.exists() for path in paths), output
            result, tables = (path.read_text(encoding="utf-8") for path in paths)
            found[name] = Run(process.returncode, output, json.loads(result), tables)
        yield found
    finally:
        for process in processes.values():
            process.kill()


@needs_triton
def test_the_whole_command_in_little(runs: dict[str, Run]) -> None:
    returncode, output, result, _ = runs["whole"]
    assert returncode == 0, output
    assert set(result["sections"]) == SECTIONS
    assert all(entry["state"] == "done" for entry in result["sections"].values()), output
    assert result["finished"]
    assert result["proof"]["by"] == "pytest"
    assert [module["outcome"] for module in result["proof"]["modules"]] == ["passed"]
    assert [each["waits"] for each in result["proof"]["waits"]] == [False, False]
    assert result["served_by"]["child_adamw"] == "triton"
    for name, case in CASES.items():
        expected = {variant.name for variant in variants.variants_of(case, True)}
        assert {r["variant"] for r in result["records"] if r["case"] == name} == expected
    for contest in CONTESTS.values():
        found = {r["variant"] for r in result["contest_records"] if r["case"] == contest.name}
        assert found == {competitor.name for competitor in contest.competitors}


@needs_triton
def test_a_tiny_run_is_no_measurement(runs: dict[str, Run]) -> None:
    _, output, result, tables = runs["whole"]
    assert not result["measurement"]
    assert not any(r["measurement"] for r in [*result["records"], *result["contest_records"]])
    assert {each["verdict"] for each in result["targets"]} == {"not a measurement", "not measured"}
    assert "not a measurement" in output
    assert "**Not a measurement**" in tables
    assert "| not a measurement |" in tables


@needs_triton
def test_a_sweep_compares_configurations(runs: dict[str, Run]) -> None:
    _, output, result, tables = runs["whole"]
    found = [(r["op"], r["tile"], r["present"]) for r in result["sweep"] if r["of"] == "plain"]
    assert sorted(found) == [("child_adamw_light", 2048, False), ("child_adamw_light", 4096, True)]
    row = "| child_adamw_compact | ct_d_0.3 | 4096 | 1 |"
    assert row in output
    assert row in tables


@needs_triton
def test_what_is_wrong_has_no_speed(runs: dict[str, Run]) -> None:
    _, output, result, tables = runs["broken"]
    faults = {fault["variant"]: fault["reason"] for fault in result["faults"]}
    assert set(faults) == {"plain_groups"}
    assert "is not bitwise equal to the reference's" in faults["plain_groups"]
    assert {record["variant"] for record in result["records"]} == {"torch_fused", "plain"}
    verdict = [each for each in result["targets"] if each["variant"] == "plain_groups"]
    assert [each["verdict"] for each in verdict] == ["no figure: see faults"]
    assert "plain_groups on groups_465: " in tables
    assert "groups_465, plain_groups: " in output


def test_unproven_ops_have_no_speed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run.json", HEAD)
    case = CASES["bert_large"]
    setting = Setting(CPU, tiny=True, deadline=time.monotonic() + 60)
    steps.measure_case(case, setting, ledger, {"child_adamw": "tests failed"})
    result = json.loads(ledger.path.read_text(encoding="utf-8"))
    assert {fault["variant"] for fault in result["faults"]} == CHILDTUNE
    assert {fault["reason"] for fault in result["faults"]} == {"tests failed"}
    assert {record["family"] for record in result["records"]} == {"torch", "unfused"}
    about_plain = [
        each
        for each in verdicts.verdicts(result)
        if (each["case"], each["variant"]) == ("bert_large", "plain")
    ]
    assert {each["verdict"] for each in about_plain} == {"no figure: see faults"}
    assert {each["value"] for each in about_plain} == {None}


MODULES = [
    {"module": "tests/ops/test_child_adamw.py", "ops": ["child_adamw"], "outcome": "passed"},
    {"module": "tests/test_selection.py", "ops": ["topk_select", "bitmask"], "outcome": "failed"},
    {"module": "tests/ops/test_bitmask.py", "ops": ["keep_words"], "outcome": "timed out"},
]


def test_failed_tests_and_wrong_findings_are_unproven() -> None:
    finding = {"backend": "triton", "setting": "float32 CT_F", "equal": True}
    reason = "tests/test_selection.py failed"
    assert proof.unproven(MODULES, [finding]) == {"topk_select": reason, "bitmask": reason}
    assert proof.unproven([], [finding]) == {}
    wrong = proof.unproven([], [finding, {**finding, "equal": False}])
    assert wrong == {
        "child_adamw": "the self-check differs from the reference: triton float32 CT_F"
    }


@pytest.mark.parametrize(
    ("returncode", "output", "outcome"),
    [
        (0, "", "passed"),
        (5, "", "no tests"),
        (1, "ModuleNotFoundError: No module named 'transformers'", "failed"),
        (2, "E   ModuleNotFoundError: No module named 'hypothesis'", "did not run"),
        (2, "E   ModuleNotFoundError: No module named 'childtune_kernels.ops'", "failed"),
        (2, "E   SyntaxError: invalid syntax", "failed"),
        (4, "error: unrecognized arguments: --column triton", "did not run"),
        (4, "ImportError while loading conftest: No module named 'numpy'", "failed"),
        (4, "E   ModuleNotFoundError: No module named 'numpy'", "did not run"),
        (4, "error: file or directory not found", "failed"),
        (-11, "", "failed"),
    ],
)
def test_what_an_exit_status_means(returncode: int, output: str, outcome: str) -> None:
    assert proof.outcome_of(returncode, output, {"tests": 3, "skipped": 1}) == outcome


def test_skipped_tests_prove_nothing() -> None:
    assert proof.outcome_of(0, "", {"tests": 3, "skipped": 3}) == "did not run"
    assert proof.outcome_of(0, "", {}) == "did not run"


def test_modules_say_which_ops_they_are_about() -> None:
    assert proof.ops_of(ROOT / "tests" / "ops" / "test_child_adamw_shards.py") == ("child_adamw",)
    assert "topk_select" in proof.ops_of(ROOT / "tests" / "test_selection.py")
    assert proof.ops_of(ROOT / "tests" / "test_house.py") == ()
    scaling = ROOT / "tests" / "ops" / "test_child_adamw_scaling.py"
    assert proof.ops_of(scaling) == ("child_adamw", "gradient_norm")
    assert proof.ops_of(ROOT / "tests" / "ops" / "test_gradient_norm.py") == ("gradient_norm",)


@pytest.mark.parametrize(("cores", "is_shared_out"), [(16, True), (2, False)])
def test_many_processors_share_out_a_module(
    cores: int, is_shared_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests of dense steps compile for five minutes of one processor."""
    asked: list[list[str]] = []
    monkeypatch.setattr(proof, "available_cores", lambda: cores)
    monkeypatch.setattr(proof, "_run_module", lambda path, ops, chosen, until: asked.append(chosen))
    proof.run_table(Setting(CPU, tiny=False, deadline=0), 1.0)
    assert len(asked) > 20
    assert all(("--numprocesses" in each) == is_shared_out for each in asked)


def test_a_contest_takes_all_of_its_ops(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run.json", HEAD)
    setting = Setting(CPU, tiny=True, deadline=time.monotonic() + 60)
    contest = CONTESTS["clipping_bert_large"]
    for op in ("gradient_norm", "child_adamw"):
        contests.measure_contest(contest, setting, ledger, {op: f"{op} is wrong"}, None)
        faults = ledger.result["faults"]
        assert {fault["variant"] for fault in faults} == {
            competitor.name for competitor in contest.competitors
        }
        assert {fault["reason"] for fault in faults} == {f"{op} is wrong"}
    assert ledger.result["contest_records"] == []


def test_what_waits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under torch's debug mode, which raises where something waits."""
    setting = Setting(CPU, tiny=False, deadline=0)
    found = find_waits(setting)
    assert [each["waits"] for each in found] == [False] * len(found)
    guarded = False

    @contextlib.contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        nonlocal guarded
        guarded = True
        try:
            yield
        finally:
            guarded = False

    summed = step_factor._sums

    def waits(*arguments: Any) -> Any:
        if guarded:
            raise RuntimeError("called a synchronizing CUDA operation")
        return summed(*arguments)

    monkeypatch.setattr(step_factor, "_sums", waits)
    named = [each["setting"] for each in find_waits(setting, guard) if each["waits"]]
    assert len(named) == 6
    assert all("max_grad_norm" in each or "skip_nonfinite" in each for each in named)


def test_the_file_holds_what_there_is_at_every_moment(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run.json", HEAD)

    def written() -> dict[str, Any]:
        result: dict[str, Any] = json.loads(ledger.path.read_text(encoding="utf-8"))
        return result

    with ledger.section("bert_large"):
        assert written()["sections"]["bert_large"] == {"state": "running"}
        ledger.put(
            "records", [{"case": "bert_large", "variant": "plain", "seconds": 1.0}], "bert_large"
        )
        assert written()["records"][0]["seconds"] == 1.0
        ledger.put(
            "records", [{"case": "bert_large", "variant": "plain", "seconds": 2.0}], "bert_large"
        )
        raise RuntimeError("the device is lost")
    found = written()
    assert [record["seconds"] for record in found["records"]] == [2.0]
    assert found["sections"]["bert_large"]["state"] == "failed"
    assert "the device is lost" in found["sections"]["bert_large"]["reason"]
    assert not found["finished"]


def test_an_earlier_result_is_taken_up_again(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "run.json", HEAD)
    first.put("records", [{"case": "bert_large", "variant": "plain"}], "bert_large")
    first.result["copy"] = [{"bytes": 1}]
    first.result |= {"titles": {"bert_large": "BERT-large"}, "dirty": True}
    second = Ledger(tmp_path / "run.json", HEAD)
    second.resume(first.result)
    assert second.result["records"] == first.result["records"]
    assert second.result["copy"] == [{"bytes": 1}]
    assert second.result["titles"] == {"bert_large": "BERT-large"}
    assert second.result["dirty"]
    other = Ledger(tmp_path / "run.json", {**HEAD, "commit": "decade"})
    with pytest.raises(ValueError, match="commit was c0ffee, and is decade"):
        other.resume(first.result)


def test_cases_have_the_tensors_of_their_models() -> None:
    for case in cases.cases_for(CPU, tiny=False).values():
        assert len(case.shapes()) == case.tensors
    assert 16 * cases.layers_of_8b(150 * 10**9).parameters < 60 * 10**9
    assert cases.layers_of_8b(10**13).tensors == 32 * 9


def test_bytes_that_a_step_cannot_do_without() -> None:
    def needed(variant: variants.Variant, dtype: torch.dtype) -> float:
        named = [("w", torch.nn.Parameter(torch.ones(2**16, dtype=dtype)))]
        optimizer = variant.build(named, "reference")
        return traffic.bytes_per_parameter(variant, optimizer, 2**16)

    assert needed(TORCH_FUSED, torch.float32) == 28
    assert needed(PLAIN, torch.float32) == 28
    assert needed(variants.PLAIN_BF16, torch.bfloat16) == 2 + 2 + 2 + 16
    assert needed(variants.PLAIN_BF16_MASTER, torch.bfloat16) == 2 + 2 + 16 + 8
    # Of a split master weight and remainder are read and written.
    kept = {SPLIT: 4 + 16, STOCHASTIC: 16, SPLIT_MOMENTS: 4 + 8, STOCHASTIC_MOMENTS: 8}
    for each, state in kept.items():
        for variant in (PLAIN, CT_F):
            assert needed(in_bf16(variant, each), torch.bfloat16) == 2 + 2 + 2 + state
    runs = needed(in_bf16(CT_D_RUNS, SPLIT), torch.bfloat16)
    assert runs == pytest.approx((6 + 4 + 16) * 0.1, rel=0.05)
    assert needed(CT_D_RUNS, torch.float32) == pytest.approx(28 * 0.1, rel=0.05)
    # Of a scattered child of 2 %, one sector of eight elements in seven is touched.
    assert traffic.touched_share(CT_D_SPARSEST.kept, 1, 8) == pytest.approx(0.149, abs=1e-3)
    assert 12 * 0.149 + 16 * 0.02 < needed(CT_D_SPARSEST, torch.float32) < 12 * 0.149 + 21 * 0.02


def test_runs_are_of_the_length_they_are_named_for() -> None:
    named = [("w", torch.nn.Parameter(torch.ones(2**14)))]
    for variant in variants.CT_D_OF_RUNS:
        mask = random_child_mask(named, variant.kept, variant.run)
        optimizer = FusedChildAdamW(named, child_mask=mask, backend="reference")
        assert optimizer.state[named[0][1]]["child_exp_avg"].numel() % 256 == 0
        assert variant.name.endswith("_runs")
