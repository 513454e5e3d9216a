"""How long does it take to find the child, beside other ways to find its threshold?"""

from __future__ import annotations

import pytest

from .conftest import ContestReport
from .contests import Competitor, Contest, selection
from .playback import playback

pytestmark = pytest.mark.benchmark(timer=playback)

_ENTRIES = [(contest, each) for contest in selection.CONTESTS for each in contest.competitors]


@pytest.mark.parametrize(("contest", "competitor"), _ENTRIES, ids=lambda record: record.name)
def test_selection(contest: Contest, competitor: Competitor, report_contest: ContestReport) -> None:
    report_contest(contest, competitor)
