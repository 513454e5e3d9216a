"""examples/many_ranks.py: every engine gives the bits of one device, and what does not is seen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .ranks import Ranks

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import many_ranks  # noqa: E402


def compared(folder: str) -> dict[str, dict[str, bool]]:
    return many_ranks.compare(torch.device("cpu"), folder)


def test_every_engine_on_four_ranks(ranks: Ranks, tmp_path: Path) -> None:
    nothing = dict.fromkeys(many_ranks.CHECKS, False)
    table = dict.fromkeys(many_ranks.ENGINES, nothing)
    assert ranks.run(4, compared, str(tmp_path)) == [table] * 4


def strayed(folder: str) -> dict[str, dict[str, bool]]:
    """One rank has another gradient in the last step."""
    values_of, last = many_ranks.values_of, many_ranks.STEPS - 1

    def other(name: str, step: int, *where: Any) -> Tensor:
        factor = 1 + (step == last and torch.distributed.get_rank() == 1)
        return values_of(name, step, *where) * factor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(many_ranks, "values_of", other)
        patch.setattr(many_ranks, "ENGINES", {"FSDP2": many_ranks.sharded})
        return many_ranks.compare(torch.device("cpu"), folder)


def test_what_differs_on_one_rank_is_seen_on_all(ranks: Ranks, tmp_path: Path) -> None:
    seen = {"CT_F": True, "child": False, "CT_D": True, "resumed": True}
    assert ranks.run(2, strayed, str(tmp_path)) == [{"FSDP2": seen}] * 2


def test_torchrun_starts_it() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*command, "--nproc-per-node", "1", str(EXAMPLES / "many_ranks.py"), "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("1 ranks on cpu, beside one device")
    assert run.stdout.count("same bits") == 3 * len(many_ranks.CHECKS)
    alone = subprocess.run(
        [sys.executable, str(EXAMPLES / "many_ranks.py")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert alone.returncode == 2
    assert "torchrun --nproc-per-node 2" in alone.stderr
