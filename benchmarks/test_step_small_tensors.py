"""What does a step cost by the tensor and by the group, where their contents hardly count?"""

import pytest

from .cases import SMALL_TENSORS
from .conftest import Report
from .playback import playback
from .variants import Variant, variants_of

pytestmark = pytest.mark.benchmark(timer=playback)


@pytest.mark.parametrize("variant", variants_of(SMALL_TENSORS), ids=lambda variant: variant.name)
def test_step_small_tensors(variant: Variant, report_step: Report) -> None:
    report_step(SMALL_TENSORS, variant)
