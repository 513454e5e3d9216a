"""ChildTuningArguments: what a Trainer is told about Child-Tuning, from Python or the command line."""

from __future__ import annotations

import json
import operator
import os
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from ..child_mask import ChildMask
from ..group_options import keep_threshold
from ..optimizer import FusedChildAdamW

Mode = Literal["F", "D", "none"]

#: Options of FusedChildAdamW that come from elsewhere, and from where.
_SET_ELSEWHERE = {
    "lr": "learning_rate (TrainingArguments)",
    "betas": "adam_beta1 and adam_beta2 (TrainingArguments)",
    "eps": "adam_epsilon (TrainingArguments)",
    "weight_decay": "weight_decay (TrainingArguments)",
    "max_grad_norm": "max_grad_norm (TrainingArguments)",
    "reserve_p": "reserve_p",
    "child_mask": "child_mask",
    "seed": "child_seed",
}


# JSON knows no dtypes.
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class ChildTuningArguments:
    """How a Trainer chooses the child network; ``HfArgumentParser`` makes command line options of it.

    Args:
        child_mode: ``"F"``: another random part of every gradient in every step. ``"D"``: one fixed child of
            highest Fisher information, measured on the train set before the first step. ``"none"``: AdamW.
        reserve_p: F: the probability that a gradient element is kept. D: the share of the weights in
            scope that are in the child. In (0, 1].
        child_mask: D: the child, a ``ChildMask`` or the file that one was saved in; nothing is measured.
        child_include: D: patterns (``fnmatch``) on parameter names: which weights may be in the child; all
            others train densely. None: the layers, see ``layer_patterns``.
        child_exclude: D: patterns of weights that are not in the child's scope all the same.
        child_granularity: D: 1, or a multiple of 32: whole runs of so many weights are in or out.
        fisher_examples: D: at most so many training examples are measured, drawn by the seed; None: all.
        fisher_batch_size: D: 1 squares the gradient of each example, as the paper has it; more squares
            means of so many, which is cheaper and another quantity.
        save_fisher: D: keep the measured sums (as large as the weights in scope in fp32) as
            ``fisher.safetensors``, to make children of other sizes from.
        child_checkpoint: D: write the tuned child alone after training, as ``tuned_child.safetensors``.
        scale_learning_rate: F: True divides the learning rate by the square root of ``reserve_p``, at which
            F moves weights as far as AdamW does at the given one; False takes the rate as it is; None too,
            but warns where it looks like one of AdamW's, which have one digit (2e-5); a rate for F may, too.
        child_seed: of F's masks and of the examples drawn; None: the ``seed`` of ``TrainingArguments``.
        optimizer_options: other options of ``FusedChildAdamW``, a dict or its JSON:
            ``'{"convention": "original", "master_weight": "fp32"}'``.

    Raises:
        ValueError: names the option, its value and the remedy.
    """

    child_mode: Mode = field(
        metadata={
            "help": "F: random masks; D: the child of highest Fisher information; none: AdamW"
        }
    )
    reserve_p: float | None = field(
        default=None,
        metadata={
            "help": "F: probability that a gradient element is kept; D: share of weights in the child"
        },
    )
    # HfArgumentParser takes the second of three types.
    child_mask: ChildMask | str | None = field(
        default=None,
        metadata={"help": "D: a mask file, in the place of measuring Fisher information"},
    )
    child_include: list[str] | None = field(
        default=None,
        metadata={"help": "D: patterns of weights that may be in the child (default: the layers')"},
    )
    child_exclude: list[str] | None = field(
        default=None, metadata={"help": "D: patterns of weights that train densely in any case"}
    )
    child_granularity: int = field(
        default=1,
        metadata={"help": "D: runs of so many weights are in or out; 1 or a multiple of 32"},
    )
    fisher_examples: int | None = field(
        default=None,
        metadata={"help": "D: measure at most so many training examples (default: all)"},
    )
    fisher_batch_size: int = field(
        default=1, metadata={"help": "D: examples a squared gradient; 1 is the paper's"}
    )
    save_fisher: bool = field(
        default=False, metadata={"help": "D: keep the Fisher information as fisher.safetensors"}
    )
    child_checkpoint: bool = field(
        default=True, metadata={"help": "D: write tuned_child.safetensors after training"}
    )
    scale_learning_rate: bool | None = field(
        default=None,
        metadata={
            "help": "F: divide the learning rate by sqrt(reserve_p)",
            "nargs": "?",  # without a value it is True, as other flags are
            "const": True,
        },
    )
    child_seed: int | None = field(
        default=None, metadata={"help": "of F's masks (default: the seed of the run)"}
    )
    optimizer_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON object of other options of FusedChildAdamW"}
    )

    def __post_init__(self) -> None:
        self._take_values_as_they_come()
        if self.child_mode not in get_args(Mode):
            raise ValueError(
                f"child_mode={self.child_mode!r} is unknown; use 'F' (random masks), 'D' (a fixed child of "
                "highest Fisher information) or 'none' (AdamW)"
            )
        self._check_share()
        self._check_of_mode_d()
        if self.child_seed is not None and self.child_mode == "none":
            raise ValueError(
                f"child_seed={self.child_seed!r} has no effect in mode none, which draws nothing"
            )
        if self.scale_learning_rate is not None and self.child_mode != "F":
            raise ValueError(
                f"scale_learning_rate={self.scale_learning_rate!r} is of mode F; mode {self.child_mode} "
                "trains at AdamW's rate"
            )
        self.options_of_optimizer()

    def _take_values_as_they_come(self) -> None:
        """Paths, and numbers of NumPy and torch, become what JSON and HfArgumentParser know."""
        if isinstance(self.child_mask, os.PathLike):
            self.child_mask = os.fspath(self.child_mask)
        if hasattr(self.reserve_p, "item"):
            self.reserve_p = float(self.reserve_p)  # type: ignore[arg-type]
        if self.fisher_examples is not None:
            self.fisher_examples = whole_number("fisher_examples", self.fisher_examples)
        self.fisher_batch_size = whole_number("fisher_batch_size", self.fisher_batch_size)
        self.child_granularity = whole_number("child_granularity", self.child_granularity)

    def options_of_optimizer(self) -> dict[str, Any]:
        """``optimizer_options`` as a dict.

        Raises:
            ValueError: no JSON object, an option that comes from elsewhere, or one that there is not.
        """
        return _options(self.optimizer_options)

    def _check_share(self) -> None:
        needed = self.child_mode == "F" or (self.child_mode == "D" and self.child_mask is None)
        if self.reserve_p is None:
            if needed:
                raise ValueError(
                    f"reserve_p is missing, which mode {self.child_mode} needs; the paper tries 0.2, 0.3 and "
                    "0.4 for F, 0.1, 0.2 and 0.3 for D"
                )
            return
        if self.child_mode == "none":
            raise ValueError(
                f"reserve_p={self.reserve_p!r} has no effect in mode none; choose mode F or D"
            )
        if self.child_mask is not None:
            raise ValueError(
                f"reserve_p={self.reserve_p!r} has no effect beside child_mask, which has its own share; "
                "leave one out"
            )
        keep_threshold(self.reserve_p, "ChildTuningArguments")

    def _check_of_mode_d(self) -> None:
        given = {
            name: getattr(self, name)
            for name, default in (
                ("child_mask", None),
                ("child_include", None),
                ("child_exclude", None),
                ("child_granularity", 1),
                ("fisher_examples", None),
                ("fisher_batch_size", 1),
                ("save_fisher", False),
            )
            if getattr(self, name) != default
        }
        for name, value in given.items():
            if self.child_mode != "D":
                raise ValueError(
                    f"{name}={value!r} is of mode D and has no effect in mode {self.child_mode}"
                )
            if self.child_mask is not None and name != "child_mask":
                raise ValueError(
                    f"{name}={value!r} has no effect beside child_mask={self.child_mask!r}, which says "
                    "what is in the child; leave one out"
                )
        granularity = self.child_granularity
        if granularity != 1 and granularity % 32:
            raise ValueError(f"child_granularity={granularity!r} must be 1 or a multiple of 32")


def whole_number(name: str, value: Any) -> int:
    """A whole number from 1 on, of whatever type.

    Raises:
        ValueError: names the option and the value.
    """
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name}={value!r} must be a whole number, 1 or more")
    return number


def _options(given: Any) -> dict[str, Any]:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(f"optimizer_options={given!r} is no JSON: {error}") from None
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ValueError(f"optimizer_options={given!r} must be a JSON object of options")
    known = FusedChildAdamW.__init__.__annotations__
    for name in given:
        if name in _SET_ELSEWHERE:
            raise ValueError(
                f"optimizer_options: {name} comes from {_SET_ELSEWHERE[name]}; set that"
            )
        if name not in known or name in ("params", "return"):
            raise ValueError(
                f"optimizer_options: FusedChildAdamW has no option {name!r}; it has "
                f"{', '.join(sorted(set(known) - set(_SET_ELSEWHERE) - {'params', 'return'}))}"
            )
    return {
        name: _DTYPES.get(value, value) if name == "state_dtype" else value
        for name, value in given.items()
    }
