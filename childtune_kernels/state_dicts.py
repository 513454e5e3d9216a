"""State dicts in and out (SPEC.md, section 5): checked whole before anything is replaced."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import (
    child_layout,
    ops,
    parameters,
    saved_groups,
    sharded_child,
    sharding,
    state_tensors,
    weight_formats,
)
from .group_options import check_spelling, group_numbers

# What an optimizer keeps its state in, and the value that asks for nothing.
_FORMATS = {"master_weight": "auto", "state_dtype": None}

State = Mapping[str, Any]
Groups = list[dict[str, Any]]


def packed(groups: Groups, states: Mapping[Tensor, State]) -> dict[str, Any]:
    """The state dict of groups and state: parameters by number, the child as mask words."""
    members = list(chain.from_iterable(group["params"] for group in groups))
    number = {id(parameter): index for index, parameter in enumerate(members)}
    return {
        "state": {
            number[id(parameter)]: _saved_state(parameter, states[parameter])
            for parameter in members
            if states.get(parameter)
        },
        "param_groups": [
            {**group, "params": [number[id(parameter)] for parameter in group["params"]]}
            for group in groups
        ],
    }


def _saved_state(parameter: Tensor, state: State) -> dict[str, Any]:
    """One parameter's state; of a sharded one what has a value a weight is sharded alike."""
    saved = state_tensors.saved_state(sharding.local_of(parameter), state)
    if not sharding.is_sharded(parameter):
        return saved
    if child_layout.has_child(state):
        return sharded_child.saved_child(parameter, saved)
    return {
        name: sharding.placed_as(value, parameter) if name in state_tensors.ELEMENTWISE else value
        for name, value in saved.items()
    }


def master_weights(groups: Groups, states: Mapping[Tensor, State]) -> dict[str, Tensor]:
    """Every parameter in full precision, by label; sharded ones are placed as they are."""
    weights = {}
    for label, parameter in parameters.by_label(groups):
        state = state_tensors.state_of(label, parameter, states)
        weight = weight_formats.full_precision(sharding.local_of(parameter), state)
        weights[label] = sharding.placed_as(weight, parameter)
    return weights


def restored(
    groups: Groups,
    states: Mapping[Tensor, State],
    saved: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    relabel: bool,
) -> tuple[Groups, defaultdict[Tensor, Any]]:
    """The parameter groups and state that loading ``saved`` gives; nothing of the arguments changes.

    Args:
        groups: the optimizer's parameter groups.
        states: the optimizer's state.
        saved: a state dict of FusedChildAdamW or ``torch.optim.AdamW``.
        defaults: what the optimizer was built with: formats of the state that were asked for stay.
        relabel: accept saved labels that differ.

    Raises:
        ValueError: groups, labels, shapes or options that do not fit.
    """
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
        raise ValueError(
            "the state dict lacks state or param_groups; give what state_dict() returned"
        )
    # What groups share, a learning rate that is a tensor, they go on sharing.
    copies = deepcopy(saved["param_groups"])
    own = saved_groups.are_own(copies)
    asked = {name: defaults[name] for name, auto in _FORMATS.items() if defaults[name] != auto}
    continued = saved_groups.continued(groups, copies, relabel=relabel)
    new_states: defaultdict[Tensor, Any] = defaultdict(dict)
    new_groups = []
    for group, (numbers, options, _) in zip(groups, continued, strict=True):
        new_group = _restored_group(group, options | asked)
        for label, parameter, number in zip(
            group["param_names"], group["params"], numbers, strict=True
        ):
            entry = saved["state"].get(number, {})
            new_states[parameter] = _restored_state(
                label, parameter, entry, states[parameter], new_group, own
            )
        masked = any(child_layout.has_child(new_states[member]) for member in group["params"])
        group_numbers(new_group, masked, "the state dict")
        new_groups.append(new_group)
    saved_groups.warn_of_lost_differences(groups, new_groups, [each.sources for each in continued])
    return new_groups, new_states


