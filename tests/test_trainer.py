"""ChildTuningTrainer trains what a plain loop trains, measures on the side, resumes and saves the child."""

from __future__ import annotations

import math
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from childtune_kernels import (
    ChildMask,
    FisherAccumulator,
    FusedChildAdamW,
    apply_child,
    lr_for,
)

from .cases import assert_same_bits

pytest.importorskip("transformers")

from transformers import TrainerCallback, default_data_collator

from childtune_kernels import layer_patterns
from childtune_kernels.integrations import train_set
from childtune_kernels.integrations import transformers as integration
from childtune_kernels.integrations.transformers import (
    ChildTuningArguments,
    OptionCallback,
    fisher_of_train_set,
)

from .tiny_transformers import (
    ARCHITECTURES,
    EXAMPLES,
    LAYERS,
    child_by_loop,
    data_of,
    model_of,
    train_by_loop,
    trainer_of,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

F = ChildTuningArguments("F", 0.3, scale_learning_rate=False)
D = ChildTuningArguments("D", 0.1)
PLAIN = ChildTuningArguments("none")


def loop_optimizer(groups: Any, **options: Any) -> FusedChildAdamW:
    chosen = {"lr": 0.0123, "seed": 42, "max_grad_norm": 0.5, **options}
    return FusedChildAdamW(groups, **chosen)


def random_states() -> tuple[Any, list[int], torch.Tensor]:
    """Of Python, NumPy (whose position in its key is a part) and torch."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002  (the old one is what collators draw from)
    numbers = [*map(int, numpy["state"]["key"]), int(numpy["state"]["pos"])]
    return random.getstate(), numbers, torch.get_rng_state()


def moved(before: Any, after: Any) -> bool:
    """Whether training has changed several tensors: a comparison of runs would pass on a no-op."""
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return sum(not torch.equal(one, other) for one, other in pairs) >= 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestEveryArchitecture:
    def test_the_layers_are_found(self, architecture: str) -> None:
        assert layer_patterns(model_of(architecture)) == [LAYERS[architecture]]

    def test_mode_f_is_the_plain_loop(self, architecture: str, tmp_path: Path) -> None:
        trainer = trainer_of(tmp_path, F, architecture)
        trainer.train()
        model = model_of(architecture)
        train_by_loop(
            trainer, model, data_of(architecture), lambda g: loop_optimizer(g, reserve_p=0.3)
        )
        assert_same_bits(weights_of(trainer.model), weights_of(model))
        assert trainer.child_mask is None

    def test_mode_d_is_the_plain_loop(self, architecture: str, tmp_path: Path) -> None:
        trainer = trainer_of(tmp_path, D, architecture)
        trainer.train()
        model, examples = model_of(architecture), data_of(architecture)
        mask = child_by_loop(trainer, model, examples, [LAYERS[architecture]], 0.1)
        assert trainer.child_mask == mask
        train_by_loop(
            trainer, model, examples, lambda groups: loop_optimizer(groups, child_mask=mask)
        )
        assert_same_bits(weights_of(trainer.model), weights_of(model))

    def test_the_child_checkpoint_is_the_tuned_model(
        self, architecture: str, tmp_path: Path
    ) -> None:
        trainer = trainer_of(tmp_path, D, architecture)
        trainer.train()
        base = model_of(architecture)
        assert moved(base, trainer.model)
        apply_child(base, tmp_path / integration.CHILD_NAME)
        assert_same_bits(weights_of(base), weights_of(trainer.model))


def test_mode_none_is_adamw(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, PLAIN)
    trainer.train()
    model = model_of("Bert")
    train_by_loop(trainer, model, data_of("Bert"), loop_optimizer)
    assert_same_bits(weights_of(trainer.model), weights_of(model))
    assert not (tmp_path / integration.MASK_NAME).exists()


def test_gradients_are_accumulated_then_clipped_then_masked(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, D, gradient_accumulation_steps=2, max_steps=3)
    trainer.train()
    model, examples = model_of("Bert"), data_of("Bert")
    mask = child_by_loop(trainer, model, examples, [LAYERS["Bert"]], 0.1)
    optimizer = train_by_loop(
        trainer,
        model,
        examples,
        lambda g: loop_optimizer(g, child_mask=mask),
        steps=3,
        accumulated=2,
    )
    assert_same_bits(weights_of(trainer.model), weights_of(model))
    # Clipping was at work, and its norm is of gradients that no mask has touched.
    assert optimizer.last_grad_norm is not None
    assert trainer.state.log_history[2]["grad_norm"] == optimizer.last_grad_norm.item() > 0.5


def test_where_the_trainer_clips_it_comes_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = trainer_of(tmp_path, F)
    inside.train()
    monkeypatch.setattr(integration.ChildTuningTrainer, "_clips_in_step", lambda self: False)
    outside = trainer_of(tmp_path, F)
    outside.train()
    assert outside.optimizer.param_groups[0]["max_grad_norm"] is None
    for name, value in weights_of(inside.model).items():
        torch.testing.assert_close(outside.model.get_parameter(name), value, rtol=1e-4, atol=1e-5)
    norms = [
        [log.get("grad_norm") for log in each.state.log_history[:4]] for each in (inside, outside)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize(("limit", "expected"), [(0.0, None), (0.5, 0.5)])
def test_what_is_logged(tmp_path: Path, limit: float, expected: float | None) -> None:
    reported: list[dict[str, Any]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            reported.append(others["logs"])

    options = {"callbacks": [Reporter()]}
    trainer = trainer_of(tmp_path, D, max_grad_norm=limit, trainer_options=options)
    trainer.train()
    # What reports to TensorBoard and others is a callback like this one.
    assert [log.get("child_density") for log in reported] == [
        log.get("child_density") for log in trainer.state.log_history
    ]
    mask = trainer.child_mask
    assert mask is not None
    total = sum(each.numel() for each in trainer.model.parameters())
    density = (total - mask.numel() + mask.count()) / total
    for log in trainer.state.log_history[:4]:
        assert log["child_density"] == log["child_kept_fraction"] == density
        assert log["grad_norm"] > 0
    assert trainer.optimizer.param_groups[0]["max_grad_norm"] == expected
    assert "child_density" not in trainer.state.log_history[4]  # of the whole run


def test_the_kept_fraction_follows_reserve_p(tmp_path: Path) -> None:
    schedule = OptionCallback("reserve_p", lambda step: (step + 1) / 4)  # of steps 0 to 3
    trainer = trainer_of(tmp_path, F, trainer_options={"callbacks": [schedule]})
    trainer.train()
    kept = [log["child_kept_fraction"] for log in trainer.state.log_history[:4]]
    assert kept == pytest.approx([0.25, 0.5, 0.75, 1.0], rel=1e-12)


class TestMeasuring:
    def test_training_goes_on_as_if_nothing_had_been_measured(self, tmp_path: Path) -> None:
        measured = trainer_of(tmp_path, D, dropout=True)
        measured.train()
        given = trainer_of(
            tmp_path,
            ChildTuningArguments("D", child_mask=str(tmp_path / integration.MASK_NAME)),
            dropout=True,
        )
        given.train()
        assert moved(model_of("Bert"), given.model)
        assert_same_bits(weights_of(measured.model), weights_of(given.model))

    def test_the_trainer_is_left_as_it_was(self, tmp_path: Path) -> None:
        trainer = trainer_of(tmp_path, D, dropout=True)
        model: Any = trainer.model
        model.train()
        model.bert.encoder.layer[0].eval()
        before = weights_of(model)
        modes = {name: module.training for name, module in model.named_modules()}
        gradient = torch.ones_like(model.classifier.bias)
        model.classifier.bias.grad = gradient
        seen: list[Any] = []

        class Noisy(list[Any]):
            def __getitem__(self, index: Any) -> Any:
                seen.append(model.training)
                random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002
                return super().__getitem__(index)

        trainer.train_dataset = Noisy(data_of("Bert"))
        states = random_states()
        fisher = fisher_of_train_set(trainer, "*")
        assert fisher.examples == len(seen) == EXAMPLES
        assert not any(seen)
        after = random_states()
        assert states[:2] == after[:2]
        assert torch.equal(states[2], after[2])
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert model.classifier.bias.grad is gradient
        assert torch.equal(gradient, torch.ones_like(gradient))
        assert all(
            each.grad is None for n, each in model.named_parameters() if n != "classifier.bias"
        )
        assert_same_bits(weights_of(model), before)
        assert trainer.accelerator._dataloaders == []
        assert (
            trainer.args.average_tokens_across_devices is True
        )  # torch's default, which ranks suspend

    def test_numbers_are_checked(self, tmp_path: Path) -> None:
        trainer = trainer_of(tmp_path, D)
        for options in ({"max_examples": 0}, {"max_examples": 2.5}, {"batch_size": -1}):
            with pytest.raises(ValueError, match="must be a whole number, 1 or more"):
                fisher_of_train_set(trainer, **options)
        assert fisher_of_train_set(trainer, max_examples=np.int64(3)).examples == 3

    def test_an_error_leaves_the_trainer_as_it_was(self, tmp_path: Path) -> None:
        trainer = trainer_of(tmp_path, D, train_set=[{"input_ids": torch.arange(4)}])
        assert trainer.model is not None
        trainer.model.train()
        state = torch.get_rng_state()
        with pytest.raises(ValueError, match="did not return a loss"):
            fisher_of_train_set(trainer)
        assert trainer.model.training
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_cap_draws_by_the_seed(self, tmp_path: Path) -> None:
        trainer = trainer_of(tmp_path, D)
        sums = [fisher_of_train_set(trainer, max_examples=3, seed=seed) for seed in (1, 1, 2)]
        assert [each.examples for each in sums] == [3, 3, 3]
        assert_same_bits(sums[0].values(), sums[1].values())
        assert any(not torch.equal(sums[0][name], sums[2][name]) for name in sums[0].names)
        assert fisher_of_train_set(trainer, max_examples=1000).examples == EXAMPLES
        tuning = ChildTuningArguments("D", 0.1, fisher_examples=3, child_seed=2)
        trainer = trainer_of(tmp_path, tuning)
        trainer.create_optimizer()
        assert trainer.child_mask == sums[2].child_mask(0.1) != sums[0].child_mask(0.1)

    @pytest.mark.parametrize("silent", [False, True])
    def test_a_bar_shows_the_backwards(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: bool
    ) -> None:
        totals: list[int] = []

        def progress_of(items: Any, what: str, total: int) -> Any:
            totals.append(total)
            return items

        monkeypatch.setattr(train_set, "progress_of", progress_of)
        trainer = trainer_of(tmp_path, D, disable_tqdm=silent)
        fisher_of_train_set(trainer, batch_size=3)
        assert totals == ([] if silent else [math.ceil(EXAMPLES / 3)])

    def test_batches_are_another_quantity_and_the_last_may_be_short(self, tmp_path: Path) -> None:
        trainer = trainer_of(tmp_path, D)
        fisher = fisher_of_train_set(trainer, batch_size=3)
        assert dict(fisher.records_by_size) == {3: 2, 2: 1}
        assert fisher.examples == EXAMPLES

    def test_examples_go_through_the_trainers_collator(self, tmp_path: Path) -> None:
        sizes: list[int] = []

        def collate(examples: list[Any]) -> Any:
            sizes.append(len(examples))
            return default_data_collator([{**each, "labels": 1} for each in examples])

        options = {"data_collator": collate}
        fisher = fisher_of_train_set(trainer_of(tmp_path, D, trainer_options=options), batch_size=3)
        assert sizes == [3, 3, 2]
        changed = [{**each, "labels": 1} for each in data_of("Bert")]
        expected = fisher_of_train_set(trainer_of(tmp_path, D, train_set=changed), batch_size=3)
        assert_same_bits(fisher.values(), expected.values())

    def test_a_stream_is_cut_to_examples(self, tmp_path: Path) -> None:
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self) -> Any:
                for number in range(100):
                    yield data_of("Bert")[number % EXAMPLES]
                raise AssertionError("read on, though there were enough")

        trainer = trainer_of(tmp_path, D, train_set=Stream())
        with pytest.raises(ValueError, match="fisher_examples is missing"):
            fisher_of_train_set(trainer)
        fisher = fisher_of_train_set(trainer, max_examples=6)
        expected = fisher_of_train_set(trainer_of(tmp_path, D, train_set=data_of("Bert")[:6]))
        assert dict(fisher.records_by_size) == dict(expected.records_by_size) == {1: 6}
        for name, value in expected.values().items():
            torch.testing.assert_close(fisher[name], value, rtol=1e-4, atol=1e-9)

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_mixed_precision(self, tmp_path: Path, precision: str) -> None:
        """bf16 measures under autocast, as it trains; fp16 in fp32, where nothing is lost."""
        exact = fisher_of_train_set(trainer_of(tmp_path, D))
        precisions: dict[str, Any] = {precision: True}
        trainer = trainer_of(tmp_path, D, **precisions)
        fisher = fisher_of_train_set(trainer)
        same = [torch.equal(fisher[name], exact[name]) for name in exact.names]
        assert not any(same) if precision == "bf16" else all(same)
        before, moved = weights_of(model_of("Bert")), 0
        trainer.train()
        assert trainer.state.log_history[0]["grad_norm"] > 0
        mask = trainer.child_mask
        assert mask is not None
        for name, value in weights_of(trainer.model).items():
            changed = value != before[name]
            allowed = mask.dense(name) if name in mask.words else torch.ones_like(changed)
            assert not (changed & ~allowed).any()
            moved += int((changed & allowed).sum())
        assert moved > mask.count() / 2

    def test_scope_size_runs_and_sums_are_the_arguments(self, tmp_path: Path) -> None:
        tuning = ChildTuningArguments(
            "D", 0.25, child_include=["*attention*"], child_exclude=["*bias", "*LayerNorm*"],
            child_granularity=32, fisher_examples=5, fisher_batch_size=2, save_fisher=True,
            child_checkpoint=False,
        )  # fmt: skip
        trainer = trainer_of(tmp_path, tuning)
        trainer.train()
        mask = ChildMask.load(tmp_path / integration.MASK_NAME)
        assert mask == trainer.child_mask
        assert set(mask.words) == {
            name
            for name, _ in model_of("Bert").named_parameters()
            if "attention" in name and not name.endswith("bias") and "LayerNorm" not in name
        }
        assert mask.density() == 0.25
        bits = torch.cat([mask.dense(name).flatten() for name in mask.words]).view(-1, 32)
        assert bool((bits.all(1) | ~bits.any(1)).all())
        stored = integration.FISHER_NAME
        assert dict(FisherAccumulator.load(tmp_path / stored).records_by_size) == {2: 2, 1: 1}
        assert not (tmp_path / integration.CHILD_NAME).exists()


def test_the_best_model_is_what_the_child_checkpoint_holds(tmp_path: Path) -> None:
    losses = iter([0.5, 0.1, 0.9, 0.7])  # the second step's is the best
    trainer = trainer_of(
        tmp_path, D, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, metric_for_best_model="made_up", greater_is_better=False,
        trainer_options={
            "eval_dataset": data_of("Bert")[:2],
            "compute_metrics": lambda _: {"made_up": next(losses)},
        },
    )  # fmt: skip
    trainer.train()
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-2")
    best = type(trainer.model).from_pretrained(tmp_path / "checkpoint-2")
    base = model_of("Bert")
    assert moved(base, best)
    apply_child(base, tmp_path / integration.CHILD_NAME)
    assert_same_bits(weights_of(base), weights_of(best))


def test_the_rate_of_mode_f(tmp_path: Path) -> None:
    def rate_of(scale: bool | None, rate: float) -> float:
        tuning = ChildTuningArguments("F", 0.25, scale_learning_rate=scale)
        optimizer = trainer_of(tmp_path, tuning, learning_rate=rate).create_optimizer()
        return float(optimizer.param_groups[0]["lr"])

    with pytest.warns(
        UserWarning, match=r"lr_for\(0\.25, 2e-05\) = 4e-05\. scale_learning_rate=True"
    ):
        assert rate_of(None, 2e-5) == 2e-5
    assert rate_of(True, 2e-5) == lr_for(0.25, 2e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rate_of(False, 2e-5) == 2e-5
        assert rate_of(None, lr_for(0.3, 2e-5)) == lr_for(0.3, 2e-5)
        trainer_of(tmp_path, PLAIN, learning_rate=2e-5).create_optimizer()
