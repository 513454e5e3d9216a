"""State dicts in and out (SPEC.md, section 5): checked whole before anything is replaced."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from . import ops
from .group_options import OPTIONS, check_seed, check_spelling, group_numbers
from .labels import is_positional, label_of
from .parameter_state import has_master, initial_state, master_of

_ADAMW_OPTIONS = ("lr", "betas", "eps", "weight_decay", "maximize")
_TORCH_ONLY = ("capturable", "differentiable", "decoupled_weight_decay", "fused", "foreach")
_MOMENTS = ("exp_avg", "exp_avg_sq")

State = Mapping[str, Any]
Groups = list[dict[str, Any]]


def restored(
    groups: Groups, states: Mapping[Tensor, State], saved: Mapping[str, Any], *, relabel: bool
) -> tuple[Groups, defaultdict[Tensor, Any]]:
    """The parameter groups and state that loading ``saved`` gives; nothing of the arguments changes.

    Args:
        groups: the optimizer's parameter groups.
        states: the optimizer's state.
        saved: a state dict of FusedChildAdamW or ``torch.optim.AdamW``.
        relabel: accept saved labels that differ.

    Raises:
        ValueError: groups, labels, shapes or options that do not fit.
    """
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        raise ValueError(
            "the state dict lacks state or param_groups; give what state_dict() returned"
        )
    saved_groups = deepcopy(saved["param_groups"])
    _check_sizes(groups, saved_groups)
    _check_labels(groups, saved_groups, relabel)
    new_states: defaultdict[Tensor, Any] = defaultdict(dict)
    new_groups = []
    for group, saved_group in zip(groups, saved_groups, strict=True):
        own = "reserve_p" in saved_group
        if not own:
            _check_is_adamw(saved_group)
        new_group = _restored_group(group, saved_group, own)
        for label, parameter, index in zip(
            group["param_names"], group["params"], saved_group["params"], strict=True
        ):
            entry = saved["state"].get(index, {})
            new_states[parameter] = _restored_state(
                label, parameter, entry, states[parameter], new_group["master_weight"], own
            )
        masked = any("mask_words" in new_states[parameter] for parameter in group["params"])
        group_numbers(new_group, masked, "the state dict")
        new_groups.append(new_group)
    return new_groups, new_states


def _check_sizes(groups: Groups, saved_groups: Groups) -> None:
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"the state dict has groups of {saved_sizes} parameters, the optimizer of {sizes}; build "
            "the optimizer with the groups it was saved with"
        )


def _check_labels(groups: Groups, saved_groups: Groups, relabel: bool) -> None:
    """Saved labels must be those of construction; a state without labels fits by position."""
    if relabel:
        return
    differing = []
    for group, saved_group in zip(groups, saved_groups, strict=True):
        saved_names = saved_group.get("param_names")
        if saved_names is None:
            continue
        if len(saved_names) != len(group["param_names"]):
            raise ValueError(
                f"the state dict has {len(saved_names)} param_names for a group of "
                f"{len(group['param_names'])} parameters; it was altered or cut"
            )
        saved_labels = [name if is_positional(name) else label_of(name) for name in saved_names]
        differing += [
            f"{saved} (saved) is not {label}"
            for saved, label in zip(saved_labels, group["param_names"], strict=True)
            if saved != label
        ]
    if differing:
        raise ValueError(
            f"{len(differing)} labels of the state dict differ: {'; '.join(differing[:4])}; Bernoulli "
            "masks follow labels: build the optimizer with the same names, or load with relabel=True"
        )


def _check_is_adamw(saved: Mapping[str, Any]) -> None:
    """Refuse the groups of optimizers that mean something else by the same state."""
    # RAdam's groups look like AdamW's but for amsgrad.
    coupled = saved.get("decoupled_weight_decay") is False and saved.get("weight_decay")
    if (
        coupled
        or not {"betas", "amsgrad"} <= saved.keys()
        or "momentum_decay" in saved
        or "rho" in saved
    ):
        raise ValueError(
            "the state dict is of another optimizer; load one of AdamW's kind (decoupled decay, betas)"
        )


def _restored_group(group: dict[str, Any], saved: dict[str, Any], own: bool) -> dict[str, Any]:
    if own:
        taken = dict(saved)
    elif saved.get("amsgrad"):
        raise ValueError("the state dict is of AdamW with amsgrad=True, which is not supported")
    else:
        foreign = set(OPTIONS) - set(_ADAMW_OPTIONS) | set(_TORCH_ONLY)
        taken = {name: value for name, value in saved.items() if name not in foreign}
    restored_group = {**group, **taken}
    restored_group["params"], restored_group["param_names"] = group["params"], group["param_names"]
    if own:
        check_seed(saved.get("seed"), "the state dict")
    check_spelling(restored_group, "the state dict")
    return restored_group


def _restored_state(
    label: str, parameter: Tensor, saved: State, current: State, master_weight: str, own: bool
) -> dict[str, Tensor]:
    if any(name in saved for name in ("child_exp_avg", "child_exp_avg_sq")):
        raise ValueError(f"state of {label}: compact moments cannot be read by this version")
    if "max_exp_avg_sq" in saved:
        raise ValueError(f"state of {label}: max_exp_avg_sq of amsgrad=True is not supported")
    words = saved.get("mask_words") if own else current.get("mask_words")
    if words is not None:
        ops.check_words(label, words, parameter.numel())
        words = words.to(parameter.device, copy=True)
    if own:
        _warn_of_other_mask(label, words, current.get("mask_words"))
    state = initial_state(parameter, words, "none")
    if own or saved:
        state.update(_saved_moments(label, parameter, saved))
    if words is not None:
        outside = ~ops.unpack_mask(words, parameter.shape)
        for name in _MOMENTS:
            state[name].masked_fill_(outside, 0.0)
    if has_master(parameter, master_weight):
        state["master_weight"] = master_of(parameter)
        if "master_weight" in saved:
            state["master_weight"] = _saved_tensor(
                "master_weight", label, parameter, saved, torch.float32
            )
    return state


def _saved_moments(label: str, parameter: Tensor, saved: State) -> dict[str, Tensor]:
    compute = ops.compute_dtype(parameter.dtype)
    moments = {name: _saved_tensor(name, label, parameter, saved, compute) for name in _MOMENTS}
    if "step" not in saved:
        raise ValueError(f"state of {label} has no step in the state dict")
    try:
        step = float(saved["step"])
    except (TypeError, ValueError, RuntimeError):
        step = -1.0
    if not (step.is_integer() and step >= 0):
        raise ValueError(f"state step of {label} is {saved['step']!r}; it must be a count of steps")
    # AdamW counts in float32; an int64 count is taken as it is.
    moments["step"] = torch.tensor(int(saved["step"]), dtype=torch.int64, device=parameter.device)
    return moments


def _saved_tensor(
    name: str, label: str, parameter: Tensor, saved: State, dtype: torch.dtype
) -> Tensor:
    """A copy of one state tensor as this parameter needs it: row-major, on its device, of ``dtype``."""
    tensor = saved.get(name)
    if not isinstance(tensor, Tensor) or tensor.shape != parameter.shape:
        found = tuple(tensor.shape) if isinstance(tensor, Tensor) else tensor
        raise ValueError(
            f"state {name} of {label} is {found} in the state dict; the parameter has shape "
            f"{tuple(parameter.shape)}"
        )
    if not tensor.is_floating_point():
        raise ValueError(f"state {name} of {label} is of {tensor.dtype}; it must be floating point")
    return torch.empty(parameter.shape, dtype=dtype, device=parameter.device).copy_(tensor)


def _warn_of_other_mask(label: str, saved: Tensor | None, current: Tensor | None) -> None:
    if current is None or (saved is not None and torch.equal(saved.to(current.device), current)):
        return
    warnings.warn(
        f"the state dict's mask of {label} differs from the one given at construction; the saved one "
        "is used",
        UserWarning,
        stacklevel=5,
    )


def adamw_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A FusedChildAdamW state dict as ``torch.optim.AdamW.load_state_dict`` takes it."""
    defaults = torch.optim.AdamW([torch.zeros(1)]).defaults
    states = {
        index: {
            "step": torch.tensor(float(entry["step"]), dtype=torch.float32),
            "exp_avg": entry["exp_avg"],
            "exp_avg_sq": entry["exp_avg_sq"],
        }
        for index, entry in state_dict["state"].items()
    }
    groups = []
    for group in state_dict["param_groups"]:
        own_keys = set(OPTIONS) | {"seed", "param_names"}
        kept = {name: value for name, value in group.items() if name not in own_keys}
        kept |= {name: group[name] for name in _ADAMW_OPTIONS}
        if not _all_positional(group["param_names"]):
            kept["param_names"] = group["param_names"]
        groups.append({**defaults, **kept})
    return {"state": states, "param_groups": groups}


def _all_positional(labels: Sequence[str]) -> bool:
    return all(is_positional(label) for label in labels)
