"""What a run has found so far, in a file at every moment: a run that is killed leaves what it had."""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .setting import say

Result = dict[str, Any]

#: The parts of a result that are lists, whatever was run.
LISTS = ("faults", "records", "contest_records", "targets", "sweep")


class Ledger:
    """A result and its file.

    Args:
        path: where the JSON stands.
        head: what is known before anything is run: device, versions, commit.
    """

    def __init__(self, path: Path, head: Result) -> None:
        self.path = path
        self.result: Result = {
            **head,
            "finished": False,
            "sections": {},
            **{name: [] for name in LISTS},
        }
        self._begun = time.monotonic()

    def resume(self, earlier: Result) -> None:
        """Go on from an earlier result of the same device and commit.

        Raises:
            ValueError: it is another device's or commit's, or measured something else.
        """
        for key in ("commit", "tiny"):
            if earlier[key] != self.result[key]:
                raise ValueError(f"{key} was {earlier[key]}, and is {self.result[key]}")
        before, now = (each["environment"]["device_name"] for each in (earlier, self.result))
        if before != now:
            raise ValueError(f"the device was {before}, and is {now}")
        kept = {key: value for key, value in earlier.items() if key not in self.result}
        self.result |= kept | {name: earlier[name] for name in (*LISTS, "sections")}
        self.result["titles"] = dict(earlier["titles"])
        self.result["dirty"] |= earlier["dirty"]

    def put(
        self, name: str, records: list[Result], case: str, variant_key: str = "variant"
    ) -> None:
        """Add records, in the place of earlier ones of the same case and variants."""
        new = {record[variant_key] for record in records}
        kept = [
            each
            for each in self.result[name]
            if each["case"] != case or each[variant_key] not in new
        ]
        self.result[name] = kept + records
        self.write()

    def fault(self, case: str, variant: str, reason: str) -> None:
        """Note why a variant has no figures on a case."""
        say(f"  {case}, {variant}: {reason}")
        record = {"case": case, "variant": variant, "reason": reason}
        self.put("faults", [record], case)

    def write(self) -> None:
        """Bring the file up to date; a reader finds the old or the new one, whole."""
        self.result["seconds"] = round(time.monotonic() - self._begun, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(self.path.name + ".part")
        fresh.write_text(
            json.dumps(self.result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        os.replace(fresh, self.path)

    def leave_out(self, section: str, reason: str) -> None:
        """Note why a section is not run."""
        say(f"{section}: left out, {reason}")
        self.result["sections"][section] = {"state": "left out", "reason": reason}
        self.write()

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Run a part of the command; what it raises is noted, and the others go on."""
        entry: Result = {"state": "running"}
        self.result["sections"][name] = entry
        self.write()
        begun = time.monotonic()
        say(f"{name} ...")
        try:
            yield
            entry["state"] = "done"
        except Exception as error:  # whatever it is, the other sections have their own right
            entry["state"] = "failed"
            entry["reason"] = f"{type(error).__name__}: {error}"[:2000]
            entry["traceback"] = traceback.format_exc()[-4000:]
            say(f"{name} failed: {entry['reason']}")
        finally:
            entry["seconds"] = round(time.monotonic() - begun, 1)
            self.write()
        say(f"{name}: {entry['state']} after {entry['seconds']} s")
