"""FisherAccumulator: sums, counts, values, masks (SPEC.md, "Fisher information")."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from childtune_kernels import FisherAccumulator, FusedChildAdamW, ops, registry, select_child

from .columns import device_of
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

OPS = ("fisher_accumulate",)


# Sums, counts and values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_those_of_a_loop(dtype: torch.dtype, backend: str) -> None:
    device = device_of(backend)
    model = Classifier(dtype).to(device)
    fisher = recorded(model, backend=backend)
    assert_equal_sums(fisher.sums, squares_by_loop(model, examples(device=device)))
    assert all(total.dtype == torch.float32 for total in fisher.sums.values())
    assert (fisher.records, fisher.examples, fisher.kind) == (8, 8, "per example")
    assert fisher.without_gradient == []


def test_values_are_means_over_the_records() -> None:
    fisher = recorded(Classifier(), 7)
    for name, value in fisher.values().items():
        assert torch.equal(value, fisher.sums[name] / 7)
        assert torch.equal(fisher[name], value)
        assert value.data_ptr() != fisher.sums[name].data_ptr()
    assert torch.equal(fisher["module.encoder.0.bias"], fisher["encoder.0.bias"])


def test_the_analytic_value_of_logistic_regression() -> None:
    """(σ(wx) − y)² x², averaged; fp32 sums of 40 squares err by less than 40 · 2⁻²⁴ of themselves."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(2, (40,), generator=generator).double()
    model = nn.Linear(6, 1, bias=False, dtype=torch.float64)

    def loss(model: Callable[[Tensor], Tensor], example: tuple[Tensor, Tensor]) -> Tensor:
        logits = model(example[0]).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, example[1])

    with torch.no_grad():
        errors = (inputs @ model.weight.t()).sigmoid().squeeze(1) - labels
        expected = (errors[:, None] ** 2 * inputs**2).mean(0, keepdim=True)
    by_backward, by_function = FisherAccumulator(model), FisherAccumulator(model)
    with by_backward.recording():
        for at in range(40):
            loss(model, (inputs[at : at + 1], labels[at : at + 1])).backward()
    by_function.record_examples(loss, (inputs, labels), chunk=16)
    for fisher in (by_backward, by_function):
        torch.testing.assert_close(
            fisher["weight"].double(), expected, rtol=42 * 2.0**-24, atol=0.0
        )


def test_batch_means_are_told_from_examples() -> None:
    model, (tokens, classes) = Classifier(), data(10)
    fisher = FisherAccumulator(model)
    batches = [(tokens[:4], classes[:4]), (tokens[4:8], classes[4:8])]
    with fisher.recording(examples_per_backward=4):
        for batch in batches:
            loss_of(model, batch).backward()
    assert_equal_sums(fisher.sums, squares_by_loop(model, batches))
    with fisher.recording(2):
        loss_of(model, (tokens[8:], classes[8:])).backward()
    assert (fisher.records, fisher.examples, fisher.kind) == (3, 10, "batch mean squares")
    assert fisher.records_by_size == {4: 2, 2: 1}
    assert torch.equal(fisher["classifier.bias"], fisher.sums["classifier.bias"] / 3)
    fisher.record_examples(loss_of, (tokens[:1], classes[:1]))
    assert (fisher.records, fisher.examples, fisher.kind) == (4, 11, "mixed")


def test_accumulate_reads_the_gradients_and_leaves_them() -> None:
    model = Classifier()
    fisher = FisherAccumulator(model)
    for example in examples():
        model.zero_grad()
        loss_of(model, example).backward()
        before = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }
        fisher.accumulate()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, before[name])  # type: ignore[arg-type]
    assert_equal_sums(fisher.sums, squares_by_loop(model, examples()))
    fisher.accumulate(examples=5)
    assert fisher.records_by_size == {1: 8, 5: 1}


