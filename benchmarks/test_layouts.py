"""Which layout of compact state is the fastest, by the child's density and its runs?"""

from __future__ import annotations

import pytest

from .conftest import ContestReport
from .contests import Competitor, Contest, layouts
from .playback import playback

pytestmark = pytest.mark.benchmark(timer=playback)

_ENTRIES = [(contest, each) for contest in layouts.CONTESTS for each in contest.competitors]


@pytest.mark.parametrize(("contest", "competitor"), _ENTRIES, ids=lambda record: record.name)
def test_layouts(contest: Contest, competitor: Competitor, report_contest: ContestReport) -> None:
    report_contest(contest, competitor)
