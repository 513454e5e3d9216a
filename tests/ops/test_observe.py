"""Op observe: equal exactly where tensors lie at the same place and look alike, and objects are the same."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from childtune_kernels import ops, registry

BASE = torch.zeros(64)
CHANGES: dict[str, Callable[[], Tensor]] = {
    "address": lambda: BASE[1:13].view(3, 4),
    "dtype": lambda: BASE.view(torch.int32)[:12].view(3, 4),
    "sizes": lambda: BASE[:12].view(4, 3),
    "one size": lambda: BASE[:8].view(2, 4),
    "strides": lambda: BASE[:12].view(4, 3).t(),
    "one stride": lambda: BASE[:24].view(3, 8)[:, :4],
    "dimensions": lambda: BASE[:12].view(3, 4, 1),
    "device": lambda: torch.empty(3, 4, device="meta"),
    "no storage": lambda: torch.empty(0, 4),
}
Rows = tuple[bytes, bytes, bytes]
NOTHING: Rows = (b"", b"", b"")


def before_change() -> Tensor:
    return BASE[:12].view(3, 4)


def with_gradient(grad: Tensor | None) -> Parameter:
    """Past torch's own checks, as libraries of mixed precision and sharding do it."""
    parameter = Parameter(torch.zeros(3, 4))
    if grad is not None:
        parameter.grad = torch.zeros(3, 4)
        parameter.grad.data = grad
    return parameter


def seen(
    parameters: Sequence[Tensor],
    backend: str,
    states: list[dict[str, Tensor]] | None = None,
    before: Rows = NOTHING,
) -> Rows:
    choice = registry.choose("observe", "cpu", backend)
    of_each = tuple(states or [{} for _ in parameters])
    return ops.observe(tuple(parameters), of_each, ops.watch(of_each, choice), before, choice)


def numbers(row: bytes) -> list[int]:
    return array("q", row).tolist()


@pytest.mark.parametrize("change", CHANGES)
def test_every_difference_of_a_parameter_is_seen(change: str, backend: str) -> None:
    first, again, other = (
        seen([tensor], backend) for tensor in (before_change(), before_change(), CHANGES[change]())
    )
    assert first == again
    assert first[0] != other[0]
    if change == "address":
        assert numbers(first[0])[1] == numbers(other[0])[1]


@pytest.mark.parametrize("change", [name for name in CHANGES if name not in ("dtype", "device")])
def test_every_difference_of_a_gradient_is_seen(change: str, backend: str) -> None:
    first, other, none = (
        seen([with_gradient(grad)], backend)[1:]
        for grad in (before_change(), CHANGES[change](), None)
    )
    assert first == seen([with_gradient(before_change())], backend)[1:]
    assert (first[0] == other[0]) == (change == "address")
    assert (first[1] == other[1]) == (BASE.data_ptr() == CHANGES[change]().data_ptr())
    assert none == (bytes(8), bytes(8))
    assert none[0] not in (first[0], other[0])


def test_a_gradient_that_is_a_negated_view_looks_different(backend: str) -> None:
    parameter = Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    plain = seen([parameter], backend)
    parameter.grad = torch._neg_view(parameter.grad)
    negated = seen([parameter], backend)
    assert plain[2] == negated[2]
    assert plain[1] != negated[1]


def test_addresses_are_those_of_the_tensors(backend: str) -> None:
    tensors = [Parameter(torch.ones(3)), torch.tensor(2), BASE[5:]]
    tensors[0].grad = torch.ones(3)
    states = [{"a": torch.ones(2), "b": torch.tensor(1)}, {}, {"a": BASE[7:]}]
    placed, looks, pointed = seen(tensors, backend, states)
    found = numbers(placed)
    assert len(numbers(looks)) == len(tensors)
    assert numbers(pointed) == [tensors[0].grad.data_ptr(), 0, 0]
    for tensor, state in zip(tensors, states, strict=True):
        assert found.pop(0) == tensor.data_ptr()
        found.pop(0)
        for entry in state.values():
            assert [found.pop(0), found.pop(0)] == [id(entry), entry.data_ptr()]
    assert found == []


