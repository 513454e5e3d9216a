"""What a ChildTuningTrainer leaves in its folders, and what a resumed run has to agree with."""

from __future__ import annotations

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


def write_choices(folder: str, tuning: ChildTuningArguments) -> None:
    """Write the choices that a resumed run must share, as ``child_tuning.json``."""
    text = json.dumps(_choices(tuning), indent=2) + "\n"
    Path(folder, CHOICES_NAME).write_text(text, encoding="utf-8")


def check_resumed(folder: str, tuning: ChildTuningArguments) -> None:
    """Refuse to go on with a run under other choices, which its saved state would override silently.

    A checkpoint of another Trainer has none and may go on in mode F or none.

    Raises:
        ValueError: names the choice and both values.
    """
    path = Path(folder, CHOICES_NAME)
    if not path.exists():
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    given = _choices(tuning)
    if tuning.child_mask is not None:
        given["reserve_p"] = saved.get("reserve_p")  # the masks are compared
    for name, value in given.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{name}={value!r}, but the run in {folder} has {saved.get(name)!r}; resume with that, or "
                "start a new run from its weights"
            )


def _choices(tuning: ChildTuningArguments) -> dict[str, Any]:
    options = {name: str(value) for name, value in tuning.options_of_optimizer().items()}
    return {
        "child_mode": tuning.child_mode,
        "reserve_p": tuning.reserve_p,
        "child_seed": tuning.child_seed,
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
            "run from its weights"
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


def set_aside(folder: str, tuning: ChildTuningArguments) -> None:
    """Rename what an earlier run left in a folder: nobody shall take it for the new run's."""
    measured = (FISHER_NAME,) if tuning.save_fisher else ()  # which is this run's already
    for name in {MASK_NAME, FISHER_NAME, CHILD_NAME}.difference(measured):
        path = Path(folder, name)
        if path.exists():
            os.replace(path, path.with_name(f"previous_{name}"))
