"""Sharded parameters: on any number of ranks, in any layout, what the whole ones do, to the bit."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from childtune_kernels import ChildMask, FusedChildAdamW, sharding
from childtune_kernels.plan_row import contiguous_map

from .cases import assert_same_bits, generator_of
from .ranks import Ranks

OPS = ("child_adamw", "gradient_norm")
STEPS = 3
# Uneven on 2, 3 and 4 ranks, with shards that are empty, and one that is not.
SHAPES = {"matrix": (13, 96), "square": (8, 24), "short": (3, 5), "bias": (7,), "cube": (4, 3, 50)}


class Layout(NamedTuple):
    """Where a run's parameters lie: the mesh, and what its dimensions do to a matrix."""

    mesh: tuple[int, ...]
    placements: tuple[Any, ...]

    @property
    def world(self) -> int:
        return math.prod(self.mesh)

    def of(self, dim: int) -> list[Any]:
        """The placements for a tensor of ``dim`` dimensions: one without a second has its first sharded."""
        return [
            placement if getattr(placement, "dim", 0) < dim else Replicate()
            for placement in self.placements
        ]


LAYOUTS = {
    "one rank": Layout((1,), (Shard(0),)),
    "rows-2": Layout((2,), (Shard(0),)),
    "rows-3": Layout((3,), (Shard(0),)),
    "rows-4": Layout((4,), (Shard(0),)),
    "columns-2": Layout((2,), (Shard(1),)),
    "columns-3": Layout((3,), (Shard(1),)),
    "rows and columns": Layout((2, 2), (Shard(0), Shard(1))),
    "rows of rows": Layout((2, 2), (Shard(0), Shard(0))),
    "replicas of rows": Layout((2, 2), (Replicate(), Shard(0))),
    "replicas": Layout((3,), (Replicate(),)),
}
MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "CT_F": {"reserve_p": 0.3},
    "CT_D": {"fixed": True},
    "CT_D dense": {"fixed": True, "child_state": "dense", "freeze_non_child": False},
    "both": {"fixed": True, "reserve_p": 0.3},
}
TYPES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "stochastic": {
        "dtype": torch.bfloat16, "master_weight": "stochastic", "state_dtype": torch.bfloat16,
    },
}  # fmt: skip


def values_of(name: str, dtype: torch.dtype, *what: object) -> Tensor:
    values = torch.randn(SHAPES[name], generator=generator_of("sharding", name, *what))
    return values.to(dtype)


def options_of(mask: str, kind: str, backend: str) -> dict[str, Any]:
    options = {**MASKS[mask], **TYPES[kind], "backend": backend, "seed": 7, "lr": 1e-2}
    options["weight_decay"] = 0.1
    if options.pop("fixed", False):
        dense = {name: values_of(name, torch.float32, "child") > 0.3 for name in SHAPES}
        options["child_mask"] = ChildMask.from_dense(dense)
    return options


def another_child() -> ChildMask:
    return ChildMask.from_dense(
        {name: values_of(name, torch.float32, "another") > 0 for name in SHAPES}
    )


def stepped(options: dict[str, Any], layout: Layout | None) -> tuple[dict[str, Tensor], Any]:
    """The whole weights after some steps, and the last norm; every rank has them."""
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    exchange = options.pop("exchange", None)
    mesh = None if layout is None else init_device_mesh("cpu", layout.mesh)

    def placed(values: Tensor) -> Tensor:
        if mesh is None or layout is None:
            return values
        return distribute_tensor(values, mesh, layout.of(values.dim()))

    named = {name: torch.nn.Parameter(placed(values_of(name, dtype))) for name in SHAPES}
    optimizer = FusedChildAdamW(named.items(), **options)
    for step in range(STEPS):
        for name, parameter in named.items():
            # An expert that no token chose has no gradient.
            missing = name == "square" and step == 1
            parameter.grad = None if missing else placed(values_of(name, dtype, step))
        optimizer.step()
        if step == 0 and exchange is not None:
            optimizer.set_child_mask(another_child(), exchange)
    weights = {name: parameter.detach() for name, parameter in named.items()}
    masters = {f"{name} master": value for name, value in optimizer.master_state_dict().items()}
    whole = {
        name: value if mesh is None else value.full_tensor()  # type: ignore[attr-defined]
        for name, value in {**weights, **masters}.items()
    }
    return whole, optimizer.last_grad_norm


