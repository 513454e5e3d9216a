"""Split masters, stochastic rounding and bf16 moments (SPEC.md, eq. 17 and 18)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from childtune_kernels import ChildMask, FusedChildAdamW

from .cases import SEED, generator_of, random_values, raw_bits
from .child_states import state_in_full
from .columns import placed
from .ops.transcription import keep_bits, key_of, word_of

OPS = ("child_adamw",)
NAME = "layer.weight"
NUMEL = 3001
CHILD = torch.rand(NUMEL, generator=generator_of("low precision")) < 0.4
MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "CT_F": {"reserve_p": 0.3},
    "CT_D dense": {"child": CHILD, "child_state": "dense"},
    "CT_D compact": {"child": CHILD},
    "decaying": {"child": CHILD, "freeze_non_child": False, "child_state": "dense"},
    "both": {"child": CHILD, "reserve_p": 0.3},
}

pytestmark = pytest.mark.usefixtures("one_thread")


def made(values: Tensor, backend: str, **options: Any) -> tuple[Tensor, FusedChildAdamW]:
    parameter = torch.nn.Parameter(placed(values.clone(), backend))
    child = options.pop("child", None)
    mask = None if child is None else ChildMask.from_dense({NAME: child})
    optimizer = FusedChildAdamW(
        [(NAME, parameter)], seed=SEED, backend=backend, child_mask=mask, **options
    )
    return parameter, optimizer


# Split masters, eq. 17.


def rounded_away(master: Tensor) -> Tensor:
    """The nearest bf16, ties away from zero, by fp64 arithmetic on a grid of one place."""
    exact = master.double()
    _, exponent = torch.frexp(exact)
    place = torch.ldexp(torch.ones_like(exact), exponent.clamp(min=-125) - 8)
    nearest = torch.sign(exact) * torch.floor(exact.abs() / place + 0.5) * place
    signed_zero = torch.where(nearest == 0, torch.copysign(nearest, exact), nearest)
    return signed_zero.to(torch.bfloat16)


def masters() -> Tensor:
    """fp32 values of every sign and exponent, with the ends of every rounding case in their lower half."""
    lower = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xFFFE, 0xFFFF])
    random = torch.randint(0, 2**16, (6,), generator=generator_of("lower halves"))
    bits = (torch.arange(2**16)[:, None] << 16) + torch.cat([lower, random])[None, :]
    # All lower halves beside a few upper ones: zeros, subnormals, ordinary numbers, the greatest.
    upper = torch.tensor([0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x7F7F, 0x8000, 0x80FF, 0xBF81])
    swept = (upper[:, None] << 16) + torch.arange(2**16)[None, :]
    every = torch.cat([bits.reshape(-1), swept.reshape(-1)])
    return every.to(torch.int32).view(torch.float32)


def split_by_hand(master: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and remainder as eq. 17's text has them, in 64-bit integers."""
    bits = raw_bits(master).long() & 0xFFFFFFFF
    weight = ((bits + 2**15) // 2**16) % 2**16
    remainder = bits - weight * 2**16
    remainder = torch.where(remainder < -(2**15), remainder + 2**32, remainder)
    return weight.to(torch.int16).view(torch.bfloat16), remainder.to(torch.int16)


def test_a_weight_and_its_remainder_are_the_master(backend: str) -> None:
    """Every sign and exponent and the ends of every rounding case come through a step that moves nothing."""
    values = masters()
    values = values[~values.isnan()]
    weight, remainder = split_by_hand(values)
    parameter, optimizer = made(weight, backend, lr=0.0)
    optimizer.state[parameter]["master_remainder"].copy_(remainder)
    assert torch.equal(raw_bits(optimizer.master_state_dict()[NAME]), raw_bits(values))
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(raw_bits(parameter), raw_bits(weight))
    assert torch.equal(optimizer.state[parameter]["master_remainder"].cpu(), remainder)
    ordinary = values.isfinite() & (values.abs() < 3.3e38)
    assert torch.equal(raw_bits(weight)[ordinary], raw_bits(rounded_away(values))[ordinary])
    assert (ordinary & weight.isfinite()).sum() > 2**16 * 15


def test_nan_is_one_pattern(backend: str) -> None:
    values = masters()
    weight, remainder = split_by_hand(values)
    parameter, optimizer = made(weight, backend, lr=0.0)
    optimizer.state[parameter]["master_remainder"].copy_(remainder)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # A NaN's upper half may look like an infinity, and its lower half then says what it is.
    nan = values.isnan() & (weight.isnan() | (remainder > 0) & weight.isinf())
    assert nan.sum() > 1000
    assert (raw_bits(parameter)[nan] == 0x7FC0).all()
    assert not optimizer.state[parameter]["master_remainder"].cpu()[nan].any()


def check_split_is_an_fp32_copy(
    backend: str, masks: Iterable[str] = ("plain", "CT_F", "CT_D dense", "decaying")
) -> None:
    """A bf16 run with split masters is the fp32 run, rounded to nearest with ties away from zero."""
    several = [MASKS[mask] for mask in masks]
    for settings, grad_dtype in itertools.product(several, (torch.bfloat16, torch.float32)):
        start = random_values((NUMEL,), torch.bfloat16, "split")
        options = {"lr": 1e-3, "weight_decay": 0.1, **settings}
        stored, optimizer = made(start, backend, **options)
        copy, copy_optimizer = made(start.float(), backend, **options)
        stored.grad_dtype = grad_dtype
        for step in range(6):
            stored.grad = placed(random_values((NUMEL,), grad_dtype, "split", step), backend)
            copy.grad = stored.grad.float()
            optimizer.step()
            copy_optimizer.step()
            master = optimizer.master_state_dict()[NAME]
            assert torch.equal(raw_bits(master), raw_bits(copy)), (settings, step)
            expected = rounded_away(copy.detach().cpu())
            assert torch.equal(raw_bits(stored), raw_bits(expected)), (settings, step)
        assert (master != stored.float()).float().mean() > 0.2


def test_split_is_an_fp32_copy(backend: str) -> None:
    check_split_is_an_fp32_copy(backend, MASKS)


def test_weights_that_somebody_has_written_since(backend: str) -> None:
    """A zero is zero, whatever the remainder; any other weight is moved by less than its last place."""
    start = random_values((NUMEL,), torch.bfloat16, "written")
    parameter, optimizer = made(start, backend, lr=1e-3)
    for step in range(3):
        parameter.grad = placed(random_values((NUMEL,), torch.bfloat16, "written", step), backend)
        optimizer.step()
    assert (optimizer.state[parameter]["master_remainder"] < 0).sum() > NUMEL // 3
    written = random_values((NUMEL,), torch.bfloat16, "written by hand")
    written[::2] = torch.tensor([0.0, -0.0]).repeat(NUMEL // 2 + 1)[: (NUMEL + 1) // 2]
    with torch.no_grad():
        parameter.copy_(written)
    master = optimizer.master_state_dict()[NAME].cpu()
    assert master[::2].abs().max() < 1e-37
    assert not master.isnan().any()
    _, exponent = torch.frexp(written.float())
    place = torch.ldexp(torch.ones(NUMEL), exponent.clamp(min=-125) - 8)
    assert ((master - written.float()).abs() <= place).all()


# Stochastic rounding, eq. 18.


def rounded_by_hand(value: Tensor, purpose: int, step: int) -> Tensor:
    """Eq. 18's text in Python's integers."""
    key = key_of(SEED, NAME)
    rounded = []
    for element, bits in enumerate((raw_bits(value.float()).long() & 0xFFFFFFFF).tolist()):
        rounded.append((bits + word_of(element, key, step, purpose) % 2**16) // 2**16)
    return torch.tensor(rounded, dtype=torch.int64).to(torch.int16).view(torch.bfloat16)


def check_rounding_by_words(backend: str) -> None:
    """Weights and moments are those of an exact step, rounded by the words of the text."""
    start = random_values((257,), torch.bfloat16, "words")
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "reserve_p": 0.5}
    formats: dict[str, Any] = {"master_weight": "stochastic", "state_dtype": torch.bfloat16}
    stored, optimizer = made(start, backend, **options, **formats)
    exact, exact_optimizer = made(start.float(), backend, **options)
    for step in range(1, 4):
        gradient = random_values((257,), torch.bfloat16, "words", step)
        stored.grad, exact.grad = placed(gradient, backend), placed(gradient.float(), backend)
        before = {"exp_avg", "exp_avg_sq"}
        with torch.no_grad():
            exact.copy_(stored.float())
        for name in before:
            exact_optimizer.state[exact][name].copy_(optimizer.state[stored][name].float())
        optimizer.step()
        exact_optimizer.step()
        found = {"weight": stored, **optimizer.state[stored]}
        wanted = {"weight": exact, **exact_optimizer.state[exact]}
        for purpose, name in enumerate(("weight", "exp_avg", "exp_avg_sq"), start=1):
            expected = rounded_by_hand(wanted[name].detach().cpu(), purpose, step)
            assert torch.equal(raw_bits(found[name]), raw_bits(expected)), (name, step)
    assert (stored.detach().cpu() != start).float().mean() > 0.5


def test_rounding_by_words(backend: str) -> None:
    check_rounding_by_words(backend)


MANY = 1 << 17


def errors(backend: str, step: int = 1, **formats: Any) -> dict[str, Tensor]:
    """How far weights and moments lie from exact ones after a step, in places of bf16."""
    start = random_values((MANY,), torch.bfloat16, "many").abs().clamp(min=2.0**-40)
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.98)}
    stored, optimizer = made(start, backend, **options, **formats)
    exact, exact_optimizer = made(start.float(), backend, **options)
    for each in (optimizer, exact_optimizer):
        for state in each.state.values():
            state["step"].fill_(step - 1)
    gradient = random_values((MANY,), torch.bfloat16, "many", "gradient") + 2.0**-12
    stored.grad, exact.grad = placed(gradient, backend), placed(gradient.float(), backend)
    optimizer.step()
    exact_optimizer.step()
    found = {"weight": stored.detach(), **optimizer.state[stored]}
    wanted = {"weight": exact.detach(), **exact_optimizer.state[exact]}
    measured = {}
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        value = wanted[name].cpu().double()
        _, exponent = torch.frexp(value)
        place = torch.ldexp(torch.ones(MANY, dtype=torch.float64), exponent - 8)
        measured[name] = (found[name].cpu().double() - value) / place
    return measured


