"""Op child_adamw: every column against the reference, bit for bit (SPEC.md, "Exactness")."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from childtune_kernels import ChildMask, FusedChildAdamW

from ..cases import (
    CASES,
    COMPACT,
    SEED,
    Arrangement,
    Case,
    as_parameters,
    assert_same_bits,
    bit_pattern,
    generator_of,
    gradients_of,
    one_group,
    random_values,
    raw_bits,
    reference_outcome,
    run,
)
from ..columns import device_of, placed

EVERY_MASK = [
    Case("fp32_everything", reserve_p=0.3, fixed_mask=True, freeze_non_child=False),
    Case("bf16_everything", torch.bfloat16, reserve_p=0.3, fixed_mask=True, freeze_non_child=False),
    Case("fp64_bernoulli", torch.float64, reserve_p=0.3, convention="original"),
    Case("fp32_compact", reserve_p=0.3, fixed_mask=True, child_state="compact"),
]


def check_column(case: Case, column: str) -> None:
    """A column and the reference leave the same bits."""
    assert_same_bits(run(case, column), run(case, "reference"))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", as_parameters(CASES))
def test_column_equals_reference(case: Case, column: str) -> None:
    assert_same_bits(run(case, column), reference_outcome(case))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", as_parameters(COMPACT))
def test_compact_state_equals_dense_state(case: Case) -> None:
    assert_same_bits(reference_outcome(case), reference_outcome(case.in_dense_state))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", EVERY_MASK, ids=str)
def test_gradients_are_only_read(case: Case, column: str) -> None:
    gradients_of.cache_clear()
    before = [{name: None if gradient is None else gradient.clone() for name, gradient in step.items()}
              for step in gradients_of(case)]  # fmt: skip
    for backend in (column, "reference"):
        run(case, backend)
        for old, new in zip(before, gradients_of(case, True, device_of(backend)), strict=True):
            for name, gradient in old.items():
                current = new[name]
                if gradient is not None and current is not None:
                    assert torch.equal(raw_bits(gradient), raw_bits(current)), (backend, name)


# Threads, and the order and grouping of parameters.


def _large(backend: str, threads: int, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Parameters of which torch's pool gives every thread a share, at a count of threads."""
    torch.set_num_threads(threads)
    sizes = {"small": 3, "large": 70_001, "empty": 0, "medium": 16_385, "last": 4097}
    parameters = {
        name: torch.nn.Parameter(random_values((size,), dtype, "large", name))
        for name, size in sizes.items()
    }
    densities = {"medium": 0.05, "last": 1.0}  # indices and runs; the others get words
    children = {
        name: torch.rand(size, generator=generator_of("large child", name))
        < densities.get(name, 0.5)
        for name, size in sizes.items()
    }
    mask = ChildMask.from_dense(children) if options.pop("masked") else None
    optimizer = FusedChildAdamW(
        parameters.items(), child_mask=mask, seed=SEED, backend=backend, **options
    )
    for step in range(3):
        for name, parameter in parameters.items():
            parameter.grad = random_values(parameter.shape, dtype, "large", name, step)
        optimizer.step()
    return {
        f"{name} {key}": tensor
        for name, parameter in parameters.items()
        for key, tensor in (("weight", parameter), *optimizer.state[parameter].items())
    }


