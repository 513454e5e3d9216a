"""GPUs as published, and what limits a kernel on them: memory or the issue of instructions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .assembly import Instruction
    from .machine_code import Course


class Generation(NamedTuple):
    """What all GPUs of a compilation target share, for one multiprocessor or compute unit.

    ``rates`` are lanes a clock: of all instructions together (``issue``) and of the pipes that have fewer.
    """

    cuda: bool
    lanes: int
    registers: int  # 32-bit registers a lane of one of the four schedulers
    register_unit: int  # registers a thread come in multiples of this
    most_warps: int
    most_blocks: int
    shared_bytes: int
    rates: dict[str, int]

    def occupancy(self, registers: int, threads: int, shared_bytes: int) -> float:
        """The share of the most warps that registers and shared memory leave room for."""
        warps = threads // self.lanes
        taken = -(-max(registers, 1) // self.register_unit) * self.register_unit
        blocks = min(
            4 * (self.registers // taken) // warps, self.most_blocks, self.most_warps // warps
        )
        if shared_bytes:
            blocks = min(blocks, self.shared_bytes // shared_bytes)
        return blocks * warps / self.most_warps

    def counted(self, instructions: Iterable[Instruction]) -> int:
        """Instructions that take an issue slot of the lanes; AMD's scalar unit has slots of its own."""
        return sum(self.cuda or item.opcode[0] != "s" for item in instructions)

    def pipes_of(self, instructions: Iterable[Instruction]) -> dict[str, int]:
        """Instructions by the pipe that bounds them, where that is not the issue alone."""
        pipe = _cuda_pipe if self.cuda else _amd_pipe
        found = Counter(pipe(item.opcode) for item in instructions)
        return {name: found[name] for name in self.rates if name in found}


def _cuda_pipe(opcode: str) -> str:
    root = opcode.partition(".")[0]
    if root in ("MUFU", "POPC", "FLO", "I2F", "F2I", "F2F", "I2FP"):
        return "special"
    if root in ("DADD", "DMUL", "DFMA", "DSETP"):
        return "double"
    if root in ("FADD", "FMUL", "FFMA", "HFMA2", "FADD2", "FMUL2", "FFMA2"):
        return "float"
    if root.startswith("IMAD"):
        return "multiply"
    if re.match(r"IADD|LOP|SHF|LEA|[IF]SETP|F?SEL|PRMT|[IF]MNMX|VIADD|FCHK|PLOP|IABS|F2FP", root):
        return "integer"
    return "other"


def _amd_pipe(opcode: str) -> str:
    if re.match(r"v_(rcp|rsq|sqrt|exp|log)_", opcode) or re.match(
        r"v_(mul_lo|mul_hi|mad_u64|mad_i64)", opcode
    ):
        return "special"
    return "other"


# CUDA C++ Programming Guide, "Arithmetic Instructions" (results per clock and multiprocessor) and "Technical
# Specifications per Compute Capability". Four schedulers issue one instruction of 32 lanes each clock.
def _cuda(shared_kib: int, fp32: int, fp64: int) -> Generation:
    rates = {
        "issue": 128,
        "float": fp32,
        "integer": 64,
        "multiply": 64,
        "special": 16,
        "double": fp64,
    }
    return Generation(True, 32, 512, 8, 64, 32, shared_kib * 1024, rates)


GENERATIONS = {
    "sm_80": _cuda(164, 64, 32),
    "sm_90": _cuda(228, 128, 64),
    "sm_100": _cuda(228, 128, 64),
    # AMD Instinct MI300 ISA guide and CDNA 3 white paper: 4 SIMDs of 16 lanes, 512 registers a lane and SIMD,
    # 8 waves a SIMD; transcendentals and 32-bit multiplications at a quarter of the rate.
    "gfx942": Generation(False, 64, 512, 8, 32, 32, 64 * 1024, {"issue": 64, "special": 16}),
}


class Gpu(NamedTuple):
    """A GPU as its maker publishes it."""

    name: str
    target: str
    units: int  # multiprocessors or compute units
    clock: float  # Hz, boost
    bandwidth: float  # bytes a second


GPUS = (
    # NVIDIA A100 datasheet (SXM, 80 GB) and Ampere white paper: 108 SMs, 1410 MHz.
    Gpu("A100", "sm_80", 108, 1.410e9, 2.039e12),
    # NVIDIA H100 and H200 datasheets (SXM): 67 TFLOPS fp32 = 132 SMs * 256 * 1.98 GHz; 3.35 and 4.8 TB/s.
    Gpu("H100", "sm_90", 132, 1.980e9, 3.35e12),
    Gpu("H200", "sm_90", 132, 1.980e9, 4.8e12),
    # NVIDIA HGX B200 datasheet: 8 GPUs have 600 TFLOPS fp32, = 148 SMs * 256 * 1.98 GHz each, and 62 TB/s.
    Gpu("B200", "sm_100", 148, 1.980e9, 7.7e12),
    # AMD Instinct MI300X data sheet: 304 compute units, 2100 MHz, 5.3 TB/s.
    Gpu("MI300X", "gfx942", 304, 2.100e9, 5.3e12),
)


def gpus_of(target: str) -> list[Gpu]:
    """The GPUs that run code of a target."""
    return [gpu for gpu in GPUS if gpu.target == target]


def seconds_per_element(gpu: Gpu, course: Course) -> dict[str, float]:
    """What memory and each pipe take for an element, were each of them alone."""
    found = {"memory": course.bytes_per_element / gpu.bandwidth}
    rates = GENERATIONS[gpu.target].rates
    for pipe, count in {"issue": course.instructions, **course.pipes}.items():
        found[pipe] = count / (gpu.units * gpu.clock * rates[pipe])
    return found


def limit_of(gpu: Gpu, course: Course) -> str:
    """The limit in words: which resource, how many elements a second, and how busy the next one is."""
    times = seconds_per_element(gpu, course)
    first, second = sorted(times, key=lambda name: -times[name])[:2]
    rate = 1e-9 / times[first]
    return f"{gpu.name}: {first}, {rate:.0f} G/s ({second} {times[second] / times[first]:.0%})"
