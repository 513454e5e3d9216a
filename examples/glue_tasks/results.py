"""Results of finished runs: a line of JSON each, appended when the run is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetuning.labelled_text import InputError
from glue_tasks.grid import Run, key_of

Scores = dict[str, float]


class Results:
    """The file of a folder; several processes may append to it, each with runs of its own.

    Args:
        path: the file; it need not exist.

    Attributes:
        scores: key of a finished run → its scores, in percent.
        broken: lines that are no whole result: of runs that were interrupted while writing.

    Raises:
        InputError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scores: dict[str, Scores] = {}
        self.broken = 0
        try:
            text = path.read_text("utf-8") if path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--out: {path} cannot be read: {error}") from None
        self._ends_a_line = text == "" or text.endswith("\n")
        for line in text.splitlines():
            try:
                record = json.loads(line)
                self.scores[key_of(record["run"])] = record["scores"]
            except (json.JSONDecodeError, KeyError, TypeError):
                self.broken += 1

    def append(self, run: Run, scores: Scores, **about: Any) -> None:
        """Keep what came out, and beside it what does not decide it: seconds, versions."""
        line = json.dumps({"run": run.options, "scores": scores, **about})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n" if self._ends_a_line else f"\n{line}\n")
        self._ends_a_line = True
        self.scores[run.key] = scores
