"""Are squares of gradients added as fast as torch.add adds tensors with as many bytes?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from childtune_kernels import ops, registry

from .cases import BERT_BASE, CASES, LARGE_TENSOR
from .playback import playback
from .rounds import Contender, Seconds, interleave, ratio

pytestmark = pytest.mark.benchmark(timer=playback)

_ROUNDS = 50
_OURS, _ADD = "fisher_accumulate", "torch.add"
_BYTES = 12  # a sum is read and written, a gradient read

_seconds: dict[str, dict[str, Seconds]] = {}


def contenders(sums: list[Tensor], gradients: list[Tensor]) -> dict[str, Callable[[], None]]:
    """Both read two tensors and write one; the tensors are the same ones."""
    choice = registry.choose("fisher_accumulate", sums[0].device)

    def ours() -> None:
        ops.fisher_accumulate_(sums, gradients, choice)

    def add() -> None:
        for total, gradient in zip(sums, gradients, strict=True):
            torch.add(total, gradient, out=total)

    return {_OURS: ours, _ADD: add}


def test_right_before_fast() -> None:
    sums, gradients = [torch.ones(1003)], [torch.randn(1003)]
    contenders(sums, gradients)[_OURS]()
    assert torch.equal(sums[0], 1 + gradients[0] * gradients[0])


@pytest.mark.parametrize("contender", [_OURS, _ADD])
@pytest.mark.parametrize("case", [LARGE_TENSOR.name, BERT_BASE.name])
def test_fisher_accumulate(
    case: str, contender: str, benchmark: BenchmarkFixture, request: pytest.FixtureRequest
) -> None:
    device = torch.device(request.config.getoption("--device"))
    shapes = CASES[case].shapes().values()
    if case not in _seconds and benchmark.enabled:
        sums = [torch.zeros(shape, device=device) for shape in shapes]
        gradients = [torch.randn(shape, device=device) for shape in shapes]
        timed = {name: Contender(run) for name, run in contenders(sums, gradients).items()}
        rounds = request.config.getoption("--rounds") or _ROUNDS
        _seconds[case] = interleave(timed, rounds, device)
    seconds = _seconds.get(case, {_OURS: {0: 1.0}, _ADD: {0: 1.0}})
    own = seconds[contender]
    benchmark.group = f"{case}, {_BYTES} bytes an element"
    _, share, _ = ratio(seconds[_ADD], own)
    benchmark.extra_info["share_of_the_rate_of_add"] = share
    playback.load(list(own.values()))
    benchmark.pedantic(playback.step, rounds=len(own))
