"""Figures and tables as a person reads them in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def table(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """Lines of a table: the first column to the left, figures to the right."""
    yield "| " + " | ".join(rows[0]) + " |"
    yield "|---|" + "---:|" * (len(rows[0]) - 1)
    for row in rows:
        yield "| " + " | ".join(row.values()) + " |"


def with_quartiles(record: dict[str, Any], key: str) -> str:
    """A ratio and its quartiles; nothing where it was not measured."""
    if key not in record:
        return ""
    digits = 1 if record[key] >= 10 else 2
    low, high = record[f"{key}_quartiles"]
    return f"{record[key]:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def size(size: int) -> str:
    """A number of bytes."""
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"
