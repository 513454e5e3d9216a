"""Op gradient_norm: every column equals the reference, bit for bit, and the reference SPEC.md, eq. 19."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from childtune_kernels import ChildMask, FusedChildAdamW, ops, registry
from childtune_kernels.labels import philox_key
from childtune_kernels.plan_row import IndexMap, contiguous_map
from childtune_kernels.step_plan import Row, StepPlan

from ..cases import (
    CASES,
    SEED,
    SHAPES,
    STEPS,
    Case,
    children,
    generator_of,
    gradients_of,
    kept_places,
    make_parameters,
    random_values,
)
from ..child_states import LAYOUTS, lay_out_children
from ..columns import device_of, placed
from . import transcription

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def plan_of(
    optimizer: FusedChildAdamW, backend: str, maps: Mapping[str, IndexMap] | None = None
) -> StepPlan:
    """A plan of an optimizer's only group, with element maps of its own where they are given."""
    (group,) = optimizer.param_groups
    rows = []
    for name, parameter in zip(group["param_names"], group["params"], strict=True):
        element_map = (maps or {}).get(name) or contiguous_map(parameter.numel())
        key = philox_key(SEED, name.partition("/")[0])
        rows.append(Row(name, parameter, optimizer.state[parameter], 0, key, element_map))
    device = device_of(backend)
    return StepPlan(rows, [group], registry.choose("child_adamw", device, backend))


def norm_of(plan: StepPlan, after_mask: bool, *, capturing: bool = False) -> Tensor:
    choice = registry.choose("gradient_norm", plan.device, plan.choice.backend)
    tables = plan.rows, plan.row_table, plan.group_table
    return ops.gradient_norm(*tables, choice, plan.kept, after_mask, capturing)


def refreshed(plan: StepPlan, after_mask: bool) -> list[float]:
    """Σ and Σ' of the gradients as they are now."""
    with torch.no_grad():
        plan.refresh()
        sums = norm_of(plan, after_mask)
    assert (sums.dtype, sums.shape, sums.device) == (torch.float64, (2,), plan.device)
    found: list[float] = sums.tolist()
    return found


def assert_same(found: Sequence[float], expected: Sequence[float]) -> None:
    """Bit for bit, but for what a NaN holds; all sums are positive."""
    assert [math.copysign(1.0, each) for each in found if each == 0] == [1.0] * found.count(0.0)
    assert [str(each) for each in found] == [str(each) for each in expected]


def run(case: Case, backend: str, *, poisoned: bool = True) -> list[list[float]]:
    """Both kinds of sums before every step of a case."""
    parameters = make_parameters(case, backend)
    mask = children() if case.fixed_mask else None
    optimizer = FusedChildAdamW(
        list(parameters.items()), **case.options(), child_mask=mask, seed=SEED, backend=backend
    )
    for parameter in parameters.values():
        optimizer.state[parameter]["step"].fill_(case.first_step - 1)
    if case.layout is not None:
        lay_out_children(optimizer, case.layout)
    plan = plan_of(optimizer, backend)
    found = []
    for gradients in gradients_of(case, poisoned, device_of(backend)):
        for name, gradient in gradients.items():
            parameters[name].grad = gradient
        found.append(refreshed(plan, False) + refreshed(plan, True))
        for row in plan.rows:
            row.step.add_(row.active)
    return found


@functools.cache
def reference_run(case: Case) -> list[list[float]]:
    return run(case, "reference")


_KINDS = ("fp32", "fp64", "bf16", "fp16", "bf16_fp32_gradient")
_NAMES = {
    *(f"{kind}-{mask}-torch" for kind in _KINDS for mask in ("plain", "bernoulli", "fixed", "both")),
    *(f"compact-fp32-{mask}-{layout}" for mask in ("fixed", "both") for layout in LAYOUTS),
    *(f"compact-bf16-both-{layout}" for layout in LAYOUTS),
    "step_wraps", "keeps_almost_none", "keeps_almost_all", "keeps_all_but_rescales", "maximize",
}  # fmt: skip
NORMS = [case for case in CASES if case.name in _NAMES]
assert len(NORMS) == len(_NAMES)


