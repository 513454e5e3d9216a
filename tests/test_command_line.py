"""The program, and its command ``info``, run in this process."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from childtune_kernels import ChildMask, __version__, registry
from childtune_kernels import __main__ as command_line
from childtune_kernels.backends import cpp
from childtune_kernels.commands import info
from childtune_kernels.self_check import Finding, self_check

ROOT = Path(__file__).parent.parent

needs_extension = pytest.mark.skipif(cpp.load() is not None, reason=str(cpp.load()))


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "_devices", lambda: ["cpu"])


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    """What the self-check finds here; it takes a second."""
    return list(self_check("cpu"))


def pretend(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> None:
    def pretended(_: object) -> Iterator[Finding]:
        yield from findings

    monkeypatch.setattr(info, "self_check", pretended)


@needs_extension
def test_info(
    one_device: None,
    findings: list[Finding],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend(monkeypatch, *findings)
    assert command_line.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert __version__ in printed
    assert torch.__version__ in printed
    assert registry.explain("cpu") in printed
    assert printed.count(" equal\n") == 16
    assert "DIFFERS" not in printed


@needs_extension
def test_info_as_json(
    one_device: None,
    findings: list[Finding],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend(monkeypatch, *findings)
    assert command_line.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sound"] is True
    assert report["versions"]["childtune_kernels"] == __version__
    assert report["cpu"]["extension offers"] == cpp.supported_capabilities()
    assert len(report["table"]["cpu"]) == len(registry.TABLE) * len(registry.BACKENDS)
    assert all(cell["reason"] for cell in report["table"]["cpu"])
    assert len(report["self_check"]) == 16
    assert {finding["backend"] for finding in report["self_check"]} == {"cpp"}


@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"]])
def test_a_failed_self_check_is_an_exit_code_of_one(
    arguments: list[str],
    one_device: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend(monkeypatch, Finding("cpp", "float32 plain", True), Finding("cpp", "CT_F", False))
    assert command_line.main(arguments) == 1
    printed = capsys.readouterr().out
    assert ("DIFFERS" in printed) == (arguments == ["info"])
    assert ('"sound": false' in printed) == (arguments != ["info"])


def test_nothing_to_compare_is_said(
    one_device: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpp, "load", lambda: "no C++ compiler was found")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the slow reference: here on purpose
        assert command_line.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "nothing to compare: only the reference is available" in printed
    assert "no C++ compiler was found" in printed


@pytest.mark.parametrize("arguments", [[], ["inform"], ["info", "--yaml"]])
def test_bad_usage_is_an_exit_code_of_two(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_of:
        command_line.main(arguments)
    assert exit_of.value.code == 2
    assert "usage: python -m childtune_kernels" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["info", "--help"], ["mask", "info", "mask"], ["mask", "info", "mask", "--json"]],
    ids=" ".join,
)
def test_a_reader_that_left_is_no_error(arguments: list[str], tmp_path: Path) -> None:
    """As ``... | head`` does; a small output breaks at the last flush, a large one while it is printed."""
    names = {f"layer.{at}.{'long' * 99}": torch.ones(1, dtype=torch.bool) for at in range(99)}
    ChildMask.from_dense(names).save(tmp_path / "mask")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)  # argparse hides what an unbuffered help meets
    reading, writing = os.pipe()
    os.close(reading)
    try:
        finished = subprocess.run(
            [sys.executable, "-m", "childtune_kernels", *arguments], cwd=tmp_path, stdout=writing,
            stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert finished.stderr == ""
    assert finished.returncode == 1


def test_an_output_that_is_closed_is_no_error(tmp_path: Path) -> None:
    ChildMask.from_dense({"w": torch.ones(1, dtype=torch.bool)}).save(tmp_path / "mask")
    finished = subprocess.run(
        f"{shlex.quote(sys.executable)} -m childtune_kernels mask info mask >&-", shell=True,
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (finished.returncode, finished.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
@pytest.mark.parametrize("command", ["info", "mask"])
def test_an_output_that_cannot_be_written_is_one_line(command: str, tmp_path: Path) -> None:
    ChildMask.from_dense({"w": torch.ones(1, dtype=torch.bool)}).save(tmp_path / "mask")
    arguments = [command] if command == "info" else [command, "info", "mask"]
    with open("/dev/full", "w") as full:
        finished = subprocess.run(
            [sys.executable, "-m", "childtune_kernels", *arguments], cwd=tmp_path, stdout=full,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert finished.stderr.splitlines() == ["error: [Errno 28] No space left on device"]
    assert finished.returncode == 1


COMMANDS_AND_ACTIONS = (
    "info", "bench", "mask", "mask info", "mask plot", "mask overlap", "child", "child info", "child apply",
    "child diff",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS_AND_ACTIONS)
def test_every_help_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And what they name is understood, up to the files, which there are not."""
    with pytest.raises(SystemExit) as exit_of:
        command_line.main([*command.split(), "--help"])
    assert exit_of.value.code == 0
    printed = capsys.readouterr().out
    examples = printed.split("\nexamples:\n")[1].splitlines()
    assert examples
    for example in examples:
        assert example.startswith(f"  python -m childtune_kernels {command}")
    assert ("--json" in printed) == (command not in ("mask", "child"))