def test_state_that_moves_or_is_exchanged_is_seen(backend: str) -> None:
    choice = registry.choose("observe", "cpu", backend)
    parameters = (BASE, BASE[1:])
    states: tuple[dict[str, Tensor], ...] = tuple({"a": torch.ones(3)} for _ in parameters)
    watched = ops.watch(states, choice)
    now = ops.observe(parameters, states, watched, NOTHING, choice)
    kept = [states[0]["a"].detach(), states[0]["a"]]  # so that no address or identity comes again

    def move() -> None:
        states[0]["a"].data = torch.ones(3)

    def exchange_for_a_view() -> None:
        states[0]["a"] = states[0]["a"].view(torch.int32)

    def add() -> None:
        states[0]["b"] = torch.ones(1)

    def take_away() -> None:
        del states[1]["a"]

    for change in (move, exchange_for_a_view, add, take_away):
        assert ops.observe(parameters, states, watched, now, choice) == now
        change()
        assert ops.observe(parameters, states, watched, now, choice)[0] != now[0]
        now = ops.observe(parameters, states, watched, now, choice)
        assert now == ops.observe(parameters, states, ops.watch(states, choice), NOTHING, choice)
        kept.extend(states[0].values())


def test_what_was_seen_before_changes_nothing(backend: str) -> None:
    """The same row may come back, but never one that was longer, shorter or different somewhere."""
    parameters = [with_gradient(before_change()), with_gradient(None), with_gradient(BASE[2:14])]
    fresh = seen(parameters, backend)
    for cut in (0, 8, len(fresh[0])):
        before = tuple(row[:cut] for row in fresh)
        assert seen(parameters, backend, before=before) == fresh  # type: ignore[arg-type]
    for before in (
        tuple(row + bytes(8) for row in fresh),
        tuple(row[:-8] + bytes(7) + b"1" for row in fresh),
        tuple(b"1" + row[1:] for row in fresh),
    ):
        assert seen(parameters, backend, before=before) == fresh  # type: ignore[arg-type]


def test_nothing_and_what_has_no_strides(backend: str) -> None:
    assert seen([], backend) == NOTHING
    with pytest.raises(RuntimeError):
        seen([torch.eye(3).to_sparse()], backend)
    with pytest.raises(RuntimeError):
        seen([BASE], backend, [{"a": torch.eye(3).to_sparse()}])
    for no_tensor in (None, 1.0):
        with pytest.raises((TypeError, AttributeError)):
            seen([no_tensor], backend)  # type: ignore[list-item]
        choice = registry.choose("observe", "cpu", backend)
        states = ({"a": BASE},)
        watched = ops.watch(states, choice)
        states[0]["a"] = no_tensor  # type: ignore[assignment]
        with pytest.raises((TypeError, AttributeError)):
            ops.observe((BASE,), states, watched, NOTHING, choice)


def set_option(groups: list[dict[str, Any]]) -> None:
    groups[0]["lr"] = 0.25


def rename_option(groups: list[dict[str, Any]]) -> None:
    groups[1]["initial"] = groups[1].pop("seed")


def add_option(groups: list[dict[str, Any]]) -> None:
    groups[1]["other"] = None


def set_parameter(groups: list[dict[str, Any]]) -> None:
    groups[0]["params"][1] = torch.zeros(1)


def move_parameter(groups: list[dict[str, Any]]) -> None:
    groups[1]["params"].insert(0, groups[0]["params"].pop())


def copy_group(groups: list[dict[str, Any]]) -> None:
    groups[0] = dict(groups[0])


def take_group(groups: list[dict[str, Any]]) -> None:
    groups.pop()


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (set_option, {1}),
        (rename_option, {1}),
        (add_option, {1}),
        (set_parameter, {0}),
        (move_parameter, {0}),
        (copy_group, {0}),
        (take_group, {0, 1}),
    ],
)
def test_every_exchange_in_groups_is_seen(
    change: Callable[[list[dict[str, Any]]], None], rows: set[int], backend: str
) -> None:
    choice = registry.choose("observe", "cpu", backend)
    groups: list[dict[str, Any]] = [
        {"lr": 0.1, "params": [torch.zeros(1), torch.zeros(1)], "seed": 7},
        {"lr": 0.1, "params": [torch.zeros(1)], "seed": 7},
    ]
    held = [[*group.items(), *group["params"]] for group in groups]
    first = ops.observe_groups(groups, {}, (b"", b""), choice)
    assert ops.observe_groups(groups, {}, first, choice) == first
    assert ops.observe_groups([*groups], {1: held}, first, choice)[0] != first[0]
    change(groups)
    now = ops.observe_groups(groups, {}, first, choice)
    assert {row for row in range(2) if now[row] != first[row]} == rows
    assert now == ops.observe_groups(groups, {}, (b"", b""), choice)


@pytest.mark.parametrize("groups", [[{"lr": 1.0}], [{"params": None}], [1]])
def test_groups_without_parameters_are_refused(groups: list[Any], backend: str) -> None:
    choice = registry.choose("observe", "cpu", backend)
    with pytest.raises((TypeError, KeyError)):
        ops.observe_groups(groups, {}, (b"", b""), choice)