@pytest.mark.parametrize("case", NORMS, ids=str)
def test_column_equals_reference(case: Case, column: str) -> None:
    """Shapes and strides of the table, rows without a gradient, NaN and infinities in dropped places."""
    expected = reference_run(case)
    for found, right in zip(run(case, column), expected, strict=True):
        assert_same(found, right)
    before, before_again, after, every = zip(*expected, strict=True)
    assert all(math.isfinite(each) for each in after)
    assert [str(each) for each in before] == [str(each) for each in before_again]
    assert [str(each) for each in before] == [str(each) for each in every]
    drops = case.fixed_mask or round(case.reserve_p * 2**32) < 2**32
    assert drops == any(math.isnan(each) for each in every)


@pytest.mark.parametrize("name", ["fp64-plain-torch", "fp32-bernoulli-torch", "bf16-both-torch"])
def test_the_sums_are_those_of_squares(name: str, backend: str) -> None:
    """Against exact sums: what is left out, counted twice or without 1/p² would show."""
    (case,) = (case for case in NORMS if case.name == name)
    found = run(case, backend, poisoned=False)
    counts = dict.fromkeys(SHAPES, case.first_step - 1)
    for step in range(STEPS):
        kept, every = [], []
        for label, gradient in gradients_of(case, False)[step].items():
            if gradient is None:
                continue
            counts[label] += 1
            squares = gradient.double().square()
            places = kept_places(case, label, SHAPES[label].sizes, counts[label])
            every += squares.flatten().tolist()
            kept += squares[places].tolist()
        exact = [math.fsum(every), math.fsum(every), math.fsum(kept) / case.reserve_p**2]
        assert found[step] == pytest.approx([*exact, exact[0]], rel=4e-15)


def sized(
    sizes: Sequence[int], dtype: torch.dtype, backend: str, offset: int = 0
) -> dict[str, Any]:
    """Parameters of one dimension, with gradients that begin ``offset`` elements into their memory."""
    parameters = {}
    for index, size in enumerate(sizes):
        values = random_values((size + offset,), dtype, "sized", index)[offset:]
        parameter = torch.nn.Parameter(placed(torch.zeros_like(values), backend))
        parameter.grad = placed(values, backend)
        parameters[f"p{index}"] = parameter
    return parameters


SIZES = (1, 127, 128, 129, 0, 4095, 4096, 4097, 16_384, 70_001, 0)


@functools.cache
def transcribed(dtype: torch.dtype, offset: int) -> float:
    rows = [p.grad.double().numpy() ** 2 for p in sized(SIZES, dtype, "reference", offset).values()]
    return transcription.gradient_norm(rows)


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_taken_in_the_order_of_the_specification(
    dtype: torch.dtype, offset: int, backend: str
) -> None:
    parameters = sized(SIZES, dtype, backend, offset)
    plan = plan_of(FusedChildAdamW(list(parameters.items()), backend=backend), backend)
    expected = transcribed(dtype, offset)
    assert_same(refreshed(plan, False), [expected, expected])


def test_another_order_would_be_seen(backend: str) -> None:
    """Whether neighbours are added, as NumPy does, or elements that lie 128 apart."""
    others = 0
    for turn in range(20):
        values = random_values((12_301,), torch.float32, "order", turn)
        parameter = torch.nn.Parameter(placed(torch.zeros_like(values), backend))
        parameter.grad = placed(values, backend)
        plan = plan_of(FusedChildAdamW([("one", parameter)], backend=backend), backend)
        expected = transcription.gradient_norm([values.double().numpy() ** 2])
        assert_same(refreshed(plan, False), [expected, expected])
        others += float((values.double().numpy() ** 2).sum()) != expected
    assert others > 5


def test_squares_are_taken_in_double_precision(backend: str) -> None:
    """fp32 would overflow, underflow and round."""
    values = torch.tensor([1e30, 1e-30, 3e38, 1e-45, 1 + 2.0**-23, 3.0])
    for each in values:
        parameter = torch.nn.Parameter(placed(torch.zeros(1), backend))
        parameter.grad = placed(each.view(1).clone(), backend)
        plan = plan_of(FusedChildAdamW([("one", parameter)], backend=backend), backend)
        assert_same(refreshed(plan, False), [float(each) ** 2] * 2)


