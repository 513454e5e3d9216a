"""What a run of tests launched, in a file: proof that a Triton column ran its own kernels."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import pytest


class LaunchRecord:
    """A pytest plugin that counts launches of Triton kernels by name, and outcomes of tests.

    When the run has ended, ``path`` holds ``{"launches": {kernel: count}, "outcomes": {outcome: count}}``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.launches: collections.Counter[str] = collections.Counter()

    def pytest_sessionstart(self) -> None:
        from childtune_kernels.backends.triton import launch

        original = launch.launch

        def counted(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
            self.launches[kernel.fn.__name__] += programs > 0
            original(kernel, programs, *arguments, **options)

        launch.launch = counted

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
        outcomes = {outcome: len(reports) for outcome, reports in reporter.stats.items() if outcome}
        record = {"launches": dict(self.launches), "outcomes": outcomes}
        self.path.write_text(json.dumps(record), encoding="utf-8")
