"""Kernels of one division or one square root, by which an AMD compiler's own expansions are known."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class _Variant(NamedTuple):
    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 1
    elementwise: bool = True
    tile: int = 64
    registers: int | None = None
    full: int | None = None
    lanes: int | None = None
    reduces: bool = False


@triton.jit
def _divide_kernel(x, y, out, DOUBLE: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, TILE)
    if DOUBLE:
        quotient = tl.load(x + at) / tl.load(y + at)
    else:
        quotient = tl.div_rn(tl.load(x + at), tl.load(y + at))
    tl.store(out + at, quotient)


@triton.jit
def _square_root_kernel(x, y, out, DOUBLE: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, TILE)
    root = tl.sqrt(tl.load(x + at)) if DOUBLE else tl.sqrt_rn(tl.load(x + at))
    tl.store(out + at, root)


VARIANTS = [
    _Variant(
        f"{kernel.__name__}-{kind}",
        kernel,
        {
            "x": f"*{kind}",
            "y": f"*{kind}",
            "out": f"*{kind}",
            "DOUBLE": "constexpr",
            "TILE": "constexpr",
        },
        {"DOUBLE": kind == "fp64", "TILE": 64},
    )
    for kernel in (_divide_kernel, _square_root_kernel)
    for kind in ("fp32", "fp64")
]