def examples_of(parser: argparse.ArgumentParser) -> list[str]:
    """The examples under a parser's help and that of its actions, without the program's name."""
    found = (parser.epilog or "").replace("%(prog)s", parser.prog).splitlines()[1:]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [line for each in action.choices.values() for line in examples_of(each)]
    return [line.strip() for line in found]


def test_examples_are_good_usage() -> None:
    parser = command_line.program("childtune")
    examples = examples_of(parser)
    assert len(examples) > 15
    for example in examples:
        name, *arguments = example.split()
        assert name == "childtune"
        parser.parse_args(arguments)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_of:
        command_line.main(["--version"])
    assert exit_of.value.code == 0
    assert capsys.readouterr().out == f"childtune_kernels {__version__}\n"


@pytest.mark.parametrize(
    ("called", "name"),
    [("/usr/bin/childtune", "childtune"), ("/x/__main__.py", "python -m childtune_kernels")],
)
def test_help_names_the_program_as_it_was_called(
    called: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [called, "mask", "info", "--help"])
    with pytest.raises(SystemExit):
        command_line.run_as_program()
    printed = capsys.readouterr().out
    assert f"usage: {name} mask info" in printed
    assert f"examples:\n  {name} mask info child.safetensors" in printed


def test_the_entry_point_leads_to_the_program() -> None:
    """What an installation makes of the line in pyproject.toml, which only a new one would show."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    scripts = re.search(r"(?m)^\[project\.scripts\]\n((?:.+\n)+)", text)
    assert scripts
    (line,) = scripts[1].splitlines()
    name, target = line.split(" = ")
    entry_point = EntryPoint(name, json.loads(target), "console_scripts")
    assert name == "childtune"
    assert entry_point.load() is command_line.run_as_program
    script = (
        f"import sys; from {entry_point.module} import {entry_point.attr}; sys.argv = ['/bin/{name}', "
        f"'--version']; sys.exit({entry_point.attr}())"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (finished.returncode, finished.stdout) == (0, f"childtune_kernels {__version__}\n")


def test_an_interrupt_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "main", interrupted)
    assert command_line.run_as_program() == 130
    assert capsys.readouterr().err == ""


@needs_extension
def test_the_self_check_finds_a_kernel_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "child_adamw_", lambda rows, *tables: None)
    findings = list(self_check())
    assert len(findings) == 16
    assert not any(finding.equal for finding in findings)


@needs_extension
def test_the_self_check_sees_the_sign_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """It promises equal bits, and −0 is not +0 in its bits."""
    correct = cpp.child_adamw_

    def other_zeros(rows: list[registry.Choice], *tables: Any) -> None:
        correct(rows, *tables)
        for row in rows:
            moment = row.exp_avg  # type: ignore[attr-defined]
            moment[moment == 0] = -0.0

    monkeypatch.setattr(cpp, "child_adamw_", other_zeros)
    assert not all(finding.equal for finding in self_check())
