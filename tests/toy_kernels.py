"""Small kernels in the manner of the real ones, good ones and such as lack one property each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl


class ToyVariant(NamedTuple):
    """The same fields as a variant of the package's kernels."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    elementwise: bool = True
    tile: int = 1024
    registers: int | None = None
    full: int | None = None
    lanes: int | None = None
    reduces: bool = False


@triton.jit
def _update(w, g, m, v, numbers):  # type: ignore[no-untyped-def]
    m = tl.load(numbers) * m + tl.load(numbers + 1) * g
    v = tl.load(numbers + 2) * v + tl.load(numbers + 3) * (g * g)
    w = w - tl.load(numbers + 4) * w
    denominator = tl.sqrt_rn(v) * tl.load(numbers + 5) + tl.load(numbers + 6)
    return w - tl.div_rn(tl.load(numbers + 7) * m, denominator), m, v


@triton.jit
def _step_kernel(  # type: ignore[no-untyped-def]
    chunks,
    rows,
    KIND: tl.constexpr,
    W_HINT: tl.constexpr,
    HINT: tl.constexpr,
    WHAT: tl.constexpr,
    TILE: tl.constexpr,
):
    chunk = chunks + 2 * tl.program_id(0)
    row = rows + tl.load(chunk) * 16
    start = tl.load(chunk + 1) * TILE
    numel = tl.load(row)
    w_at = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(KIND)), W_HINT) + start
    g_at = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(KIND)), W_HINT) + start
    m_at = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.float32)), HINT) + start
    v_at = tl.multiple_of(tl.load(row + 4).to(tl.pointer_type(tl.float32)), HINT) + start
    numbers = (row + 8).to(tl.pointer_type(tl.float32))
    at = tl.arange(0, TILE)
    if (start + TILE <= numel) & (WHAT != "masked"):
        w = tl.load(w_at + at).to(tl.float32)
        g = tl.load(g_at + at).to(tl.float32)
        if WHAT == "reduction":
            g = g * tl.sum(g, 0)
        w, m, v = _update(w, g, tl.load(m_at + at), tl.load(v_at + at), numbers)
        if WHAT == "approximate":
            w = w / m
        tl.store(w_at + at, w.to(KIND))
        tl.store(m_at + at, m)
        tl.store(v_at + at, v)
    else:
        inside = start + at < numel
        w = tl.load(w_at + at, mask=inside, other=0).to(tl.float32)
        g = tl.load(g_at + at, mask=inside, other=0).to(tl.float32)
        m = tl.load(m_at + at, mask=inside, other=0)
        v = tl.load(v_at + at, mask=inside, other=0)
        w, m, v = _update(w, g, m, v, numbers)
        tl.store(w_at + at, w.to(KIND), mask=inside)
        tl.store(m_at + at, m, mask=inside)
        tl.store(v_at + at, v, mask=inside)


@triton.jit
def _loop_kernel(values, count, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, TILE)
    for chunk in range(count):
        here = values + chunk * TILE + at
        tl.store(here, tl.load(here) * 0.5)


@triton.jit
def _sums_kernel(row, sums, HINT: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * TILE
    values = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), HINT) + start
    at = tl.arange(0, TILE)
    left = tl.load(row + 1) - start
    if left >= TILE:
        tl.store(sums + tl.program_id(0), tl.sum(tl.load(values + at), 0))
    else:
        tl.store(sums + tl.program_id(0), tl.sum(tl.load(values + at, at < left, 0.0), 0))


def variants(target_generation: str) -> Iterator[ToyVariant]:
    """The good kernels first, then those with one fault each."""
    four = 1024 if target_generation == "gfx942" else 512  # four elements a thread
    yield _step("fp32", tl.float32, 16, tile=four)
    yield _step("bf16", tl.bfloat16, 8, tile=four)
    yield _step("fp16", tl.float16, 8, tile=four)
    yield _step("masked only", tl.float32, 16, what="masked", tile=four)
    yield _step("no hint", tl.float32, 4, hint=4, tile=four)
    yield _step("bf16 of eight", tl.bfloat16, 16, tile=2 * four)
    yield _step("reduction", tl.float32, 16, what="reduction", tile=four)
    yield _step("approximate division", tl.float32, 16, what="approximate", tile=four)
    yield _step("two a thread", tl.float32, 16, tile=four // 2)
    yield _step("many registers", tl.float32, 16, tile=8192 if four == 1024 else 2048)
    signature = {"values": "*fp32", "count": "i32", "TILE": "constexpr"}
    yield ToyVariant("loop", _loop_kernel, signature, {"TILE": 1024}, full=1024)
    yield _sums("sums", 16, four)
    yield _sums("narrow sums", 4, four)


def _step(
    name: str, kind: Any, w_hint: int, *, hint: int = 16, what: str = "step", tile: int
) -> ToyVariant:
    constants = {"KIND": kind, "W_HINT": w_hint, "HINT": hint, "WHAT": what, "TILE": tile}
    signature = {"chunks": "*i64", "rows": "*i64", **dict.fromkeys(constants, "constexpr")}
    return ToyVariant(name, _step_kernel, signature, constants, tile=tile, full=tile)


def _sums(name: str, hint: int, tile: int) -> ToyVariant:
    constants = {"HINT": hint, "TILE": tile}
    signature = {"row": "*i64", "sums": "*fp32", **dict.fromkeys(constants, "constexpr")}
    return ToyVariant(
        name, _sums_kernel, signature, constants,
        elementwise=False, tile=tile, full=tile, reduces=True,
    )  # fmt: skip