ROUNDED: dict[str, Any] = {"master_weight": "stochastic", "state_dtype": torch.bfloat16}


def bias(error: Tensor) -> float:
    """The mean of errors in standard deviations of the mean."""
    return float(error.mean() / (error.std() / math.sqrt(error.numel())))


def correlation(first: Tensor, second: Tensor) -> float:
    """In standard deviations of what independent ones show."""
    together = torch.stack([first.double(), second.double()])
    return float(torch.corrcoef(together)[0, 1] * math.sqrt(first.numel()))


def test_stochastic_rounding_is_unbiased() -> None:
    for step in (1, 2, 1000):
        for name, error in errors("reference", step, **ROUNDED).items():
            assert (error.abs() < 1).all(), name
            assert abs(bias(error)) < 4.5, name
            # Errors of rounding to nearest would stay within half a place.
            assert (error.abs() > 0.5).float().mean() > 0.2, name


def test_the_bias_of_a_fixed_rounding_is_seen() -> None:
    """The bound above would not let pass what always rounds the same way."""
    truncated = {name: error - error.clamp(min=0).ceil() for name, error in _exact_fractions()}
    assert all(abs(bias(error)) > 50 for error in truncated.values())


def _exact_fractions() -> Iterator[tuple[str, Tensor]]:
    yield from errors("reference", **ROUNDED).items()


