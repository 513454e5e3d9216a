"""How fast is a step over the tensors of a real model, most of them small beside a few large ones?"""

import pytest

from .cases import BERT_BASE, BERT_LARGE, Case
from .conftest import Report
from .playback import playback
from .variants import VARIANTS, Variant

pytestmark = pytest.mark.benchmark(timer=playback)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("case", [BERT_BASE, BERT_LARGE], ids=lambda case: case.name)
def test_step_bert(case: Case, variant: Variant, report_step: Report) -> None:
    report_step(case, variant)
