"""Op gradient_norm on plans: shards of a tensor, and what is kept between the calls for one plan."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from childtune_kernels import ChildMask, FusedChildAdamW, child_layout, ops
from childtune_kernels.labels import philox_key
from childtune_kernels.plan_row import IndexMap, contiguous_map
from childtune_kernels.step_plan import Row, StepPlan

from ..cases import SEED, generator_of, random_values
from ..child_states import LAYOUTS, lay_out_children
from ..columns import placed
from .test_child_adamw_shards import PARTITIONS, element_map_of
from .test_gradient_norm import assert_same, plan_of, refreshed, sized

pytestmark = pytest.mark.usefixtures("one_thread")


def sharded(
    partition: str, dtype: torch.dtype, backend: str, base: int = 0, ones: bool = False
) -> StepPlan:
    """A plan of the shards of one tensor, with Bernoulli and fixed masks."""
    sizes, views = PARTITIONS[partition]
    gradient = random_values(sizes, dtype, "sharded")
    gradient = torch.ones_like(gradient) if ones else gradient
    child = torch.rand(tuple(sizes), generator=generator_of("sharded")) < 0.6
    parameters, masks, maps = {}, {}, {}
    for index, view in enumerate(views):
        name = f"weight/{index}"
        parameter = torch.nn.Parameter(placed(view(torch.zeros_like(gradient)).clone(), backend))
        parameter.grad = placed(view(gradient).clone(), backend)
        parameters[name], masks[name] = parameter, view(child)
        shard = element_map_of(view, sizes)
        maps[name] = IndexMap(base + shard.base, shard.levels)
    optimizer = FusedChildAdamW(
        list(parameters.items()), reserve_p=0.3, child_mask=ChildMask.from_dense(masks),
        child_state="dense", seed=SEED, backend=backend,
    )  # fmt: skip
    return plan_of(optimizer, backend, maps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("partition", PARTITIONS)
def test_shards_drop_what_the_whole_drops(partition: str, dtype: torch.dtype, column: str) -> None:
    expected = refreshed(sharded(partition, dtype, "reference"), True)
    assert_same(refreshed(sharded(partition, dtype, column), True), expected)
    # Squares of ones are counted exactly, whatever the order.
    sizes, _ = PARTITIONS[partition]
    child = torch.rand(tuple(sizes), generator=generator_of("sharded")) < 0.6
    words = ops.keep_words(
        child.numel(), contiguous_map(child.numel()), philox_key(SEED, "weight"), 1,
        round(0.3 * 2**32), backend="reference",
    )  # fmt: skip
    kept = int((ops.unpack_mask(words, sizes, backend="reference") & child).sum())
    counted = refreshed(sharded(partition, dtype, column, ones=True), True)
    assert counted == pytest.approx([kept / 0.3**2, child.numel()], rel=1e-14)


@pytest.mark.parametrize("base", [2**32 - 70, 2**34 - 129, 2**40 + 3])
def test_shards_of_huge_tensors(base: int, column: str) -> None:
    plans = [sharded("rows_unaligned", torch.float32, each, base) for each in (column, "reference")]
    found, expected = (refreshed(plan, True) for plan in plans)
    assert_same(found, expected)
    assert expected != refreshed(sharded("rows_unaligned", torch.float32, "reference"), True)


# What is kept between calls.


def test_gradients_move_and_go_and_change_their_type(column: str) -> None:
    """One plan of each backend; everything that a step may find changed."""
    sizes = (700, 70, 1300)
    plans, members = [], []
    for backend in (column, "reference"):
        parameters = list(sized(sizes, torch.bfloat16, backend).values())
        for parameter in parameters:
            parameter.grad_dtype = None
        named = [(f"p{index}", parameter) for index, parameter in enumerate(parameters)]
        optimizer = FusedChildAdamW(named, reserve_p=0.5, seed=SEED, backend=backend)
        plans.append((optimizer, plan_of(optimizer, backend)))
        members.append(parameters)

    def check() -> list[float]:
        for after_mask in (True, False, True):
            found, expected = (refreshed(plan, after_mask) for _, plan in plans)
            assert_same(found, expected)
        return expected

    seen = [check()]
    for change in (
        lambda parameter, _: setattr(parameter, "grad", 2 * parameter.grad),
        lambda parameter, index: setattr(parameter, "grad", None if index == 0 else parameter.grad),
        lambda parameter, _: setattr(parameter, "grad", torch.full_like(parameter, 3.0).float()),
        lambda parameter, _: parameter.grad.mul_(0.5),
    ):
        for parameters in members:
            for index, parameter in enumerate(parameters):
                change(parameter, index)
        seen.append(check())
    for reserve_p in (1.0, 0.25):
        for optimizer, _ in plans:
            optimizer.param_groups[0]["reserve_p"] = reserve_p
        seen.append(check())
    for _, plan in plans:
        for row in plan.rows:
            row.step.add_(1)
    seen.append(check())
    assert len({tuple(each) for each in seen}) == len(seen)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_words_of_a_child_are_made_once(
    layout: str, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    words_of = Row.mask_words
    assert isinstance(words_of, property)

    def counted(row: Row) -> Tensor | None:
        made.append(row.label)
        words: Tensor | None = words_of.__get__(row)
        return words

    monkeypatch.setattr(Row, "mask_words", property(counted))
    ((name, parameter),) = sized((9001,), torch.float32, column).items()
    child = (torch.arange(9001) * 7 % 23) < 9
    optimizer = FusedChildAdamW(
        [(name, parameter)],
        child_mask=ChildMask.from_dense({name: child}),
        child_state="compact",
        backend=column,
    )
    lay_out_children(optimizer, layout)
    made.clear()
    plan = plan_of(optimizer, column)
    squares = parameter.grad.double().cpu().square()
    first = refreshed(plan, True)
    assert made == [name]
    assert first == pytest.approx([float(squares[child].sum()), float(squares.sum())])
    assert_same(refreshed(plan, True), first)
    parameter.grad = parameter.grad.clone()
    assert_same(refreshed(plan, True), first)
    assert made == [name]
    # Another child of as many elements, in tensors of their own.
    other = child.roll(11)
    state = optimizer.state[parameter]
    words = ops.pack_mask(other).to(parameter.device)
    for key in child_layout.LAYOUT_KEYS:
        state.pop(key, None)
    state.update(child_layout.child_layout(words, parameter.numel(), layout))
    found = refreshed(plan, True)
    assert found == pytest.approx([float(squares[other].sum()), float(squares.sum())])
    assert found[0] != first[0]
    assert made == [name] * 2
