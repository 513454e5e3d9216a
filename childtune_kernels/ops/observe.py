"""Op observe: whether what a plan was made of is still there, still the same, and where it lies.

What is observed at two times is compared with ``==``. It tells nothing between processes or backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import registry


def watch(states: Sequence[dict[str, Tensor]], choice: registry.Choice) -> Any:
    """Prepare to observe state many times.

    Args:
        states: the state of each parameter, dense tensors of any device.
        choice: what ``registry.choose("observe", device)`` gave.

    Returns:
        What ``observe`` takes; it keeps the tensors alive.
    """
    return choice.module.watch(states)


def observe(
    parameters: tuple[Tensor, ...],
    states: tuple[dict[str, Tensor], ...],
    watched: Any,
    before: tuple[bytes, bytes, bytes],
    choice: registry.Choice,
) -> tuple[bytes, bytes, bytes]:
    """Where parameters, their state and their gradients lie now, and what they look like.

    Args:
        parameters: dense tensors of any device.
        states: the state of each parameter.
        watched: what ``watch`` made of ``states``; entries exchanged since then are seen.
        before: what was observed last; a row that is the same may be returned itself.
        choice: what ``registry.choose("observe", device)`` gave.

    Returns:
        Three rows of 64-bit integers: first, for each parameter its address and looks, then of every
        tensor of its state the identity and the address; second, the looks of each gradient, or 0;
        third, the address of each gradient, or 0. Looks are a digest of dtype, device, sizes, strides,
        of whether the address is null, and of a gradient whether it is a negated view.

    Raises:
        RuntimeError: a tensor without strides or storage, as sparse ones are.
        TypeError, AttributeError: an object that is no tensor.
    """
    now: tuple[bytes, bytes, bytes] = choice.module.observe(parameters, states, watched, before)
    return now


def observe_groups(
    groups: list[dict[str, Any]],
    state: dict[Any, Any],
    before: tuple[Any, Any],
    choice: registry.Choice,
) -> tuple[Any, Any]:
    """Which objects an optimizer consists of.

    Args:
        groups: its groups, each with a list ``"params"``.
        state: its state.
        before: what was observed last; a row that is the same may be returned itself.
        choice: what ``registry.choose("observe", device)`` gave.

    Returns:
        Two rows of identities, which mean something as long as the objects live: first, groups,
        parameters and the entries of the state; second, keys and values of every group.

    Raises:
        TypeError, KeyError: a group that is no dict with a list ``"params"``.
    """
    now: tuple[Any, Any] = choice.module.observe_groups(groups, state, before)
    return now
