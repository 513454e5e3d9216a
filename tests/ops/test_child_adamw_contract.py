"""What op child_adamw promises beside equality: SPEC.md, eq. 8 to 12, skipping, and frozen weights.

The ``check_`` functions run on any backend; tests/test_mutations.py shows that each can fail.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from childtune_kernels import ChildMask, FusedChildAdamW

from ..cases import (
    SEED,
    Case,
    assert_same_bits,
    generator_of,
    gradients_of,
    make_parameters,
    random_values,
    raw_bits,
    run,
)
from ..child_states import state_in_full
from ..columns import placed
from . import transcription
from .transcription import Element, Options, adamw_step, keep_bits, key_of

NAME = "layer.weight"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
CHILD_STATES = ["dense", "compact"]

pytestmark = pytest.mark.usefixtures("one_thread")


def half_child(numel: int) -> Tensor:
    """A child of about half the elements."""
    return torch.rand(numel, generator=generator_of("half", numel)) < 0.5


def made(start: Tensor, backend: str, **options: Any) -> tuple[Tensor, FusedChildAdamW]:
    """A parameter at ``start`` (a copy) and its optimizer, with dense state if nothing else is said."""
    options.setdefault("child_state", "dense")
    parameter = torch.nn.Parameter(placed(start.clone(), backend))
    child = options.pop("child", None)
    mask = None if child is None else ChildMask.from_dense({NAME: child})
    optimizer = FusedChildAdamW(
        [(NAME, parameter)], seed=SEED, backend=backend, child_mask=mask, **options
    )
    return parameter, optimizer


# Equations 6 to 11, operation by operation.

_SETTINGS = [
    Options(),
    Options(reserve_p=0.3),
    Options(convention="original", reserve_p=0.3, eps=1e-5),
    Options(convention="original", correct_bias=False, weight_decay=0.3),
    Options(correct_bias=False, maximize=True, lr=3e-3),
    Options(beta1=0.0, beta2=0.5, reserve_p=0.7, weight_decay=0.0),
]


def _start_with_specials(numel: int, dtype: torch.dtype, *what: object) -> Tensor:
    values = random_values((numel,), dtype, *what)
    tiny = torch.finfo(dtype).tiny
    specials = torch.tensor([torch.inf, -torch.inf, torch.nan, tiny, -tiny / 4, -0.0, 1e-30, 1e30])
    values[: 8 * 8] = specials.to(dtype).repeat(8)
    return values


def check_transcription(backend: str) -> None:
    """Each operation of eq. 6 to 11 rounds once, in SPEC.md's order, on usual and special values."""
    numel = 203
    child = half_child(numel)
    for child_state, (index, options), dtype in itertools.product(
        CHILD_STATES, enumerate(_SETTINGS), (torch.float32, torch.float64)
    ):
        masked = options.reserve_p < 1
        if not masked and child_state == "compact":
            continue
        start = _start_with_specials(numel, dtype, "transcription")
        parameter, optimizer = made(
            start,
            backend,
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            weight_decay=options.weight_decay,
            reserve_p=options.reserve_p,
            convention=options.convention,
            correct_bias=options.correct_bias,
            maximize=options.maximize,
            child=child if masked else None,
            child_state=child_state,
        )
        zeros = np.zeros_like(start.numpy())
        element = Element(start.numpy().copy(), zeros, zeros)
        inside = child.numpy() if masked else True
        for step in range(1, 6):
            gradient = _start_with_specials(numel, dtype, "transcription", step)
            gradient = gradient.roll(3 * step)
            threshold = round(options.reserve_p * 2**32)
            keep = np.array(keep_bits(range(numel), key_of(SEED, NAME), step, threshold))
            parameter.grad = placed(gradient, backend)
            optimizer.step()
            after = adamw_step(element, gradient.numpy(), step, options, keep)
            element = Element(
                *(np.where(inside, getattr(after, name), getattr(element, name))
                  for name in ("weight", "exp_avg", "exp_avg_sq"))
            )  # fmt: skip
        expected = {name: torch.from_numpy(array) for name, array in vars(element).items()}
        state = state_in_full(parameter, optimizer.state[parameter])
        found = {"weight": parameter, **{name: state[name] for name in ("exp_avg", "exp_avg_sq")}}
        assert_same_bits(found, expected)
        assert expected["weight"].isfinite().sum() > numel // 4, index


def test_transcription(backend: str) -> None:
    check_transcription(backend)


def test_binary_powering_is_accurate() -> None:
    for base, exponent in itertools.product(
        (0.0, 0.5, 0.9, 0.999), (0, 1, 2, 3, 7, 64, 1000, 12345)
    ):
        found = transcription.power(base, exponent)
        assert abs(found - base**exponent) <= 1e-12 * base**exponent


# Dropped gradients, frozen weights, parameters without a gradient.

