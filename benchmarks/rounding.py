"""Whether compiled code rounds each operation once, to nearest, and keeps subnormals (SPEC.md, section 3)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_PTX_FLOAT = re.compile(
    r"^\s*(?:@!?%p\d+\s+)?((?:fma|mad|add|sub|mul|div|sqrt|rcp|rsqrt)\.[\w.]*f\d\w*)", re.M
)
_AMD_OPCODE = re.compile(r"^\s+(v_\w+)", re.M)
_AMD_FUSED = re.compile(
    r"^\s+v_(?P<packed>pk_)?(?:fma|fmac|fmaak|fmamk|fma_mix|fma_mixlo|fma_mixhi|mad|mac)_b?f\d+\w*\s+(?P<operands>[^;\n]*)",
    re.M,
)
# x·1 + z and x·y − 0 round once, like an addition and a product: so 16-bit operands are widened on the way.
# Products with ±2**32 stand in the division of 64-bit integers, which goes by floats.
_ALONE = re.compile(r", -?1\.0,|, neg\(0\)|, 0x[4c]f800000")


class Expansions(NamedTuple):
    """Fused multiply-adds inside one correctly rounded division or square root, by type."""

    division: dict[str, int]
    square_root: dict[str, int]


def faults_in_ptx(text: str) -> Iterator[str]:
    """Operations of PTX that round twice, not to nearest, or flush subnormals.

    PTX lets the assembler fuse ``mul`` and ``add`` only where they name no rounding, so ``.rn`` on each of
    them and no ``fma`` mean that nothing is contracted; ``div.rn`` and ``sqrt.rn`` are expanded in SASS.
    """
    counts = Counter(_PTX_FLOAT.findall(text))
    for opcode, count in counts.items():
        if opcode.startswith(("fma", "mad")):
            yield f"{count} {opcode}: contracted"
        elif ".rn" not in opcode:
            yield f"{count} {opcode}: not rounded to nearest, or open to contraction"
        if ".ftz" in opcode:
            yield f"{count} {opcode}: flushes subnormals"


def faults_in_amdgcn(text: str, expected: Expansions) -> Iterator[str]:
    """More fused multiply-adds than the code's own divisions and square roots have, or flushed subnormals.

    Fused operations are part of a correctly rounded division or square root. So they are counted and compared
    with what the same compiler puts into one of each.
    """
    found = _fused(text)
    marks = _marks(text)
    conversions = len(
        re.findall(r"^\s+v_floor_f64", text, re.M)
    )  # of fp64 to 64-bit integers: one each
    allowed = sum(expected.division.get(kind, 0) * count for kind, count in marks.division.items())
    allowed += sum(
        expected.square_root.get(kind, 0) * count for kind, count in marks.square_root.items()
    )
    allowed += conversions
    if found != allowed:
        yield f"{found} fused multiply-adds where divisions and square roots have {allowed}: contracted"
    modes = dict(re.findall(r"\.amdhsa_float_denorm_mode_(32|16_64) (\d)", text))
    for width, mode in modes.items():
        if mode != "3":
            yield f"denormal mode {mode} of {width.replace('_', '- and ')}-bit floats: flushes subnormals"


def expansions(codes: Iterable[str]) -> Expansions:
    """What one division and one square root of a type have, from kernels of one kind and type each."""
    division: dict[str, int] = {}
    square_root: dict[str, int] = {}
    for text in codes:
        marks = _marks(text)
        for kind, count in marks.division.items():
            division[kind] = _fused(text) // count
        if not marks.division:
            for kind, count in marks.square_root.items():
                square_root[kind] = _fused(text) // count
    return Expansions(division, square_root)


def _fused(text: str) -> int:
    """Fused multiply-adds of a lane; a packed one does two."""
    return sum(
        2 if fused["packed"] else 1
        for fused in _AMD_FUSED.finditer(text)
        if not _ALONE.search(fused["operands"])
    )


def _marks(text: str) -> Expansions:
    """How many divisions and square roots there are: each has one instruction that nothing else has."""
    opcodes = Counter(_AMD_OPCODE.findall(text))
    division: Counter[str] = Counter()
    square_root: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        if found := re.match(r"v_div_fixup_(f\d+)", opcode):
            division[found[1]] += count
        elif found := re.match(r"v_(?:sqrt|rsq)_(f\d+)", opcode):
            square_root[found[1]] += count
    return Expansions(dict(division), dict(square_root))