# Each mask and each type, and the pairs that share least; the others with the slow tests.
USUAL = (
    ("plain", "fp32"), ("CT_F", "fp32"), ("CT_F", "stochastic"), ("CT_D", "bf16"),
    ("CT_D dense", "stochastic"), ("both", "fp32"), ("both", "bf16"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        pytest.param(mask, kind, marks=[] if (mask, kind) in USUAL else [pytest.mark.slow])
        for mask in MASKS
        for kind in TYPES
    ],
)
def test_any_layout_gives_the_same_bits(ranks: Ranks, mask: str, kind: str) -> None:
    options = options_of(mask, kind, "cpp")
    expected, _ = stepped({**options, "backend": "reference"}, None)
    for name, weight in expected.items():
        assert not torch.equal(weight, values_of(name.split()[0], weight.dtype)), name
    for name, layout in LAYOUTS.items():
        for found, _ in ranks.run(layout.world, stepped, options, layout):
            try:
                assert_same_bits(found, expected)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


def stepped_on_many_meshes(options: dict[str, Any]) -> tuple[dict[str, Tensor], float]:
    """Parameters on meshes of all ranks, of three, of pairs, each pair with all of it, and a whole one."""
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    # Names of their own: DTensor keeps meshes that are equal from run to run, with the groups they had then.
    every = init_device_mesh("cpu", (4,), mesh_dim_names=("every",))
    three = DeviceMesh("cpu", [0, 1, 2], mesh_dim_names=("three",))
    places: dict[str, tuple[DeviceMesh, list[Any]]] = {
        "matrix": (pairs, [Replicate(), Shard(1)]),
        "square": (three, [Shard(0)]),
        "short": (every, [Shard(0)]),
        "cube": (pairs["inner"], [Shard(2)]),
    }

    def placed(name: str, values: Tensor) -> Tensor:
        return distribute_tensor(values, *places[name]) if name in places else values

    named = {name: torch.nn.Parameter(placed(name, values_of(name, dtype))) for name in SHAPES}
    optimizer = FusedChildAdamW(named.items(), **options, max_grad_norm=1e9)
    for step in range(STEPS):
        for name, parameter in named.items():
            missing = name == "square" and step == 1
            parameter.grad = None if missing else placed(name, values_of(name, dtype, step))
        optimizer.step()
    found = {}
    for name, parameter in named.items():
        value = parameter.detach()
        if not isinstance(value, DTensor):
            found[name] = value
        elif value.device_mesh.get_coordinate() is not None:
            found[name] = value.full_tensor()
    return found, float(optimizer.last_grad_norm)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_meshes_may_differ_between_parameters(ranks: Ranks, kind: str) -> None:
    options = options_of("both", kind, "cpp")
    expected, norm = stepped({**options, "max_grad_norm": 1e9}, None)
    results = ranks.run(4, stepped_on_many_meshes, options)
    assert [len(found) for found, _ in results] == [5, 5, 5, 4]
    for found, same_norm in results:
        assert_same_bits(found, {name: expected[name] for name in found})
        assert same_norm == pytest.approx(float(norm), rel=1e-6)


@pytest.mark.parametrize("new_state", ["keep", "reset"])
def test_a_child_is_exchanged_in_its_parts(ranks: Ranks, new_state: str) -> None:
    options = options_of("CT_D", "bf16", "cpp") | {"exchange": new_state}
    expected, _ = stepped(options, None)
    for name in ("rows-3", "rows and columns"):
        for found, _ in ranks.run(LAYOUTS[name].world, stepped, options, LAYOUTS[name]):
            assert_same_bits(found, expected)


