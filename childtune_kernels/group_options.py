"""The options of a parameter group: their checks and the numbers made of them (SPEC.md, eq. 3)."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .plan_row import GroupNumbers

CHOICES = {
    "convention": ("torch", "original"),
    "child_state": ("auto", "compact", "dense"),
    "master_weight": ("auto", "split", "fp32", "stochastic", "none"),
    "clip": ("before_mask", "after_mask"),
}
FLAGS = ("freeze_non_child", "correct_bias", "maximize", "capturable", "skip_nonfinite")
#: What is of all groups together: the same value stands in each of them.
SHARED = ("max_grad_norm", "clip", "skip_nonfinite")
NUMBERS = ("lr", "betas", "eps", "weight_decay", "reserve_p")
# Accepted so that FusedChildAdamW drops into scripts written for torch.optim.AdamW.
DROP_IN = ("amsgrad", "differentiable", "fused", "foreach")
REFUSED = ("amsgrad", "differentiable")  # of these, what must stay False
OPTIONS = (*NUMBERS, *FLAGS, *CHOICES, "state_dtype", "max_grad_norm", *DROP_IN)
#: What ``state_dtype`` may be; None: the type that computes.
STATE_DTYPES = (None, torch.float32, torch.bfloat16)
# What a group notes of its run: whether weights outside its present child have been written.
WROTE_OUTSIDE = "wrote_outside_child"
# The mode of a ChildTuningAdamW, in each of its groups.
MODE = "mode"
#: What a group has besides its options, and what stays as it is for a whole run.
FIXED_KEYS = (WROTE_OUTSIDE, MODE, "seed", "params", "param_names")
GROUP_KEYS = (*OPTIONS, *FIXED_KEYS)

#: All that a step depends on, looked at anew at every step.
watched_options = operator.itemgetter(
    *NUMBERS, *FLAGS, *CHOICES, "state_dtype", "max_grad_norm", *REFUSED, "seed"
)


def _number(name: str, value: Any, where: str) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name}={value!r} ({where}) must be a number")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value!r} ({where}) must be finite and not negative")
    return float(value)


def _betas(value: Any, where: str) -> tuple[float, float]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"betas={value!r} ({where}) must be two numbers")
    beta1, beta2 = (_number("betas", beta, where) for beta in value)
    if beta1 >= 1 or beta2 >= 1:
        raise ValueError(f"betas={value!r} ({where}) must lie in [0, 1)")
    return beta1, beta2


def keep_threshold(reserve_p: Any, where: str) -> tuple[float, int]:
    """p and T = round(p * 2**32) (SPEC.md, eq. 3).

    Raises:
        ValueError: no number, outside (0, 1], or so small that T is 0.
    """
    remedy = "use 1.0 to keep every gradient element, or keep the parameters out of the optimizer"
    p = _number("reserve_p", reserve_p, where)
    if p > 1:
        raise ValueError(f"reserve_p={reserve_p!r} ({where}) must lie in (0, 1]")
    threshold = round(p * 2**32)
    if threshold == 0:
        raise ValueError(f"reserve_p={reserve_p!r} ({where}) keeps no gradient element; {remedy}")
    return p, threshold


def _max_grad_norm(value: Any, where: str) -> float:
    """The norm to which gradients are clipped; 0 where they are not."""
    norm = 0.0 if value is None else _number("max_grad_norm", value, where)
    if norm == 0.0 and value is not None:
        raise ValueError(
            f"max_grad_norm={value!r} ({where}) must be above 0; use None to leave gradients as they are"
        )
    return norm


def check_optimizers_own(group: Mapping[str, Any], own: Mapping[str, Any], where: str) -> None:
    """Refuse a new group's own value of what an optimizer has once.

    Raises:
        ValueError: names the option.
    """
    for name, value in own.items():
        if group.get(name, value) != value:
            raise ValueError(
                f"{name}={group[name]!r} ({where}) cannot differ by group; give it to the constructor"
            )


def shared_options(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is of all groups together, as it stands now, for a group that is added to them."""
    return {name: group[name] for group in groups[:1] for name in SHARED}


