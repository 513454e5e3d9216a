"""``python -m childtune_kernels bench``: figures follow from measurements, the verdict from figures."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from childtune_kernels import contenders, machine, model_shapes, registry, side_by_side
from childtune_kernels.__main__ import main
from childtune_kernels.contenders import NAMES, Entrant, bytes_needed, entrants_of, run_child
from childtune_kernels.model_shapes import ModelShapes, model_at, parameter_count, transformer_of
from childtune_kernels.report.speeds import note, speeds_table, standing, verdict
from childtune_kernels.side_by_side import Measured, SideBySide, measure

CPU = torch.device("cpu")
SMALL = ModelShapes("made for a test", {"w": (300, 70), "layers.0.b": (33,), "e": (0, 3), "s": ()})
QUICK = ("--seconds", "0.05", "--threads", "1", "--device", "cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a machine with other work take a thousand times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def entrants(*names: str, dtype: torch.dtype = torch.float32) -> list[Entrant]:
    return entrants_of(names or NAMES, CPU, dtype, 0.3, 0.1)


def made_up(
    ratios: Mapping[str, tuple[float, float, float]], *, rounds: int = 20, **changes: Any
) -> SideBySide:
    """Measurements of a billion parameters: quartiles of times in relation to a base of 100 ms."""
    titles = {each.name: each.title for each in entrants()}
    state = {"ct_d": 1.03, "ct_d_runs": 0.91}
    measured = tuple(
        Measured(
            name,
            titles[name],
            name in ("plain", "ct_f", "ct_d", "ct_d_runs"),
            seconds=(0.1 * low, 0.1 * middle, 0.1 * high),
            of_base=(low, middle, high),
            rounds=rounds,
            state_bytes=int(1e9 * state.get(name, 8.0)),
        )
        for name, (low, middle, high) in {"torch-fused": (1.0, 1.0, 1.0), **ratios}.items()
    )
    model = ModelShapes("made for a test", {"w": (10**9,)})
    found = {
        "model": model, "device": CPU, "dtype": torch.float32, "backend": "cpp", "absent": "",
        "measured": measured,
    }  # fmt: skip
    return SideBySide(**{**found, **changes})


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that fails."""
    assert main(["bench", *QUICK, *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_the_verdict_tells_faster_from_slower() -> None:
    ratios = {
        "unfused": (24.0, 25.0, 26.0), "plain": (0.97, 1.01, 1.05), "ct_f": (1.09, 1.10, 1.12),
        "ct_d": (0.55, 0.57, 0.60),
    }  # fmt: skip
    speed, state, unfused = verdict(made_up(ratios))
    assert speed == (
        "Of the time of torch's fused AdamW, plain FusedChildAdamW takes 1.01 (about as fast), CT_F at "
        "p = 0.3 takes 1.10 (slower) and CT_D at density 0.1 takes 0.57 (faster)."
    )
    assert state == (
        "CT_D at density 0.1 keeps 1.03 bytes of state a parameter instead of 8.00: 6.97 GB less for this "
        "model."
    )
    assert unfused == ("An unfused Child-Tuning step takes 23 times as long as CT_F at p = 0.3.")


@pytest.mark.parametrize(
    ("quartiles", "rounds", "expected"),
    [
        ((0.50, 0.60, 0.70), 20, "faster"),
        ((0.50, 0.80, 0.99), 20, "faster"),
        ((1.06, 1.10, 1.60), 20, "slower"),
        ((0.97, 1.01, 1.06), 20, "about as fast"),
        ((0.96, 0.98, 0.99), 20, "about as fast"),
        ((1.01, 1.02, 1.03), 20, "about as fast"),
        ((0.80, 0.90, 1.10), 20, "unclear"),
        ((0.20, 0.45, 1.80), 20, "unclear"),
        ((0.60, 0.61, 0.62), 4, "unclear"),
        ((0.39, 0.40, 0.41), 4, "faster"),
        ((2.90, 3.00, 3.10), 1, "slower"),
    ],
)
def test_standing(quartiles: tuple[float, float, float], rounds: int, expected: str) -> None:
    (base, measured) = made_up({"ct_f": quartiles}, rounds=rounds).measured
    assert standing(measured, base) == expected


def test_where_the_spread_is_large_nothing_is_claimed() -> None:
    noisy = {"plain": (0.7, 1.01, 1.4), "ct_f": (0.8, 0.9, 1.2)}
    speed, _ = verdict(made_up(noisy))
    assert speed.startswith(
        "Whether plain FusedChildAdamW or CT_F at p = 0.3 is faster cannot be told"
    )
    assert "idle machine" in speed
    assert "takes" not in speed
    speed, *_ = verdict(made_up({**noisy, "ct_d": (0.5, 0.6, 0.7)}))
    assert "CT_D at density 0.1 takes 0.60 (faster); whether plain" in speed


def test_a_base_that_varies_is_said() -> None:
    found = made_up({"ct_d": (0.3, 0.3, 0.3)})

    def with_base(*seconds: float) -> list[str]:
        base = Measured(**{**vars(found.base), "seconds": seconds})
        return verdict(made_up({}, measured=(base, *found.measured[1:])))

    assert len(with_base(0.09, 0.1, 0.105)) == 2
    caution, speed, _ = with_base(0.09, 0.1, 0.13)
    assert "themselves differ by 40%" in caution
    assert "takes 0.30 (faster)" in speed
    caution, speed, _ = with_base(0.08, 0.1, 0.14)
    assert "themselves differ by 60%" in caution
    assert speed.startswith("Whether CT_D at density 0.1 is faster cannot be told")


def test_figures_of_the_reference_do_not_stand_for_the_package() -> None:
    slow = made_up({"ct_f": (30, 31, 32)}, backend="reference", absent="cpp: no C++ compiler")
    caution, speed, _ = verdict(slow)
    assert caution.startswith("These times do not stand for the package, whose slow reference")
    assert "(cpp: no C++ compiler)" in caution
    assert "CT_F at p = 0.3 takes 31 (slower)" in speed


def test_more_state_and_equal_state_are_said() -> None:
    plain = made_up({"plain": (1.0, 1.0, 1.0)})
    assert verdict(plain)[1].startswith(
        "plain FusedChildAdamW keeps as much state as torch's fused"
    )
    base = Measured(**{**vars(plain.base), "state_bytes": 4 * 10**9})
    more = made_up({}, measured=(base, *plain.measured[1:]), dtype=torch.bfloat16)
    assert verdict(more)[1].endswith("8.00 bytes of state a parameter instead of 4.00: 4.00 GB more for "
                                     "this model.")  # fmt: skip
    assert "fp32 moments" in note(more)
    assert note(plain) == ""


def test_ours_alone_are_judged_and_failures_have_a_row() -> None:
    failed = Measured("ct_d", "CT_D", True, failure="out of memory")
    found = made_up({"unfused": (24.0, 25.0, 26.0)})
    found = made_up({}, measured=(*found.measured, failed))
    assert verdict(found) == []
    assert not found.sound
    rows = {line[:4]: line.split() for line in speeds_table(found).splitlines()}
    assert rows["CT_D"] == ["CT_D", "failed", "-", "-", "-", "-"]
    assert rows["unfu"][-5:] == ["2,500", "25", "24–26", "20", "8.00"]


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


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *QUICK, "--parameters", "120K", "--contenders", "ct_f", "ct_d"]) == 0
    printed = capsys.readouterr().out
    assert ", threads: 1\n" in printed
    assert torch.__version__ in printed
    assert "a made-up transformer: " in printed
    rows = [line for line in printed.splitlines() if line.startswith(("torch's", "CT_F", "CT_D"))]
    assert [row.split("  ")[0] for row in rows[:3]] == [
        "torch's fused AdamW", "CT_F at p = 0.3", "CT_D at density 0.1",
    ]  # fmt: skip
    assert "bytes of state a parameter instead of 8.00" in printed