def test_the_streams_are_uncorrelated() -> None:
    """Of weight, exp_avg and exp_avg_sq, with each other, the next step and the keep bits."""
    first, second = errors("reference", 1, **ROUNDED), errors("reference", 2, **ROUNDED)
    kept = torch.tensor(keep_bits(range(1 << 13), key_of(SEED, NAME), 1, 2**31))
    for name, other in itertools.combinations(first, 2):
        assert abs(correlation(first[name], first[other])) < 4.5, (name, other)
        assert abs(correlation(first[name], first[name])) > 100
    for name, error in first.items():
        assert abs(correlation(error, second[name])) < 4.5, name
        assert abs(correlation(error[: kept.numel()], kept)) < 4.5, name


def test_small_updates_arrive_on_average() -> None:
    """Updates of a tenth of a place: rounding to nearest loses them all, the others none."""
    moved = {}
    for kind in ("split", "stochastic", "none"):
        parameter, optimizer = made(
            torch.ones(4096, dtype=torch.bfloat16), "reference", lr=2.0**-8 / 10, weight_decay=0.0,
            master_weight=kind,
        )  # fmt: skip
        for _ in range(30):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        moved[kind] = float((1 - parameter.detach().double()).mean()) * 2**8
    assert moved["none"] == 0
    assert moved["split"] == pytest.approx(3, abs=0.5)
    assert moved["stochastic"] == pytest.approx(3, rel=0.05)


# Options and errors.


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        (torch.float16, {"master_weight": "split"}, "'split' is for bfloat16, and layer.weight is"),
        (torch.float16, {"master_weight": "stochastic"}, "use master_weight='fp32' or 'auto'"),
        (torch.float64, {"state_dtype": torch.bfloat16}, "not for layer.weight, .*float64"),
        (torch.float64, {"state_dtype": torch.float32}, "use state_dtype=None"),
    ],
)
def test_formats_that_do_not_go_with_a_type_are_refused(
    dtype: torch.dtype, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made(torch.ones(3, dtype=dtype), "reference", **options)


@pytest.mark.parametrize(
    ("option", "value"), [("master_weight", "fp32"), ("state_dtype", torch.bfloat16)]
)
def test_a_format_changed_by_hand_is_refused_before_anything_is_written(
    option: str, value: Any
) -> None:
    parameter, optimizer = made(torch.ones(3, dtype=torch.bfloat16), "reference")
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = parameter.detach().clone()
    optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=f"{option}=.*build the optimizer anew"):
        optimizer.step()
    assert torch.equal(parameter, before)
    assert int(optimizer.state[parameter]["step"]) == 1