def check_shared(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse groups that differ in what is of all of them together.

    Raises:
        ValueError: names the option and two values.
    """
    for name in SHARED:
        for number, group in enumerate(groups):
            if group[name] != groups[0][name]:
                raise ValueError(
                    f"{name}={group[name]!r} (group {number}) cannot differ from that of group 0, "
                    f"{groups[0][name]!r}: one norm is taken of all gradients; give it to the constructor, "
                    "or set it in every group"
                )


def _rounds_to_zero(eps: float) -> bool:
    try:
        return struct.unpack("f", struct.pack("f", eps))[0] == 0.0
    except OverflowError:
        return False


def check_spelling(group: Mapping[str, Any], where: str) -> None:
    """Refuse a key that looks like a misspelt option; other keys of a group are its owner's affair.

    Raises:
        ValueError: names the key and the option that was probably meant.
    """
    if "child_mask" in group:
        raise ValueError(
            f"child_mask ({where}) cannot be put into a group that the optimizer holds; give it to the "
            "constructor or to add_param_group"
        )
    for key in group:
        if key not in GROUP_KEYS:
            near = difflib.get_close_matches(key, (*OPTIONS, "child_mask"), n=1, cutoff=0.8)
            if near:
                raise ValueError(
                    f"group key {key!r} ({where}) is no option; did you mean {near[0]!r}?"
                )


def check_seed(seed: Any, where: str) -> None:
    """Refuse a seed that is no integer.

    Raises:
        ValueError: names the value.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed={seed!r} ({where}) must be an int or None")


def check_drop_in(options: Mapping[str, Any], where: str) -> None:
    """Refuse what ``torch.optim.AdamW``'s constructor refuses, so that a script runs with both.

    These are limits of its implementations; nothing here would go wrong.

    Raises:
        ValueError: ``fused`` beside ``foreach``; ``foreach`` without ``capturable`` beside an ``lr`` or
            ``betas`` that are tensors; betas of which one is a tensor.
    """
    if options["fused"] and options["foreach"]:
        raise ValueError(f"fused=True and foreach=True ({where}) exclude each other; give one")
    numbers = {"lr": [options["lr"]], "betas": [*options["betas"]]}
    tensors = {
        name: [isinstance(value, torch.Tensor) for value in values]
        for name, values in numbers.items()
    }
    if len({*tensors["betas"]}) > 1:
        raise ValueError(
            f"betas={options['betas']!r} ({where}) must be both numbers or both tensors"
        )
    for name, are_tensors in tensors.items():
        if any(are_tensors) and options["foreach"] and not options["capturable"]:
            raise ValueError(
                f"{name}={options[name]!r} ({where}) cannot be a tensor beside foreach=True without "
                "capturable=True; use foreach=None"
            )


def _check_choices(group: Mapping[str, Any], where: str) -> None:
    for name, allowed in CHOICES.items():
        if group[name] not in allowed:
            raise ValueError(f"{name}={group[name]!r} ({where}) must be one of {allowed}")
    for name in FLAGS:
        if not isinstance(group[name], bool):
            raise ValueError(f"{name}={group[name]!r} ({where}) must be True or False")
    if group["state_dtype"] not in STATE_DTYPES:
        raise ValueError(
            f"state_dtype={group['state_dtype']!r} ({where}) must be None, torch.float32 or torch.bfloat16"
        )
    for name in REFUSED:
        if group[name]:
            raise ValueError(f"{name}={group[name]!r} ({where}) is not supported; use {name}=False")
    check_seed(group["seed"], where)


def _on_device(name: str, value: Any, device: torch.device | None, where: str) -> tuple[int, bool]:
    """Address of an option that is a tensor on ``device`` (0: it is not), and whether it is fp64."""
    if device is None or not isinstance(value, torch.Tensor):
        return 0, False
    if value.device != device:
        if value.device.type == "cpu":
            return 0, False
        raise ValueError(
            f"{name} ({where}) lies on {value.device}, the parameters on {device}; with capturable=True "
            "each device needs a group with a tensor of its own"
        )
    if value.numel() != 1 or value.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name}={value!r} ({where}) must have one element of float32 or float64 with capturable=True"
        )
    return value.data_ptr(), value.dtype == torch.float64


def group_numbers(
    group: Mapping[str, Any],
    has_fixed_mask: bool,
    where: str,
    device: torch.device | None = None,
) -> GroupNumbers:
    """The numbers of a group, after a check of all its options.

    Args:
        group: the options.
        has_fixed_mask: whether one of its parameters has one.
        where: the group, for messages.
        device: with ``capturable``, where the group's parameters lie: an ``lr`` or ``weight_decay`` that is a
            tensor there is not read, since that would wait for the device, but left to the kernel.

    Raises:
        ValueError: an option out of range or of another kind, or an eps that fp32 rounds to 0 beside a
            mask (a dropped element would be 0/0 in its first step).
    """
    _check_choices(group, where)
    beta1, beta2 = _betas(group["betas"], where)
    reserve_p, threshold = keep_threshold(group["reserve_p"], where)
    eps = _number("eps", group["eps"], where)
    if (has_fixed_mask or reserve_p < 1) and _rounds_to_zero(eps):
        raise ValueError(
            f"eps={group['eps']!r} ({where}) is 0 in float32; with a mask a dropped element would "
            "be 0/0 in its first step; use eps=1e-8"
        )
    device = device if group["capturable"] else None
    if device is not None and any(isinstance(beta, torch.Tensor) for beta in group["betas"]):
        raise ValueError(
            f"betas={group['betas']!r} ({where}) must be numbers with capturable=True: reading a tensor "
            "would wait for the device"
        )
    lr_address, lr_is_double = _on_device("lr", group["lr"], device, where)
    decay_address, decay_is_double = _on_device(
        "weight_decay", group["weight_decay"], device, where
    )
    return GroupNumbers(
        lr=0.0 if lr_address else _number("lr", group["lr"], where),
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=0.0
        if decay_address
        else _number("weight_decay", group["weight_decay"], where),
        reserve_p=reserve_p,
        threshold=threshold,
        freeze_non_child=group["freeze_non_child"],
        original_convention=group["convention"] == "original",
        correct_bias=group["correct_bias"],
        maximize=group["maximize"],
        max_grad_norm=_max_grad_norm(group["max_grad_norm"], where),
        skip_nonfinite=group["skip_nonfinite"],
        stochastic_rounding=group["master_weight"] == "stochastic",
        lr_address=lr_address,
        lr_is_double=lr_is_double,
        weight_decay_address=decay_address,
        weight_decay_is_double=decay_is_double,
    )


def lr_for(reserve_p: float, lr: float) -> float:
    """The learning rate at which CT_F moves weights as far as AdamW does at ``lr``.

    Under Adam a constant gradient kept with probability p and scaled by 1/p moves a weight
    sqrt(p) * lr a step (exp_avg keeps the gradient's mean, exp_avg_sq grows by 1/p), so the
    comparable learning rate is ``lr / sqrt(reserve_p)``.

    Raises:
        ValueError: ``reserve_p`` outside (0, 1], ``lr`` not finite or negative.
    """
    p, _ = keep_threshold(reserve_p, "lr_for")
    return _number("lr", lr, "lr_for") / math.sqrt(p)
