"""What is measured beside optimizer steps: a module a question, and the table of all of them."""

from __future__ import annotations

from . import checkpoint, clipping, fisher, layouts, selection, sharded
from .contest import Comparison, Competitor, Contest, Prepared

__all__ = ["CONTESTS", "Comparison", "Competitor", "Contest", "Prepared"]

CONTESTS: dict[str, Contest] = {
    contest.name: contest
    for contest in (
        *selection.CONTESTS,
        *fisher.CONTESTS,
        *clipping.CONTESTS,
        *sharded.CONTESTS,
        *checkpoint.CONTESTS,
        *layouts.CONTESTS,
    )
}
