"""A contest: competitors that do the same work on the same tensors, and with whom each is compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..cases import Shapes, checked_shapes, miniature_of


@dataclass(frozen=True)
class Prepared:
    """Competitors that are ready to run.

    ``steps``: name → one run; its result is what the run is asked for, and is let go. None where there is
    nothing to time. ``figures``: name → what is known of a competitor without a clock, for its record.
    """

    steps: dict[str, Callable[[], object]] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Competitor:
    """One way to do the work.

    ``bytes_per_element`` is what it must read and write, where that is what limits it. ``slow``: takes
    part in few rounds.
    """

    name: str
    title: str
    bytes_per_element: int | None = None
    slow: bool = False


@dataclass(frozen=True)
class Comparison:
    """A ratio of all competitors to one of them, within a round: time over ``base``'s time.

    ``inverted``: the other way round, so that more is better; between competitors whose bytes are known it
    compares bytes a second. ``plus``: to the base's time that of the fastest of these is added, the one
    with the least median.
    """

    measure: str
    title: str
    base: str
    inverted: bool = False
    plus: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contest:
    """Some work, and those who do it.

    ``family`` is the question, whose contests stand together in the report. ``op`` is the one whose kernel is
    needed, ``more_ops`` are others. ``prepare`` makes the competitors for shapes on a device; ``faults`` says
    on cut-down shapes which competitors are wrong, and how. ``memory``: peaks are measured too, beyond what a
    run returns. ``option``: measured only with this option.
    """

    name: str
    title: str
    family: str
    op: str
    competitors: tuple[Competitor, ...]
    make_shapes: Callable[[], Shapes]
    tensors: int
    elements: int
    prepare: Callable[[Shapes, torch.device], Prepared]
    faults: Callable[[Shapes, torch.device], dict[str, str]]
    comparisons: tuple[Comparison, ...] = ()
    rounds: int = 25
    memory: bool = False
    option: str | None = None
    more_ops: tuple[str, ...] = ()

    @property
    def ops(self) -> tuple[str, ...]:
        """All ops whose kernels are needed."""
        return self.op, *self.more_ops

    def shapes(self) -> Shapes:
        """Tensor name → shape.

        Raises:
            ValueError: they are not the tensors that the contest is known to have.
        """
        return checked_shapes(self.name, self.make_shapes(), self.tensors, self.elements)

    def miniature(self) -> Shapes:
        """The first tensors, cut along their first axis."""
        return miniature_of(self.shapes())
