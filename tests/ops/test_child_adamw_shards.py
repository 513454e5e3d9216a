"""Op child_adamw on plans: shards of a tensor, anywhere in memory, do what the whole one does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from childtune_kernels import ops, registry, state_tensors
from childtune_kernels.labels import philox_key
from childtune_kernels.plan_row import ROW_COLUMN, IndexMap, contiguous_map, strided_map
from childtune_kernels.step_plan import Row, StepPlan

from ..cases import SEED, assert_same_bits, generator_of, random_values
from ..child_states import state_in_full
from ..columns import device_of, placed

View = Callable[[Tensor], Tensor]
# The type of the weights, and how they and their moments are kept.
KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "fp64": (torch.float64, {}),
    "bf16": (torch.bfloat16, {}),
    "fp16": (torch.float16, {}),
    "fp32_bf16_state": (torch.float32, {"state_dtype": torch.bfloat16}),
    "stochastic": (
        torch.bfloat16,
        {"master_weight": "stochastic", "state_dtype": torch.bfloat16},
    ),
}
STEPS = 3
LABEL = "layer.weight"
GROUP: dict[str, Any] = {
    "lr": 1e-2,
    "betas": (0.9, 0.98),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "reserve_p": 0.3,
    "freeze_non_child": False,
    "correct_bias": True,
    "maximize": False,
    "convention": "torch",
    "child_state": "dense",
    "master_weight": "auto",
    "state_dtype": None,
    "amsgrad": False,
    "differentiable": False,
    "capturable": False,
    "max_grad_norm": None,
    "clip": "before_mask",
    "skip_nonfinite": False,
    "seed": SEED,
}


def _everything(whole: Tensor) -> Tensor:
    return whole


def _between(*bounds: int) -> list[View]:
    """Row shards, cut at the bounds."""
    return [
        lambda whole, start=start, end=end: whole[start:end]  # type: ignore[misc]
        for start, end in itertools.pairwise(bounds)
    ]


# The shape of the whole tensor and the views that part it: shards as FSDP, tensor parallelism and
# both make them.
PARTITIONS: dict[str, tuple[tuple[int, ...], list[View]]] = {
    "whole": ((10_007,), _between(0, 10_007)),
    "rows_unaligned": ((10_007,), _between(0, 1, 4, 37, 37, 4133, 8230, 10_007, 10_007)),
    "rows_of_matrix": ((53, 97), _between(0, 1, 20, 53)),
    "columns": ((53, 97), [lambda w: w[:, :31], lambda w: w[:, 31:32], lambda w: w[:, 32:]]),
    "blocks": (
        (53, 97),
        [
            lambda w: w[:20, :50],
            lambda w: w[20:, :50],
            lambda w: w[:20, 50:],
            lambda w: w[20:, 50:],
        ],
    ),
    "every_third": ((1000,), [lambda w: w[0::3], lambda w: w[1::3], lambda w: w[2::3]]),
    "transposed": ((41, 77), [lambda w: w.t()[:30], lambda w: w.t()[30:]]),
    "four_levels": (
        (6, 5, 8, 9),
        [
            lambda w: w[:, :3, :, 0::2],
            lambda w: w[:, 3:, :, 0::2].permute(3, 1, 0, 2),
            lambda w: w[:, :, 0::2, 1::2].permute(2, 3, 1, 0),
            lambda w: w[:, :, 1::2, 1::2].permute(1, 0, 2, 3),
        ],
    ),
}


def element_map_of(view: View, sizes: Sequence[int]) -> IndexMap:
    """The element map of a shard: in a row-major tensor, places in memory are element indexes."""
    shard = view(torch.arange(torch.Size(sizes).numel()).view(*sizes))
    return strided_map(shard.shape, shard.stride(), int(shard.storage_offset()))


def _in_memory(values: Tensor, offset: int) -> Tensor:
    """The same values, contiguous, ``offset`` elements behind where an allocation begins."""
    buffer = values.new_empty(values.numel() + offset)
    return buffer[offset:].view(values.shape).copy_(values)


def stepped(
    shards: Sequence[tuple[View, IndexMap]],
    sizes: Sequence[int],
    kind: str,
    backend: str,
    offset: int = 0,
    group: dict[str, Any] = GROUP,
) -> dict[str, Tensor]:
    """Steps on all shards in one plan; the whole weight and moments, put together again on the CPU."""
    dtype, formats = KINDS[kind]
    group = {**group, **formats}
    device = device_of(backend)
    child = torch.rand(tuple(sizes), generator=generator_of("shards")) < 0.6
    weight = random_values(sizes, dtype, "shards")
    rows = []
    for view, element_map in shards:
        parameter = torch.nn.Parameter(placed(_in_memory(view(weight), offset), backend))
        words = ops.pack_mask(view(child), backend="reference").to(device)
        state = state_tensors.initial_state(LABEL, parameter, words, group)
        for name in state.keys() - {"step"}:
            state[name] = _in_memory(state[name], offset)
        rows.append(Row(LABEL, parameter, state, 0, philox_key(SEED, LABEL), element_map))
    plan = StepPlan(rows, [group], registry.choose("child_adamw", device, backend))
    for step in range(STEPS):
        gradient = random_values(sizes, dtype, "shards", step)
        for row, (view, _) in zip(rows, shards, strict=True):
            row.parameter.grad = placed(_in_memory(view(gradient), offset), backend)
        with torch.no_grad():
            plan.refresh()
            plan.run()
    return _joined(rows, shards, sizes)


def _joined(
    rows: Sequence[Row], shards: Sequence[tuple[View, IndexMap]], sizes: Sequence[int]
) -> dict[str, Tensor]:
    joined: dict[str, Tensor] = {}
    for row, (view, _) in zip(rows, shards, strict=True):
        state = state_in_full(row.parameter, row.state)
        state.pop("mask_words", None)
        for name, tensor in {"weight": row.parameter.detach().cpu(), **state}.items():
            if name == "step":
                assert int(tensor) == STEPS
                continue
            whole = joined.setdefault(name, torch.full(tuple(sizes), 77, dtype=tensor.dtype))
            view(whole).copy_(tensor)
    return joined


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("partition", PARTITIONS)
def test_shards_do_what_the_whole_does(partition: str, kind: str, column: str) -> None:
    sizes, views = PARTITIONS[partition]
    whole: list[tuple[View, IndexMap]] = [(_everything, contiguous_map(torch.Size(sizes).numel()))]
    expected = stepped(whole, sizes, kind, "reference")
    assert expected["weight"].isfinite().all()
    shards = [(view, element_map_of(view, sizes)) for view in views]
    assert_same_bits(stepped(shards, sizes, kind, column), expected)
    assert_same_bits(stepped(shards, sizes, kind, "reference"), expected)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["fp32", "bf16", "stochastic"])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_shards_in_compact_state_do_what_the_whole_does_in_dense_state(
    partition: str, kind: str, column: str
) -> None:
    sizes, views = PARTITIONS[partition]
    frozen = {**GROUP, "freeze_non_child": True}
    whole: list[tuple[View, IndexMap]] = [(_everything, contiguous_map(torch.Size(sizes).numel()))]
    expected = stepped(whole, sizes, kind, "reference", group=frozen)
    shards = [(view, element_map_of(view, sizes)) for view in views]
    compact = {**frozen, "child_state": "compact"}
    for offset in (0, 3):
        assert_same_bits(stepped(shards, sizes, kind, column, offset, compact), expected)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("offset", [1, 3, 5, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_alignment_changes_nothing(kind: str, offset: int, column: str) -> None:
    sizes, views = PARTITIONS["rows_unaligned"]
    shards = [(view, element_map_of(view, sizes)) for view in views]
    expected = stepped(shards, sizes, kind, "reference")
    assert_same_bits(stepped(shards, sizes, kind, column, offset), expected)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("base", [2**32 - 70, 2**34 - 129, 2**40 + 3])
def test_shards_of_huge_tensors(base: int, column: str) -> None:
    """Shards that begin beyond what 32 bits count, and across where the counter's second word moves."""
    sizes, views = PARTITIONS["rows_unaligned"]
    far = [
        (view, IndexMap(base + found.base, found.levels))
        for view in views
        for found in [element_map_of(view, sizes)]
    ]
    whole: list[tuple[View, IndexMap]] = [(_everything, contiguous_map(sizes[0], base))]
    expected = stepped(whole, sizes, "fp32", "reference")
    near: list[tuple[View, IndexMap]] = [(_everything, contiguous_map(sizes[0]))]
    assert not torch.equal(expected["weight"], stepped(near, sizes, "fp32", "reference")["weight"])
    assert_same_bits(stepped(far, sizes, "fp32", column), expected)


def test_a_refused_gradient_leaves_no_row_behind() -> None:
    """After a refusal a parameter without a gradient is skipped; its old gradient's memory is gone."""
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    parameter.grad_dtype = None
    state = state_tensors.initial_state(LABEL, parameter, None, GROUP)
    row = Row(LABEL, parameter, state, 0, philox_key(SEED, LABEL), contiguous_map(3))
    plan = StepPlan([row], [GROUP], registry.choose("child_adamw", "cpu", "reference"))
    plan.refresh()
    assert not row.active
    parameter.grad = torch.ones(3, dtype=torch.float16)
    with pytest.raises(ValueError, match="float16"):
        plan.refresh()
    parameter.grad = None
    plan.refresh()
    assert not row.active
    assert int(plan.row_table[0, ROW_COLUMN["active"]]) == 0