@pytest.mark.parametrize(
    ("clip", "backend"),
    [
        ("before_mask", "cpp"),
        ("after_mask", "reference"),
        pytest.param("after_mask", "cpp", marks=pytest.mark.slow),
        pytest.param("before_mask", "reference", marks=pytest.mark.slow),
    ],
)
def test_the_norm_is_that_of_all_parts(ranks: Ranks, clip: str, backend: str) -> None:
    options = options_of("both", "fp32", backend) | {"max_grad_norm": 0.5, "clip": clip}
    expected, norm = stepped(options, None)
    for layout in LAYOUTS.values():
        found = ranks.run(layout.world, stepped, options, layout)
        assert len({float(of_rank) for _, of_rank in found}) == 1
        assert float(found[0][1]) == pytest.approx(float(norm), rel=1e-12)
        for name, value in found[0][0].items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def stepped_by_local_places(options: dict[str, Any], layout: Layout) -> dict[str, Tensor]:
    """The fault that the tests above are for: parts that take their own places for the whole's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sharding, "element_map_of",
            lambda _, tensor: contiguous_map(sharding.local_of(tensor).numel()),
        )  # fmt: skip
        return stepped(options, layout)[0]


@pytest.mark.parametrize("layout", ["rows-2", "columns-3", "rows and columns"])
def test_parts_that_draw_by_their_own_places_are_found(ranks: Ranks, layout: str) -> None:
    options = options_of("CT_F", "fp32", "cpp")
    expected, _ = stepped(options, None)
    found = ranks.run(LAYOUTS[layout].world, stepped_by_local_places, options, LAYOUTS[layout])
    with pytest.raises(AssertionError):
        assert_same_bits(found[0], expected)


# Positions along a dimension, and the levels (sizes and steps) that they are.
POSITIONS: dict[str, tuple[list[int], list[tuple[int, int]] | None]] = {
    "one": ([5], [(1, 1)]),
    "neighbours": ([3, 4, 5], [(3, 1)]),
    "steps": ([0, 4, 8], [(3, 4)]),
    "blocks": ([2, 3, 10, 11, 18, 19], [(3, 8), (2, 1)]),
    "blocks of blocks": ([0, 1, 4, 5, 100, 101, 104, 105], [(2, 100), (2, 4), (2, 1)]),
    "uneven blocks": ([0, 1, 2, 8, 9], None),
    "uneven steps": ([0, 1, 5, 6, 7, 8], None),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_are_regular_steps_or_refused(name: str) -> None:
    positions, levels = POSITIONS[name]
    assert sharding._levels(positions) == levels


def refused(what: str) -> str:
    mesh = init_device_mesh("cpu", (2, 2))
    placements = {
        "unsummed": [Replicate(), Partial()],
        "local": [Replicate(), Shard(0)],
        # Of pieces of 4, 4, 4, 4 and 2 each rank has half: the last step is another one.
        "irregular": [Replicate(), _StridedShard(0, split_factor=5)],
    }[what]
    size = {"unsummed": 8, "local": torch.distributed.get_rank() % 2 * 4 + 2, "irregular": 9}[what]
    values: Tensor = DTensor.from_local(
        torch.ones(size), mesh, placements, run_check=False,
        shape=torch.Size([18 if what == "irregular" else 8]), stride=(1,),
    )  # fmt: skip
    try:
        FusedChildAdamW([("layer.bias", torch.nn.Parameter(values))])
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("what", ["unsummed", "local", "irregular"])
def test_what_no_element_map_expresses_is_refused(ranks: Ranks, what: str) -> None:
    for message in ranks.run(4, refused, what):
        assert "layer.bias" in message
        assert "2×2" in message
        assert "placements" in message
        assert what != "irregular" or "follow no regular steps" in message
