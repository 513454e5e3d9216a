"""What do clipping by global norm and a loss scale cost within the step?"""

from __future__ import annotations

import pytest

from .conftest import ContestReport
from .contests import Competitor, Contest, clipping
from .playback import playback

pytestmark = pytest.mark.benchmark(timer=playback)

_ENTRIES = [(contest, each) for contest in clipping.CONTESTS for each in contest.competitors]


@pytest.mark.parametrize(("contest", "competitor"), _ENTRIES, ids=lambda record: record.name)
def test_clipping(contest: Contest, competitor: Competitor, report_contest: ContestReport) -> None:
    report_contest(contest, competitor)