def test_rounding_may_be_changed_by_hand_where_no_state_is_in_question() -> None:
    """ "none" and "stochastic" keep the same state."""
    parameter, optimizer = made(
        torch.ones(4096).bfloat16(), "reference", master_weight="none", lr=4e-4
    )
    for kind, moved in (("none", False), ("stochastic", True), ("none", False)):
        before = parameter.detach().clone()
        optimizer.param_groups[0]["master_weight"] = kind
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert torch.equal(parameter, before) != moved


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_full_precision_by_name(dtype: torch.dtype, mask: str) -> None:
    """The masters that a state holds; elsewhere the weights."""
    start = random_values((NUMEL,), dtype, "by name")
    parameter, optimizer = made(start, "reference", lr=1e-3, **MASKS[mask])
    parameter.grad = random_values((NUMEL,), dtype, "by name", 1)
    optimizer.step()
    found = optimizer.master_state_dict()
    assert found.keys() == {NAME}
    if dtype in (torch.float32, torch.float64):
        assert found[NAME].data_ptr() == parameter.data_ptr()
        assert not found[NAME].requires_grad
        return
    assert found[NAME].dtype == torch.float32
    state = state_in_full(parameter, optimizer.state[parameter])
    if dtype == torch.float16:
        assert torch.equal(found[NAME], state["master_weight"])
    else:
        bits = (raw_bits(parameter).int() << 16) + state["master_remainder"].int()
        assert torch.equal(raw_bits(found[NAME]), bits)
    assert (found[NAME] != parameter.detach().float()).float().mean() > 0.1


KEPT = {"fp32": "master_weight", "split": "master_remainder"}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("before", "after"), [("fp32", "split"), ("split", "fp32")])
def test_masters_of_one_kind_become_the_other(before: str, after: str, mask: str) -> None:
    """To the bit, but for ties, which two kinds round to different sides."""
    start = random_values((NUMEL,), torch.bfloat16, "kinds")
    options = {"lr": 1e-3, **MASKS[mask]}
    parameter, optimizer = made(start, "reference", master_weight=before, **options)
    for step in range(3):
        parameter.grad = random_values((NUMEL,), torch.bfloat16, "kinds", step)
        optimizer.step()
    other, loaded = made(parameter.detach(), "reference", master_weight=after, **options)
    loaded.load_state_dict(optimizer.state_dict())
    assert {name.removeprefix("child_") for name in loaded.state[other]} >= {KEPT[after]}
    expected = optimizer.master_state_dict()[NAME]
    ties = (raw_bits(expected) & 0xFFFF) == 0x8000
    assert torch.equal(loaded.master_state_dict()[NAME][~ties], expected[~ties])
    assert (expected != parameter.detach().float()).float().mean() > 0.1
    # A format that nobody asked for follows the state dict.
    third, following = made(parameter.detach(), "reference", **options)
    following.load_state_dict(optimizer.state_dict())
    assert {name.removeprefix("child_") for name in following.state[third]} >= {KEPT[before]}
    assert following.param_groups[0]["master_weight"] == before


def test_moments_become_the_type_that_was_asked_for() -> None:
    start = random_values((NUMEL,), torch.float32, "moments")
    parameter, optimizer = made(start, "reference")
    parameter.grad = random_values((NUMEL,), torch.float32, "moments", 1)
    optimizer.step()
    exp_avg = optimizer.state[parameter]["exp_avg"]
    other, loaded = made(start, "reference", state_dtype=torch.bfloat16)
    loaded.load_state_dict(optimizer.state_dict())
    assert torch.equal(loaded.state[other]["exp_avg"], exp_avg.to(torch.bfloat16))
    third, back = made(start, "reference", state_dtype=torch.float32)
    back.load_state_dict(loaded.state_dict())
    assert torch.equal(back.state[third]["exp_avg"], exp_avg.to(torch.bfloat16).float())
    adamw = torch.optim.AdamW([torch.nn.Parameter(start.clone())])
    adamw.load_state_dict(loaded.to_adamw_state_dict())
    moments = next(iter(adamw.state.values()))
    assert torch.equal(moments["exp_avg"], exp_avg.to(torch.bfloat16).float())
