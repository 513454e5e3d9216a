"""What does a step cost the host more by the tensor where parameters are DTensors?"""

from __future__ import annotations

import pytest

from .conftest import ContestReport
from .contests import Competitor, Contest, sharded
from .playback import playback

pytestmark = pytest.mark.benchmark(timer=playback)

_ENTRIES = [(contest, each) for contest in sharded.CONTESTS for each in contest.competitors]


@pytest.mark.parametrize(("contest", "competitor"), _ENTRIES, ids=lambda record: record.name)
def test_step_sharded(
    contest: Contest, competitor: Competitor, report_contest: ContestReport
) -> None:
    report_contest(contest, competitor)
