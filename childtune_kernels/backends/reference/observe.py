"""Op observe: what decides whether a plan still holds (SPEC.md, "The plan")."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor


def watch(states: Sequence[dict[str, Tensor]]) -> None:
    """Nothing: state is read as parameters are (contract: ops.watch)."""
    del states


def _look(tensor: Tensor) -> tuple[int, int]:
    address = tensor.data_ptr()
    return address, hash((tensor.dtype, tensor.device, tensor.shape, tensor.stride(), address == 0))


def observe(
    parameters: tuple[Tensor, ...],
    states: tuple[dict[str, Tensor], ...],
    watched: None,
    before: tuple[bytes, bytes, bytes],
) -> tuple[bytes, bytes, bytes]:
    """Addresses and looks of parameters, state and gradients (contract: ops.observe)."""
    del watched, before
    placed, looks, pointed = array("q"), array("q"), array("q")
    for parameter, state in zip(parameters, states, strict=True):
        placed.extend(_look(parameter))
        grad = parameter.grad
        address, digest = (0, 0) if grad is None else _look(grad)
        looks.append(digest if grad is None else hash((digest, grad.is_neg())))
        pointed.append(address)
        for tensor in state.values():
            placed.extend((id(tensor), tensor.data_ptr()))
    return placed.tobytes(), looks.tobytes(), pointed.tobytes()


class _Objects:
    """Objects that are compared by identity; they live as long as this does."""

    def __init__(self, objects: Iterable[Any]) -> None:
        self._objects = [*objects]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Objects) or len(self._objects) != len(other._objects):
            return False
        return all(map(is_, self._objects, other._objects))

    __hash__ = None  # type: ignore[assignment]


def observe_groups(
    groups: list[dict[str, Any]], state: dict[Any, Any], before: tuple[Any, Any]
) -> tuple[Any, Any]:
    """Identities of members and options (contract: ops.observe_groups)."""
    del before
    members = chain.from_iterable(chain((group,), group["params"]) for group in groups)
    options = chain(chain.from_iterable(groups), chain.from_iterable(map(dict.values, groups)))
    return _Objects(chain(members, state.values())), _Objects(options)
