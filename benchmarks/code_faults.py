"""What machine code must not do: spill, exchange, call, move narrowly, round twice, or take too long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .machine_code import Course, MachineCode


class Most(NamedTuple):
    """Bounds on instructions an element: of a full chunk, and of elements taken one by one.

    ``occupancy``: the least share of all threads that registers leave room for.
    """

    chunk: float | None = None
    scattered: float | None = None
    occupancy: float = 0.5


NO_BOUNDS = Most()


def faults_of(code: MachineCode, most: Most = NO_BOUNDS) -> list[str]:
    """What is wrong with a variant's machine code, a sentence each."""
    faults = list(code.rounding_faults)
    if code.local_bytes:
        faults.append(f"{code.local_bytes} bytes of local memory a thread: registers are spilled")
    if code.occupancy < most.occupancy:
        faults.append(
            f"{code.registers} registers allow {code.occupancy:.0%} occupancy, below {most.occupancy:.0%}"
        )
    if code.elementwise and (code.shared_bytes or code.exchanges):
        between = ", ".join(code.exchanges)
        faults.append(f"{code.shared_bytes} bytes of shared memory, {between} between lanes")
    if code.elementwise and not (code.full or code.lanes):
        faults.append("an elementwise kernel names neither a full chunk nor lanes")
    if code.full:
        faults += _chunk_faults(code, code.full)
    if code.lanes:
        faults += _scattered_faults(code)
    for way, course, bound in (
        ("a full chunk", code.chunk, most.chunk),
        ("elements one by one", code.scattered, most.scattered),
    ):
        if bound is not None and course is not None and course.instructions > bound:
            faults.append(
                f"{course.instructions:.1f} instructions an element of {way}, above {bound}"
            )
    return faults


def _chunk_faults(code: MachineCode, full: int) -> Iterator[str]:
    assert code.chunk is not None
    if code.chunk.loops and full == code.tile:
        yield "a loop on the path of a full chunk: its instructions cannot be counted"
    yield from _calls(code.chunk)
    for store in (False,) if code.reduces else (False, True):
        yield from _narrow_accesses(code, code.chunk, store)


def _narrow_accesses(code: MachineCode, chunk: Course, store: bool) -> Iterator[str]:
    """Floating-point tensors must move in 128 bits, those of 16-bit types in 64 or more."""
    what = "stores" if store else "loads"
    found = [a for a in chunk.accesses if a.store == store and not a.guarded]
    full, half = (code.asked.stored if store else code.asked.loaded)[:2]
    if not full + half:
        yield f"no unmasked {what} of floating-point tensors: there is no branch for full chunks"
        return
    widest = sum(a.bits for a in found if a.bits >= 128) // 8
    wide = sum(a.bits for a in found if a.bits >= 64) // 8
    if widest < full:
        yield f"128-bit {what} move {widest} bytes a thread, of {full} of 32- and 64-bit tensors"
    if wide < full + half:
        yield f"{what} of 64 bits and more move {wide} bytes a thread, of {full + half}"


def _scattered_faults(code: MachineCode) -> Iterator[str]:
    """Elements anywhere: an access of more than one of them would fault at an address that is not aligned."""
    if code.scattered is None:
        yield "no way for elements that lie anywhere: every one stores 128 bits at a time"
        return
    yield from _calls(code.scattered)
    for store, widest in zip((False, True), code.widest, strict=True):
        for bits in sorted({a.bits for a in code.scattered.accesses if a.store == store}):
            if bits > widest:
                what = "stores" if store else "loads"
                yield f"{what} of {bits} bits of elements anywhere, which have {widest} at most"


def _calls(course: Course) -> Iterator[str]:
    if course.unavoidable_calls:
        yield "a subroutine call that no way around avoids"
