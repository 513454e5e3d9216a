"""Progress bars for long work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

_T = TypeVar("_T")

PATIENCE = 2.0  # seconds; what is done by then needs no bar


def _tqdm() -> Any:
    """The class, or None; no block of the caller's runs while its absence is handled."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm


@contextmanager
def progress_of_amount(
    what: str, total: int | None, unit: str = "B"
) -> Iterator[Callable[[int], object]]:
    """Gives a function that is told how much more is done, of ``total`` where that is known.

    A bar stands on a terminal's standard error once ``PATIENCE`` is over, if tqdm is installed.
    """
    tqdm = _tqdm()
    if tqdm is None:
        yield lambda done: None
        return
    with tqdm(
        desc=what,
        total=total,
        unit=unit,
        unit_scale=True,
        delay=PATIENCE,
        disable=None,
        leave=False,
    ) as bar:
        yield bar.update


def progress_of(items: Iterable[_T], what: str, total: int) -> Iterator[_T]:
    """The items one by one, with a bar over their number under the same conditions."""
    tqdm = _tqdm()
    if tqdm is None:
        yield from items
        return
    yield from tqdm(items, what, total, delay=PATIENCE, disable=None, leave=False)
