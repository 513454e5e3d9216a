"""How close steps are to exact ones, and to torch.optim.AdamW and the paper's equations.

The ``check_`` functions run on any backend; test_mutations.py shows that each can fail.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from childtune_kernels import ChildMask, FusedChildAdamW
from childtune_kernels.backends.reference.square_root import square_root

from .cases import SEED, generator_of, random_values, raw_bits
from .columns import placed
from .ops.transcription import keep_bits, key_of

OPS = ("child_adamw",)
STEPS = 20
NAME = "layer.weight"
SETTINGS: dict[str, dict[str, Any]] = {
    "usual": {"lr": 1e-3, "weight_decay": 1e-2, "eps": 1e-8},
    "fast": {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-8},
    "faster": {"lr": 0.1, "weight_decay": 1e-2, "eps": 1e-8},
    "large_eps": {"lr": 1e-4, "weight_decay": 0.5, "eps": 1e-4},
    "small_eps": {"lr": 3e-4, "weight_decay": 0.1, "eps": 1e-12},
    "slow": {"lr": 5e-5, "weight_decay": 0.3, "eps": 1e-8},
    "bernoulli": {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-8, "reserve_p": 0.3},
}
MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def start_and_gradients() -> tuple[Tensor, list[Tensor]]:
    """fp32 weights and gradients of many magnitudes."""
    numel = 10_007
    start = random_values((numel,), torch.float32, "start")
    return start, [
        random_values((numel,), torch.float32, "numerics", step) for step in range(STEPS)
    ]


@functools.cache
def kept(reserve_p: float) -> list[Tensor]:
    """The keep bits of every step, from plain Python."""
    numel, threshold = start_and_gradients()[0].numel(), round(reserve_p * 2**32)
    key = key_of(SEED, "#0")
    return [
        torch.tensor(keep_bits(range(numel), key, step, threshold)) for step in range(1, STEPS + 1)
    ]


def trained(
    make: MakeOptimizer, dtype: torch.dtype, reserve_p: float = 1.0, backend: str | None = None
) -> Tensor:
    """The weights after all steps, in fp64; ``reserve_p`` masks gradients before they are given."""
    start, gradients = start_and_gradients()
    parameter = torch.nn.Parameter(placed(start.to(dtype, copy=True), backend))
    optimizer = make([parameter])
    for step, gradient in enumerate(gradients):
        gradient = gradient.to(dtype)
        if reserve_p < 1:
            scaled = gradient * (1 / reserve_p)
            gradient = torch.where(kept(reserve_p)[step], scaled, torch.zeros_like(scaled))
        parameter.grad = placed(gradient, backend)
        optimizer.step()
    return parameter.detach().cpu().double()


@functools.cache
def torch_runs(setting: str) -> tuple[Tensor, Tensor]:
    """torch.optim.AdamW on masked gradients: in fp64, and fused in fp32."""
    options = dict(SETTINGS[setting])
    p = options.pop("reserve_p", 1.0)
    exact = trained(lambda w: torch.optim.AdamW(w, **options), torch.float64, p)
    fused = trained(lambda w: torch.optim.AdamW(w, fused=True, **options), torch.float32, p)
    return exact, fused


def ours(backend: str, dtype: torch.dtype, **options: Any) -> Tensor:
    """The weights that FusedChildAdamW makes, in fp64."""
    return trained(
        lambda w: FusedChildAdamW(w, backend=backend, seed=SEED, **options), dtype, backend=backend
    )


def distances(setting: str, backend: str, **changed: Any) -> tuple[float, float, float, float]:
    """Maximal and mean distance from the fp64 run: of FusedChildAdamW, then of torch's fused AdamW."""
    options = {**SETTINGS[setting], **changed}
    exact, fused = torch_runs(setting)
    found = (ours(backend, torch.float32, **options) - exact).abs()
    theirs = (fused - exact).abs()
    return found.max().item(), found.mean().item(), theirs.max().item(), theirs.mean().item()


