"""Children of parts: on any number of ranks, in any layout, the child of the whole scores, to the bit."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from childtune_kernels import (
    ChildMask,
    FusedChildAdamW,
    child_mask,
    random_child,
    select_child,
    sharding,
    smallest_words,
)
from childtune_kernels.rank_values import counts_over_ranks

from .cases import generator_of
from .ranks import Ranks
from .test_sharding import LAYOUTS, SHAPES, Layout

MANY, FEW = 7, 2  # how many different values scores have: with two, most of all are ties
NUMEL = sum(torch.Size(shape).numel() for shape in SHAPES.values())
CASES: dict[str, dict[str, Any]] = {
    "a third": {"reserve_p": 0.3},
    "one": {"k": 1},
    "all but one": {"k": NUMEL - 1},
    "all": {"reserve_p": 1.0},
    "smallest": {"reserve_p": 0.4, "largest": False},
    "tensor by tensor": {"reserve_p": 0.45, "scope": "tensor"},
    "percentile": {"reserve_p": 0.35, "rule": "percentile"},
}
STRIDED = Layout((2, 2), (_StridedShard(0, split_factor=2), Shard(0)))


def scores_of(values: int) -> dict[str, Tensor]:
    found = {}
    for name, shape in SHAPES.items():
        drawn = torch.randint(values, shape, generator=generator_of("scores", name, values))
        found[name] = drawn.float() / 4
    return found


def spread(values: Tensor, layout: Layout, mesh: DeviceMesh) -> Tensor:
    if layout is not STRIDED:
        return distribute_tensor(values, mesh, layout.of(values.dim()), src_data_rank=None)
    placed = sharding.Placed(values.shape, mesh, layout.placements)
    empty = sharding.placed_by(values.new_empty(sharding.part_shape("", placed)), placed)
    return sharding.placed_by(sharding.part_of("", values, empty).contiguous(), placed)


def in_own_order(named: dict[str, Any]) -> dict[str, Any]:
    """The ranks but the first have recorded the other way round."""
    return named if torch.distributed.get_rank() == 0 else dict(reversed(named.items()))


def layouts_of(world: int) -> dict[str, Layout]:
    table = LAYOUTS | {"strided": STRIDED}
    return {name: layout for name, layout in table.items() if layout.world == world}


def selected_in_every_layout() -> int:
    compared = 0
    for name, layout in layouts_of(torch.distributed.get_world_size()).items():
        mesh = init_device_mesh("cpu", layout.mesh)
        for (case, options), values in itertools.product(CASES.items(), (MANY, FEW)):
            scores = scores_of(values)
            # One parameter is whole on every rank.
            placed = {
                label: each if label == "short" else spread(each, layout, mesh)
                for label, each in scores.items()
            }
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                expected = select_child(scores, **options, dense=["head"])
                found = select_child(in_own_order(placed), **options, dense=["head"])
            assert list(found.words) == list(scores)
            assert found.dense_names == {"head"}
            for label, words in expected.words.items():
                part = sharding.words_of_part(label, words, placed[label])
                assert torch.equal(found.words[label], part), (name, case, label)
            compared += 1
        assert found.gather() == expected
        assert found.count() == expected.count()
    return compared


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_layout_gives_the_child_of_the_whole(ranks: Ranks, world: int) -> None:
    compared = ranks.run(world, selected_in_every_layout)
    assert compared == [len(layouts_of(world)) * len(CASES) * 2] * world


BELOW = smallest_words.Draw.below


def below_coarsely(draw: smallest_words.Draw, threshold: int) -> Tensor:
    """As if words had two bits."""
    return BELOW(draw, -(-threshold >> 30) << 30)


def draws_in_every_layout() -> int:
    compared = 0
    for layout in layouts_of(torch.distributed.get_world_size()).values():
        mesh = init_device_mesh("cpu", layout.mesh)
        placed = {name: spread(each, layout, mesh) for name, each in scores_of(MANY).items()}
        for share, seed in ((0.3, 1), (0.01, 2)):
            expected = random_child(SHAPES, share, seed).placed(placed.items())
            assert random_child(in_own_order(placed), share, seed) == expected
            compared += 1
        # Words of 32 bits are seldom equal: with two bits of them there are ties in every tensor.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(smallest_words.Draw, "below", below_coarsely)
            expected = random_child(SHAPES, 0.3, 1).placed(placed.items())
            assert random_child(in_own_order(placed), 0.3, 1) == expected
    return compared


@pytest.mark.parametrize("world", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_random_child_is_that_of_the_whole(ranks: Ranks, world: int) -> None:
    assert ranks.run(world, draws_in_every_layout) == [2 * len(layouts_of(world))] * world


def runs_in_parts() -> list[str]:
    """Whole runs in parts of rows; then parts of columns that cut them."""
    mesh = init_device_mesh("cpu", (2,))
    scores = {"matrix": scores_of(MANY)["matrix"], "other": scores_of(FEW)["matrix"].square()}
    # The last run of a parameter may be short.
    scores["bias"] = scores["matrix"].flatten()[:100].contiguous()
    messages = []
    placed = {name: distribute_tensor(each, mesh, [Shard(0)]) for name, each in scores.items()}
    placed["bias"] = distribute_tensor(scores["bias"], mesh, [Replicate()])
    asked: list[dict[str, Any]] = [
        {"granularity": 32, "reserve_p": 0.4},
        {"granularity": 96, "k": 11},
        {"granularity": 32, "reserve_p": 0.4, "scope": "tensor"},
    ]
    for options in asked:
        expected = select_child(scores, **options)
        assert select_child(placed, **options) == expected.placed(placed.items())
    for placement, granularity in ((Shard(1), 32), (Shard(0), 64)):
        placed["matrix"] = distribute_tensor(scores["matrix"], mesh, [placement])
        messages.append(message_of(placed, reserve_p=0.3, granularity=granularity))
    return messages


def message_of(scores: Mapping[str, Tensor], **options: Any) -> str:
    try:
        select_child(scores, **options)
    except ValueError as error:
        return str(error)
    return "no error"


def test_runs_lie_within_parts_or_are_refused(ranks: Ranks) -> None:
    for columns, rows in ranks.run(2, runs_in_parts):
        assert "granularity=32: parameter matrix" in columns
        assert "placements (S(1))" in columns
        assert "granularity=64: parameter matrix" in rows
        assert "placements (S(0))" in rows


def errors_of_one_rank() -> dict[str, str]:
    """What every rank says of faults that the last one alone has."""
    mesh = init_device_mesh("cpu", (3,))
    is_last = torch.distributed.get_rank() == 2
    scores = scores_of(MANY)

    def placed(name: str = "matrix", *places: Any) -> dict[str, Tensor]:
        found = {
            "whole": scores["short"],
            name: distribute_tensor(scores["matrix"], mesh, [Shard(0)]),
        }
        if is_last and places:
            found[places[0]] = sharding.placed_by(
                sharding.local_of(found[places[0]]).clone(), sharding.placed_of(found[places[0]])
            )
            sharding.local_of(found[places[0]]).view(-1)[places[1]] = places[2]
        return found

    shapes = placed()
    if is_last:
        shapes["whole"] = scores["square"]
    negative = placed()
    negative["whole"] = negative["whole"].index_fill(1, torch.tensor([2]), -1.0)
    unsummed = placed()
    as_partial = sharding.Placed(scores["bias"].shape, mesh, (Partial(),))
    unsummed["bias"] = sharding.placed_by(scores["bias"], as_partial)
    replaced = placed()
    if is_last:
        replaced["matrix"] = distribute_tensor(
            scores["matrix"], mesh, [Replicate()], src_data_rank=None
        )
    return {
        "NaN": message_of(placed("matrix", "matrix", 1, float("nan")), reserve_p=0.3),
        "negative": message_of(negative, reserve_p=0.3, granularity=32),
        "replica": message_of(placed("matrix", "whole", 4, -2.0), reserve_p=0.3),
        "name": message_of(placed("another" if is_last else "matrix"), reserve_p=0.3),
        "shape": message_of(shapes, reserve_p=0.3),
        "placements": message_of(replaced, reserve_p=0.3),
        "options": message_of(placed(), reserve_p=0.4 if is_last else 0.3),
        "share": message_of(placed(), reserve_p=2.0 if is_last else 0.3),
        "unsummed": message_of(unsummed, reserve_p=0.3),
        "number": message_of(placed(), k=5000),
    }


def test_an_error_of_one_rank_is_raised_on_all(ranks: Ranks) -> None:
    first, *others = ranks.run(3, errors_of_one_rank)
    assert all(other == first for other in others)
    # 13 rows on three ranks: 5, 5 and 3.
    assert "matrix: nan at element 961" in first["NaN"]
    # That rank's copy is not counted, but it would get another child.
    assert "whole: rank 0 and rank 2 hold the same elements" in first["replica"]
    assert "whole: -1.0 at element 2" in first["negative"]
    assert "another, matrix" in first["name"]
    assert "whole: shapes (3, 5) on rank 0 and (8, 24) on rank 2" in first["shape"]
    assert "(S(0)) on rank 0 and (R) on rank 2" in first["placements"].replace(
        "Shard(dim=0)", "S(0)"
    )
    assert "reserve_p=0.3 on rank 0 and 0.4 on rank 2" in first["options"]
    assert "reserve_p=2.0" in first["share"]
    assert "bias" in first["unsummed"]
    assert "unsummed" in first["unsummed"]
    assert "1..1263" in first["number"]


def replicas_of_other_scores() -> dict[str, str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "part"))
    scores = torch.full((4, 3), 1.0 + mesh.get_local_rank("replica"))
    apart = distribute_tensor(scores, mesh["part"], [Shard(0)], src_data_rank=None)
    placed = sharding.Placed(torch.Size([4, 3]), mesh, (Replicate(), Shard(0)))
    together = sharding.placed_by(sharding.local_of(apart), placed)
    same = distribute_tensor(torch.ones(4, 3), mesh["part"], [Shard(0)], src_data_rank=None)
    whole = torch.full((3,), 1.0 + torch.distributed.get_rank())
    assert select_child({"w": same}, k=5).count() == 5
    return {
        "meshes apart": message_of({"w": apart}, k=5),
        "one mesh": message_of({"w": together}, k=5),
        "whole": message_of({"w": same, "bias": whole}, k=5),
    }


def test_replicas_of_other_scores_are_refused(ranks: Ranks) -> None:
    for said in ranks.run(4, replicas_of_other_scores):
        assert "w: rank 0 and rank 2 hold the same elements" in said["meshes apart"]
        assert "w: rank 0 and rank 2 hold the same elements" in said["one mesh"]
        assert "bias: rank 0 and rank 1 hold the same elements" in said["whole"]
        assert "FisherAccumulator.reduce()" in said["whole"]


def on_turned_meshes() -> str:
    """Each rank has a mesh in which it is the first: both hold the same rows."""
    turned = [DeviceMesh("cpu", ranks) for ranks in ([0, 1], [1, 0])]
    mesh = turned[torch.distributed.get_rank()]
    placed = sharding.Placed(torch.Size([4, 3]), mesh, (Shard(0),))
    return message_of({"w": sharding.placed_by(torch.ones(2, 3), placed)}, k=2)


def test_parts_that_are_not_the_whole_together_are_refused(ranks: Ranks) -> None:
    for said in ranks.run(2, on_turned_meshes):
        assert "w: the parts of all ranks have 6 elements" in said
        assert "(4, 3) has 12" in said


def warned() -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    values = torch.zeros(10, 4)
    values[7, 1:3] = 1.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mask = select_child({"w": distribute_tensor(values, mesh, [Shard(0)])}, k=5)
    expected = (values > 0) | (torch.arange(40).view(10, 4) < 3)
    assert mask.gather() == ChildMask.from_dense({"w": expected})
    return [str(each.message) for each in caught]


def test_zeros_of_all_ranks_are_counted(ranks: Ranks) -> None:
    for messages in ranks.run(2, warned):
        assert len(messages) == 1
        assert "k=5 is more than the 2 non-zero values" in messages[0]


def written_twice(*_: Any) -> None:
    raise AssertionError("a file is written by rank 0 alone")


def algebra_of_parts(path: str) -> dict[str, Any]:
    """What masks of parts say of the whole, in the layouts of four ranks."""
    said: dict[str, Any] = {}
    bits = {name: scores_of(MANY)[name] > 0.5 for name in SHAPES}
    others = {name: scores_of(FEW)[name] > 0 for name in SHAPES}
    a, b = ChildMask.from_dense(bits, ["head"]), ChildMask.from_dense(others, ["head"])
    for name, layout in layouts_of(4).items():
        mesh = init_device_mesh("cpu", layout.mesh)
        of_a, of_b = (
            ChildMask.from_dense(
                {n: spread(each, layout, mesh) for n, each in of.items()}, ["head"]
            )
            for of in (bits, others)
        )
        said[name] = (
            of_a.count() == a.count(),
            of_a.count("matrix") == a.count("matrix"),
            of_a.density() == a.density(),
            of_a.overlap(of_b) == a.overlap(b),
            of_a.jaccard(of_b) == a.jaccard(b),
            (of_a & of_b) == (a & b),
            (a | of_b).gather() == (a | b),
            (~of_a).gather() == ~a,
            of_a != b,
            of_a.to("cpu") == of_a,
            torch.equal(of_a.dense("cube"), sharding.local_of(spread(bits["cube"], layout, mesh))),
        )
        if torch.distributed.get_rank() == 1:
            of_one = dict(of_a.words) | {"matrix": of_a.words["matrix"] ^ 1}
        else:
            of_one = dict(of_a.words)
        said[name] += (ChildMask(of_one, of_a.shapes, ["head"], parts=of_a.parts) != of_a,)
    with pytest.MonkeyPatch.context() as patch:
        if torch.distributed.get_rank():
            patch.setattr(child_mask, "save_whole", written_twice)
        of_a.save(f"{path}/child.safetensors")
    said["loaded"] = ChildMask.load(f"{path}/child.safetensors") == a
    said["words"] = repr(of_a)
    for what, act in {
        "save": lambda: of_a.save(f"{path}/nowhere/child.safetensors"),
        "copy": lambda: copy.deepcopy(of_a),
        "whole": lambda: of_a.require_whole("save_child"),
        "other parts": lambda: of_a & ChildMask.from_dense(
            {n: spread(each, LAYOUTS["rows-4"], init_device_mesh("cpu", (4,))) for n, each in bits.items()},
            ["head"],
        ),
    }.items():  # fmt: skip
        try:
            act()
        except (FileNotFoundError, TypeError, ValueError) as error:
            said[what] = f"{type(error).__name__}: {error}"
    return said


def test_masks_of_parts_count_compare_and_save_as_the_whole(ranks: Ranks, tmp_path: Path) -> None:
    for said in ranks.run(4, algebra_of_parts, str(tmp_path)):
        for name in layouts_of(4):
            assert said[name] == (True,) * 12, (name, said[name])
        assert said["loaded"]
        assert "this rank's part" in said["words"]
        assert said["save"].startswith("FileNotFoundError: ")
        assert "mask.gather()" in said["copy"]
        assert "save_child needs a whole mask" in said["whole"]
        assert "mask.gather()" in said["other parts"]
    assert [path.name for path in tmp_path.iterdir()] == ["child.safetensors"]


def trained_with_parts() -> tuple[bool, str]:
    """An optimizer with a mask of parts beside one with the whole mask, and one of other parts."""
    layout = LAYOUTS["rows and columns"]
    mesh = init_device_mesh("cpu", layout.mesh)
    scores = scores_of(MANY)
    whole = select_child(scores, reserve_p=0.3)
    placed = {name: spread(each, layout, mesh) for name, each in scores.items()}
    weights = []
    for mask in (whole, select_child(placed, reserve_p=0.3)):
        named = {name: torch.nn.Parameter(each.detach().clone()) for name, each in placed.items()}
        optimizer = FusedChildAdamW(named.items(), lr=0.1, child_mask=mask)
        for parameter in named.values():
            parameter.grad = torch.ones_like(parameter.detach())
        optimizer.step()
        weights.append({name: sharding.local_of(each.detach()) for name, each in named.items()})
    same = all(torch.equal(each, weights[1][name]) for name, each in weights[0].items())
    other = {name: spread(each, LAYOUTS["replicas of rows"], mesh) for name, each in scores.items()}
    try:
        optimizer.set_child_mask(select_child(other, reserve_p=0.3))
    except ValueError as error:
        return same, str(error)
    return same, ""


def test_an_optimizer_takes_the_parts_that_are_its_own(ranks: Ranks) -> None:
    for same, message in ranks.run(4, trained_with_parts):
        assert same
        assert "mask.gather()" in message
        assert "placements" in message


def noted(tensor: Tensor, sent: list[int]) -> Tensor:
    sent.append(tensor.nbytes)
    return tensor


def bytes_of_a_selection() -> int:
    """The bytes that a rank hands to collectives of tensors in a selection without ties, and with."""
    mesh = init_device_mesh("cpu", (2,))
    sent: list[int] = []
    values = torch.rand(1 << 16, generator=generator_of("wire"))
    values[:30_000] = 0.75
    placed = {"w": distribute_tensor(values.view(256, 256), mesh, [Shard(1)])}
    with pytest.MonkeyPatch.context() as patch:
        reduce = torch.distributed.all_reduce
        patch.setattr(
            torch.distributed, "all_reduce",
            lambda each, **options: reduce(noted(each, sent), **options),
        )  # fmt: skip
        mask = select_child(placed, k=20_000)
    assert int(counts_over_ranks(torch.tensor([int(mask.dense("w").sum())]))) == 20_000
    assert max(sent) <= 8 << 11
    return sum(sent)


def test_ranks_tell_each_other_numbers_of_elements_alone(ranks: Ranks) -> None:
    for sent in ranks.run(2, bytes_of_a_selection):
        assert 0 < sent < 64 << 10