def test_bench_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(2)
    arguments = (
        "--parameters",
        "120K",
        "--reserve-p",
        "0.5",
        "--density",
        "0.2",
        "--dtype",
        "bf16",
    )
    assert main(["bench", *QUICK, *arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert torch.get_num_threads() == 2
    assert report["threads"] == 1
    assert (report["dtype"], report["reserve_p"], report["density"]) == ("bf16", 0.5, 0.2)
    assert report["base"] == "torch-fused"
    assert [each["name"] for each in report["contenders"]] == list(NAMES)
    assert report["model"]["parameters"] == transformer_of(120_000).parameters
    for each in report["contenders"]:
        low, high = each["of_base_quartiles"]
        assert low <= each["of_base"] <= high
        assert each["failure"] is None
        assert each["state_bytes_per_parameter"] * report["model"]["parameters"] == pytest.approx(
            each["state_bytes"]
        )
    assert 1 <= len(report["verdict"]) <= 3


def test_a_contender_that_fails_is_an_exit_code_of_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object, **__: object) -> Optimizer:
        raise RuntimeError("no kernel here\nand a trace of ten lines")

    arguments = ["bench", *QUICK, "--parameters", "120K", "--contenders", "plain", "unfused"]
    with monkeypatch.context() as patch:
        patch.setattr(contenders, "FusedChildAdamW", failing)
        assert main(arguments) == 1
        printed = capsys.readouterr()
        assert printed.err == "error: plain FusedChildAdamW: no kernel here\n"
        assert "unfused Child-Tuning at p = 0.3" in printed.out
        assert main([*arguments, "--json"]) == 1
        found = json.loads(capsys.readouterr().out)["contenders"]
        assert [each["failure"] for each in found] == [None, None, "no kernel here"]
    monkeypatch.setattr(contenders, "AdamW", failing)
    monkeypatch.setattr(contenders, "_has_fused", lambda *_: True)
    assert "torch's fused AdamW: no kernel here" in error_of(capsys, "--parameters", "120K")


def test_the_reference_is_told_from_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = registry.Choice("child_adamw", "reference", True, "plain PyTorch")
    absent = registry.Choice("child_adamw", "cpp", False, "no C++ compiler was found")
    monkeypatch.setattr(registry, "survey", lambda device: [absent, choice])
    assert side_by_side._absent(choice, CPU) == "cpp: no C++ compiler was found"
    assert side_by_side._absent(absent, CPU) == ""


def test_what_memory_does_not_hold_is_refused_or_made_smaller(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(side_by_side, "available_bytes", lambda device: 20_000_000)
    error = error_of(capsys, "--parameters", "7B")
    assert "6,999,997,248 parameters need about " in error
    assert "0.02 GB are free" in error
    smaller = transformer_of(int(error.split("say --parameters ")[1].split()[0]))
    assert 300_000 < smaller.parameters < 600_000
    side_by_side.check_memory(smaller, entrants(), CPU, torch.float32)
    assert main(["bench", *QUICK, "--contenders", "plain", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 300_000 < report["model"]["parameters"] < 1_000_000
    monkeypatch.setattr(side_by_side, "available_bytes", lambda device: None)
    side_by_side.check_memory(transformer_of(10**9), entrants(), CPU, torch.float32)


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


@pytest.mark.parametrize(
    ("text", "count"),
    [("110M", 110_000_000), ("1.5B", 1_500_000_000), ("350k", 350_000), ("100000", 10**5)],
)
def test_counts_of_parameters(text: str, count: int) -> None:
    assert parameter_count(text) == count
    model = transformer_of(count)
    width = model.shapes["embedding.weight"][1]
    assert 0 <= count - model.parameters < width
    assert width % 64 == 0
    kinds = {len(shape) for shape in model.shapes.values()}
    assert kinds == {1, 2}


def weights() -> dict[str, Tensor]:
    return {
        "encoder.w": torch.ones(30, 40), "head.bias": torch.ones(3, dtype=torch.bfloat16),
        "positions": torch.arange(9),
    }  # fmt: skip


def test_shapes_of_weights_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkdir(tmp_path / "single")
    os.mkdir(tmp_path / "shards")
    save_file(weights(), tmp_path / "single" / "model.safetensors")
    for number, (name, tensor) in enumerate(weights().items()):
        save_file({name: tensor}, tmp_path / "shards" / f"{number}.safetensors")
    index = {name: f"{number}.safetensors" for number, name in enumerate(weights())}
    (tmp_path / "shards" / model_shapes.INDEX).write_text(json.dumps({"weight_map": index}))
    expected = {"encoder.w": (30, 40), "head.bias": (3,)}
    for path in ("single", "single/model.safetensors", "shards"):
        assert model_at(tmp_path / path).shapes == expected
    arguments = ["--model", str(tmp_path / "single"), "--contenders", "plain"]
    assert main(["bench", *QUICK, *arguments]) == 0
    printed = capsys.readouterr().out
    assert f"the floating point tensors of {tmp_path / 'single'}" in printed
    assert "2 with 1,203 parameters" in printed


def test_shapes_by_a_config_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is an extra")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 64, "vocab_size": 50}  # fmt: skip
    config = transformers.BertConfig(**sizes, architectures=["BertForSequenceClassification"])
    config.save_pretrained(tmp_path)
    found = model_at(tmp_path)
    model = transformers.BertForSequenceClassification(config)
    assert found.shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert "BertForSequenceClassification" in found.source
    transformers.BertConfig(**sizes).save_pretrained(tmp_path)
    assert model_at(tmp_path).parameters == transformers.BertModel(config).num_parameters()
    (tmp_path / "config.json").write_text('{"model_type": "nobody"}')
    assert "transformers makes no model of" in error_of(capsys, "--model", str(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in error_of(capsys, "--model", str(tmp_path))


def test_bad_input_is_an_exit_code_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"n": torch.arange(3)}, tmp_path / "integers")
    (tmp_path / "text").write_text("no weights")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "nowhere": "nothing lies at",
        "integers": "holds no floating point weights",
        "text": "is no whole safetensors file",
        "empty": "neither model.safetensors, model.safetensors.index.json nor config.json",
    }.items():
        assert message in error_of(capsys, "--model", str(tmp_path / name))
    assert "--device meta:x" in error_of(capsys, "--device", "meta:x")
    if not torch.cuda.is_available():
        assert "try --device cpu" in error_of(capsys, "--device", "cuda")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--parameters", "many"], ["--parameters", "99K"], ["--parameters", "-1M"], ["--density", "0"],
        ["--density", "1.1"], ["--reserve-p", "half"], ["--seconds", "0"], ["--seconds", "nan"],
        ["--threads", "0"], ["--dtype", "fp8"], ["--contenders", "sgd"], ["--contenders"],
        ["--parameters", "1M", "--model", "base"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_bad_usage_is_an_exit_code_of_two(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_of:
        main(["bench", *arguments])
    assert exit_of.value.code == 2
    assert "usage: python -m childtune_kernels bench" in capsys.readouterr().err