def test_without_any_unit_the_sum_is_zero(backend: str) -> None:
    parameters = {name: torch.nn.Parameter(placed(torch.ones(size), backend))
                  for name, size in (("empty", 0), ("without gradient", 70))}  # fmt: skip
    parameters["empty"].grad = torch.zeros_like(parameters["empty"])
    for names in (["empty"], ["without gradient"], [*parameters]):
        members = [(name, parameters[name]) for name in names]
        plan = plan_of(FusedChildAdamW(members, reserve_p=0.5, backend=backend), backend)
        for after_mask in (False, True):
            assert_same(refreshed(plan, after_mask), [0.0, 0.0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_where_it_counts(value: float, backend: str) -> None:
    sizes = (20_000, 70)
    kept = torch.rand(sizes[0], generator=generator_of("not finite")) < 0.5
    mask = ChildMask.from_dense({"p0": kept}, dense=["p1"])
    for row, index, counts in ((0, 17_003, None), (0, 3, None), (1, 69, True)):
        parameters = sized(sizes, torch.float32, backend)
        members = list(parameters.items())
        optimizer = FusedChildAdamW(members, child_mask=mask, backend=backend)
        parameters[f"p{row}"].grad[index] = value
        total, every = refreshed(plan_of(optimizer, backend), True)
        counts = bool(kept[index]) if counts is None else counts
        assert str(every) == str(value * value)
        assert str(total) == str(every) if counts else math.isfinite(total)


@pytest.mark.parametrize("fixed", [False, True], ids=["bernoulli", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_units_after_masks(dtype: torch.dtype, fixed: bool, column: str) -> None:
    """Aligned tensors of many units, which take other branches than the small ones of the table."""
    sizes = (37_000, 16_384)
    children = {f"p{index}": torch.rand(size, generator=generator_of("whole", size)) < 0.4
                for index, size in enumerate(sizes)}  # fmt: skip
    mask = ChildMask.from_dense(children) if fixed else None

    def found(backend: str) -> list[float]:
        members = list(sized(sizes, dtype, backend).items())
        optimizer = FusedChildAdamW(
            members, reserve_p=0.3, child_mask=mask, seed=SEED, backend=backend
        )
        return refreshed(plan_of(optimizer, backend), True)

    expected = found("reference")
    assert 0 < expected[0] < expected[1] / 0.3**2
    assert_same(found(column), expected)


# Sums of units are summed again: more than one unit of them, and sums of those.


@pytest.fixture
def large_programs(monkeypatch: pytest.MonkeyPatch, column: str) -> None:
    """The interpreter pays by program."""
    if column == "triton" and device_of(column).type == "cpu":
        from childtune_kernels.backends.triton import launch

        by_op = launch._INTERPRETER_BY_OP | {"gradient_norm": launch.Config(1 << 22, 1)}
        monkeypatch.setattr(launch, "_INTERPRETER_BY_OP", by_op)


@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize("after_mask", [False, True])
def test_sums_of_many_units(after_mask: bool, column: str) -> None:
    sizes = (129, 4096 * 4096 + 4097, 4096)
    gradients = [torch.rand(size, generator=generator_of("many", size)) for size in sizes]
    drawn = torch.arange(sizes[1]) % 97 < 3
    mask = ChildMask.from_dense({"p1": drawn}, dense=["p0", "p2"])

    def found(backend: str) -> list[float]:
        parameters = [
            (f"p{index}", torch.nn.Parameter(placed(gradient, backend)))
            for index, gradient in enumerate(gradients)
        ]
        for _, parameter in parameters:
            parameter.grad = parameter.detach()
        optimizer = FusedChildAdamW(parameters, child_mask=mask, backend=backend)
        return refreshed(plan_of(optimizer, backend), after_mask)

    expected = found("reference")
    squares = [gradient.double().square() for gradient in gradients]
    every = float(torch.stack([each.sum() for each in squares]).sum())
    kept = every - float(squares[1][~drawn].sum())
    assert expected == pytest.approx([kept if after_mask else every, every], rel=1e-12)
    assert_same(found(column), expected)


@pytest.mark.threads
@pytest.mark.parametrize("after_mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thread_counts_change_nothing(dtype: torch.dtype, after_mask: bool, column: str) -> None:
    def plan(backend: str) -> StepPlan:
        parameters = sized((3, 200_001, 0, 16_385, 4097, 70), dtype, backend)
        optimizer = FusedChildAdamW(list(parameters.items()), reserve_p=0.3, backend=backend)
        return plan_of(optimizer, backend)

    expected = refreshed(plan("reference"), after_mask)
    for threads in (1, 2, 4, 7):
        torch.set_num_threads(threads)
        assert_same(refreshed(plan(column), after_mask), expected)
