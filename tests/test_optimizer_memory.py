"""Where weights and gradients lie: strides, storages that move, versions, and what is never written."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from childtune_kernels import FusedChildAdamW
from tests.snapshots import bits, identical, untouched
from tests.toy_parameters import give_gradients, random_tensor, toy_mask, toy_parameters, train

BACKENDS = pytest.mark.parametrize("backend", [None, "reference"])


def stepped(weight: Tensor, gradient: Tensor, backend: str | None = None) -> Tensor:
    """The weight, row-major, after two steps with one gradient, both as they lie in memory."""
    parameter = Parameter(weight)
    optimizer = FusedChildAdamW([("w", parameter)], lr=0.1, reserve_p=0.7, seed=1, backend=backend)
    parameter.grad = gradient
    for _ in range(2):
        optimizer.step()
    return parameter.detach().clone(memory_format=torch.contiguous_format)


def laid_out(values: Tensor) -> dict[str, Tensor]:
    """The same values under different strides."""
    gaps = torch.full((*values.shape[:-1], 2 * values.shape[-1]), 99.0)
    gaps[..., ::2] = values
    padded = torch.full((values.shape[0] + 2, *values.shape[1:]), 99.0)
    padded[1:-1] = values
    return {
        "contiguous": values.clone(),
        "transposed": values.transpose(0, 1).contiguous().transpose(0, 1),
        "channels last": values.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "reversed order": values.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "with gaps": gaps[..., ::2],
        "inside another": padded[1:-1],
    }


SHAPE = (3, 4, 5, 6)


@BACKENDS
@pytest.mark.parametrize("of_weight", laid_out(torch.zeros(SHAPE)))
@pytest.mark.parametrize("of_gradient", laid_out(torch.zeros(SHAPE)))
def test_strides_do_not_change_the_result(
    of_weight: str, of_gradient: str, backend: str | None
) -> None:
    weight, gradient = random_tensor(SHAPE, 1), random_tensor(SHAPE, 2)
    found = stepped(laid_out(weight)[of_weight], laid_out(gradient)[of_gradient], backend)
    assert identical(found, stepped(weight.clone(), gradient.clone()))
    assert not torch.equal(found, weight)


@BACKENDS
def test_what_lies_between_the_weights_is_not_written(backend: str | None) -> None:
    around = torch.full((4, 10), 99.0)
    stepped(around[1:3, ::2], torch.ones(2, 5), backend)
    inside = torch.zeros_like(around, dtype=torch.bool)
    inside[1:3, ::2] = True
    assert torch.equal(around != 99.0, inside)


@BACKENDS
@pytest.mark.parametrize("kind", ["expanded", "negated view", "wider type"])
def test_gradients_of_odd_kinds(kind: str, backend: str | None) -> None:
    ones = torch.ones(2, 3)
    gradient = {
        "expanded": torch.ones(()).expand(2, 3),
        "negated view": torch._neg_view(-ones),
        "wider type": ones,
    }[kind]
    dtype = torch.bfloat16 if kind == "wider type" else torch.float32
    parameter, plain = (Parameter(random_tensor((2, 3), 1, dtype)) for _ in range(2))
    for each, given in ((parameter, gradient), (plain, ones.to(dtype))):
        each.grad_dtype = None
        optimizer = FusedChildAdamW([each], lr=0.1, backend=backend)
        each.grad = given
        optimizer.step()
    assert identical(parameter.detach(), plain.detach())


def test_layouts_of_gradients_may_change_between_steps() -> None:
    parameters, twin = ({"w": Parameter(random_tensor(SHAPE, 1))} for _ in range(2))
    optimizer, other = (FusedChildAdamW(p.items(), lr=0.1) for p in (parameters, twin))
    layouts = ["contiguous", "transposed", "transposed", "contiguous", "with gaps", "contiguous"]
    for step, layout in enumerate(layouts):
        gradient = random_tensor(SHAPE, 50 + step)
        parameters["w"].grad = laid_out(gradient)[layout]
        optimizer.step()
        twin["w"].grad = gradient.clone()
        other.step()
        assert identical(parameters["w"], twin["w"]), layout


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_never_written(backend: str | None, dtype: torch.dtype) -> None:
    parameters = toy_parameters(dtype)
    mask = toy_mask(parameters)
    optimizer = FusedChildAdamW(
        parameters.items(), reserve_p=0.5, child_mask=mask, maximize=True, backend=backend
    )
    for step in range(3):
        give_gradients(parameters, step)
        parameters["layer.weight"].grad = random_tensor((33, 5), 9, dtype).t()
        given = {name: p.grad for name, p in parameters.items()}
        copies = {name: bits(g).clone() for name, g in given.items() if g is not None}
        optimizer.step()
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            assert parameter.grad is given[name]
            assert torch.equal(bits(parameter.grad), copies[name])
            assert parameter.grad._version == 0


def moved_each_step(replace: bool) -> Tensor:
    parameter = Parameter(random_tensor((40,), 3))
    optimizer = FusedChildAdamW([("w", parameter)], lr=0.1, reserve_p=0.5, seed=1)
    kept = []
    for step in range(5):
        if replace:
            kept.append(parameter.data)
            parameter.data = parameter.data.clone()
        parameter.grad = random_tensor((40,), step)
        optimizer.step()
    return parameter.detach()


def test_weights_may_move_between_steps() -> None:
    assert identical(moved_each_step(True), moved_each_step(False))


def test_weights_may_take_the_storage_of_others() -> None:
    """Two parameters swap storages: the addresses are all known, but of other tensors."""
    first, second = Parameter(torch.zeros(5)), Parameter(torch.ones(5))
    optimizer = FusedChildAdamW([first, second], lr=0.1, weight_decay=0.0)
    first.grad, second.grad = torch.ones(5), torch.zeros(5)
    optimizer.step()
    first.data, second.data = second.data, first.data
    optimizer.step()
    torch.testing.assert_close(first.detach(), torch.full((5,), 0.9))
    torch.testing.assert_close(second.detach(), torch.full((5,), -0.1))


@BACKENDS
def test_weights_transposed_in_place_keep_their_own_gradients(backend: str | None) -> None:
    """The address stays, the strides change: the same run as with new storage."""
    results = []
    for move in (lambda t: t.t(), lambda t: t.t().clone()):
        parameter = Parameter(random_tensor((3, 3), 1))
        optimizer = FusedChildAdamW([parameter], lr=0.1, backend=backend)
        parameter.grad = random_tensor((3, 3), 2)
        optimizer.step()
        parameter.data = move(parameter.data)
        optimizer.step()
        results.append(parameter.detach().clone(memory_format=torch.contiguous_format))
    assert identical(*results)


@BACKENDS
@pytest.mark.parametrize("moved", [True, False], ids=["other storage", "same address"])
@pytest.mark.parametrize("shape", [(2,), (2, 2), (8,)])
def test_weights_of_another_shape_are_refused(
    shape: tuple[int, ...], moved: bool, backend: str | None
) -> None:
    parameter, other = Parameter(torch.zeros(8)[:4]), Parameter(torch.ones(3))
    optimizer = FusedChildAdamW([("w", parameter), ("v", other)], lr=0.1, backend=backend)
    parameter.grad, other.grad = torch.ones(4), torch.ones(3)
    optimizer.step()
    original = parameter.data
    wider = original.as_strided((8,), (1,))
    changed = wider[: torch.Size(shape).numel()].view(shape)
    parameter.data = changed.clone() if moved else changed
    with untouched(optimizer), pytest.raises(ValueError, match=r" of w"):
        optimizer.step()
    parameter.grad = None
    parameter.grad = torch.ones(shape)
    with untouched(optimizer), pytest.raises(ValueError, match=r" of w"):
        optimizer.step()
    parameter.grad = None
    parameter.data = original
    parameter.grad = torch.ones(4)
    optimizer.step()
    assert int(optimizer.state[parameter]["step"]) == 2


@BACKENDS
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
)
def test_weights_cast_between_steps_change_nothing_half_way(
    before: torch.dtype, after: torch.dtype, backend: str | None
) -> None:
    parameter = Parameter(torch.ones(4, dtype=before))
    optimizer = FusedChildAdamW([("w", parameter)], lr=0.1, backend=backend)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    parameter.grad = None
    parameter.data = parameter.data.to(after)
    parameter.grad = torch.ones_like(parameter)
    with untouched(optimizer), pytest.raises(ValueError, match=r" of w"):
        optimizer.step()


def test_weights_loaded_in_place_are_seen() -> None:
    """A weight that somebody else has written is the one the next step starts from."""
    for dtype in (torch.float32, torch.bfloat16):
        parameters = toy_parameters(dtype)
        optimizer = FusedChildAdamW(parameters.items(), lr=0.0)
        train(optimizer, parameters, range(2))
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.fill_(3.0)
        train(optimizer, parameters, range(2, 4))
        assert all(bool((parameter == 3.0).all()) for parameter in parameters.values())


@BACKENDS
def test_autograd_notices_that_weights_have_changed(backend: str | None) -> None:
    parameter, skipped = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = FusedChildAdamW([parameter, skipped], backend=backend)
    loss = (parameter * parameter).sum()
    without_gradient = (skipped * skipped).sum()
    parameter.grad = torch.ones(3)
    version = parameter._version
    optimizer.step()
    assert parameter._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    without_gradient.backward()


NULL_POINTERS = """
import torch
from childtune_kernels import FusedChildAdamW

