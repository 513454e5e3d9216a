"""The progress bar of long work."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from childtune_kernels import child_diff, progress
from childtune_kernels.fisher_sums import FisherSums
from childtune_kernels.progress import progress_of_amount


class Terminal(io.StringIO):
    """A standard error that somebody looks at."""

    def isatty(self) -> bool:
        return True


def printed(error: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    """What work of 100 bytes prints."""
    monkeypatch.setattr(sys, "stderr", error)
    with progress_of_amount("digest of nothing", 100) as advance:
        advance(40)
        advance(60)
    return error.getvalue()


def test_a_bar_appears_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm", reason="tqdm is an extra")
    monkeypatch.setattr(progress, "PATIENCE", 0)
    assert "digest of nothing" in printed(Terminal(), monkeypatch)
    assert printed(io.StringIO(), monkeypatch) == ""


def test_quick_work_needs_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "digest" not in printed(Terminal(), monkeypatch)


def test_without_tqdm_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert printed(Terminal(), monkeypatch) == ""


def test_long_work_on_files_shows_its_bar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Comparing two models, and the checksum of a Fisher file, each of as many bytes as the weights."""
    pytest.importorskip("tqdm", reason="tqdm is an extra")
    monkeypatch.setattr(progress, "PATIENCE", 0)
    weights = {"w": torch.ones(40)}
    FisherSums(weights, {1: 4}).save(tmp_path / "fisher")
    for what, work in {
        "comparing": lambda: child_diff(weights, {"w": torch.zeros(40)}),
        "checksum of Fisher sums": lambda: FisherSums.load(tmp_path / "fisher"),
    }.items():
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        work()
        assert what in terminal.getvalue()
        assert "/160 [" in terminal.getvalue(), "of all bytes"
