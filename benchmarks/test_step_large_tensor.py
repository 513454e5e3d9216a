"""How fast is a step when nothing but memory limits it?"""

import pytest

from .cases import LARGE_TENSOR
from .conftest import Report
from .playback import playback
from .variants import Variant, variants_of

pytestmark = pytest.mark.benchmark(timer=playback)


@pytest.mark.parametrize("variant", variants_of(LARGE_TENSOR), ids=lambda variant: variant.name)
def test_step_large_tensor(variant: Variant, report_step: Report) -> None:
    report_step(LARGE_TENSOR, variant)
