"""How large is a child checkpoint beside the weights that it stands for?"""

from __future__ import annotations

import pytest

from .conftest import ContestReport
from .contests import Competitor, Contest, checkpoint
from .playback import playback

pytestmark = pytest.mark.benchmark(timer=playback)

_ENTRIES = [(contest, each) for contest in checkpoint.CONTESTS for each in contest.competitors]


@pytest.mark.parametrize(("contest", "competitor"), _ENTRIES, ids=lambda record: record.name)
def test_child_checkpoint(
    contest: Contest, competitor: Competitor, report_contest: ContestReport
) -> None:
    report_contest(contest, competitor)
