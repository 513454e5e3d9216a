"""What a kernel moves in unmasked accesses, read from Triton's IR before it knows any GPU."""

from __future__ import annotations

import re
from math import prod
from typing import NamedTuple

_ACCESS = re.compile(r"\btt\.(load|store) ([^:]*?) : tensor<((?:\d+x)+)!tt\.ptr<(\w+)>")
_BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2}


class TensorBytes(NamedTuple):
    """Bytes a thread: (of fp32 and fp64 tensors, of 16-bit floating-point tensors)."""

    loaded: tuple[float, float] = (0, 0)
    stored: tuple[float, float] = (0, 0)


def largest_unmasked(text: str, threads: int) -> TensorBytes:
    """The branch that moves most floating-point tensors without a mask, with all that encloses it."""
    best = TensorBytes()
    branches: list[list[tuple[str, str, float]]] = [[]]
    for line in text.splitlines():
        code = re.sub(r"\s*loc\(.*$", "", line).strip()
        if code.startswith("}") and len(branches) > 1:
            best = max(best, _total(branches), key=_all_of)
            branches.pop()
        if found := _ACCESS.search(code):
            operands = re.findall(r"%[\w#:]+", found[2])
            masked = len(operands) > (1 if found[1] == "load" else 2)
            elements = prod(int(size) for size in found[3].split("x") if size)
            if not masked and found[4] in _BYTES:
                branches[-1].append((found[1], found[4], elements * _BYTES[found[4]] / threads))
        if code.endswith("{"):
            branches.append([])
    return max(best, _total(branches), key=_all_of)


def widest_elements(text: str) -> tuple[int, int]:
    """Bits of the widest element of any tensor that is loaded, and of any that is stored."""
    bits = {"load": 0, "store": 0}
    for what, _, _, kind in _ACCESS.findall(text):
        bits[what] = max(bits[what], int(kind.lstrip("bfi")))
    return bits["load"], bits["store"]


def _total(branches: list[list[tuple[str, str, float]]]) -> TensorBytes:
    def of(what: str, half: bool) -> float:
        return sum(
            n for b in branches for w, kind, n in b if w == what and (_BYTES[kind] == 2) == half
        )

    return TensorBytes(
        (of("load", False), of("load", True)), (of("store", False), of("store", True))
    )


def _all_of(moved: TensorBytes) -> float:
    return sum(moved.loaded) + sum(moved.stored)
