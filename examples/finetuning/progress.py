"""What is said where no bar is seen."""

from __future__ import annotations

import sys


def tell_without_bar(text: str) -> None:
    """Print a line, unless a bar on a terminal says as much."""
    if not sys.stderr.isatty():
        print(text, flush=True)
