"""Reading machine code (SASS and amdgcn): its blocks, and what its instructions move."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

_SASS_LINE = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?P<predicate>@!?U?P\w+)?\s*(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>.*?)\s*;"
)
_SASS_LABEL = re.compile(r"^(?P<label>[.$\w]+):")
_SASS_TARGET = re.compile(r"`\((?P<label>[^)]+)\)")
_SASS_REGISTER = re.compile(r"\b(?P<file>U?R)(?P<number>\d+)\b(?P<wide>\.64)?")
_AMD_LINE = re.compile(r"^\s+(?P<opcode>[a-z]+_\w+)\s*(?P<operands>[^;]*?)\s*(?:;.*)?$")
_AMD_REGISTER = re.compile(r"\b(?P<file>[vsa])(?:(?P<number>\d+)|\[(?P<first>\d+):(?P<last>\d+)\])")
_AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}
# A write of these is the same in every lane, whatever was read.
_UNIFORM_RESULT = {"v_readfirstlane_b32", "R2UR"}


@dataclass(frozen=True)
class Instruction:
    """One instruction: its full opcode, whether a predicate guards it, and its operands as written."""

    opcode: str
    operands: tuple[str, ...] = ()
    guarded: bool = False

    @property
    def root(self) -> str:
        """The opcode without its modifiers: ``LDG`` of ``LDG.E.128``."""
        return self.opcode.partition(".")[0]


@dataclass
class Block:
    """Instructions without a branch between them, and the blocks that may follow."""

    label: str
    instructions: list[Instruction] = field(default_factory=list)
    followers: list[str] = field(default_factory=list)
    called: str | None = None
    leaves: bool = False


class Access(NamedTuple):
    """One access to global memory whose address differs from lane to lane."""

    store: bool
    bits: int
    guarded: bool


def read_sass(text: str, kernel: str) -> list[Block]:
    """Blocks of a kernel in ``nvdisasm -c``'s output, the entry first; called subroutines stand at the end.

    Raises:
        ValueError: the kernel is not there, or a jump has no target that can be read.
    """
    section = re.search(rf"(?m)^\.text\.{re.escape(kernel)}:\n(.*?)(?=^//-----|\Z)", text, re.S)
    if section is None:
        raise ValueError(f"no machine code of kernel {kernel!r} among the sections")
    blocks = [Block("entry")]
    for line in section[1].splitlines():
        if label := _SASS_LABEL.match(line):
            _open(blocks, label["label"])
        elif found := _SASS_LINE.search(line):
            operands = tuple(part.strip() for part in found["operands"].split(","))
            guarded = found["predicate"] not in (None, "@PT", "@UPT")
            _append_sass(blocks, Instruction(found["opcode"], operands, guarded))
    return blocks


def _append_sass(blocks: list[Block], instruction: Instruction) -> None:
    block = blocks[-1]
    block.instructions.append(instruction)
    target = _SASS_TARGET.search(", ".join(instruction.operands))
    if instruction.root in ("BRX", "JMX", "JMP"):
        raise ValueError(f"cannot follow {instruction.opcode} {instruction.operands}")
    within = target is not None and target["label"].startswith(".L")
    # For sm_80 some jumps within a kernel are calls that never return.
    if target is not None and (
        instruction.root == "BRA" or (instruction.root == "CALL" and within)
    ):
        conditional = instruction.guarded or len(instruction.operands) > 1
        _close(blocks, [target["label"]], falls_through=conditional)
    elif instruction.root == "EXIT":
        block.leaves = True
        _close(blocks, [], falls_through=instruction.guarded)
    elif instruction.root == "RET":
        _close(blocks, [], falls_through=instruction.guarded)
    elif instruction.root == "CALL":
        block.called = target["label"] if target else "?"
        _close(blocks, [], falls_through=True)


def read_amdgcn(text: str, kernel: str) -> list[Block]:
    """Blocks of a kernel in AMD assembly, the entry first.

    Raises:
        ValueError: the kernel is not there, or a jump has no target that can be read.
    """
    body = re.search(
        rf"(?m)^{re.escape(kernel)}:.*?\n(.*?)^\s*s_endpgm\n(.*?)^\s*\.section", text, re.S
    )
    if body is None:
        raise ValueError(f"no machine code of kernel {kernel!r} in the assembly")
    blocks = [Block("entry")]
    for line in (body[1] + "\ts_endpgm\n" + body[2]).splitlines():
        if label := re.match(r"^(\.LBB\w+):", line):
            _open(blocks, label[1])
        elif (found := _AMD_LINE.match(line)) and not line.lstrip().startswith("."):
            if found["opcode"] == "s_code_end":
                break
            _append_amd(blocks, _amd_instruction(found["opcode"], found["operands"]))
    return blocks


def _amd_instruction(opcode: str, operands: str) -> Instruction:
    return Instruction(opcode, tuple(re.split(r",\s*", operands)) if operands else ())


def _append_amd(blocks: list[Block], instruction: Instruction) -> None:
    block = blocks[-1]
    block.instructions.append(instruction)
    if instruction.opcode.startswith("s_cbranch"):
        _close(blocks, [instruction.operands[0]], falls_through=True)
    elif instruction.opcode == "s_branch":
        _close(blocks, [instruction.operands[0]], falls_through=False)
    elif instruction.opcode == "s_endpgm":
        block.leaves = True
        _close(blocks, [], falls_through=False)
    elif instruction.opcode in ("s_setpc_b64", "s_swappc_b64"):
        raise ValueError(f"cannot follow {instruction.opcode} {instruction.operands}")


def _open(blocks: list[Block], label: str) -> None:
    blocks[-1].followers.append(label)
    blocks.append(Block(label))


def _close(blocks: list[Block], targets: list[str], *, falls_through: bool) -> None:
    following = f"after {len(blocks)}"
    blocks[-1].followers = [*targets, following] if falls_through else targets
    # What stands behind a jump without a label is reached by nobody but a fall-through.
    blocks.append(Block(following))


def lane_accesses(instructions: tuple[Instruction, ...]) -> Iterator[Access]:
    """Accesses at addresses that depend on the lane: the thread's index is followed through registers."""
    varying: set[str] = set()
    for item in instructions:
        found = access_of(item)
        if found is not None and not varying.isdisjoint(_address(item)):
            yield found
        written, read = _registers(item)
        depends = item.root not in _UNIFORM_RESULT and not varying.isdisjoint(read)
        if depends or "SR_TID.X" in item.operands or "SR_LANEID" in item.operands:
            varying |= written
        elif not item.guarded:
            varying -= written
        if item is instructions[0] and _is_amd(item):
            varying.add("v0")  # holds the work-item's index at entry


