"""``python -m childtune_kernels mask``, run in this process and once in one of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from childtune_kernels import ChildMask
from childtune_kernels.__main__ import main
from childtune_kernels.fisher_sums import FisherSums

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Two masks of one scope."""
    generator = torch.Generator().manual_seed(2)
    names = ["embeddings.weight", *(f"layer.{n}.{kind}" for n in (0, 1) for kind in ("w", "b"))]
    paths = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    for path in paths:
        masks = {name: torch.rand(20, 10, generator=generator) < 0.3 for name in names}
        ChildMask.from_dense(masks, dense=["head.weight", "head.bias"]).save(path)
    return str(paths[0]), str(paths[1])


def test_info(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    mask = ChildMask.load(files[0])
    assert main(["mask", "info", files[0]]) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.split()}
    assert lines["scope"][:2] == ["5", "parameters"]
    assert lines["elements"] == ["1,000"]
    assert lines["child"] == [str(mask.count())]
    assert lines["density"] != []
    assert f"{mask.density():.4f}" in printed
    assert lines["w"][:2] == [f"{100 * mask.density(f'layer.{n}.w'):.1f}" for n in (0, 1)]
    assert lines["embeddings.weight"][1] == str(mask.count("embeddings.weight"))
    assert printed.endswith("train densely\n  head.bias\n  head.weight\n")


