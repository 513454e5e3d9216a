"""child_diff: the mask of what differs between two models, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from childtune_kernels import child_diff, weight_bits

from .tuned_models import Model, Run, flip_bit_, tuned_run


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight of these small models is worked on in several parts."""
    monkeypatch.setattr(weight_bits, "PART", 96)


@pytest.fixture(scope="module")
def run() -> Run:
    """A tuned run in fp32, which tests must not change."""
    return tuned_run()


def test_child_diff_sees_every_bit() -> None:
    base = torch.tensor([0.0, 1.0, float("nan"), float("nan"), 2.0, float("inf")])
    tuned = base.clone()
    tuned[0] = -0.0
    flip_bit_(tuned, 3)
    mask = child_diff({"w": base, "count": torch.tensor(1)}, {"w": tuned, "count": torch.tensor(2)})
    assert mask.names == ["w"]
    assert mask.dense("w").tolist() == [True, False, False, True, False, False]


Sides = Callable[[Model], Model | Mapping[str, Tensor]]


@pytest.mark.parametrize(
    "tuned_side", [lambda m: m, lambda m: m.state_dict()], ids=["model", "dict"]
)
@pytest.mark.parametrize(
    "base_side", [lambda m: m, lambda m: m.state_dict()], ids=["model", "dict"]
)
def test_child_diff_of_models_and_state_dicts(
    run: Run, base_side: Sides, tuned_side: Sides
) -> None:
    found = child_diff(base_side(run.base), tuned_side(run.tuned))
    assert found.count("frozen.weight") == 0
    for name in run.mask.words:
        assert not (found.dense(name) & ~run.mask.dense(name)).any()
        assert torch.equal(
            found.dense(name), run.base.get_parameter(name) != run.tuned.get_parameter(name)
        )
    assert found.count("head.weight") > 0


def test_child_diff_refuses_what_cannot_be_compared(run: Run) -> None:
    weights = dict(run.base.named_parameters())
    with pytest.raises(ValueError, match=r"base: other weights than expected; missing: head.bias"):
        child_diff({n: w for n, w in weights.items() if n != "head.bias"}, run.tuned)
    with pytest.raises(ValueError, match=r"inner.bias has shape \(4, 4\), not \(16,\)"):
        child_diff({**weights, "inner.bias": torch.ones(4, 4)}, run.tuned)
    with pytest.raises(ValueError, match=r"inner.bias is of torch.float64, not torch.float32"):
        child_diff({**weights, "inner.bias": torch.ones(16).double()}, run.tuned)
    with pytest.raises(ValueError, match=r"output.weight differ but are tied"):
        child_diff({**weights, "output.weight": torch.ones(40, 16)}, run.tuned)
    with pytest.raises(ValueError, match="have one label, 'w'"):
        child_diff({"w": torch.ones(1), "module.w": torch.ones(1)}, {"w": torch.ones(1)})
