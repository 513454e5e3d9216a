"""A clock for pytest-benchmark that shows rounds timed before.

pytest-benchmark times one test after the other, which noise makes incomparable. Here all variants of a case
are timed interleaved and their tests play the recorded rounds to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class Playback:
    """Time stands still but in ``step``, which takes as long as the recorded round took."""

    __name__ = "interleaved_rounds"

    def __init__(self) -> None:
        self._now = 0.0
        self._rounds: Iterator[float] = iter(())

    def load(self, seconds: Sequence[float]) -> None:
        """Take the rounds to play."""
        self._rounds = iter(seconds)

    def step(self) -> None:
        """Let the next round pass."""
        self._now += next(self._rounds, 0.0)

    def __call__(self) -> float:
        return self._now


playback = Playback()
