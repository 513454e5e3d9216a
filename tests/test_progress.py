"""The progress bar of long work."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from childtune_kernels import child_checkpoint, child_diff, fisher_files, progress
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


def test_long_work_on_files_tells_all_its_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Comparing two models, and the checksum of a Fisher file."""
    told: dict[str, list[int]] = {}

    @contextmanager
    def recorded(what: str, total: int) -> Iterator[Callable[[int], object]]:
        told[what] = [total]
        yield told[what].append

    monkeypatch.setattr(child_checkpoint, "progress_of_amount", recorded)
    monkeypatch.setattr(fisher_files, "progress_of_amount", recorded)
    weights = {"w": torch.ones(40), "b": torch.ones(3), "empty": torch.ones(0)}
    child_diff(weights, {name: weight + 1 for name, weight in weights.items()})
    FisherSums(weights, {1: 4}).save(tmp_path / "fisher")
    assert told == {"comparing": [172, 160, 12, 0], "checksum of Fisher sums": [172, 160, 12]}
    del told["checksum of Fisher sums"]
    FisherSums.load(tmp_path / "fisher")
    assert told["checksum of Fisher sums"] == [172, 160, 12]
