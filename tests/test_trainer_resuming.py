"""Runs of ChildTuningTrainer that are resumed: in the same bits, with the same child, or not at all."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from childtune_kernels import ChildMask, FusedChildAdamW, load_child

from .cases import assert_same_bits

pytest.importorskip("transformers")

import transformers

from childtune_kernels.integrations import transformers as integration
from childtune_kernels.integrations.checkpoint_files import trains
from childtune_kernels.integrations.transformers import ChildTuningArguments

from .test_trainer import PLAIN, D, F, moved
from .tiny_transformers import arguments_of, data_of, model_of, trainer_of, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def nobody_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(integration, "fisher_of_train_set", refuse)


def saved_run(folder: Path, tuning: ChildTuningArguments) -> dict[str, torch.Tensor]:
    """The weights of a run of four steps that was saved after two."""
    trainer = trainer_of(folder, tuning, dropout=True, save_strategy="steps", save_steps=2)
    trainer.train()
    return weights_of(trainer.model)


@pytest.mark.parametrize("tuning", [F, D], ids=["F", "D"])
def test_a_resumed_run_ends_in_the_same_bits(
    tmp_path: Path, tuning: ChildTuningArguments, request: pytest.FixtureRequest
) -> None:
    expected = saved_run(tmp_path, tuning)
    shutil.rmtree(tmp_path / "checkpoint-4")
    request.getfixturevalue("nobody_measures")
    resumed = trainer_of(tmp_path, tuning, dropout=True)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert moved(type(resumed.model).from_pretrained(tmp_path / "checkpoint-2"), resumed.model)
    assert_same_bits(weights_of(resumed.model), expected)
    if tuning is D:
        load_child(tmp_path / integration.CHILD_NAME)


def test_the_mask_is_that_of_the_checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    saved_run(tmp_path / "first", D)
    checkpoint = tmp_path / "first" / "checkpoint-2"
    request.getfixturevalue("nobody_measures")
    own = ChildMask.load(checkpoint / integration.MASK_NAME)
    above = tmp_path / "first" / integration.MASK_NAME
    (~own).save(above)  # the checkpoint's own comes first
    given = ChildTuningArguments("D", child_mask=str(checkpoint / integration.MASK_NAME))
    other = trainer_of(tmp_path / "second", given, dropout=True)
    other.train(resume_from_checkpoint=str(checkpoint))
    assert other.child_mask == own
    for mask in (~own, str(above)):
        different = trainer_of(tmp_path / "x", ChildTuningArguments("D", child_mask=mask))
        with pytest.raises(ValueError, match="child_mask is not the child of the run"):
            different.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / integration.MASK_NAME).unlink()
    with pytest.raises(ValueError, match="is not of the child of child_mask"):
        trainer_of(tmp_path / "x", D, dropout=True).train(resume_from_checkpoint=str(checkpoint))
    own.save(above)
    third = trainer_of(tmp_path / "third", D, dropout=True)
    third.train(resume_from_checkpoint=str(checkpoint))
    assert third.child_mask == other.child_mask
    above.unlink()
    lost = trainer_of(tmp_path / "fourth", D, dropout=True)
    with pytest.raises(ValueError, match=r"has no child_mask\.safetensors.*as child_mask"):
        lost.train(resume_from_checkpoint=str(checkpoint))


@pytest.fixture(scope="module")
def begun_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Mode → the checkpoint of a run of two steps."""
    found: dict[str, Path] = {}
    for tuning in (F, D, PLAIN):
        folder = tmp_path_factory.mktemp(tuning.child_mode)
        trainer_of(folder, tuning, save_strategy="steps", save_steps=2, max_steps=2).train()
        found[tuning.child_mode] = folder / "checkpoint-2"
    return found


@pytest.mark.parametrize(
    ("begun", "goes_on", "message"),
    [
        (D, F, "child_mode='F', but the run in .* has 'D'"),
        (F, PLAIN, "child_mode='none', but the run in .* has 'F'"),
        (PLAIN, F, "child_mode='F', but the run in .* has 'none'"),
        (F, replace(F, reserve_p=0.9), "reserve_p=0.9, but the run in .* has 0.3"),
        (D, replace(D, reserve_p=0.5), "reserve_p=0.5, but the run in .* has 0.1"),
        (F, replace(F, child_seed=9), "child_seed=9, but the run in .* has 42"),
        (
            F,
            replace(F, scale_learning_rate=True),
            "scale_learning_rate=True, but the run in .* has False",
        ),
        (
            D,
            replace(D, child_include=["*attention*"]),
            r"child_include=\['\*attention\*'\], but the run in",
        ),
        (D, replace(D, child_exclude=["*bias"]), "child_exclude="),
        (D, replace(D, child_granularity=32), "child_granularity=32, but the run in .* has 1;"),
        (D, replace(D, fisher_examples=3), "fisher_examples=3, but the run in .* has None"),
        (D, replace(D, fisher_batch_size=2), "fisher_batch_size=2, but the run in .* has 1;"),
        (F, replace(F, optimizer_options={"skip_nonfinite": True}), "optimizer_options={'skip_n"),
    ],
)
def test_other_choices_are_refused(
    begun_runs: dict[str, Path], tmp_path: Path, begun: Any, goes_on: Any, message: str
) -> None:
    other, checkpoint = trainer_of(tmp_path, goes_on), begun_runs[begun.child_mode]
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=str(checkpoint))
    saved = type(other.model).from_pretrained(checkpoint)
    assert_same_bits(weights_of(other.model), weights_of(saved))
    assert not [*tmp_path.rglob("*.safetensors")]


