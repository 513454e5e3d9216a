"""The state of an optimizer's parameters for another child network (SPEC.md, section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from . import parameters, sharding, state_tensors
from .child_mask import ChildMask
from .group_options import group_numbers


def states_of_child(
    groups: Sequence[Mapping[str, Any]],
    states: Mapping[Tensor, Mapping[str, Tensor]],
    mask: ChildMask | None,
    *,
    keep: bool,
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Every parameter with new state for a child, in the order of the groups; nothing that is given changes.

    Args:
        keep: elements of both children keep their moments and masters, and steps go on; else all of it
            begins anew.

    Raises:
        ValueError: a mask that does not fit, or options that do not go with it.
    """
    found = []
    for number, group in enumerate(groups):
        words = parameters.mask_words(mask, group["param_names"], group["params"])
        group_numbers(group, bool(words), f"group {number}")
        for label, parameter in zip(group["param_names"], group["params"], strict=True):
            own = words.get(label)
            part = sharding.local_of(parameter)
            if keep:
                current = state_tensors.state_of(label, parameter, states)
                state = state_tensors.moved_state(label, part, current, own, group)
            else:
                state = state_tensors.initial_state(label, part, own, group)
            found.append((parameter, state))
    return found