_MASKED = [
    Case("bernoulli", reserve_p=0.3),
    Case("fixed", fixed_mask=True),
    Case("both", reserve_p=0.3, fixed_mask=True, freeze_non_child=False),
    Case("both_bf16", torch.bfloat16, reserve_p=0.3, fixed_mask=True),
    Case("original_fp64", torch.float64, reserve_p=0.3, fixed_mask=True, convention="original"),
    Case("compact", fixed_mask=True, child_state="compact"),
    Case("compact_both", torch.bfloat16, reserve_p=0.3, fixed_mask=True, child_state="compact"),
]


def check_dropped_gradients_leave_no_trace(backend: str) -> None:
    """NaN and infinite gradients in dropped places do what zeros there do: nothing."""
    for case in _MASKED:
        dropped = gradients_of(case)[0]["matrix"]
        assert dropped is not None
        assert dropped.isnan().sum() > 1000
        assert dropped.isinf().sum() > 1000
        poisoned = run(case, backend)
        assert_same_bits(poisoned, run(case, backend, poisoned=False))
        odd = [name for name, tensor in poisoned.items() if not tensor.isfinite().all()]
        assert not odd, odd
        moved = poisoned["matrix weight"] != make_parameters(case)["matrix"]
        assert moved.float().mean() > 0.2


def test_dropped_gradients_leave_no_trace(backend: str) -> None:
    check_dropped_gradients_leave_no_trace(backend)


def _with_payloads(dtype: torch.dtype, numel: int) -> Tensor:
    """Weights with quiet and signalling NaNs of many payloads, infinities, zeros and subnormals."""
    values = random_values((numel,), dtype, "frozen")
    bits = raw_bits(values)
    infinity = int(raw_bits(torch.tensor(torch.inf, dtype=dtype)))
    lowest = torch.iinfo(bits.dtype).min
    for index, payload in enumerate((1, 2, 3, 5, 64, 65, 100, 127)):
        bits[11 + index :: 61] = infinity + payload
        bits[31 + index :: 61] = lowest + infinity + payload
    return bits.view(dtype)


def check_frozen_weights(backend: str) -> None:
    """Outside the child every bit of weight, master and moments stays, over steps with much decay."""
    numel = 5003
    child = half_child(numel)
    for child_state, dtype, reserve_p in itertools.product(CHILD_STATES, DTYPES, (1.0, 0.5)):
        start = _with_payloads(dtype, numel)
        parameter, optimizer = made(
            start, backend, lr=0.05, weight_decay=2.0, reserve_p=reserve_p, child=child,
            child_state=child_state,
        )  # fmt: skip
        state = state_in_full(parameter, optimizer.state[parameter])
        kept = {torch.bfloat16: "master_remainder", torch.float16: "master_weight"}.get(dtype)
        master = raw_bits(state[kept]).clone() if kept is not None else None
        for step in range(20):
            gradient = random_values((numel,), dtype, "frozen", step)
            gradient[~child] = torch.nan
            parameter.grad = placed(gradient, backend)
            optimizer.step()
        assert torch.equal(raw_bits(parameter)[~child], raw_bits(start)[~child])
        state = state_in_full(parameter, optimizer.state[parameter])
        for name in ("exp_avg", "exp_avg_sq"):
            assert not raw_bits(state[name])[~child].any()
        if kept is not None and master is not None:
            assert torch.equal(raw_bits(state[kept])[~child], master[~child])
        usual = child & start.isfinite() & (start.abs() > 1e-3)
        assert (parameter.detach().cpu() != start)[usual].float().mean() > 0.98


def test_frozen_weights(backend: str) -> None:
    check_frozen_weights(backend)


def check_decay_outside_the_child(backend: str) -> None:
    """With freeze_non_child=False eq. 9 reaches the weights outside the child, and nothing else does."""
    numel = 5003
    child = half_child(numel)
    for child_state, convention, reserve_p in itertools.product(
        CHILD_STATES, ("torch", "original"), (1.0, 0.5)
    ):
        start = random_values((numel,), torch.float32, "decay outside")
        parameter, optimizer = made(
            start, backend, lr=0.05, weight_decay=0.1, reserve_p=reserve_p, child=child,
            freeze_non_child=False, convention=convention, child_state=child_state,
        )  # fmt: skip
        expected = start.clone()
        for step in range(5):
            gradient = random_values((numel,), torch.float32, "decay outside", step)
            gradient[~child] = torch.nan
            parameter.grad = placed(gradient, backend)
            optimizer.step()
            expected = expected - expected * (0.05 * 0.1)
        assert torch.equal(raw_bits(parameter)[~child], raw_bits(expected)[~child])
        moved = (parameter.detach().cpu() != expected)[child & (start.abs() > 1e-3)]
        assert moved.float().mean() > 0.9  # of the others every gradient was dropped


def test_decay_outside_the_child(backend: str) -> None:
    check_decay_outside_the_child(backend)


