"""Runs of ChildTuningTrainer that are resumed: in the same bits, with the same child, or not at all."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from childtune_kernels import ChildMask, load_child

from .cases import assert_same_bits

pytest.importorskip("transformers")

import transformers

from childtune_kernels.integrations import transformers as integration
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


@pytest.mark.parametrize(
    ("begun", "goes_on", "message"),
    [
        (D, F, "child_mode='F', but the run in .* has 'D'"),
        (F, PLAIN, "child_mode='none', but the run in .* has 'F'"),
        (PLAIN, F, "child_mode='F', but the run in .* has 'none'"),
        (F, replace(F, reserve_p=0.9), "reserve_p=0.9, but the run in .* has 0.3"),
        (D, replace(D, reserve_p=0.5), "reserve_p=0.5, but the run in .* has 0.1"),
        (F, replace(F, child_seed=9), "child_seed=9, but the run in .* has None"),
        (F, replace(F, optimizer_options={"skip_nonfinite": True}), "optimizer_options={'skip_n"),
    ],
)
def test_other_choices_are_refused(tmp_path: Path, begun: Any, goes_on: Any, message: str) -> None:
    trainer = trainer_of(tmp_path, begun, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    before = weights_of(trainer.model)
    other = trainer_of(tmp_path, goes_on, model=trainer.model)
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=True)
    assert_same_bits(weights_of(other.model), before)


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
    trainer = trainer_of(tmp_path / "second", replace(D, child_include=["*attention*"]))
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
