"""Op fisher_accumulate: sums of squared gradients of many tensors in one launch (SPEC.md, eq. 13).

F[i] <- fl(F[i] + fl(c * fl(g[i] * g[i]))), fp32 ``[numel]``, for every tensor of a list; g in fp32, fp64,
bf16 or fp16 with any strides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan_row import IndexMap, strided_map
from . import launch
from .philox import mapped_index

# Columns of a tensor's row: address of sums, address of gradient, elements, bits of c, access, storage map.
_WIDTH = tl.constexpr(14)
# Access: whether the gradient lies row-major in memory, and both begin where a wide access may.
_STRIDED, _ROW_MAJOR, _ALIGNED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def added_square(total, gradient, scale):
    """Eq. 13 for elements: fp32 sums, gradients of any type, a fp32 scalar."""
    single = gradient.to(tl.float32)
    return total + scale * (single * single)


@triton.jit
def _fisher_accumulate_kernel(
    chunks, rows, GRADIENT: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr
):
    program = tl.program_id(0)
    row = rows + tl.load(chunks + 2 * program).to(tl.int64) * _WIDTH
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * TILE
    sums = tl.load(row).to(tl.pointer_type(tl.float32))
    gradients = tl.load(row + 1).to(tl.pointer_type(GRADIENT))
    numel = tl.load(row + 2)
    scale = tl.load(row + 3).to(tl.int32).to(tl.float32, bitcast=True)
    access = tl.load(row + 4)
    if (access == _ALIGNED) & (start + TILE <= numel):
        # Both get four elements a thread, so that none has to change hands.
        BYTES: tl.constexpr = 8 if GRADIENT.primitive_bitwidth == 16 else 16
        lane = tl.arange(0, TILE)
        place = tl.multiple_of(sums + start, 16) + lane
        wide = tl.load(tl.multiple_of(gradients + start, BYTES) + lane)
        tl.store(place, added_square(tl.load(place), wide, scale))
    else:
        for at in range(start, tl.minimum(start + TILE, numel), LANES):
            local = at + tl.arange(0, LANES)
            inside = local < numel
            offset = local
            if access == _STRIDED:
                offset = mapped_index(local, row + 5)
            gradient = tl.load(gradients + offset, inside)
            total = added_square(tl.load(sums + local, inside), gradient, scale)
            tl.store(sums + local, total, inside)


def fisher_accumulate_(sums: Sequence[Tensor], gradients: Sequence[Tensor], scale: float) -> None:
    """Add every scaled squared gradient to its sums (contract: ops.fisher_accumulate_)."""
    device = sums[0].device
    for dtype in {gradient.dtype for gradient in gradients}:
        pairs = [
            (total, _readable(gradient))
            for total, gradient in zip(sums, gradients, strict=True)
            if gradient.dtype == dtype
        ]
        _accumulate_type_(pairs, scale, dtype, device)


def _accumulate_type_(
    pairs: Sequence[tuple[Tensor, tuple[Tensor, IndexMap]]],
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """The launch for the gradients of one type."""
    generation = launch.generation(device)
    config = launch.config("fisher_accumulate", generation)
    scale_bits = int(torch.tensor(scale, dtype=torch.float32, device="cpu").view(torch.int32))
    rows: list[int] = []
    for total, (gradient, storage) in pairs:
        addresses = (total.data_ptr(), gradient.data_ptr())
        access = _ROW_MAJOR if storage.is_contiguous else _STRIDED
        if storage.is_contiguous and all(address % 16 == 0 for address in addresses):
            access = _ALIGNED
        rows += [*addresses, total.numel(), scale_bits, access.value, *storage.columns()]
    chunks = launch.chunks([total.numel() for total, _ in pairs], config.tile, device)
    launch.launch(
        _fisher_accumulate_kernel,
        chunks.shape[0],
        device,
        (chunks, launch.table(rows, device)),
        _constants(launch.TYPES[dtype], generation),
        config.num_warps,
    )


def _readable(gradient: Tensor) -> tuple[Tensor, IndexMap]:
    """A gradient and its storage map; a copy where elements share memory, or four levels do not do."""
    try:
        return gradient, strided_map(gradient.shape, gradient.stride())
    except ValueError:
        copy = gradient.contiguous()
        return copy, strided_map(copy.shape, copy.stride())


def _constants(gradient: Any, generation: str) -> dict[str, Any]:
    config = launch.config("fisher_accumulate", generation)
    return {"GRADIENT": gradient, "TILE": config.tile, "LANES": launch.lanes(generation, config)}


def variants(generation: str) -> Iterator[launch.Variant]:
    """What is compiled ahead of time."""
    config = launch.config("fisher_accumulate", generation)
    for dtype in launch.TYPES.values():
        constants = _constants(dtype, generation)
        yield launch.Variant(
            f"fisher_accumulate {dtype}",
            _fisher_accumulate_kernel,
            {"chunks": "*i32", "rows": "*i64", **dict.fromkeys(constants, "constexpr")},
            constants,
            config.num_warps,
            elementwise=True,
            tile=config.tile,
            full=config.tile,
            lanes=constants["LANES"],
        )
