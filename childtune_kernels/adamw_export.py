"""A run of FusedChildAdamW as a state dict of ``torch.optim.AdamW`` (SPEC.md, section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import child_layout, saved_groups, sharded_child, sharding, state_tensors
from .group_options import GROUP_KEYS
from .labels import is_positional, label_of

Group = Mapping[str, Any]
Groups = Sequence[Group]


def adamw_state_dict(
    state_dict: Mapping[str, Any], groups: Groups, wanted: Groups | None = None
) -> dict[str, Any]:
    """A FusedChildAdamW state dict as ``torch.optim.AdamW.load_state_dict`` takes it.

    Args:
        state_dict: it; not changed.
        groups: the optimizer's parameter groups.
        wanted: the ``param_groups`` of the AdamW that shall load it; None: those of the state dict.

    Raises:
        ValueError: other parameters in ``wanted``, or parameters of one of its groups whose options differ.
    """
    members = list(chain.from_iterable(group["params"] for group in groups))
    states = {
        number: {
            "step": torch.tensor(float(entry["step"]), dtype=torch.float32),
            **_dense_moments(members[number], entry),
        }
        for number, entry in state_dict["state"].items()
    }
    defaults = torch.optim.AdamW([torch.zeros(1)]).defaults
    saved = state_dict["param_groups"]
    if wanted is None:
        return {"state": states, "param_groups": [_adamw_group(defaults, g) for g in saved]}
    continued = _continued(saved, members, wanted)
    order = list(chain.from_iterable(each.numbers for each in continued))
    place = {number: index for index, number in enumerate(order)}
    return {
        "state": {place[number]: state for number, state in states.items()},
        "param_groups": [
            {**defaults, **group, **each.options, "params": [place[n] for n in each.numbers]}
            for group, each in zip(wanted, continued, strict=True)
        ],
    }


def _dense_moments(parameter: Tensor, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """Both moments of a saved state; of a sharded parameter as DTensors that are placed as it is."""
    if not (sharding.is_sharded(parameter) and child_layout.is_compact(entry)):
        return state_tensors.dense_moments(parameter, entry)
    of_part = sharded_child.child_of_part("a parameter", parameter, entry, None)
    moments = state_tensors.dense_moments(sharding.local_of(parameter), of_part)
    return {name: sharding.placed_as(moment, parameter) for name, moment in moments.items()}


def _adamw_group(defaults: Group, group: Group) -> dict[str, Any]:
    exported = {**defaults, **_adamw_options(group), "params": group["params"]}
    if not all(map(is_positional, group["param_names"])):
        exported["param_names"] = group["param_names"]
    return exported


def _adamw_options(group: Group) -> dict[str, Any]:
    """The options that AdamW has too, and what a group's owner has put into it."""
    foreign = set(GROUP_KEYS) - set(saved_groups.ADAMW_OPTIONS)
    return {name: value for name, value in group.items() if name not in foreign}


def _continued(
    groups: Groups, members: Sequence[Tensor], wanted: Groups
) -> list[saved_groups.Continued]:
    """What each group of an AdamW continues."""
    by_identity = {
        id(members[number]): label
        for group in groups
        for label, number in zip(group["param_names"], group["params"], strict=True)
    }
    shapes = {by_identity[id(parameter)]: parameter.shape for parameter in members}
    labels = []
    for number, group in enumerate(wanted):
        if group.get("amsgrad"):
            raise ValueError(
                f"amsgrad=True (groups[{number}]) is not supported; build the AdamW without it"
            )
        labels.append(_labels_of(group, by_identity, shapes, f"groups[{number}]"))
    own = [group["param_names"] for group in groups]
    saved_groups.check_same_labels(
        labels, own, ("this optimizer", "AdamW"), "build both with the same parameters"
    )
    numbers, options = [g["params"] for g in groups], [_adamw_options(g) for g in groups]
    return saved_groups.by_label(labels, own, numbers, options, "this optimizer")


def _labels_of(
    group: Group, by_identity: Mapping[int, str], shapes: Mapping[str, torch.Size], where: str
) -> list[str]:
    """The labels of an AdamW's parameters: those of the same tensors, or else of their names."""
    names = group.get("param_names") or [None] * len(group["params"])
    labels = []
    for index, (parameter, name) in enumerate(zip(group["params"], names, strict=True)):
        label = by_identity.get(id(parameter))
        if label is None and name is None:
            raise ValueError(
                f"{where}: parameter {index} is none of this optimizer's and has no name; build the AdamW "
                "with the same parameters, or with names"
            )
        label = label_of(name) if label is None else label
        if parameter.shape != shapes.get(label, parameter.shape):
            raise ValueError(
                f"{where}: {label} has shape {tuple(parameter.shape)}, here {tuple(shapes[label])}; build "
                "both with parameters of the same shapes"
            )
        labels.append(label)
    return labels
