"""``python -m childtune_kernels child``: weight files on disk, base + child = tuned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from childtune_kernels import (
    ChildMask,
    apply_child,
    child_diff,
    load_child,
    save_child,
    weight_bits,
)
from childtune_kernels.__main__ import main

from .snapshots import bits
from .tuned_models import Run, different, flip_bit_, tuned_run

PT = {"format": "pt"}
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight of these small models is worked on in several parts."""
    monkeypatch.setattr(weight_bits, "PART", 96)


@pytest.fixture(scope="module")
def run() -> Run:
    """A tuned run, which tests must not change."""
    return tuned_run(torch.bfloat16)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> Path:
    """The working directory: base.safetensors, tuned.safetensors and child, of one run."""
    monkeypatch.chdir(tmp_path)
    save_file(weights_of(run.base), "base.safetensors", PT)
    save_file(weights_of(run.tuned), "tuned.safetensors", PT)
    save_child("child", run.tuned, run.mask)
    return tmp_path


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A state dict as transformers writes it: of tied weights the first name alone."""
    return {k: v for k, v in model.state_dict().items() if k != "output.weight"}


def in_shards(folder: str, weights: Mapping[str, Tensor]) -> None:
    """Write weights as two shards with an index."""
    os.mkdir(folder)
    weight_map: dict[str, str] = {}
    for number in range(2):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        part = dict(list(weights.items())[number::2])
        save_file(part, f"{folder}/{file}", {**PT, "part": str(number)})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    Path(folder, INDEX).write_text(json.dumps(index), encoding="utf-8")


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and torch.equal(bits(first[name]), bits(second[name]))
        for name in first
    )


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a refused command prints; nothing new lies in the working directory."""
    before = sorted(os.listdir())
    assert main(["child", *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert sorted(os.listdir()) == before
    return printed.err


def test_apply_makes_the_tuned_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["child", "apply", "base.safetensors", "child", "out.safetensors"]) == 0
    assert "out.safetensors: " in capsys.readouterr().out
    assert same(load_file("out.safetensors"), load_file("tuned.safetensors"))
    with safe_open("out.safetensors", framework="pt") as file:
        assert file.metadata() == PT


def test_apply_keeps_the_layout_of_a_folder(here: Path, run: Run) -> None:
    os.mkdir("single")
    save_file(weights_of(run.base), "single/model.safetensors", PT)
    in_shards("shards", weights_of(run.base))
    for layout in ("single", "shards"):
        assert main(["child", "apply", layout, "child", f"{layout}-out"]) == 0
        assert sorted(os.listdir(f"{layout}-out")) == sorted(os.listdir(layout))
        tuned: dict[str, Tensor] = {}
        for path in sorted(Path(f"{layout}-out").glob("*.safetensors")):
            tuned |= load_file(path)
            with safe_open(path, framework="pt") as file, \
                    safe_open(Path(layout, path.name), framework="pt") as source:  # fmt: skip
                assert file.metadata() == source.metadata()
                assert set(file.keys()) == set(source.keys())
        assert same(tuned, weights_of(run.tuned))
    index = json.loads(Path("shards-out", INDEX).read_text(encoding="utf-8"))
    assert index == json.loads(Path("shards", INDEX).read_text(encoding="utf-8"))
    assert not [name for name in os.listdir() if "partial" in name]


def test_apply_to_a_file_with_both_names_or_the_other_name_of_a_tied_weight(
    here: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = weights_of(run.base), weights_of(run.tuned)
    both = {**base, "output.weight": base["embedding.weight"].clone()}
    other = {k: v for k, v in both.items() if k != "embedding.weight"}
    for weights in (both, other):
        save_file(weights, "untied", PT)
        assert main(["child", "apply", "untied", "child", "out", "--overwrite"]) == 0
        expected = {**tuned, "output.weight": tuned["embedding.weight"]}
        assert same(load_file("out"), {name: expected[name] for name in weights})
    flip_bit_(both["output.weight"], 0)
    save_file(both, "untied", PT)
    os.remove("out")
    capsys.readouterr()
    error = error_of(capsys, "apply", "untied", "child", "out")
    assert "embedding.weight and output.weight differ but are tied" in error


def test_diff_makes_a_checkpoint_that_applies(here: Path, run: Run) -> None:
    in_shards("tuned", weights_of(run.tuned))
    assert main(["child", "diff", "base.safetensors", "tuned", "diff"]) == 0
    assert main(["child", "apply", "base.safetensors", "diff", "out.safetensors"]) == 0
    assert same(load_file("out.safetensors"), load_file("tuned.safetensors"))
    model = tuned_run(torch.bfloat16, steps=0).base
    apply_child(model, "diff")
    assert different(model, run.tuned) == []
    checkpoint = load_child("diff")
    assert checkpoint.role("frozen.weight") == "base"
    assert checkpoint.role("inner.weight") == "child"
    assert checkpoint.role("head.weight") == "dense"
    assert checkpoint.role("norm.num_batches_tracked") == "buffer"
    inner = checkpoint.mask.dense("inner.weight")
    assert not (inner & ~run.mask.dense("inner.weight")).any()


def test_a_checkpoint_of_files_does_not_fit_a_model_that_ties_more(here: Path, run: Run) -> None:
    for name, model in (("base", run.base), ("tuned", run.tuned)):
        weights = weights_of(model)
        save_file({**weights, "output.weight": weights["embedding.weight"].clone()}, name, PT)
    assert main(["child", "diff", "base", "tuned", "diff"]) == 0
    with pytest.raises(
        ValueError, match=r"embedding.weight is one tied weight, for which the other"
    ):
        apply_child(tuned_run(torch.bfloat16, steps=0).base, "diff")


def test_diff_can_write_the_mask_alone(here: Path) -> None:
    arguments = ["base.safetensors", "tuned.safetensors", "mask"]
    assert main(["child", "diff", "--mask", *arguments]) == 0
    expected = child_diff(load_file("base.safetensors"), load_file("tuned.safetensors"))
    assert ChildMask.load("mask") == expected
    assert expected.count() > 0


def test_info(here: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["child", "info", "child"]) == 0
    printed = capsys.readouterr().out
    assert load_child("child").fingerprint in printed
    assert f"{run.mask.count():,} of {run.mask.numel():,} elements" in printed
    assert "embedding.weight = output.weight" in printed
    rows = {line.split()[0]: line.split()[1] for line in printed.splitlines() if "(16," in line}
    assert rows["inner.weight"] == "child"
    assert rows["frozen.weight"] == "base"
    assert main(["child", "info", "child", "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert report["count"] == run.mask.count()
    assert report["members"]["head.bias"] == {
        "role": "dense", "dtype": "bfloat16", "shape": [3], "count": None,
    }  # fmt: skip
    whole = sum(v.numel() * v.element_size() for v in weights_of(run.tuned).values())
    assert report["model_bytes"] == whole


def test_apply_and_diff_as_json(here: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["child", "apply", "base.safetensors", "child", "out", "--json"]) == 0
    whole = sorted(load_child("child").whole)
    assert json.loads(capsys.readouterr().out) == {
        "base": "base.safetensors", "child": "child", "out": "out", "count": run.mask.count(), "whole": whole,
        "base_checked": True,
    }  # fmt: skip
    assert main(["child", "apply", "base.safetensors", "child", "b", "--json", "--no-strict"]) == 0
    assert json.loads(capsys.readouterr().out)["base_checked"] is False
    for options, kind in ([], "child checkpoint"), (["--mask"], "mask"):
        arguments = ["base.safetensors", "tuned.safetensors", kind, "--json", *options]
        assert main(["child", "diff", *arguments]) == 0
        report = json.loads(capsys.readouterr().out)
        written = ChildMask.load(kind) if options else load_child(kind).mask
        assert (report["out"], report["kind"]) == (kind, kind)
        assert (report["count"], report["numel"]) == (written.count(), written.numel())
        assert report["bytes"] == os.path.getsize(kind)
        assert (report["whole"] == []) == (kind == "mask")


def test_another_base_needs_no_strict(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file("base.safetensors")
    flip_bit_(weights["frozen.weight"], 5)
    save_file(weights, "other", PT)
    arguments = ("apply", "other", "child", "out")
    error = error_of(capsys, *arguments)
    assert "not the base this child was tuned from" in error
    assert "the outcome is then not the tuned model" in error
    assert main(["child", *arguments, "--no-strict"]) == 0
    assert "on another one than the run's this is not the tuned model" in capsys.readouterr().out
    flip_bit_(weights["frozen.weight"], 5)
    tuned = load_file("tuned.safetensors")
    flip_bit_(tuned["frozen.weight"], 5)
    assert same(load_file("out"), tuned)


def test_inputs_are_not_overwritten(
    here: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    in_shards("shards", weights_of(run.base))
    os.link("base.safetensors", "again")
    shard = "shards/model-00001-of-00002.safetensors"
    for arguments in (
        ("apply", "base.safetensors", "child", "base.safetensors"),
        ("apply", "base.safetensors", "child", "again"),
        ("apply", "base.safetensors", "child", "child"),
        ("apply", "shards", "child", "shards"),
        ("diff", "shards", "tuned.safetensors", "tuned.safetensors"),
        ("diff", "shards", "tuned.safetensors", shard),
        ("diff", "--mask", "shards", "tuned.safetensors", f"shards/{INDEX}"),
    ):
        before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
        assert "is an input; name another" in error_of(capsys, *arguments)
        assert "is an input; name another" in error_of(capsys, *arguments, "--overwrite")
        assert before == {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "arguments",
    [
        ("apply", "base.safetensors", "child", "out"),
        ("diff", "base.safetensors", "tuned.safetensors", "out"),
        ("diff", "--mask", "base.safetensors", "tuned.safetensors", "out"),
    ],
)
def test_files_are_overwritten_on_request_only(
    arguments: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").write_text("of another run")
    assert "out exists already; name another file, or say --overwrite" in error_of(
        capsys, *arguments
    )
    assert Path("out").read_text() == "of another run"
    assert main(["child", *arguments, "--overwrite"]) == 0
    assert Path("out").stat().st_size > 100


def test_outputs_of_another_kind_are_refused(
    here: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    in_shards("shards", weights_of(run.base))
    os.mkdir("full")
    Path("full/something").touch()
    for base, out, message in (
        ("shards", "full", "full exists and is no empty folder"),
        (
            "shards",
            "tuned.safetensors",
            "tuned.safetensors is a file and shards a folder; name a folder",
        ),
        ("shards", "missing/out", "missing is no directory"),
        ("base.safetensors", "full", "full is a folder and base.safetensors a file"),
        ("base.safetensors", "missing/out", "missing is no directory"),
    ):
        assert message in error_of(capsys, "apply", base, "child", out)
        assert message in error_of(capsys, "apply", base, "child", out, "--overwrite")
    for out, message in (
        ("full", "full is a folder"),
        ("new/", "new/ is a folder; name a file"),
        ("missing/out", "missing is no directory"),
    ):
        assert message in error_of(capsys, "diff", "shards", "tuned.safetensors", out)
    os.mkdir("empty")
    assert main(["child", "apply", "shards", "child", "empty"]) == 0


def test_a_child_checkpoint_is_no_model(
    here: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "is no model; its format is 'childtune_kernels.child_checkpoint'"
    assert message in error_of(capsys, "apply", "child", "child", "out")
    assert message in error_of(capsys, "diff", "base.safetensors", "child", "out")
    assert not Path("out").exists()


def test_a_failed_folder_leaves_nothing(
    here: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_shards("shards", weights_of(run.base))
    written = []

    def disk_full(tensors: object, path: Path, metadata: object) -> None:
        written.append(path)
        path.write_bytes(b"whole or half")
        if len(written) == 2:
            raise OSError("no space left on device")

    monkeypatch.setattr("childtune_kernels.weight_files.save_whole", disk_full)
    assert "no space left" in error_of(capsys, "apply", "shards", "child", "out")
    assert len(written) == 2


def _index(folder: str, **changes: Any) -> None:
    path = Path(folder, INDEX)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes))


def test_bad_input_is_an_exit_code_of_one(
    here: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text").write_text("no weights")
    os.mkdir("empty")
    save_file({"w": torch.ones(2)}, "foreign", PT)
    torch.save({"w": torch.ones(2)}, "pickled")
    content = Path("child").read_bytes()
    Path("cut").write_bytes(content[:-1])
    weights = weights_of(run.base)
    for folder in ("escapes", "no map", "no index", "too much", "shard lost", "twice"):
        in_shards(folder, weights)
    weight_map = json.loads(Path("too much", INDEX).read_text())["weight_map"]
    _index("escapes", weight_map={"w": "../foreign"})
    _index("no map", weight_map=3)
    Path("no index", INDEX).write_text("{")
    _index("too much", weight_map={**weight_map, "more": next(iter(weight_map.values()))})
    os.remove("shard lost/model-00002-of-00002.safetensors")
    shards = [load_file(f"twice/model-0000{number}-of-00002.safetensors") for number in (1, 2)]
    again = {name: weight + 1 for name, weight in shards[1].items()}
    save_file({**shards[0], **again}, "twice/model-00001-of-00002.safetensors", PT)
    for arguments, message in {
        ("info", "foreign"): "foreign is no child checkpoint",
        ("info", "cut"): "cut is not a whole child checkpoint",
        ("info", "nowhere"): "nothing lies at nowhere; a child checkpoint file was expected",
        ("info", "empty"): "empty is a folder and no child checkpoint",
        ("apply", "base.safetensors", "foreign", "out"): "foreign is no child checkpoint",
        ("apply", "foreign", "child", "out"): "base: other weights than expected",
        ("apply", "text", "child", "out"): "text is no whole safetensors file",
        ("apply", "pickled", "child", "out"): "pickled is no whole safetensors file",
        ("apply", "nowhere", "child", "out"): "nothing lies at nowhere; a safetensors file, or",
        ("apply", "empty", "child", "out"): "empty has neither model.safetensors nor",
        ("apply", "escapes", "child", "out"): "names files outside its folder",
        ("apply", "no map", "child", "out"): "is no index of shards",
        ("apply", "no index", "child", "out"): "is no index of shards",
        ("apply", "too much", "child", "out"): "names other tensors than its files hold",
        ("apply", "shard lost", "child", "out"): "00002.safetensors; a shard that shard lost/model",
        ("apply", "twice", "child", "out"): "stands in another file too",
        ("diff", "foreign", "tuned.safetensors", "out"): "base: other weights than expected",
        ("diff", "base.safetensors", "base.safetensors", "out"): "no floating point weight differs",
    }.items():
        assert message in error_of(capsys, *arguments)


@pytest.mark.parametrize(
    "arguments", [[], ["inform"], ["apply", "base"], ["info", "child", "--json=yes"]]
)
def test_bad_usage_is_an_exit_code_of_two(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_of:
        main(["child", *arguments])
    assert exit_of.value.code == 2
    assert "usage: python -m childtune_kernels child" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["info", "apply", "diff"])
def test_help(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_of:
        main(["child", action, "--help"])
    assert exit_of.value.code == 0
    assert "child checkpoint" in capsys.readouterr().out


def test_columns_stand_apart_whatever_the_labels(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label = f"encoder.{'very_' * 12}long.weight"
    base = {label: torch.zeros(4, 4), "b": torch.zeros(3)}
    save_file(base, "a", PT)
    save_file({**base, "b": torch.ones(3)}, "b", PT)
    assert main(["child", "diff", "a", "b", "out"]) == 0
    assert main(["child", "info", "out"]) == 0
    printed = capsys.readouterr().out.splitlines()
    (row,) = (line for line in printed if line.startswith(label))
    assert row.split(maxsplit=4) == [label, "base", "float32", "-", "(4, 4)"]
    (title,) = (line for line in printed if line.startswith("weight "))
    assert title.index("type") + 4 == row.index("float32") + 7


def test_as_a_program(here: Path) -> None:
    root = Path(__file__).parent.parent
    finished = subprocess.run(
        [sys.executable, "-m", "childtune_kernels", "child", "info", str(here / "base.safetensors")],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 1
    assert "is no child checkpoint; its format is 'pt'" in finished.stderr
    assert "Traceback" not in finished.stderr
