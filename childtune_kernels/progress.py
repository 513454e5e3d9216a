"""A progress bar for long work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 2.0  # seconds; what is done by then needs no bar


@contextmanager
def progress_of_bytes(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """Gives a function that is told how many bytes more are done.

    A bar stands on a terminal's standard error once ``PATIENCE`` is over, if tqdm is installed.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda done: None
        return
    with tqdm(
        desc=what, total=total, unit="B", unit_scale=True, delay=PATIENCE, disable=None, leave=False
    ) as bar:
        yield bar.update