def test_accumulate_is_one_call_for_all_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = ops.fisher_accumulate_

    def counted(sums: list[Tensor], *rest: object) -> None:
        calls.append(len(sums))
        real(sums, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "fisher_accumulate_", counted)
    model = Classifier()
    near, offloaded = FisherAccumulator(model), FisherAccumulator(model, offload="cpu")
    loss_of(model, examples()[0]).backward()
    near.accumulate()
    assert calls == [7]
    offloaded.accumulate()
    assert calls == [7] + [1] * 7
    assert_equal_sums(offloaded.sums, dict(near.sums))


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-3])
def test_a_scaled_loss_gives_the_same_sums(scale: float) -> None:
    model = Classifier()
    fisher = FisherAccumulator(model)
    with fisher.recording(grad_scale=scale):
        for example in examples():
            (loss_of(model, example) * scale).backward()
    assert_equal_sums(fisher.sums, squares_by_loop(model, examples()))
    model.zero_grad()
    (loss_of(model, examples()[0]) * scale).backward()
    once = FisherAccumulator(model)
    once.accumulate(grad_scale=scale)
    assert_equal_sums(once.sums, squares_by_loop(model, examples()[:1]))


# Masks


def test_the_mask_is_the_top_of_the_means_and_fits_the_optimizer() -> None:
    model = Classifier()
    fisher = recorded(model, exclude=EXCLUDED)
    mask = fisher.child_mask(0.3)
    values = torch.cat([value.flatten() for value in fisher.values().values()])
    k = math.floor(0.3 * values.numel() + 0.5)
    lowest = values.topk(k).values[-1]
    chosen = torch.cat([mask.dense(name).flatten() for name in fisher.names])
    assert int(chosen.sum()) == k
    assert (values[chosen] >= lowest).all()
    assert (values[~chosen] <= lowest).all()
    assert mask.dense_names == DENSE

    before = copy.deepcopy(model)
    optimizer = FusedChildAdamW(model.named_parameters(), lr=0.1, child_mask=mask)
    loss_of(model, data(40)).backward()
    optimizer.step()
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        changed = old != new
        assert torch.equal(changed, mask.dense(name)) if name in ENCODER else changed.any()


@pytest.mark.parametrize(
    "options",
    [
        {"reserve_p": 0.25},
        {"k": 17, "largest": False},
        {"reserve_p": 0.5, "granularity": 32},
        {"reserve_p": 0.25, "scope": "tensor"},
        {"reserve_p": 0.25, "rule": "percentile"},
    ],
)
def test_the_options_of_a_selection_are_passed_on(options: dict[str, object]) -> None:
    fisher = recorded(Classifier(), exclude=EXCLUDED)
    expected = select_child(fisher.sums, dense=DENSE, **options)  # type: ignore[arg-type]
    assert fisher.child_mask(**options) == expected  # type: ignore[arg-type]


def test_parameters_without_a_gradient_are_zero_and_listed() -> None:
    model = Classifier()
    model.spare = nn.Linear(2, 2)
    by_backward = recorded(model)
    by_function = FisherAccumulator(model)
    by_function.record_examples(loss_of, data())
    for fisher in (by_backward, by_function):
        assert fisher.without_gradient == ["spare.weight", "spare.bias"]
        assert not fisher["spare.weight"].any()
        with pytest.warns(UserWarning, match=r"2 parameters got no gradient.*spare\.weight"):
            fisher.child_mask(0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorded(model, exclude="spare*").child_mask(0.3)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_gradient_is_found_by_the_selection(poison: float) -> None:
    model = Classifier()
    fisher = recorded(model)
    model.zero_grad()
    loss_of(model, examples()[0]).backward()
    gradient = model.get_parameter("encoder.2.bias").grad
    assert gradient is not None
    gradient[1] = poison
    fisher.accumulate()
    with pytest.raises(ValueError, match=r"encoder\.2\.bias"):
        fisher.child_mask(0.3)


def test_nothing_can_be_read_before_the_first_record() -> None:
    fisher = FisherAccumulator(Classifier())
    assert (fisher.records, fisher.examples) == (0, 0)
    assert fisher.without_gradient == fisher.names
    for read in (fisher.values, lambda: fisher["encoder.0.bias"], lambda: fisher.child_mask(0.3)):
        with pytest.raises(RuntimeError, match="there is no record yet"):
            read()


def test_names_that_are_not_in_scope_say_why() -> None:
    fisher = recorded(Classifier(), exclude=EXCLUDED)
    with pytest.raises(KeyError, match=r"classifier\.bias trains densely"):
        fisher["classifier.bias"]
    with pytest.raises(
        KeyError, match=r"encoder\.1\.weight is not in scope; in scope are encoder\.0"
    ):
        fisher["encoder.1.weight"]


# What surrounds it


def test_random_numbers_mode_and_parameters_are_left_alone() -> None:
    model = Classifier().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    fisher = recorded(model)
    fisher.record_examples(loss_of, data(), chunk=3)
    fisher.child_mask(0.3)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.BatchNorm1d(6)])