def check_skipped_parameters(backend: str) -> None:
    """Without a gradient nothing of a parameter changes, its step included; the others go on."""
    for dtype, reserve_p in itertools.product(DTYPES, (1.0, 0.5)):
        starts = {name: _with_payloads(dtype, 301) for name in ("never", "late", "every")}
        parameters = {
            name: torch.nn.Parameter(placed(start.clone(), backend))
            for name, start in starts.items()
        }
        optimizer = FusedChildAdamW(
            parameters.items(), 0.05, weight_decay=2.0, reserve_p=reserve_p, seed=1, backend=backend
        )
        before: dict[str, Tensor] = {}
        for step in range(4):
            with_gradient = {"every"} if step % 2 == 0 else {"every", "late"}
            for name, parameter in parameters.items():
                gradient = random_values((301,), dtype, "skipped", name, step)
                parameter.grad = placed(gradient, backend) if name in with_gradient else None
            before = {
                f"{name} {key}": tensor.clone()
                for name, parameter in parameters.items()
                for key, tensor in (("weight", parameter.detach()), *optimizer.state[parameter].items())
            }  # fmt: skip
            optimizer.step()
            for name, parameter in parameters.items():
                state = {"weight": parameter.detach(), **optimizer.state[parameter]}
                for key, tensor in state.items():
                    unchanged = torch.equal(*map(_bits, (tensor, before[f"{name} {key}"])))
                    assert unchanged == (name not in with_gradient), (name, key)
        steps = [int(optimizer.state[parameter]["step"]) for parameter in parameters.values()]
        assert steps == [0, 2, 4]


def _bits(tensor: Tensor) -> Tensor:
    return raw_bits(tensor) if tensor.is_floating_point() else tensor


def test_skipped_parameters(backend: str) -> None:
    check_skipped_parameters(backend)


# Master weights, eq. 12.

_MASTER_SETTINGS: list[dict[str, Any]] = [
    {},
    {"reserve_p": 0.3},
    {"child": half_child(3001)},
    {"child": half_child(3001), "child_state": "compact"},
    {"child": half_child(3001), "freeze_non_child": False, "convention": "original"},
]


def check_master_is_an_fp32_copy(backend: str) -> None:
    """A 16-bit run equals training an fp32 copy and rounding it, also where somebody wrote weights."""
    for dtype, settings in itertools.product(HALVES, _MASTER_SETTINGS):
        start = random_values((3001,), dtype, "master")
        options = {"lr": 1e-3, "weight_decay": 0.1, **settings}
        stored, optimizer = made(start, backend, master_weight="fp32", **options)
        copy, copy_optimizer = made(start.float(), backend, **options)
        child = settings.get("child", torch.ones(3001, dtype=torch.bool))
        for step in range(8):
            stored.grad = placed(random_values((3001,), dtype, "master", step), backend)
            copy.grad = stored.grad.float()
            optimizer.step()
            copy_optimizer.step()
            assert torch.equal(raw_bits(stored), raw_bits(copy.to(dtype))), step
            master = state_in_full(stored, optimizer.state[stored])["master_weight"]
            assert torch.equal(raw_bits(master), raw_bits(copy)), step
            if step == 3:
                _overwrite(stored, copy, child)
        assert (master != stored.cpu().float()).float().mean() > 0.2


def _overwrite(stored: Tensor, copy: Tensor, child: Tensor) -> None:
    """New values in every third place of the child; the same bits in the place after it."""
    places = torch.zeros(stored.shape, dtype=torch.bool)
    places[::3] = True
    places &= child
    fresh = random_values(stored.shape, stored.dtype, "overwritten")
    # Weights that are written as they are keep the exact master.
    changed = places & (raw_bits(fresh) != raw_bits(stored))
    assert changed.sum() > 400
    written, where = fresh[changed].to(stored.device), changed.to(stored.device)
    with torch.no_grad():
        stored[where] = written
        copy[where] = written.float()
        stored[1::3] = stored[1::3].clone()


def test_master_is_an_fp32_copy(backend: str) -> None:
    check_master_is_an_fp32_copy(backend)


def check_without_master(backend: str) -> None:
    """With master_weight="none" every step begins at the rounded weight and rounds again."""
    dense = [settings for settings in _MASTER_SETTINGS if "child_state" not in settings]
    for dtype, settings in itertools.product(HALVES, dense):
        start = random_values((3001,), dtype, "no master")
        options = {"lr": 1e-2, "weight_decay": 0.1, **settings}
        stored, optimizer = made(start, backend, master_weight="none", **options)
        copy, copy_optimizer = made(start.float(), backend, **options)
        assert not {"master_weight", "child_master_weight"} & optimizer.state[stored].keys()
        for step in range(5):
            stored.grad = placed(random_values((3001,), dtype, "no master", step), backend)
            copy.grad = stored.grad.float()
            optimizer.step()
            copy_optimizer.step()
            with torch.no_grad():
                copy.copy_(copy.to(dtype))
            assert torch.equal(raw_bits(stored), raw_bits(copy.to(dtype))), step
        assert (stored.cpu() != start).float().mean() > 0.3


def test_without_master(backend: str) -> None:
    check_without_master(backend)
