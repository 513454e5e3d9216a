"""What of a sharded parameter lies on this rank, and which elements those are (SPEC.md, section 10)."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, rank_values
from .plan_row import IndexMap, contiguous_map, strided_map

# Counts and strides of positions along one dimension, outermost first.
_Levels = list[tuple[int, int]]


class Placed(NamedTuple):
    """How a whole parameter is spread over ranks: what a DTensor knows of it besides values."""

    shape: torch.Size
    device_mesh: Any
    placements: tuple[Any, ...]


def placed_of(tensor: Tensor) -> Placed | None:
    """How a DTensor is placed; None of a plain tensor."""
    if not is_sharded(tensor):
        return None
    sharded: Any = tensor
    return Placed(tensor.shape, sharded.device_mesh, tuple(sharded.placements))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this rank holds a part (or a replica)."""
    # Nobody has a DTensor whose module was never imported; importing it takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds: memory that kernels can work on, of a plain one itself."""
    if not is_sharded(tensor):
        return tensor
    local: Any = tensor._local_tensor  # type: ignore[attr-defined]
    # A gradient that a collective is still writing.
    return local.wait() if hasattr(local, "wait") else local


def parts_stand(rows: Iterable[Any]) -> bool:
    """Whether the parts that rows of sharded parameters know are still theirs."""
    return all(local_of(row.sharded) is row.parameter for row in rows)


@contextmanager
def gradients_of_parts(rows: Sequence[Any]) -> Iterator[None]:
    """Inside the block the parts of sharded parameters have their parts of the gradients as ``.grad``.

    A gradient that is placed otherwise than its parameter, as the unsummed one of a replicated weight, is
    brought to the parameter's placements: a collective of the ranks that hold it.

    Args:
        rows: of a plan (step_plan.Row), all of them of ``sharded`` parameters.
    """
    try:
        for row in rows:
            _give_gradient(row.label, row.sharded, row.parameter)
        yield
    finally:
        for row in rows:
            row.parameter.grad = None


def _give_gradient(label: str, sharded: Any, part: Tensor) -> None:
    if sharded.grad is None:
        part.grad = None
        return
    of_part = gradient_part(label, sharded.grad, sharded)
    if of_part.dtype != part.dtype and part.grad_dtype is not None:
        part.grad_dtype = None  # any: ops.check_gradient says which will do
    part.grad = of_part


def gradient_part(label: str, grad: Any, like: Tensor) -> Tensor:
    """Of a gradient what goes with this rank's part of ``like``; of a plain tensor's the gradient itself.

    One that is placed otherwise is redistributed: a collective of the ranks that hold it.

    Raises:
        ValueError: no DTensor of the shape of ``like``.
    """
    if not is_sharded(like):
        plain: Tensor = grad
        return plain
    if not is_sharded(grad) or grad.shape != like.shape:
        raise ValueError(
            f"gradient of {label}: a {type(grad).__name__} of shape {tuple(grad.shape)} for a DTensor of "
            f"shape {tuple(like.shape)}; let backward make it, or place it as the parameter is"
        )
    # Once a tensor and step: a DTensor's own properties take three times as long.
    own, theirs = like._spec, grad._spec  # type: ignore[attr-defined]
    if theirs.placements != own.placements or theirs.mesh != own.mesh:
        grad = grad.redistribute(own.mesh, own.placements)
    return local_of(grad)


def element_map_of(label: str, tensor: Tensor) -> IndexMap:
    """Which elements of the whole parameter this rank's part has (SPEC.md, eq. 5).

    Raises:
        ValueError: placements that four levels cannot express, unsummed values, a part of another
            shape than its placements say, or a parameter that FullyShardedDataParallel has flattened.
    """
    if not is_sharded(tensor):
        check_whole(label, tensor)
        return contiguous_map(tensor.numel())
    if local_of(tensor).numel() == 0:
        return contiguous_map(0)
    check_part(label, tensor)
    return element_map_of_part(label, tensor)


def check_part(label: str, tensor: Tensor) -> None:
    """Refuse a sharded tensor whose part is not what its placements say.

    Raises:
        ValueError: unsummed values, or a part of another shape.
    """
    expected, held = part_shape(label, tensor), local_of(tensor).shape
    if expected != held and (expected.numel() or held.numel()):
        raise ValueError(
            f"{described(label, tensor)} holds {tuple(held)} on this rank, and not "
            f"{tuple(expected)}, as its placements say; make it with distribute_tensor"
        )


def part_shape(label: str, placed: Any) -> torch.Size:
    """The shape of this rank's part of a DTensor, or of a ``Placed``.

    Raises:
        ValueError: unsummed values.
    """
    if placed.device_mesh.get_coordinate() is None:
        return torch.Size([0])
    return torch.Size(map(len, positions_of(label, placed)))


