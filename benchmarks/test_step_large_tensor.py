"""How fast is a step when nothing but memory limits it?"""

import pytest

from .cases import LARGE_TENSOR, LARGE_TENSOR_APART, Case
from .conftest import Report
from .playback import playback
from .variants import BF16_VARIANTS, VARIANTS, Variant

pytestmark = pytest.mark.benchmark(timer=playback)


@pytest.mark.parametrize("variant", VARIANTS + BF16_VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("case", [LARGE_TENSOR, LARGE_TENSOR_APART], ids=lambda case: case.name)
def test_step_large_tensor(case: Case, variant: Variant, report_step: Report) -> None:
    report_step(case, variant)