def test_train_mode_draws_one_warning(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(layer))
    fisher = FisherAccumulator(model)
    with pytest.warns(UserWarning, match=r"^1\.0 in train mode.*model\.eval\(\)") as caught:  # noqa: SIM117
        with fisher.recording():
            model(torch.ones(3, 6)).sum().backward()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fisher.recording():
            model(torch.ones(3, 6)).sum().backward()
        with FisherAccumulator(model.eval()).recording():
            model(torch.ones(3, 6)).sum().backward()
    model.train()(torch.ones(3, 6)).sum().backward()
    with pytest.warns(UserWarning, match="in train mode") as caught:
        FisherAccumulator(model).accumulate()
    assert caught[0].filename == __file__


def test_inference_mode_and_default_devices_do_not_matter(backend: str) -> None:
    device = device_of(backend)
    model = Classifier().to(device)
    squares, batch = squares_by_loop(model, examples(device=device)), data(device=device)
    with torch.inference_mode():
        fisher = FisherAccumulator(model, backend=backend)
    with fisher.recording():
        for example in examples(device=device):
            loss_of(model, example).backward()
    with torch.device("meta"):
        again = FisherAccumulator(model, backend=backend)
        again.record_examples(loss_of, batch, chunk=3)
        again.child_mask(0.3)
    with torch.inference_mode():
        assert_equal_sums(fisher.sums, squares)
        again.merge(fisher)
        again.reset()
        fisher.child_mask(0.3)


def test_a_moved_model_is_refused_before_anything_is_added() -> None:
    model = Classifier()
    fisher = recorded(model)
    before = {name: total.clone() for name, total in fisher.sums.items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.classifier.bias.data = torch.ones(5)
    model.classifier.bias.grad = torch.ones(5)
    with pytest.raises(ValueError, match=r"gradient of classifier\.bias: \(5,\)"):
        fisher.accumulate()
    assert_equal_sums(fisher.sums, before)
    fisher._sums["classifier.bias"] = torch.zeros(5, device="meta")
    with pytest.raises(
        ValueError, match=r"on cpu for sums of \(5,\) on meta; make the accumulator after"
    ):
        fisher.accumulate()
    assert fisher.records == 8


@pytest.mark.parametrize("count", [0, -1, 1.0, True, "2"])
def test_counts_must_be_counts(count: object) -> None:
    fisher = FisherAccumulator(Classifier())
    with pytest.raises(ValueError, match=f"examples: {count!r} must be an int, 1 or more"):
        fisher.accumulate(examples=count)  # type: ignore[arg-type]
    with (
        pytest.raises(ValueError, match="examples_per_backward"),
        fisher.recording(count),  # type: ignore[arg-type]
    ):
        raise AssertionError("the block must not be entered")


@pytest.mark.parametrize("scale", [0.0, -2.0, math.nan, math.inf, 1e30, 1e-30, 1e300])
def test_scales_must_be_scales(scale: float) -> None:
    fisher = FisherAccumulator(Classifier())
    with pytest.raises(ValueError, match="grad_scale="):
        fisher.accumulate(grad_scale=scale)


def test_accumulate_without_a_gradient_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no parameter in scope has a gradient"):
        FisherAccumulator(Classifier()).accumulate()


def test_a_backend_that_cannot_serve_is_refused() -> None:
    with pytest.raises(RuntimeError, match="backend='triton' cannot serve fisher_accumulate"):
        FisherAccumulator(Classifier(), backend="triton")
    assert "fisher_accumulate" in registry.explain()