def element_map_of_part(label: str, placed: Any) -> IndexMap:
    """The same of a ``Placed``, or of a DTensor that has been checked."""
    positions = positions_of(label, placed)
    if not all(map(len, positions)):
        return contiguous_map(0)
    sizes, strides, base = [], [], 0
    for dim, (of_dim, stride) in enumerate(zip(positions, strides_of(placed), strict=True)):
        base += of_dim[0] * stride
        levels = _levels(of_dim)
        if levels is None:
            raise ValueError(
                f"{described(label, placed)}: the positions of this rank's part along dimension {dim} "
                "follow no regular steps; shard evenly, or along another dimension"
            )
        sizes += [size for size, _ in levels]
        strides += [step * stride for _, step in levels]
    try:
        return strided_map(sizes, strides, base)
    except ValueError as error:
        raise ValueError(f"{described(label, placed)}: {error}; shard fewer dimensions") from None


def check_whole(label: str, tensor: Tensor) -> None:
    """Refuse the pieces of FullyShardedDataParallel, which do not say which elements they hold.

    Raises:
        ValueError: names the parameter.
    """
    # torch marks so both the flat parameters and the original ones, which are views of them.
    if getattr(tensor, "_fsdp_flattened", False):
        raise ValueError(
            f"parameter {label} was flattened by FullyShardedDataParallel, which keeps no indexes of "
            "elements; use fully_shard (FSDP2)"
        )


def positions_of(
    label: str, tensor: Any, coordinate: Sequence[int] | None = None
) -> list[Sequence[int]]:
    """For every dimension of the whole, the ascending positions of this rank, or of a coordinate of the mesh.

    Raises:
        ValueError: unsummed values.
    """
    found: list[Sequence[int]] = [range(size) for size in tensor.shape]
    coordinate = tensor.device_mesh.get_coordinate() if coordinate is None else coordinate
    if coordinate is None:
        return [range(0) for _ in tensor.shape]
    mesh_shape = tensor.device_mesh.shape
    for placement, count, index in zip(tensor.placements, mesh_shape, coordinate, strict=True):
        if placement.is_partial():
            raise ValueError(
                f"{described(label, tensor)} has unsummed values; redistribute it before training"
            )
        if not hasattr(placement, "dim"):
            continue
        # FSDP over tensor parallelism cuts what the other has cut already: each piece for itself.
        pieces = _chunks(found[placement.dim], getattr(placement, "split_factor", 1))
        mine = [_chunks(piece, count)[index] for piece in pieces]
        found[placement.dim] = mine[0] if len(mine) == 1 else [at for part in mine for at in part]
    return found


