"""``python -m childtune_kernels bench``: run in this process, on few parameters."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from childtune_kernels import contenders, model_shapes, side_by_side
from childtune_kernels.__main__ import main
from childtune_kernels.contenders import NAMES, entrants_of
from childtune_kernels.model_shapes import model_at, parameter_count, transformer_of

CPU = torch.device("cpu")
QUICK = ("--seconds", "0.05", "--threads", "1", "--device", "cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that fails."""
    assert main(["bench", *QUICK, *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


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


def test_what_memory_does_not_hold_is_refused_or_made_smaller(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(side_by_side, "available_bytes", lambda device: 20_000_000)
    error = error_of(capsys, "--parameters", "7B")
    assert "6,999,997,248 parameters need about " in error
    assert "0.02 GB are free" in error
    smaller = transformer_of(int(error.split("say --parameters ")[1].split()[0]))
    assert 300_000 < smaller.parameters < 600_000
    entrants = entrants_of(NAMES, CPU, torch.float32, 0.3, 0.1)
    side_by_side.check_memory(smaller, entrants, CPU, torch.float32)
    assert main(["bench", *QUICK, "--contenders", "plain", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 300_000 < report["model"]["parameters"] < 1_000_000
    monkeypatch.setattr(side_by_side, "available_bytes", lambda device: None)
    side_by_side.check_memory(transformer_of(10**9), entrants, CPU, torch.float32)


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
    assert "NVIDIA and AMD are cuda" in error_of(capsys, "--device", "gpu")
    if not torch.cuda.is_available():
        assert "try --device cpu" in error_of(capsys, "--device", "cuda")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--parameters", "many"], ["--parameters", "99K"], ["--parameters", "-1M"], ["--density", "0"],
        ["--density", "1.1"], ["--reserve-p", "half"], ["--seconds", "0"], ["--seconds", "nan"],
        ["--threads", "0"], ["--threads", "9" * 20], ["--reserve-p", "1e-12"],
        ["--dtype", "fp8"], ["--contenders", "sgd"], ["--contenders"],
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
