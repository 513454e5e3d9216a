"""Progress bars for what takes more than a moment, where tqdm is installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T")


def track(items: Iterable[_T], total: int, description: str) -> Iterator[_T]:
    """The items, with a bar on stderr once they take more than a second (terminals only)."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    yield from tqdm(items, description, total, leave=False, delay=1.0, disable=None)