def _chunks(positions: Sequence[int], count: int) -> list[Sequence[int]]:
    """As ``torch.chunk`` cuts: equal pieces, the last ones shorter or empty."""
    size = max(1, -(-len(positions) // count))
    return [positions[index * size : (index + 1) * size] for index in range(count)]


def _levels(positions: Sequence[int]) -> _Levels | None:
    """Positions as regular steps of regular steps, outermost first; None where they are not."""
    if isinstance(positions, range) or len(positions) < 2:
        return [(len(positions), 1)]
    step = positions[1] - positions[0]
    run = next(
        (at for at, (a, b) in enumerate(pairwise(positions), 1) if b - a != step), len(positions)
    )
    if run == len(positions):
        return [(run, step)]
    inner = range(0, run * step, step)
    starts = positions[::run]
    if any(
        start + offset != at
        for block, start in enumerate(starts)
        for offset, at in zip(inner, positions[block * run : (block + 1) * run], strict=False)
    ):
        return None
    outer = _levels(starts)
    return None if outer is None or len(positions) % run else [*outer, (run, step)]


def strides_of(placed: Any) -> tuple[int, ...]:
    """The strides of a whole parameter, row-major."""
    return tuple(math.prod(placed.shape[dim + 1 :]) for dim in range(len(placed.shape)))


def described(label: str, tensor: Any) -> str:
    """A DTensor, or a ``Placed``, with its placements, for messages."""
    placements = ", ".join(map(str, tensor.placements))
    mesh = "×".join(map(str, tensor.device_mesh.shape))
    return (
        f"parameter {label}, a DTensor of shape {tuple(tensor.shape)} with placements ({placements}) on a "
        f"mesh of {mesh} ranks"
    )


def words_of_part(label: str, words: Tensor, tensor: Tensor | Placed) -> Tensor:
    """Of the mask words of a whole parameter those of this rank's part."""
    if not isinstance(tensor, Placed) and not is_sharded(tensor):
        return words
    part = _cut(ops.unpack_mask(words, tensor.shape), positions_of(label, tensor))
    return ops.pack_mask(part.contiguous())


def _cuts(placed: Any) -> list[int]:
    """The dimensions of the mesh over which a DTensor is cut."""
    return [at for at, placement in enumerate(placed.placements) if hasattr(placement, "dim")]


def is_cut_in_order(tensor: Any) -> bool:
    """Whether one part of a DTensor ends where the next begins."""
    cutting = [tensor.placements[cut] for cut in _cuts(tensor)]
    return all(each.dim == 0 and not hasattr(each, "split_factor") for each in cutting)


def numbers_of_parts(label: str, tensor: Any) -> list[Tensor]:
    """For every dimension of a DTensor, what each position adds to the number of the part it lies in.

    int64, on the CPU; the sum over an element's positions is the row that its part has in ``of_all_parts``.
    """
    shape, cuts = tensor.device_mesh.shape, _cuts(tensor)
    strides = {cut: math.prod(shape[other] for other in cuts if other > cut) for cut in cuts}
    tables = [torch.zeros(size, dtype=torch.int64) for size in tensor.shape]
    for dim, table in enumerate(tables):
        of_dim = [cut for cut in cuts if tensor.placements[cut].dim == dim]
        for indices in itertools.product(*(range(shape[cut]) for cut in of_dim)):
            at = [0] * len(shape)
            for cut, index in zip(of_dim, indices, strict=True):
                at[cut] = index
            held = positions_of(label, tensor, at)[dim]
            table[list(held)] = sum(strides[cut] * at[cut] for cut in of_dim)
    return tables


def placements_along_first(tensor: Any) -> list[Any]:
    """Placements that cut another tensor's first dimension over the mesh dimensions that cut this one."""
    from torch.distributed.tensor import Shard

    cuts = _cuts(tensor)
    return [Shard(0) if at in cuts else each for at, each in enumerate(tensor.placements)]


def of_all_parts(values: Tensor, tensor: Any) -> Tensor:
    """One row from every part of a DTensor, ``[parts, n]``: a collective of the ranks that hold it."""
    made = type(tensor.detach()).from_local(
        values.view(1, -1), tensor.device_mesh, placements_along_first(tensor), run_check=False
    )
    return whole_of(made)


def whole_of(tensor: Tensor) -> Tensor:
    """All of a tensor on this rank, row-major; of a DTensor a collective of the ranks that hold it."""
    if not is_sharded(tensor):
        return tensor
    like: Any = tensor
    # Not every process group moves int16; bits are bits.
    moved = like.view(torch.bfloat16) if tensor.dtype == torch.int16 else like
    with rank_values.said_when_late():
        whole: Tensor = moved.full_tensor().view(tensor.dtype)
        return whole.contiguous()


def on_any_rank(fact: bool, tensor: Tensor) -> bool:
    """Whether something is so on any of the ranks that hold a DTensor, all of which must ask."""
    from torch.distributed.tensor import Partial

    like: Any = tensor
    told = torch.tensor([int(fact)], device=local_of(tensor).device)
    summed = type(like).from_local(told, like.device_mesh, [Partial()] * like.device_mesh.ndim)
    return bool(summed.full_tensor() > 0)


def part_of(label: str, value: Tensor, tensor: Tensor) -> Tensor:
    """Of a value a weight, of a whole parameter or sharded in any way, what goes with this rank's part."""
    if not is_sharded(tensor):
        return value
    like: Any = tensor
    if is_sharded(value) and value.device_mesh != like.device_mesh:  # type: ignore[attr-defined]
        value = whole_of(value)  # nothing redistributes from mesh to mesh
    if is_sharded(value):
        return local_of(value.redistribute(like.device_mesh, like.placements))  # type: ignore[attr-defined]
    return _cut(value, positions_of(label, tensor))


def _cut(whole: Tensor, positions: Sequence[Sequence[int]]) -> Tensor:
    for dim, of_dim in enumerate(positions):
        if isinstance(of_dim, range):
            whole = whole.narrow(dim, of_dim.start if of_dim else 0, len(of_dim))
        else:
            at = torch.tensor(of_dim, dtype=torch.int64, device=whole.device)
            whole = whole.index_select(dim, at)
    return whole


def placed_as(part: Tensor, tensor: Tensor) -> Tensor:
    """A value a weight of this rank's part as the DTensor that it is a part of; of a plain tensor itself."""
    if not is_sharded(tensor):
        return part
    return placed_by(part, placed_of(tensor))


def placed_by(part: Tensor, placed: Placed | None) -> Tensor:
    """The same by a ``Placed``; None leaves the part as it is."""
    if placed is None:
        return part
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(placed.shape, strides_of(placed), part.dtype)
    spec = DTensorSpec(placed.device_mesh, placed.placements, tensor_meta=meta)
    # As fully_shard does: DTensor.from_local would move a part that is offloaded to the mesh's device.
    made: Tensor = DTensor(part, spec, requires_grad=False)
    return made


def first_rank_of(tensor: Tensor) -> int | None:
    """The lowest rank of the mesh that holds the parts of a DTensor; of a plain tensor None."""
    if not is_sharded(tensor):
        return None
    like: Any = tensor
    return int(like.device_mesh.mesh.min())


def is_first_replica(tensor: Any) -> bool:
    """Whether this rank's part of a DTensor, or of a ``Placed``, is the first of its replicas in the mesh."""
    coordinate = tensor.device_mesh.get_coordinate()
    return coordinate is not None and not any(
        index and placement.is_replicate()
        for index, placement in zip(coordinate, tensor.placements, strict=True)
    )