def test_info_as_json(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    mask = ChildMask.load(files[0])
    assert main(["mask", "info", files[0], "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["elements"], report["child"], report["parameters"]) == (1000, mask.count(), 5)
    assert report["density"] == mask.density()
    assert report["dense"] == ["head.bias", "head.weight"]
    by_place = {(cell["layer"], cell["kind"]): cell["child"] for cell in report["layers"]}
    expected = {(n, kind): mask.count(f"layer.{n}.{kind}") for n in (0, 1) for kind in ("w", "b")}
    assert by_place == expected
    assert [cell["parameter"] for cell in report["outside_layers"]] == ["embeddings.weight"]


def test_info_of_a_mask_without_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "dense"
    ChildMask.from_dense({}, dense=["w"]).save(path)
    assert main(["mask", "info", str(path)]) == 0
    assert "undefined" in capsys.readouterr().out
    assert main(["mask", "info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["density"] is None


def test_plot(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "density.png"
    assert main(["mask", "plot", files[0], "--out", str(out)]) == 0
    assert out.read_bytes()[:8] == PNG
    assert capsys.readouterr().out == f"wrote {out}\n"


@pytest.fixture
def fisher_file(files: tuple[str, str], tmp_path: Path) -> str:
    """Fisher sums of four records, for the scope of the masks."""
    generator = torch.Generator().manual_seed(4)
    shapes = ChildMask.load(files[0]).shapes
    sums = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    path = tmp_path / "fisher.safetensors"
    FisherSums(sums, {1: 4}).save(path)
    return str(path)


def test_plot_of_the_fisher_spectrum(
    files: tuple[str, str], fisher_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "spectrum.png"
    assert main(["mask", "plot", files[0], "--fisher", fisher_file, "--out", str(out)]) == 0
    assert out.read_bytes()[:8] == PNG
    mask, fisher = ChildMask.load(files[0]), FisherSums.load(fisher_file).values()
    inside = torch.cat([fisher[name][mask.dense(name)] for name in mask.words])
    whole = torch.cat([fisher[name].flatten() for name in mask.words])
    printed = capsys.readouterr().out
    assert f"Threshold (smallest Fisher inside the child): {inside.min():.3e}." in printed
    assert f"holds {100 * inside.sum() / whole.sum():.1f} % of the Fisher information" in printed
    assert printed.endswith(f"\nwrote {out}\n")


def test_plot_as_json(
    files: tuple[str, str], fisher_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask, fisher = ChildMask.load(files[0]), FisherSums.load(fisher_file).values()
    out = tmp_path / "a.png"
    arguments = ["mask", "plot", files[0], "--out", str(out), "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert main(["mask", "info", files[0], "--json"]) == 0
    assert report == {**json.loads(capsys.readouterr().out), "picture": str(out)}
    out.unlink()
    assert main([*arguments, "--fisher", fisher_file]) == 0
    report = json.loads(capsys.readouterr().out)
    assert out.read_bytes()[:8] == PNG
    assert report["threshold"] == min(fisher[name][mask.dense(name)].min() for name in mask.words)
    whole = torch.cat([fisher[name].flatten() for name in mask.words])
    for bar in report["bins"]:
        within = (whole >= bar["from"]) & (whole < bar["to"])
        assert bar["elements"] == within.sum()
    assert sum(bar["child"] for bar in report["bins"]) == mask.count()


def test_the_last_bin_of_fp32_is_valid_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask, fisher = str(tmp_path / "mask"), str(tmp_path / "fisher")
    ChildMask.from_dense({"w": torch.tensor([True, False])}).save(mask)
    FisherSums({"w": torch.tensor([3.3e38, 1e30])}, {1: 1}).save(fisher)
    out = str(tmp_path / "a.png")
    assert main(["mask", "plot", mask, "--fisher", fisher, "--out", out, "--json"]) == 0
    printed = capsys.readouterr().out
    assert "Infinity" not in printed
    assert json.loads(printed)["bins"][-1]["to"] is None


def test_pictures_are_overwritten_on_request_only(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, mask = tmp_path / "a.png", tmp_path / "mask.png"
    out.write_text("of another run")
    ChildMask.load(files[0]).save(mask)
    for arguments in (["plot", files[0]], ["overlap", *files]):
        assert main(["mask", *arguments, "--out", str(out)]) == 1
        assert (
            "a.png exists already; name another file, or say --overwrite" in capsys.readouterr().err
        )
        assert out.read_text() == "of another run"
        assert main(["mask", *arguments, "--out", str(out), "--overwrite"]) == 0
        assert out.read_bytes()[:8] == PNG
        out.write_text("of another run")
    for arguments in (["plot", str(mask)], ["overlap", files[1], str(mask)]):
        assert main(["mask", *arguments, "--out", str(mask), "--overwrite"]) == 1
        assert "is an input; name another" in capsys.readouterr().err
    assert ChildMask.load(mask) == ChildMask.load(files[0])


def test_fisher_that_does_not_fit_is_refused(
    files: tuple[str, str], fisher_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.safetensors"
    FisherSums({"v": torch.ones(3)}, {1: 1}).save(other)
    out = tmp_path / "a.png"
    for fisher, message in (
        (other, "has no Fisher information here"),
        (files[0], "first.safetensors"),
        (tmp_path / "nowhere", "nowhere; a fisher file was expected"),
        (tmp_path, "is a folder"),
    ):
        arguments = ["plot", files[0], "--fisher", str(fisher), "--out", str(out)]
        assert main(["mask", *arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
    assert not out.exists()


def test_overlap(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (ChildMask.load(file) for file in files)
    out = tmp_path / "overlap.png"
    assert main(["mask", "overlap", *files, "--out", str(out)]) == 0
    assert out.read_bytes()[:8] == PNG
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.split()}
    assert lines["first"] == ["100", f"{100 * first.overlap(second):.1f}"]
    assert lines["second"] == [f"{100 * second.overlap(first):.1f}", "100"]
    assert lines["by"] == ["chance", *(f"{100 * mask.density():.1f}" for mask in (first, second))]


def test_overlap_as_json(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (ChildMask.load(file) for file in files)
    assert main(["mask", "overlap", *files, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["overlap"]["first"] == {"first": 1.0, "second": first.overlap(second)}
    assert report["overlap"]["second"]["first"] == second.overlap(first)
    assert report["picture"] is None
    assert report["by_chance"] == {"first": first.density(), "second": second.density()}


def test_masks_with_one_file_name_are_told_apart(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    other = tmp_path / "run" / "first.safetensors"
    ChildMask.load(files[1]).save(other)
    assert main(["mask", "overlap", files[0], str(other), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["overlap"]) == [files[0], str(other)]


def test_bad_input_is_one_line_and_an_exit_code_of_one(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign, text, other = tmp_path / "model.safetensors", tmp_path / "text", tmp_path / "other"
    save_file({"w": torch.ones(3)}, foreign)
    text.write_text("a mask, or so they say")
    ChildMask.from_dense({"w": torch.ones(3, dtype=torch.bool)}).save(other)
    ChildMask.from_dense({"w": torch.zeros(3, dtype=torch.bool)}).save(tmp_path / "empty")
    out = str(tmp_path / "a.png")
    cases = [
        (["info", str(tmp_path / "nowhere")], "nowhere; a child mask file was expected"),
        (["info", str(foreign)], "is no child mask"),
        (["info", str(text)], "is not a whole child mask"),
        (["info", str(tmp_path)], "is a folder"),
        (["plot", str(foreign), "--out", out], "is no child mask"),
        (
            ["plot", files[0], "--out", str(tmp_path / "missing" / "a.png")],
            "missing is no directory",
        ),
        (["overlap", files[0]], "name a second mask"),
        (["overlap", files[0], files[0]], "is named twice"),
        (["overlap", files[0], str(other)], "differ in scope"),
        (["overlap", str(other), str(tmp_path / "empty"), "--out", out], "empty is an empty child"),
    ]
    for arguments, message in cases:
        assert main(["mask", *arguments]) == 1, arguments
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert message in printed.err
        assert printed.err.count("\n") == 1
    assert not Path(out).exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["info"], ["plot", "a"], ["plot", "a", "--out", "a.pdf"], ["overlap"],
        ["overlap", "a", "b", "--out", "a"], ["info", "a", "--yaml"],
    ],
)  # fmt: skip
def test_bad_usage_is_an_exit_code_of_two(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_of:
        main(["mask", *arguments])
    assert exit_of.value.code == 2
    assert "usage: python -m childtune_kernels" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["info", "plot", "overlap"])
def test_every_action_has_help(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_of:
        main(["mask", action, "--help"])
    assert exit_of.value.code == 0
    assert f"mask {action}" in capsys.readouterr().out


def test_without_matplotlib_tables_work_and_pictures_name_the_remedy(
    files: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = str(tmp_path / "a.png")
    for arguments in (["plot", files[0]], ["overlap", *files]):
        assert main(["mask", *arguments, "--out", out]) == 1
        assert "pip install matplotlib" in capsys.readouterr().err
    assert main(["mask", "info", files[0]]) == 0
    assert main(["mask", "overlap", *files]) == 0


def test_tables_do_not_import_matplotlib(files: tuple[str, str]) -> None:
    script = (
        "import sys; from childtune_kernels.__main__ import main; "
        f"code = main(['mask', 'overlap', *{files!r}]); "
        "assert 'matplotlib' not in sys.modules; sys.exit(code)"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("share of the row's child")