@pytest.mark.threads
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("mask", ["none", "dense", "compact", "compact without Bernoulli"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thread_counts_change_nothing(dtype: torch.dtype, mask: str, column: str) -> None:
    options: dict[str, Any] = {"reserve_p": 0.3, "weight_decay": 0.1, "masked": mask != "none"}
    if mask != "none":
        options["child_state"] = mask.split()[0]
    if mask == "compact without Bernoulli":
        options["reserve_p"] = 1.0
    expected = _large("reference", 1, dtype, **options)
    for threads in (1, 2, 4):
        assert_same_bits(_large(column, threads, dtype, **options), expected)


def _reversed_order(parameters: dict[str, Tensor]) -> Any:
    return list(reversed(parameters.items()))


def _group_each(parameters: dict[str, Tensor]) -> Any:
    return [{"params": [item]} for item in parameters.items()]


def _three_groups_shuffled(parameters: dict[str, Tensor]) -> Any:
    items = list(parameters.items())
    return [{"params": items[start::3][::-1]} for start in (2, 0, 1)]


ARRANGEMENTS: list[Arrangement] = [_reversed_order, _group_each, _three_groups_shuffled]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("arrange", ARRANGEMENTS)
@pytest.mark.parametrize("case", EVERY_MASK, ids=str)
def test_grouping_and_order_change_nothing(case: Case, arrange: Arrangement, column: str) -> None:
    expected = run(case, "reference", one_group)
    assert_same_bits(run(case, column, arrange), expected)
    assert_same_bits(run(case, "reference", arrange), expected)


# One element at a time: special values meet special values.

_SPECIAL = [
    0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 1e-38, 1e-40, -1e-45, 65504.0,
    65520.0, 6e-8, 3e-8, 6.1e-5, 1 + 2.0**-8, 1 + 2.0**-9, 1 + 3 * 2.0**-9, 1e-20, 1e20,
]  # fmt: skip


def _specials(dtype: torch.dtype, backend: str, **options: Any) -> dict[str, Tensor]:
    """Two steps on every pair (weight, gradient) of special values, after moments of special values."""
    combined = torch.tensor(list(itertools.product(_SPECIAL, repeat=2)), dtype=torch.float64)
    parameter = torch.nn.Parameter(placed(combined[:, 0].to(dtype), backend))
    optimizer = FusedChildAdamW([("special", parameter)], seed=SEED, backend=backend, **options)
    state = optimizer.state[parameter]
    order = torch.randperm(len(combined), generator=generator_of("order", dtype))
    state["exp_avg"].copy_(combined[order, 0])
    state["exp_avg_sq"].copy_(combined[order, 1].abs())
    outcome = {}
    for step in range(2):
        parameter.grad = placed(combined[:, 1].to(dtype), backend)
        optimizer.step()
        outcome[f"{step} weight"] = parameter.detach().clone()
        outcome |= {f"{step} {key}": tensor.clone() for key, tensor in state.items()}
    return outcome


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("convention", ["torch", "original"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_special_values(dtype: torch.dtype, convention: str, column: str) -> None:
    several: list[dict[str, Any]] = [
        {}, {"reserve_p": 0.5}, {"eps": 0.0}, {"master_weight": "none"}, {"master_weight": "fp32"},
    ]  # fmt: skip
    if dtype != torch.float64:
        several.append({"state_dtype": torch.bfloat16})
    if dtype == torch.bfloat16:
        several.append({"master_weight": "stochastic", "state_dtype": torch.bfloat16})
    for options in several:
        chosen = {"lr": 1e-2, "convention": convention, **options}
        assert_same_bits(
            _specials(dtype, column, **chosen), _specials(dtype, "reference", **chosen)
        )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_bit_patterns(dtype: torch.dtype, column: str) -> None:
    """Any bits that memory can hold: weights, gradients and moments are drawn as integers."""
    integers = torch.int32 if dtype == torch.float32 else torch.int64
    lowest, highest = torch.iinfo(integers).min, torch.iinfo(integers).max

    def drawn(what: str) -> Tensor:
        bits = torch.randint(lowest, highest, (20_011,), generator=generator_of(what, dtype))
        return bits.to(integers).view(dtype)

    def stepped(backend: str) -> dict[str, Tensor]:
        parameter = torch.nn.Parameter(placed(drawn("weight"), backend))
        optimizer = FusedChildAdamW(
            [("any", parameter)], reserve_p=0.5, seed=SEED, backend=backend, weight_decay=0.3
        )
        state = optimizer.state[parameter]
        state["exp_avg"].copy_(drawn("exp_avg"))
        state["exp_avg_sq"].copy_(drawn("exp_avg_sq").abs())
        parameter.grad = placed(drawn("gradient"), backend)
        optimizer.step()
        return {"weight": parameter.detach(), **state}

    expected = stepped("reference")
    assert_same_bits(stepped(column), expected)
    assert expected["weight"].isfinite().sum() > 1000


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_weight_is_widened_and_narrowed(dtype: torch.dtype, column: str) -> None:
    """All 65,536 weights pass through steps on the stored weight, moved by less and more than a place."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)

    def stepped(backend: str, lr: float) -> Tensor:
        parameter = torch.nn.Parameter(placed(every.clone(), backend))
        optimizer = FusedChildAdamW([parameter], lr, master_weight="none", backend=backend)
        gradient = torch.where(torch.arange(2**16) % 3 == 0, 1.0, -1.0).to(dtype)
        parameter.grad = placed(gradient, backend)
        optimizer.step()
        return parameter.detach()

    for lr in (0.0, 1e-7, 1e-3, 1e-2, 0.3, 1e4):
        found, expected = stepped(column, lr), stepped("reference", lr)
        assert torch.equal(bit_pattern(found), bit_pattern(expected)), lr
    same = bit_pattern(stepped(column, 0.0)) == bit_pattern(every)
    assert same[~every.isnan()].all()
