"""A parameter group that is added to an optimizer: checked whole, with the state of its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from . import graph_capture, parameters, sharding, state_tensors
from .child_mask import ChildMask
from .group_options import (
    check_optimizers_own,
    check_shared,
    check_spelling,
    group_numbers,
    shared_options,
)
from .labels import Aliases


class NewGroup(NamedTuple):
    """A group with all options, its parameters' first state, and the mask that it was given."""

    group: dict[str, Any]
    states: dict[Tensor, dict[str, Tensor]]
    mask: ChildMask | None


def checked_group(
    param_group: Mapping[str, Any],
    groups: Sequence[dict[str, Any]],
    defaults: Mapping[str, Any],
    backend: str | None,
    default_mask: ChildMask | None,
    aliases: Aliases,
) -> NewGroup:
    """What a group adds to ``groups``; nothing of the arguments changes.

    Raises:
        ValueError, TypeError, RuntimeError: an option, a parameter, a name or a mask that does not fit.
    """
    if not isinstance(param_group, dict):
        raise TypeError(f"a parameter group must be a dict, not {type(param_group).__name__}")
    where = f"group {len(groups)}"
    check_optimizers_own(param_group, {"seed": defaults["seed"], "backend": backend}, where)
    group = {**defaults, **shared_options(groups), **param_group}
    group.pop("backend", None)
    mask = group.pop("child_mask", default_mask)
    known = [*parameters.by_label(groups)]
    labels, tensors = parameters.labelled(group, known, where, aliases.label_of)
    check_spelling(group, where)
    group_numbers(group, mask is not None, where)
    words = parameters.mask_words(mask, labels, tensors)
    for device in {tensor.device for tensor in tensors}:
        graph_capture.check_backend(device, backend, bool(group["capturable"]), where)
    check_shared([*groups, group])
    group["params"], group["param_names"] = tensors, labels
    states = {
        tensor: state_tensors.initial_state(
            label, sharding.local_of(tensor), words.get(label), group
        )
        for label, tensor in zip(labels, tensors, strict=True)
    }
    return NewGroup(group, states, mask)
