"""Are squares of gradients added as fast as torch.add adds tensors with as many bytes?"""

from __future__ import annotations

import pytest

from .conftest import ContestReport
from .contests import Competitor, Contest, fisher
from .playback import playback

pytestmark = pytest.mark.benchmark(timer=playback)

_ENTRIES = [(contest, each) for contest in fisher.CONTESTS for each in contest.competitors]


@pytest.mark.parametrize(("contest", "competitor"), _ENTRIES, ids=lambda record: record.name)
def test_fisher_accumulate(
    contest: Contest, competitor: Competitor, report_contest: ContestReport
) -> None:
    report_contest(contest, competitor)