def _is_amd(instruction: Instruction) -> bool:
    return instruction.opcode[0].islower()


@cache
def access_of(instruction: Instruction) -> Access | None:
    """The access to global memory that an instruction is, if it is one."""
    if _is_amd(instruction):
        found = re.match(
            r"(?:global|buffer|flat)_(load|store)_\w*?(dwordx\d|dword|short|byte)",
            instruction.opcode,
        )
        return Access(found[1] == "store", _AMD_BITS[found[2]], False) if found else None
    if instruction.root not in ("LDG", "STG", "LD", "ST"):
        return None
    width = re.search(r"\.[US]?(8|16|64|128|256)\b", instruction.opcode)
    return Access(
        instruction.root.startswith("ST"), int(width[1]) if width else 32, instruction.guarded
    )


def _address(instruction: Instruction) -> list[str]:
    """The registers that an access takes its address from."""
    if _is_amd(instruction):
        second = "buffer" in instruction.opcode or "load" in instruction.opcode
        return _names(instruction.operands[1 if second else 0], _AMD_REGISTER)
    brackets = re.findall(r"\[([^\]]*)\]", ", ".join(instruction.operands))
    return _names(brackets[-1], _SASS_REGISTER) if brackets else []


@cache
def _registers(instruction: Instruction) -> tuple[frozenset[str], frozenset[str]]:
    """Registers written and read; predicates are left out."""
    pattern = _AMD_REGISTER if _is_amd(instruction) else _SASS_REGISTER
    access = access_of(instruction)
    if not instruction.operands or (access and access.store):
        return frozenset(), frozenset()
    first, *rest = instruction.operands
    written = _names(first, pattern)
    if written and not _is_amd(instruction):
        count = (
            access.bits // 32
            if access
            else 2
            if re.search(r"\.(WIDE|64)\b", instruction.opcode)
            else 1
        )
        file, number = re.fullmatch(r"(U?R)(\d+)", written[0]).groups()  # type: ignore[union-attr]
        written = [f"{file}{int(number) + more}" for more in range(max(count, 1))]
    return frozenset(written), frozenset(_names(", ".join(rest), pattern))


def _names(text: str, pattern: re.Pattern[str]) -> list[str]:
    names: list[str] = []
    for found in pattern.finditer(text):
        groups = found.groupdict()
        first = int(groups["number"] or groups["first"])
        last = int(groups.get("last") or first + bool(groups.get("wide")))
        names += [f"{found['file']}{number}" for number in range(first, last + 1)]
    return names


def is_exchange(opcode: str) -> bool:
    """Whether an opcode moves values between lanes: shared memory, shuffles, barriers, reductions."""
    if opcode[0].islower():
        return bool(re.match(r"ds_|v_permlane|s_barrier|v_\w+_dpp", opcode))
    return bool(re.match(r"(SHFL|LDS|STS|LDSM|STSM|BAR|REDUX|VOTE|MATCH|ATOMS)\b", opcode))
