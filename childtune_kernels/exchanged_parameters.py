"""DTensors that an engine has put in the place of the parameters which an optimizer was given."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from . import child_layout, sharding, state_tensors

Groups = Sequence[Mapping[str, Any]]


def given_by(groups: Groups) -> dict[str, Tensor]:
    """Label to parameter, as groups have them now."""
    return {
        label: parameter
        for group in groups
        for label, parameter in zip(group["param_names"], group["params"], strict=False)
    }


def follow_(
    groups: Groups, states: MutableMapping[Tensor, Any], given: MutableMapping[str, Tensor]
) -> None:
    """Give DTensors that have come in the place of whole parameters the state of their parts.

    An engine that shards a model after the optimizer was built (``accelerate`` with FSDP2) writes the
    DTensors into the groups. An optimizer that has not stepped yet begins with them: with this rank's part
    of the mask, zero moments, and masters made of the weights as they are.

    Args:
        groups: labels, and the parameters that are there now.
        states: by parameter, whole ones too.
        given: label to the parameter for which there is state.

    Changes in place: ``states`` and ``given``, for what was exchanged so. Other exchanges are left to
    ``state_tensors.state_of``, which refuses them.

    Raises:
        ValueError: the optimizer has stepped already; nothing has changed.
    """
    made: list[tuple[str, Tensor, Tensor, dict[str, Tensor]]] = []
    for group in groups:
        for label, parameter in zip(group["param_names"], group["params"], strict=False):
            before = given.get(label)
            if before is None or parameter in states or not _shards(parameter, before):
                continue
            state = states.get(before)
            if not state:
                continue
            if int(state["step"]):
                raise ValueError(
                    f"parameter {label} became a DTensor after {int(state['step'])} steps; shard the model "
                    "first, then build the optimizer and load its state dict"
                )
            words = child_layout.mask_words(state, before.numel())
            part = sharding.local_of(parameter)
            if words is not None:
                words = sharding.words_of_part(label, words, parameter).to(part.device)
            made.append(
                (label, before, parameter, state_tensors.initial_state(label, part, words, group))
            )
    for label, before, parameter, state in made:
        del states[before]
        states[parameter], given[label] = state, parameter


def _shards(parameter: Tensor, before: Tensor) -> bool:
    return (
        sharding.is_sharded(parameter)
        and not sharding.is_sharded(before)
        and parameter.shape == before.shape
    )
