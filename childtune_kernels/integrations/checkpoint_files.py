"""What a ChildTuningTrainer leaves in its folders, and what a resumed run has to agree with."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

import torch

from .. import child_layout, sharding
from ..child_mask import ChildMask
from ..optimizer import FusedChildAdamW
from .trainer_arguments import ChildTuningArguments

MASK_NAME = "child_mask.safetensors"
FISHER_NAME = "fisher.safetensors"
CHILD_NAME = "tuned_child.safetensors"
CHOICES_NAME = "child_tuning.json"


# What of the choices decides which weights are in a measured child.
_OF_MEASURING = (
    "reserve_p", "child_include", "child_exclude", "child_granularity", "fisher_examples",
    "fisher_batch_size",
)  # fmt: skip


def write_choices(folder: str, tuning: ChildTuningArguments, seed: int) -> None:
    """Write the choices that a resumed run must share, as ``child_tuning.json``.

    Args:
        folder: of a checkpoint.
        tuning: the choices.
        seed: of the run (``TrainingArguments``).
    """
    text = json.dumps(_choices(tuning, seed), indent=2) + "\n"
    Path(folder, CHOICES_NAME).write_text(text, encoding="utf-8")


def check_resumed(folder: str, tuning: ChildTuningArguments, seed: int) -> None:
    """Refuse to go on with a run under other choices, which its saved state would override silently.

    Choices are compared by what they do: a default may be spelt out. A checkpoint of another Trainer has none
    and may go on in mode F or none.

    Raises:
        ValueError: names the choice and both values, or a file that cannot be read.
    """
    if not has_choices(folder):
        if tuning.child_mode != "D" and Path(folder, MASK_NAME).exists():
            raise ValueError(
                f"child_mode={tuning.child_mode!r}, but the run in {folder} has a {MASK_NAME}; resume in "
                "mode 'D', or start a new run from its weights"
            )
        return
    saved, given = _saved_choices(Path(folder, CHOICES_NAME)), _choices(tuning, seed)
    for name, value in given.items():
        if tuning.child_mask is not None and name in _OF_MEASURING:
            continue  # the masks are compared
        if saved.get(name) != value:
            raise ValueError(
                f"{name}={value!r}, but the run in {folder} has {saved.get(name)!r}; resume with that, or "
                "start a new run from its weights"
            )


def has_choices(folder: str) -> bool:
    """Whether a checkpoint is of a ChildTuningTrainer."""
    return Path(folder, CHOICES_NAME).exists()


def _saved_choices(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); resume from another checkpoint") from None
    if not isinstance(saved, dict) or "child_mode" not in saved:
        raise ValueError(f"{path} holds no choices of a run; resume from another checkpoint")
    return saved


def _choices(tuning: ChildTuningArguments, seed: int) -> dict[str, Any]:
    defaults = inspect.signature(FusedChildAdamW).parameters
    options = {
        name: str(value)
        for name, value in tuning.options_of_optimizer().items()
        if name != "backend" and value != defaults[name].default
    }
    own_seed = seed if tuning.child_seed is None else tuning.child_seed
    return {
        "child_mode": tuning.child_mode,
        **{name: getattr(tuning, name) for name in _OF_MEASURING},
        "child_seed": None if tuning.child_mode == "none" else own_seed,
        "scale_learning_rate": bool(tuning.scale_learning_rate),
        "optimizer_options": options,
    }


def same_child(saved: ChildMask, place: Path, given: ChildMask | str | None) -> ChildMask:
    """The child of a resumed run, which one that is given must equal.

    Raises:
        ValueError: it does not.
    """
    if isinstance(given, str):
        given = ChildMask.load(given)
    if given is not None and given != saved:
        raise ValueError(
            f"child_mask is not the child of the run that is resumed, {place}; leave it out, or start a new "
            "run from its weights (a run whose child was changed by set_child_mask cannot be resumed)"
        )
    return saved


def trains(optimizer: FusedChildAdamW, mask: ChildMask) -> bool:
    """Whether an optimizer's state is that of a child; sharded parameters are not looked at."""
    for group in optimizer.param_groups:
        for label, parameter in zip(group["param_names"], group["params"], strict=True):
            if sharding.is_sharded(parameter):
                continue
            words = child_layout.mask_words(optimizer.state[parameter], parameter.numel())
            expected = mask.words.get(label)
            if (words is None) != (expected is None):
                return False
            if words is not None and not torch.equal(words.cpu(), expected.cpu()):  # type: ignore[union-attr]
                return False
    return True


def drop_mask(folder: str) -> None:
    """Remove the mask of another run from a checkpoint that has been written over it."""
    Path(folder, MASK_NAME).unlink(missing_ok=True)


def set_aside(folder: str, tuning: ChildTuningArguments) -> None:
    """Rename what an earlier run left in a folder: nobody shall take it for the new run's."""
    measured = (FISHER_NAME,) if tuning.save_fisher else ()  # which is this run's already
    for name in {MASK_NAME, FISHER_NAME, CHILD_NAME}.difference(measured):
        path = Path(folder, name)
        if path.exists():
            os.replace(path, path.with_name(f"previous_{name}"))