def _restored_group(group: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    moved = {
        name: value.to(group[name].device)
        for name, value in options.items()
        if isinstance(value, Tensor) and isinstance(group.get(name), Tensor)
    }
    restored_group = {**group, **options, **moved}
    check_spelling(restored_group, "the state dict")
    return restored_group


def _restored_state(
    label: str,
    parameter: Tensor,
    saved: State,
    current: State,
    group: Mapping[str, Any],
    own: bool,
) -> dict[str, Tensor]:
    # A flat state dict that lacks a key of the live state gives an empty dict for it.
    saved = {name: value for name, value in saved.items() if not _is_empty_dict(value)}
    part = sharding.local_of(parameter)
    current_words = child_layout.mask_words(current, part.numel())
    saved, parameter = _of_part(label, parameter, saved, current_words), part
    if "max_exp_avg_sq" in saved:
        raise ValueError(f"state of {label}: max_exp_avg_sq of amsgrad=True is not supported")
    saved_words = saved.get("mask_words")
    if saved_words is not None:
        ops.check_words(label, saved_words, parameter.numel())
    words = saved_words if own else current_words
    if words is not None:
        words = words.to(parameter.device, copy=True)
    if not own and not saved:
        return state_tensors.initial_state(label, parameter, words, group)
    read = _read_state(label, parameter, saved, saved_words)
    restored_state = state_tensors.moved_state(label, parameter, read, words, group)
    if own:
        _warn_of_other_mask(label, words, current_words)
    return restored_state


def _of_part(label: str, parameter: Tensor, saved: State, current: Tensor | None) -> State:
    """Of a saved state what goes with this rank's part of the parameter, however the state is sharded."""
    read = dict(saved)
    sharded = sharding.is_sharded(parameter)
    for name, value in saved.items():
        if isinstance(value, Tensor) and sharding.is_sharded(value) and not sharded:
            raise ValueError(
                f"state {name} of {label} is a DTensor in the state dict, and the parameter is not sharded; "
                "call full_tensor() on it, on all ranks"
            )
    if not sharded:
        if child_layout.is_compact(saved) and "mask_words" not in saved:
            read["mask_words"] = sharded_child.own_words(label, current)
        return read
    if saved.keys() & {"mask_words", *sharded_child.OF_CHILD}:
        read = sharded_child.child_of_part(label, parameter, saved, current)
    for name in state_tensors.ELEMENTWISE:
        value = saved.get(name)
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            read[name] = sharding.part_of(label, value, parameter)
    return read


def _read_state(
    label: str, parameter: Tensor, saved: State, words: Tensor | None
) -> dict[str, Tensor]:
    """A saved state, whose mask words are ``words``, on the parameter's device and checked."""
    compact = child_layout.is_compact(saved)
    shape = parameter.shape
    if compact:
        assert words is not None
        state_tensors.check_shape(label, parameter, saved)
        shape = torch.Size([ops.count_mask(words)])
    read = {"step": _saved_step(label, parameter, saved)}
    for plain in state_tensors.ELEMENTWISE:
        name = weight_formats.key(plain, compact)
        if plain in state_tensors.MOMENTS or name in saved:
            read[name] = _saved_tensor(name, label, parameter, saved, shape)
    if words is not None:
        read["mask_words"] = words.to(parameter.device)
    return read


def _is_empty_dict(value: Any) -> bool:
    return isinstance(value, dict) and not value


def _saved_step(label: str, parameter: Tensor, saved: State) -> Tensor:
    if "step" not in saved:
        raise ValueError(f"state of {label} has no step in the state dict")
    try:
        step = float(saved["step"])
    except (TypeError, ValueError, RuntimeError):
        step = -1.0
    if not (step.is_integer() and step >= 0):
        raise ValueError(f"state step of {label} is {saved['step']!r}; it must be a count of steps")
    # AdamW counts in float32; an int64 count is taken as it is.
    return torch.tensor(int(saved["step"]), dtype=torch.int64, device=parameter.device)


def _saved_tensor(
    name: str, label: str, parameter: Tensor, saved: State, shape: torch.Size
) -> Tensor:
    """One saved state tensor on the parameter's device."""
    tensor = saved.get(name)
    if not isinstance(tensor, Tensor) or tensor.shape != shape:
        found = tuple(tensor.shape) if isinstance(tensor, Tensor) else tensor
        raise ValueError(
            f"state {name} of {label} is {found} in the state dict; expected shape {tuple(shape)} for a "
            f"parameter of shape {tuple(parameter.shape)}"
        )
    integers = name.endswith(weight_formats.MASTERS["split"])
    if tensor.dtype != torch.int16 if integers else not tensor.is_floating_point():
        expected = "int16" if integers else "floating point"
        raise ValueError(f"state {name} of {label} is of {tensor.dtype}; it must be {expected}")
    return tensor.to(parameter.device)


def _warn_of_other_mask(label: str, saved: Tensor | None, current: Tensor | None) -> None:
    if current is None or (saved is not None and torch.equal(saved.to(current.device), current)):
        return
    warnings.warn(
        f"the state dict's mask of {label} differs from the one given at construction; the saved one "
        "is used",
        UserWarning,
        stacklevel=5,
    )