def check_distance_from_fp64(backend: str) -> None:
    """fp32 steps, with p = 1 and masked, are as exact as torch's fused ones within a factor of 1.5."""
    for setting in SETTINGS:
        largest, mean, torch_largest, torch_mean = distances(setting, backend)
        assert largest <= 1.5 * torch_largest, setting
        assert mean <= 1.5 * torch_mean, setting


def test_distance_from_fp64(backend: str) -> None:
    check_distance_from_fp64(backend)


@pytest.mark.parametrize("changed", [{"weight_decay": 0.0}, {"correct_bias": False}], ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_missing_term_is_a_hundred_times_too_far(
    setting: str, changed: dict[str, Any], backend: str
) -> None:
    largest, mean, torch_largest, torch_mean = distances(setting, backend, **changed)
    assert largest > 100 * 1.5 * torch_largest
    assert mean > 100 * 1.5 * torch_mean


def check_fp64_equals_torch(backend: str) -> None:
    """fp64 steps are those of torch.optim.AdamW in fp64 to 1e-13."""
    for setting, options in SETTINGS.items():
        exact, _ = torch_runs(setting)
        found = ours(backend, torch.float64, **options)
        assert (found - exact).abs().max() <= 1e-13, setting
    start, _ = start_and_gradients()
    assert (exact - start).abs().max() > 1e-4


def test_fp64_equals_torch(backend: str) -> None:
    check_fp64_equals_torch(backend)


# Convention "original": the equations of the paper's released optimizer, element by element.


def _original(
    weight: float, gradients: list[float], options: dict[str, Any], keep: list[bool]
) -> float:
    """Child-Tuning's AdamW for one weight in Python's floats."""
    beta1, beta2 = options["betas"]
    exp_avg = exp_avg_sq = 0.0
    for step, (gradient, keeps) in enumerate(zip(gradients, keep, strict=True), 1):
        masked = gradient / options["reserve_p"] if keeps else 0.0
        exp_avg = beta1 * exp_avg + (1 - beta1) * masked
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * masked**2
        step_size = options["lr"]
        if options["correct_bias"]:
            step_size *= math.sqrt(1 - beta2**step) / (1 - beta1**step)
        weight -= step_size * exp_avg / (math.sqrt(exp_avg_sq) + options["eps"])
        weight -= options["lr"] * options["weight_decay"] * weight
    return weight


def check_original_convention(backend: str) -> None:
    """Convention "original" in fp64 is a plain transcription of its equations to 1e-12."""
    numel = 257
    start = random_values((numel,), torch.float64, "original")
    gradients = [random_values((numel,), torch.float64, "original", step) for step in range(STEPS)]
    child = torch.rand(numel, generator=generator_of("original")) < 0.5
    for correct_bias, reserve_p, masked in itertools.product(
        (True, False), (1.0, 0.3), (False, True)
    ):
        options: dict[str, Any] = {
            "lr": 1e-2,
            "betas": (0.9, 0.98),
            "eps": 1e-6,
            "weight_decay": 0.1,
            "correct_bias": correct_bias,
            "reserve_p": reserve_p,
        }
        parameter = torch.nn.Parameter(placed(start.clone(), backend))
        mask = ChildMask.from_dense({NAME: child}) if masked else None
        optimizer = FusedChildAdamW(
            [(NAME, parameter)], convention="original", child_mask=mask, seed=SEED, backend=backend,
            freeze_non_child=False, child_state="dense", **options,
        )  # fmt: skip
        keep = []
        for step, gradient in enumerate(gradients, 1):
            parameter.grad = placed(gradient, backend)
            optimizer.step()
            bits = keep_bits(range(numel), key_of(SEED, NAME), step, round(reserve_p * 2**32))
            keep.append(torch.tensor(bits) & (child | (not masked)))
        columns = torch.stack(gradients, 1).tolist(), torch.stack(keep, 1).tolist()
        expected = [
            _original(weight, own, options, keeps)
            for weight, own, keeps in zip(start.tolist(), *columns, strict=True)
        ]
        exact = torch.tensor(expected, dtype=torch.float64)
        distance = (parameter.detach().cpu() - exact).abs().max()
        assert distance <= 1e-12, (correct_bias, reserve_p, masked)


def test_original_convention(backend: str) -> None:
    check_original_convention(backend)


def test_conventions_differ() -> None:
    """eps before and after bias correction, decay last and first: not the same weights."""
    options: dict[str, Any] = {"lr": 0.1, "eps": 1e-3}
    first = ours("reference", torch.float64, **options)
    second = ours("reference", torch.float64, convention="original", **options)
    assert (first - second).abs().max() > 1e-3


# Small decays, square roots and special values.


def check_small_decay(backend: str) -> None:
    """At a = 1e-7 a decay is off by no more than the rounding of the weight itself.

    w * (1 - a) with a factor rounded to fp32 would decay by 1.19e-7 and miss half a unit in the last
    place by up to 40 %.
    """
    weights = (1 + torch.arange(50_000) / 50_000).repeat(4)
    weights *= torch.tensor([1.0, -1.0, 2.0**-20, 2.0**20]).repeat_interleave(50_000)
    parameter = torch.nn.Parameter(placed(weights.clone(), backend))
    optimizer = FusedChildAdamW([parameter], lr=1e-5, weight_decay=1e-2, backend=backend)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    exact = weights.double() - 1e-7 * weights.double()
    _, exponent = torch.frexp(weights.double())
    place = (exponent - 24).double().exp2()
    found = parameter.detach().cpu()
    assert ((found.double() - exact).abs() <= 0.5001 * place).all()
    assert (found != weights).all()


def test_small_decay(backend: str) -> None:
    check_small_decay(backend)


def test_a_rounded_decay_factor_is_found() -> None:
    weights = 1 + torch.arange(50_000) / 50_000
    rounded = (weights * torch.tensor(1 - 1e-7)).double()
    misses = (rounded - (weights.double() - 1e-7 * weights.double())).abs() / 2.0**-23
    assert misses.max() > 0.6


def _nearest_fp32(x: Tensor) -> list[bool]:
    """Whether square_root gives the fp32 value nearest to each exact root, by exact fractions."""
    verdicts = []
    for value, root in zip(x.tolist(), square_root(x).tolist(), strict=True):
        nearest = torch.tensor(root)
        up = torch.nextafter(nearest, torch.tensor(torch.inf)).item()
        down = torch.nextafter(nearest, torch.tensor(-torch.inf)).item()
        upper, lower = (Fraction(root) + Fraction(up)) / 2, (Fraction(root) + Fraction(down)) / 2
        verdicts.append(lower**2 <= Fraction(value) <= upper**2)
    return verdicts


def test_square_roots_of_fp32_are_nearest() -> None:
    bits = torch.randint(1, 0x7F800000, (3000,), generator=generator_of("fp32 roots"))
    random = bits.to(torch.int32).view(torch.float32)
    squares = torch.randint(1, 2**12, (500,), generator=generator_of("squares")).float() ** 2
    around = torch.cat([squares, *(torch.nextafter(squares, torch.tensor(x)) for x in (0.0, 1e38))])
    tiny = torch.arange(1, 200).to(torch.int32).view(torch.float32)
    assert all(_nearest_fp32(torch.cat([random, around, tiny])))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.floats(min_value=0.0, max_value=sys.float_info.max), min_size=1))