def attempt(name, spoil):
    good, bad = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    bad.grad_dtype = None
    optimizer = FusedChildAdamW([("good", good), ("bad", bad)])
    good.grad = torch.ones(4)
    optimizer.step()
    bad.grad = torch.ones(4)
    try:
        spoil(optimizer, bad)
        optimizer.step()
    except (RuntimeError, ValueError):
        pass
    print(name, flush=True)

def refused_then_taken_away(optimizer, bad):
    bad.grad = torch.ones(4, dtype=torch.float64)
    try:
        optimizer.step()
    finally:
        bad.grad = None
        optimizer.step()

def without_storage(optimizer, bad):
    bad.grad = torch._efficientzerotensor(4)

def storage_gone(optimizer, bad):
    bad.data.untyped_storage().resize_(0)

attempt("refused, then taken away", refused_then_taken_away)
attempt("a gradient without storage", without_storage)
attempt("a weight whose storage is gone", storage_gone)
"""


def test_null_pointers_are_errors_and_no_crash() -> None:
    """In a process of its own, as a failure would be a segmentation fault."""
    command = [sys.executable, "-c", NULL_POINTERS]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.stdout.splitlines() == [
        "refused, then taken away",
        "a gradient without storage",
        "a weight whose storage is gone",
    ], (finished.returncode, finished.stderr)
