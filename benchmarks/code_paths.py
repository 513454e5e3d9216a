"""The ways through a kernel's machine code: that of a full chunk, and that of elements one a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .assembly import Access, Block, Instruction, access_of, lane_accesses


@dataclass(frozen=True)
class Path:
    """What a thread executes, in order; the subroutines stepped over; the turn of a loop on the way."""

    instructions: tuple[Instruction, ...]
    accesses: tuple[Access, ...]
    slow_paths: tuple[str, ...]
    turn: tuple[Instruction, ...]  # of the loop with the longest one; empty without a loop
    turn_accesses: tuple[Access, ...]
    labels: frozenset[str]  # of its blocks

    def moves(self) -> tuple[list[Access], list[Access]]:
        """All accesses, and those of the loop, whatever their order."""
        return sorted(self.accesses), sorted(self.turn_accesses)


def full_chunk_path(blocks: list[Block]) -> Path:
    """The way from the entry to the exit that a full chunk takes.

    It is the one that stores most in accesses of 128 bits (where there are none: of 64), and of those the
    shortest: AMD's blocks for full and partial chunks stand one behind the other, each with a jump over it.
    Where nothing is stored in wide accesses it is the longest of all. Calls of subroutines (the slow paths of
    a division or a square root) are stepped around where that stores as much.

    Raises:
        ValueError: no way leads from the entry to the exit.
    """
    wide = next(
        (least for least in (128, 64) if any(_stored_bits(block, least) for block in blocks)), None
    )

    def worth(block: Block) -> tuple[int, int]:
        if wide is None:
            return 0, len(block.instructions)
        return _stored_bits(block, wide), -len(block.instructions)

    around, way = (_best_way(blocks, barred, worth) for barred in (_calls(blocks), set[str]()))
    if way is None:
        raise ValueError("no way leads from the kernel's entry to its exit")
    if around and around.worth[0] == way.worth[0]:
        return _path(blocks, around, _calls(blocks), worth)
    return _path(blocks, way, set(), worth)


def reducing_path(blocks: list[Block]) -> Path:
    """The way of a full chunk through a kernel that stores nothing but sums.

    It is the one that loads most at addresses that differ from lane to lane, in accesses of 128 bits, then of
    64, and of those the shortest. Where nothing is loaded so it is that of ``full_chunk_path``.
    """
    paths = []
    for wide in blocks:
        accesses = [access_of(item) for item in wide.instructions]
        if not any(found and not found.store and found.bits >= 64 for found in accesses):
            continue

        def worth(block: Block, wide: Block = wide) -> tuple[int, int]:
            return block is wide, -len(block.instructions)

        way = _best_way(blocks, _calls(blocks), worth)
        if way and wide.label in way.labels:
            paths.append(_path(blocks, way, _calls(blocks), worth))

    def loaded(path: Path) -> tuple[int, int, int]:
        bits = [a.bits for a in path.accesses if not a.store and not a.guarded]
        return (
            sum(each for each in bits if each >= 128),
            sum(each for each in bits if each >= 64),
            -len(path.instructions),
        )

    return max(paths, key=loaded, default=None) or full_chunk_path(blocks)


def scattered_path(blocks: list[Block]) -> Path | None:
    """The way of elements that are stepped one a thread and access, wherever they lie; None: there is none.

    It is one that moves most without any store of 128 bits; of its blocks, calls first, those are left out
    that move nothing at addresses that differ from lane to lane and can be gone around. So it is the way of
    a contiguous tensor, without index maps.
    """
    barred = {
        block.label
        for block in blocks
        if any(
            (found := access_of(i)) and found.store and found.bits >= 128
            for i in block.instructions
        )
    }

    def worth(block: Block) -> tuple[int, int]:
        accesses = [access_of(item) for item in block.instructions]
        return sum(found.bits for found in accesses if found), -len(block.instructions)

    way = _best_way(blocks, barred, worth)
    path = _path(blocks, way, barred, worth) if way else None
    if path is None or not any(access.store for access in path.accesses):
        return None
    for more in (_calls(blocks), *({block.label} for block in blocks)):
        less = _best_way(blocks, barred | more, worth) if more & path.labels else None
        shorter = _path(blocks, less, barred | more, worth) if less else None
        if shorter and shorter.moves() == path.moves():
            barred, path = barred | more, shorter
    return path


def _calls(blocks: list[Block]) -> set[str]:
    return {block.label for block in blocks if block.called}


def _path(
    blocks: list[Block], way: _Way, barred: set[str], worth: Callable[[Block], tuple[int, int]]
) -> Path:
    named = {block.label: block for block in blocks}

    def along(labels: Iterable[str]) -> tuple[Instruction, ...]:
        return tuple(item for label in labels for item in named[label].instructions)

    rounds = [_best_way(blocks, barred, worth, head, tail) for tail, head in way.loops]
    turn = max(
        (round_ for round_ in rounds if round_), key=lambda round_: round_.worth, default=None
    )
    turn_labels = turn.labels if turn else ()
    before = way.labels[: way.labels.index(turn_labels[0])] if turn else way.labels
    behind = [label for label in way.labels[len(before) :] if label not in turn_labels]
    accesses = tuple(lane_accesses(along([*before, *turn_labels, *behind])))
    begun, ended = (len(tuple(lane_accesses(along(s)))) for s in (before, [*before, *turn_labels]))
    called = sorted({block.called for block in blocks if block.called})
    return Path(
        _without_padding(along([*before, *turn_labels, *behind])),
        accesses,
        tuple(called),
        _without_padding(along(turn_labels)),
        accesses[begun:ended],
        frozenset([*before, *turn_labels, *behind]),
    )


def calls_on(path: Path) -> list[str]:
    """The subroutine calls that no way around avoids."""
    return [
        item.opcode
        for item in path.instructions
        if item.root == "CALL" and "`(.L" not in item.operands[0]
    ]


class _Way(NamedTuple):
    labels: tuple[str, ...]
    worth: tuple[int, int]
    loops: list[tuple[str, str]]  # last and first block of every loop that it enters


def _best_way(
    blocks: list[Block],
    barred: set[str],
    worth: Callable[[Block], tuple[int, int]],
    entry: str = "entry",
    last: str | None = None,
) -> _Way | None:
    """The way of most worth from the entry to an exit, or to the last block."""
    named = {block.label: block for block in blocks}
    order, backward = _depth_first(named, entry, barred)
    best: dict[str, tuple[tuple[int, int], tuple[str, ...]]] = {}
    for label in order:  # followers come before the blocks that lead to them
        block = named[label]
        ends: list[tuple[tuple[int, int], tuple[str, ...]]] = []
        ends += [((0, 0), ())] if (block.leaves if last is None else label == last) else []
        ends += [
            best[follower]
            for follower in block.followers
            if follower in best and (label, follower) not in backward
        ]
        if ends:
            so_far, way = max(ends, key=lambda end: end[0])
            first, second = worth(block)
            best[label] = ((first + so_far[0], second + so_far[1]), (label, *way))
    if entry not in best:
        return None
    value, labels = best[entry]
    loops = [(tail, head) for tail, head in backward if head in labels]
    return _Way(labels, value, sorted(loops))


def _depth_first(
    named: dict[str, Block], entry: str, barred: set[str]
) -> tuple[list[str], set[tuple[str, str]]]:
    order: list[str] = []
    backward: set[tuple[str, str]] = set()
    open_, done = {entry}, set()
    stack: list[tuple[str, Iterator[str]]] = [(entry, iter(named[entry].followers))]
    while stack:
        label, followers = stack[-1]
        for follower in followers:
            if follower in open_:
                backward.add((label, follower))
            elif follower in named and follower not in done and follower not in barred:
                open_.add(follower)
                stack.append((follower, iter(named[follower].followers)))
                break
        else:
            stack.pop()
            open_.remove(label)
            done.add(label)
            order.append(label)
    return order, backward


def _stored_bits(block: Block, least: int) -> int:
    """Bits stored without a guard in accesses of ``least`` bits and more."""
    accesses = [access_of(item) for item in block.instructions if not item.guarded]
    return sum(found.bits for found in accesses if found and found.store and found.bits >= least)


def _without_padding(instructions: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
    return tuple(item for item in instructions if item.root not in ("NOP", "s_nop", "s_waitcnt"))
