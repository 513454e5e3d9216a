"""Plain text: aligned columns, and numbers that fit them."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines: the first column to the left, all others to the right.

    Args:
        rows: rows of equal length; the first is the header and gets a rule under it.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def scientific(value: float) -> str:
    """A number in four significant digits, all of them written; ``0`` is zero and nothing else."""
    return f"{value:.3e}" if value else "0"


def milliseconds(seconds: float) -> str:
    """Seconds in milliseconds: three digits that count, and no exponent."""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def percent(share: float) -> str:
    """A share as per cent without the sign, in at most five characters; a trace is never ``0``."""
    hundred = 100 * share
    if hundred == 0:
        return "0"
    if hundred < 0.005:
        return "<0.01"
    if hundred < 9.995:
        return f"{hundred:.2f}"
    if share < 1:
        return min(f"{hundred:.1f}", "99.9", key=float)
    return "100"