def test_another_seed_of_the_run_is_another_seed_of_the_masks(tmp_path: Path) -> None:
    trainer_of(tmp_path, F, save_strategy="steps", save_steps=2, max_steps=2).train()
    with pytest.raises(ValueError, match=r"child_seed=7, but the run in .* has 42"):
        trainer_of(tmp_path, F, seed=7).train(resume_from_checkpoint=True)
    same = replace(
        F, child_seed=42, scale_learning_rate=None, reserve_p=np.float64(0.3),
        optimizer_options={"convention": "torch", "clip": "before_mask", "backend": "reference"},
    )  # fmt: skip
    resumed = trainer_of(tmp_path, same, seed=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of a rate that a resumed run does not take
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


def test_the_child_of_a_state_is_that_of_all_its_weights() -> None:
    named = [(name, torch.nn.Parameter(torch.ones(70))) for name in "ab"]
    child = ChildMask.from_dense({"a": torch.arange(70) < 3}, dense=["b"])
    masked = FusedChildAdamW(named, child_mask=child)
    assert trains(masked, child)
    assert not trains(FusedChildAdamW(named), child)
    assert not trains(masked, ChildMask.from_dense({n: torch.arange(70) < 3 for n in "ab"}))
    assert not trains(masked, ChildMask.from_dense({"a": torch.arange(70) < 4}, dense=["b"]))


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "{"])
def test_damaged_choices_are_named(begun_runs: dict[str, Path], tmp_path: Path, text: str) -> None:
    shutil.copytree(begun_runs["F"], tmp_path / "checkpoint-2")
    path = tmp_path / "checkpoint-2" / "child_tuning.json"
    assert path.exists()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"child_tuning\.json (is damaged|holds no choices)"):
        trainer_of(tmp_path, F).train(resume_from_checkpoint=True)


def test_a_mask_of_another_run_is_not_taken(tmp_path: Path) -> None:
    """A plain run in the folder of an earlier one; a run over another's checkpoints."""
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer_of(tmp_path, D, **saved).train()
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "child_tuning.json").unlink()
    with pytest.raises(ValueError, match=r"child_mode='F', but the run in .* has a child_mask"):
        trainer_of(tmp_path, F).train(resume_from_checkpoint=str(checkpoint))
    trainer_of(tmp_path, F, **saved).train()
    assert not (checkpoint / integration.MASK_NAME).exists()
    shutil.rmtree(checkpoint)
    plain = arguments_of(tmp_path, **saved)
    transformers.Trainer(model_of("Bert"), plain, train_dataset=data_of("Bert")).train()
    own = tmp_path / f"previous_{integration.MASK_NAME}"
    own.rename(tmp_path / integration.MASK_NAME)
    with pytest.raises(ValueError, match=r"has no child_mask\.safetensors"):
        trainer_of(tmp_path, D).train(resume_from_checkpoint=str(checkpoint))


def test_a_path_is_a_mask_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = saved_run(tmp_path / "first", D)
    given = ChildTuningArguments("D", child_mask=tmp_path / "first" / integration.MASK_NAME)  # type: ignore[arg-type]
    assert_same_bits(saved_run(tmp_path / "second", given), expected)
    resumed = trainer_of(tmp_path / "second", given, dropout=True)
    monkeypatch.chdir(tmp_path / "second" / "checkpoint-2")
    Path(integration.MASK_NAME).unlink()
    resumed.train(resume_from_checkpoint=".")
    assert_same_bits(weights_of(resumed.model), expected)


@pytest.mark.parametrize(("first", "then"), [(0.0, 0.01), (0.01, 0.0)])
def test_clipping_is_that_of_the_present_arguments(
    tmp_path: Path, first: float, then: float
) -> None:
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer_of(tmp_path, F, max_grad_norm=first, **saved).train()
    resumed = trainer_of(tmp_path, F, max_grad_norm=then)
    resumed.train(resume_from_checkpoint=True)
    limits = {group["max_grad_norm"] for group in resumed.optimizer.param_groups}
    assert limits == {then or None}
    assert all(log["grad_norm"] > 0 for log in resumed.state.log_history[2:4])


def test_a_trainer_that_goes_on_with_another_run_has_its_child(tmp_path: Path) -> None:
    saved_run(tmp_path / "first", D)
    checkpoint = tmp_path / "first" / "checkpoint-2"
    trainer = trainer_of(tmp_path / "second", D, train_set=data_of("Bert", 5))
    trainer.train()
    own = trainer.child_mask
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.child_mask == ChildMask.load(checkpoint / integration.MASK_NAME) != own
    assert load_child(tmp_path / "second" / integration.CHILD_NAME).mask == trainer.child_mask


def test_a_plain_run_goes_on_in_mode_f(tmp_path: Path) -> None:
    plain = transformers.Trainer(
        model_of("Bert"),
        arguments_of(tmp_path, save_strategy="steps", save_steps=2, max_steps=2),
        train_dataset=data_of("Bert"),
    )
    plain.train()
    resumed = trainer_of(tmp_path, F)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.log_history[-2]["child_kept_fraction"] == pytest.approx(0.3)


def test_a_new_run_measures_anew(tmp_path: Path) -> None:
    ChildMask.from_dense({"a": torch.ones(3, dtype=torch.bool)}).save(
        tmp_path / integration.MASK_NAME
    )
    stale = ChildMask.load(tmp_path / integration.MASK_NAME)
    (tmp_path / integration.CHILD_NAME).write_text("of an earlier run")
    trainer = trainer_of(tmp_path, replace(D, child_checkpoint=False, save_fisher=True))
    trainer.train()
    assert ChildMask.load(tmp_path / integration.MASK_NAME) == trainer.child_mask
    assert ChildMask.load(tmp_path / f"previous_{integration.MASK_NAME}") == stale
    assert not (tmp_path / integration.CHILD_NAME).exists()
    assert (tmp_path / integration.FISHER_NAME).exists()
