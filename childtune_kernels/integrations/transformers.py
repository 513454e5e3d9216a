"""ChildTuningTrainer, the Trainer of ``transformers`` with a child network, and its parts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..child_checkpoint import save_child
from ..child_mask import ChildMask
from ..fisher_scope import layer_patterns
from ..group_options import lr_for
from ..optimizer import FusedChildAdamW
from ..option_scheduler import OptionScheduler
from ..summary import child_shares
from .checkpoint_files import (
    CHILD_NAME,
    FISHER_NAME,
    MASK_NAME,
    check_resumed,
    drop_mask,
    has_choices,
    same_child,
    set_aside,
    trains,
    write_choices,
)
from .train_set import fisher_of_train_set
from .trainer_arguments import ChildTuningArguments

__all__ = [
    "ChildTuningArguments",
    "ChildTuningTrainer",
    "OptionCallback",
    "fisher_of_train_set",
    "layer_patterns",
    "named_decay_groups",
]


# A logger of transformers', so that it follows the run's log level.
_log = logging.get_logger("transformers.childtune_kernels")


def named_decay_groups(trainer: Trainer, model: nn.Module | None = None) -> list[dict[str, Any]]:
    """The Trainer's two groups, with and without weight decay, of (name, parameter) pairs.

    With names, masks and saved states follow the weights. Frozen parameters are left out.

    Args:
        trainer: says which parameters decay (``get_decay_parameter_names``), and how much.
        model: None: the Trainer's.
    """
    model = model or trainer.model
    assert model is not None
    decaying = set(trainer.get_decay_parameter_names(model))
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    return [
        {
            "params": [pair for pair in named if pair[0] in decaying],
            "weight_decay": trainer.args.weight_decay,
        },
        {"params": [pair for pair in named if pair[0] not in decaying], "weight_decay": 0.0},
    ]


class ChildTuningTrainer(Trainer):
    """The Trainer of ``transformers`` with a child network.

    Makes the optimizer, a ``FusedChildAdamW`` with the Trainer's options and decay groups. In mode D the
    child is measured on the train set before the first step; its mask is saved in the output directory and
    in every checkpoint, and read there by ``resume_from_checkpoint``, which never measures. Gradients are
    clipped before the mask, inside the step where the Trainer lets it be. Loss logs gain
    ``child_density`` (the share of the trainable weights that may change), ``child_kept_fraction`` (the
    share that a step is expected to give a gradient) and ``grad_norm``. Before another kind of Trainer, it
    does the same for that one: ``class ChildSFTTrainer(ChildTuningTrainer, SFTTrainer): pass``.

    Args:
        *arguments, **options: as for the Trainer.
        child_tuning: the choices, see ``ChildTuningArguments``.

    Attributes:
        child_mask: the child, in mode D from the first step on; else None.

    Example::

        trainer = ChildTuningTrainer(
            model, arguments, train_dataset=train_set,
            child_tuning=ChildTuningArguments(child_mode="D", reserve_p=0.1),
        )
        trainer.train()

    Raises:
        ValueError: another optimizer was given; an engine that keeps no whole weights (DeepSpeed; FSDP
            where the child is to be measured).
    """

    def __init__(
        self,
        *arguments: Any,
        child_tuning: ChildTuningArguments,
        **options: Any,
    ) -> None:
        if not isinstance(child_tuning, ChildTuningArguments):
            raise TypeError(
                f"child_tuning is a {type(child_tuning).__name__}; give ChildTuningArguments(...)"
            )
        # What FusedChildAdamW refuses shall be said now, and not after Fisher information was measured.
        FusedChildAdamW([torch.zeros(1)], **child_tuning.options_of_optimizer())
        super().__init__(*arguments, **options)
        self.child_tuning = child_tuning
        self.child_mask: ChildMask | None = None
        self._resumed_from: str | None = None
        self._check_setting()

    def _check_setting(self) -> None:
        """Refuse what would train otherwise than asked, before anything is loaded or measured."""
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            raise ValueError(
                "optimizers or optimizer_cls_and_kwargs was given, but the optimizer is made of "
                "child_tuning; leave it out (a scheduler alone may be given: optimizers=(None, scheduler))"
            )
        name = getattr(self.args.optim, "value", self.args.optim)
        if name not in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError(
                f"optim={name!r} is not what trains here: FusedChildAdamW does; leave it at its default"
            )
        if self.args.optim_args:
            raise ValueError(
                f"optim_args={self.args.optim_args!r} is not read; use optimizer_options of "
                "ChildTuningArguments"
            )
        if self.is_deepspeed_enabled:
            raise ValueError(
                "deepspeed is not supported by this Trainer: ZeRO keeps no parameters whose elements a mask "
                "could name; use DistributedDataParallel or FSDP2"
            )
        measures = self.child_tuning.child_mode == "D" and self.child_tuning.child_mask is None
        if self.is_fsdp_enabled and measures:
            raise ValueError(
                "mode D cannot measure Fisher information under FSDP, where ranks may have no weights until "
                "the model is sharded; measure on one device and give child_mask"
            )

    @property
    def _folder(self) -> str:
        return self.args.output_dir or "."

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any
    ) -> Any:
        """Train as the Trainer does; in mode D the tuned child is written after it."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self._folder)
        self._resumed_from = folder or None
        output = super().train(resume_from_checkpoint, *arguments, **options)
        trial = arguments[0] if arguments else options.get("trial")
        if trial is None:
            self._write_child()
        return output

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Make the FusedChildAdamW, and before it, in mode D, find or measure the child."""
        tuning, arguments = self.child_tuning, self.args
        if self._resumed_from is not None:
            check_resumed(self._resumed_from, tuning, arguments.seed)
        if tuning.child_mode == "D" and (self.optimizer is None or self._resumed_from):
            self.child_mask = self._find_or_measure()
        if self.optimizer is not None:
            return self.optimizer
        self.optimizer = FusedChildAdamW(
            named_decay_groups(self, self.model if model is None else model),
            lr=self._learning_rate_of_child(),
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
            reserve_p=(tuning.reserve_p or 1.0) if tuning.child_mode == "F" else 1.0,
            child_mask=self.child_mask,
            seed=arguments.seed if tuning.child_seed is None else tuning.child_seed,
            max_grad_norm=self._limit_of_step(),
            **tuning.options_of_optimizer(),
        )
        if self._resumed_from is None and arguments.should_save:
            set_aside(self._folder, tuning)
        self._write_mask(self._folder)
        return self.optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        optimizer = _innermost(self.optimizer)
        # The groups are those of the checkpoint now; what the Trainer reads anew at every start is not.
        for group in optimizer.param_groups:
            group["max_grad_norm"] = self._limit_of_step()
        if self.child_mask is not None and not trains(optimizer, self.child_mask):
            raise ValueError(
                f"resume_from_checkpoint: the optimizer's state in {checkpoint} is not of the child of "
                f"{MASK_NAME} there, or above it; give the run's own as child_mask (a run whose child was "
                "changed by set_child_mask cannot be resumed)"
            )

    def _learning_rate_of_child(self) -> float:
        """The Trainer's rate, or in mode F the one at which weights move as far."""
        rate, tuning = float(self.args.learning_rate), self.child_tuning
        if tuning.child_mode != "F" or tuning.reserve_p in (None, 1.0):
            return rate
        comparable = lr_for(tuning.reserve_p, rate)
        if tuning.scale_learning_rate:
            return comparable
        # AdamW's customary rates have one digit (2e-5, 5e-5, 1e-4); lr_for's seldom do.
        fresh = self._resumed_from is None  # a resumed run has the rate that it began with
        if fresh and tuning.scale_learning_rate is None and float(f"{rate:.0e}") == rate:
            warnings.warn(
                f"learning_rate={rate:g} looks like one of AdamW's, at which CT_F undertrains: with "
                f"reserve_p={tuning.reserve_p:g} it moves weights as far at lr_for({tuning.reserve_p:g}, "
                f"{rate:g}) = {comparable:.3g}. scale_learning_rate=True uses that; False takes the rate as "
                "it is, without this warning",
                UserWarning,
                stacklevel=3,
            )
        return rate

    def _limit_of_step(self) -> float | None:
        return self.args.max_grad_norm if self._clips_in_step() else None

    def _clips_in_step(self) -> bool:
        """Whether the step clips, which saves a pass over the gradients; else the Trainer does before it."""
        limit = self.args.max_grad_norm
        return hasattr(super(), "_clip_grad_norm") and bool(limit) and not self.is_fsdp_enabled

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return None if self._clips_in_step() else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # The step has yet to take its norm; log() has it.
        return None if self._clips_in_step() else super()._get_grad_norm(model, grad_norm)

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Log what the Trainer does, and beside a training loss what the child is."""
        optimizer = _innermost(self.optimizer)
        if "loss" in logs and isinstance(optimizer, FusedChildAdamW):
            if optimizer.last_grad_norm is not None:
                logs["grad_norm"] = optimizer.last_grad_norm.item()
            density, kept = child_shares(optimizer.param_groups, optimizer.state)
            logs |= {"child_density": density, "child_kept_fraction": kept}
        super().log(logs, *arguments, **options)

    def save_model(self, output_dir: str | None = None, *arguments: Any, **options: Any) -> None:
        """Save the model as the Trainer does, and beside it the child's mask and what was asked for."""
        super().save_model(output_dir, *arguments, **options)
        folder = output_dir or self._folder
        self._write_mask(folder)
        if self.args.should_save:
            write_choices(folder, self.child_tuning, self.args.seed)
            if self.child_mask is None and folder != self._folder:
                drop_mask(folder)

    def _find_or_measure(self) -> ChildMask:
        """The child of a given file, of the run that is resumed, or of the Fisher information."""
        tuning, folder = self.child_tuning, self._resumed_from
        if folder is not None:
            # What lies above a checkpoint of another Trainer is of another run.
            above = [Path(folder).resolve().parent / MASK_NAME] * has_choices(folder)
            for place in (Path(folder, MASK_NAME), *above):
                if place.exists():
                    _log.info("the child is that of %s", place)
                    return same_child(ChildMask.load(place), place, tuning.child_mask)
            if tuning.child_mask is None:
                raise ValueError(
                    f"resume_from_checkpoint: {folder} has no {MASK_NAME}, nor has the folder above it, and "
                    "measuring at resumed weights would give another child; give the run's as child_mask"
                )
        if isinstance(tuning.child_mask, ChildMask):
            return tuning.child_mask
        if tuning.child_mask is not None:
            return ChildMask.load(tuning.child_mask)
        fisher = fisher_of_train_set(
            self,
            tuning.child_include,
            tuning.child_exclude or (),
            max_examples=tuning.fisher_examples,
            batch_size=tuning.fisher_batch_size,
            seed=tuning.child_seed,
        )
        if tuning.save_fisher and self.args.should_save:
            os.makedirs(self._folder, exist_ok=True)
            fisher.save(Path(self._folder, FISHER_NAME))
        mask = fisher.child_mask(tuning.reserve_p, granularity=tuning.child_granularity)
        _log.info(
            "%s; measured on %d examples; what may be in it: %s; dense: %d other weights",
            mask,
            fisher.examples,
            ", ".join(fisher.include or ["all"]),
            len(mask.dense_names),
        )
        return mask

    def _write_mask(self, folder: str) -> None:
        if self.child_mask is not None and self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            self.child_mask.save(Path(folder, MASK_NAME))

    def _write_child(self) -> None:
        """Write the tuned child alone; what stands in the way is said, for the training is done."""
        if self.child_mask is None or not self.child_tuning.child_checkpoint:
            return
        if self.is_fsdp_enabled:
            warnings.warn(
                f"{CHILD_NAME} is not written under FSDP: it needs whole weights; docs/guide_distributed.md "
                "has a recipe",
                UserWarning,
                stacklevel=3,
            )
        elif self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            try:
                save_child(
                    Path(self._folder, CHILD_NAME),
                    model,
                    self.child_mask,
                    optimizer=_innermost(self.optimizer),
                )
            except (ValueError, OSError) as error:
                warnings.warn(f"{CHILD_NAME} is not written: {error}", UserWarning, stacklevel=3)


class OptionCallback(TrainerCallback):
    """Moves an option of the optimizer with the step, as ``OptionScheduler`` does; resumed runs too.

    Args:
        option: such as ``"reserve_p"``.
        schedule: gives its value at a step, counted from 0.
    """

    def __init__(self, option: str, schedule: Callable[[int], Any]) -> None:
        self.option, self.schedule = option, schedule
        self._scheduler: OptionScheduler | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Take hold of the run's optimizer."""
        self._scheduler = OptionScheduler(
            _innermost(others["optimizer"]), self.option, self.schedule
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Set the option to its value at this step."""
        if self._scheduler is not None:
            self._scheduler.load_state_dict({"option": self.option, "last_step": state.global_step})


def _innermost(optimizer: Any) -> Any:
    """The optimizer within accelerate's wrapper."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
