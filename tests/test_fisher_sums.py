"""Sums without a model: merging, sums made elsewhere, starting anew."""

from __future__ import annotations

import pytest
import torch

from childtune_kernels import FisherAccumulator
from childtune_kernels.fisher_sums import FisherSums

from .fisher_models import (
    DENSE,
    ENCODER,
    EXCLUDED,
    Classifier,
    assert_equal_sums,
    data,
    examples,
    loss_of,
    recorded,
    squares_by_loop,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_merging_adds_sums_and_counts() -> None:
    model = Classifier()
    first, second, both = recorded(model, 3), FisherAccumulator(model), FisherAccumulator(model)
    second.record_examples(loss_of, data(5))
    for part in (first, second):
        before = {name: total.clone() for name, total in part.sums.items()}
        both += part
        assert_equal_sums(part.sums, before)
    assert (both.records, both.examples, both.kind) == (8, 8, "per example")
    assert both.without_gradient == []
    assert_equal_sums(both.sums, {n: first.sums[n] + second.sums[n] for n in first.names})
    with both.recording(2):
        loss_of(model, data(2)).backward()
    assert both.kind == "mixed"


def test_a_gradient_in_one_of_two_runs_is_a_gradient() -> None:
    model = Classifier()
    first, second = FisherAccumulator(model), FisherAccumulator(model)
    with first.recording():
        model.get_parameter(ENCODER[0]).sum().backward()
    with second.recording():
        model.get_parameter(ENCODER[1]).sum().backward()
    first.merge(second)
    assert set(first.names) - set(first.without_gradient) == set(ENCODER[:2])


def test_other_scopes_and_shapes_do_not_merge() -> None:
    fisher = recorded(Classifier(), exclude=EXCLUDED)
    before = {name: total.clone() for name, total in fisher.sums.items()}
    sums = {name: torch.zeros_like(total) for name, total in fisher.sums.items()}
    with pytest.raises(ValueError, match=r"classifier\.bias, .* is in scope in one of them only"):
        fisher.merge(recorded(Classifier()))
    with pytest.raises(ValueError, match=r"classifier\.bias.* is dense in one of them only"):
        fisher.merge(FisherSums(sums, {1: 2}))
    with pytest.raises(ValueError, match=r"encoder\.0\.bias have shape \(9,\) and \(3,\)"):
        fisher.merge(FisherSums({**sums, "encoder.0.bias": torch.zeros(3)}, {1: 2}, DENSE))
    with pytest.raises(TypeError, match="not dict"):
        fisher.merge(sums)  # type: ignore[arg-type]
    assert_equal_sums(fisher.sums, before)
    assert fisher.records == 8


def test_sums_of_elsewhere() -> None:
    sums = {"module.a": torch.tensor([4.0, 8.0]), "b": torch.tensor(2.0)}
    fisher = FisherSums(sums, {1: 2, 3: 2}, dense=["module.c"], without_gradient=["b"])
    assert (fisher.records, fisher.examples, fisher.kind) == (4, 8, "mixed")
    assert fisher["a"].tolist() == [1.0, 2.0]
    assert fisher.sums["a"] is sums["module.a"]
    assert (fisher.names, fisher.dense_names) == (["a", "b"], {"c"})
    assert fisher.without_gradient == ["b"]
    assert "2 parameters, 1 dense; 4 records" in repr(fisher)
    with pytest.raises(ValueError, match=r"sums of a: torch\.float64"):
        FisherSums({"a": torch.ones(2).double()}, {1: 1})
    with pytest.raises(ValueError, match="records: 0 must be"):
        FisherSums({"a": torch.ones(2)}, {1: 0})
    with pytest.raises(ValueError, match="a cannot be dense and have sums"):
        FisherSums({"a": torch.ones(2)}, {1: 1}, dense=["a"])
    with pytest.raises(ValueError, match="'a' stands for two parameters"):
        FisherSums({"a": torch.ones(2), "module.a": torch.ones(2)}, {1: 1})


def test_reset_starts_anew() -> None:
    model = Classifier()
    fisher = recorded(model, 3)
    fisher.record_examples(loss_of, data(2))
    fisher.reset()
    assert (fisher.records, fisher.without_gradient) == (0, fisher.names)
    with fisher.recording():
        loss_of(model, examples()[0]).backward()
    assert_equal_sums(fisher.sums, squares_by_loop(model, examples()[:1]))