def test_square_roots_of_fp64_are_nearest(values: list[float]) -> None:
    """math.sqrt is correctly rounded, as IEEE 754 asks of every square root."""
    roots = square_root(torch.tensor(values, dtype=torch.float64))
    assert roots.tolist() == [math.sqrt(value) for value in values]


def test_square_roots_at_the_end_of_the_range() -> None:
    values = torch.linspace(1.79769e308, sys.float_info.max, 2000, dtype=torch.float64)
    assert square_root(values).tolist() == [math.sqrt(value) for value in values.tolist()]


def test_square_roots_of_fp64_at_all_magnitudes() -> None:
    generator = generator_of("fp64 roots")
    exponents = torch.arange(-1074, 1024).repeat(20)
    random = torch.rand(exponents.shape, generator=generator, dtype=torch.float64) + 1
    scaled = torch.ldexp(random, exponents)
    squares = (torch.randint(1, 2**26, (5000,), generator=generator).double() ** 2).repeat(3)
    squares[:5000] = torch.nextafter(squares[:5000], torch.tensor(torch.inf, dtype=torch.float64))
    squares[5000:10_000] = torch.nextafter(
        squares[5000:10_000], torch.zeros((), dtype=torch.float64)
    )
    extremes = torch.tensor([5e-324, 1e-323, 2.2e-308, 1.79e308, 2.0**-800, 2.0**-801])
    for x in (scaled[scaled.isfinite()], squares, extremes):
        assert square_root(x).tolist() == [math.sqrt(value) for value in x.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_square_roots_of_special_values(dtype: torch.dtype) -> None:
    found = square_root(
        torch.tensor([0.0, -0.0, torch.inf, torch.nan, -1.0, -torch.inf], dtype=dtype)
    )
    expected = torch.tensor([0.0, -0.0, torch.inf], dtype=dtype)
    assert torch.equal(raw_bits(found[:3]), raw_bits(expected))
    assert found[3:].isnan().all()


def one_step(
    weight: float, gradient: float, dtype: torch.dtype, backend: str, **options: Any
) -> tuple[float, float, float]:
    """Weight, exp_avg and exp_avg_sq of one element after its first step."""
    parameter = torch.nn.Parameter(placed(torch.tensor([weight], dtype=dtype), backend))
    parameter.grad = torch.full_like(parameter, gradient)
    optimizer = FusedChildAdamW([parameter], lr=0.1, backend=backend, **options)
    optimizer.step()
    state = optimizer.state[parameter]
    return parameter.item(), state["exp_avg"].item(), state["exp_avg_sq"].item()


def check_special_values(backend: str) -> None:
    """NaN and infinities show where they meet an element; -0.0 and subnormals survive."""
    inf, nan = math.inf, math.nan
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert all(map(math.isnan, one_step(1.0, nan, dtype, backend)))
        weight, exp_avg, exp_avg_sq = one_step(1.0, -inf, dtype, backend)
        assert (math.isnan(weight), exp_avg, exp_avg_sq) == (True, -inf, inf)
        assert one_step(inf, 1.0, dtype, backend, weight_decay=0.0)[0] == inf
        assert math.isnan(one_step(inf, 1.0, dtype, backend)[0])  # inf − a·inf
        assert math.isnan(one_step(nan, 1.0, dtype, backend)[0])
        for zero in (0.0, -0.0):
            weight, *_ = one_step(zero, 0.0, dtype, backend, weight_decay=0.0)
            assert math.copysign(1.0, weight) == math.copysign(1.0, zero)
            weight, *_ = one_step(zero, 0.0, dtype, backend)
            assert math.copysign(1.0, weight) == 1.0  # −0 − (−0) is +0
        moved, exp_avg, exp_avg_sq = one_step(0.0, 1.0, dtype, backend)
        assert abs(moved + 0.1 / (1 + 1e-8)) <= 0.1 * max(torch.finfo(dtype).eps, 1e-14)
        assert abs(exp_avg - 0.1) <= 1e-8
        assert abs(exp_avg_sq - 1e-3) <= 1e-10
        tiny = torch.finfo(dtype).tiny / 4
        assert one_step(tiny, 0.0, dtype, backend, weight_decay=0.0)[0] == tiny
    _, exp_avg, exp_avg_sq = one_step(1.0, 1e-40, torch.float32, backend)
    assert (round(exp_avg * 1e44), exp_avg_sq) == (1000, 0.0)
    _, _, exp_avg_sq = one_step(1.0, 1e-20, torch.float32, backend)
    assert abs(exp_avg_sq / 1e-43 - 1) <= 0.01
    _, _, overflow = one_step(1.0, 3e38, torch.float32, backend)
    assert overflow == inf


def test_special_values(backend: str) -> None:
    check_special_values(backend)
