"""How kernels get onto a device: tables and chunk maps, fixed configurations, the device guard.

A launch serves many tensors. Their addresses stand in a table on the device, and a chunk map says for
every program which row of the table, and which part of that tensor, it works on.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Whether kernels run in Triton's interpreter. Triton decides it when a function is defined, for its own
#: library when it is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret) and not isinstance(tl.philox, triton.JITFunction)


#: Triton's name of every type that weights and gradients may have.
TYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class Config(NamedTuple):
    """How an op is cut up on a generation of GPUs: elements a program, and its warps."""

    tile: int
    num_warps: int


class Variant(NamedTuple):
    """One compiled form of a kernel: what a launch asks for, and what is compiled ahead of time.

    ``signature`` has Triton's type of every argument ("*i64", "i32", "constexpr", ...), ``constants`` the
    values of the constexpr ones. ``elementwise``: the kernel needs neither shared memory nor shuffles.
    ``registers``: the most that a thread may have. ``full``: the elements that its branch of 128-bit
    accesses takes at a time, and ``lanes``: those that its branch for elements anywhere takes at a time, one
    a thread and access; None where it has no such branch. ``reduces``: a full chunk is only read.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    elementwise: bool
    tile: int
    registers: int | None = None
    full: int | None = None
    lanes: int | None = None
    reduces: bool = False


#: Registers a thread with which half of an NVIDIA multiprocessor's 2048 threads can be resident.
HALF_OCCUPANCY = 64
THIRD_OCCUPANCY = 80  # three eighths of them

# Never autotuned: the trial runs of an in-place kernel would change weights and state. Four elements a
# thread are one 128-bit access of fp32, and leave registers for more than half of all threads. On an H200
# programs of four warps were 2 to 15 % faster than of eight but for scattered children, and eight elements a
# thread another 2 to 4 % where they fit into 64 registers (`python -m benchmarks.gpu --sweep`, 2026-11-27).
_GENERATIONS: dict[str, dict[str, Config]] = {
    "sm_80": {},
    "sm_90": {
        "child_adamw_light": Config(1024, 4),
        "child_adamw": Config(512, 4),
        "child_adamw_runs": Config(512, 4),
    },
    "sm_100": {},
    # Warps of 64 lanes.
    "gfx942": {
        "child_adamw_light": Config(1024, 4),
        "child_adamw": Config(1024, 4),
        "child_adamw_compact": Config(1024, 4),
        "child_adamw_runs": Config(1024, 4),
        "fisher_accumulate": Config(1024, 4),
        "gradient_norm": Config(1 << 15, 4),
    },
}
_DEFAULTS = {
    # Light: of dense state, without master weights or random rounding.
    "child_adamw_light": Config(1024, 8),
    "child_adamw": Config(1024, 8),
    "child_adamw_compact": Config(1024, 8),
    "child_adamw_runs": Config(1024, 8),
    "fisher_accumulate": Config(1024, 8),
    # A unit of 4096 elements for every 32 threads, each with four elements of its 32 rows.
    "gradient_norm": Config(1 << 15, 8),
    "keep_words": Config(512, 8),
    "bitmask": Config(4096, 8),
    "topk_select": Config(4096, 8),
}
# The interpreter pays by operation, not by element.
_INTERPRETER = Config(4096, 1)
_INTERPRETER_BY_OP = {
    "bitmask": Config(1 << 15, 1),
    "gradient_norm": Config(1 << 14, 1),
    "topk_select": Config(1 << 14, 1),
}


def generation(device: torch.device) -> str:
    """The GPU generation of a device as ``_GENERATIONS`` names it, or ``"interpreter"``."""
    if INTERPRETED:
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def config(op: str, of_generation: str) -> Config:
    """The configuration of an op; generations that are not in the table take the default."""
    if of_generation == "interpreter":
        return _INTERPRETER_BY_OP.get(op, _INTERPRETER)
    return _GENERATIONS.get(of_generation, {}).get(op, _DEFAULTS[op])


def warp_size(of_generation: str) -> int:
    """Threads of a warp."""
    return 64 if of_generation.startswith("gfx9") else 32


def lanes(of_generation: str, of_config: Config) -> int:
    """Elements of which every thread of a program has one: the step of a loop over a tail."""
    if of_generation == "interpreter":
        return of_config.tile
    return of_config.num_warps * warp_size(of_generation)


@triton.jit
def _probe_kernel(written):
    tl.store(written, 1)


@functools.cache
def failure(device_type: str) -> str | None:
    """Why no kernel can be compiled and run on devices of a type, or None; tried once, where there is one."""
    if device_type == "cpu" or INTERPRETED or not torch.cuda.is_available():
        return None
    try:
        written = torch.zeros(1, dtype=torch.int32, device=device_type)
        launch(_probe_kernel, 1, written.device, (written,), {}, num_warps=1)
        return None if int(written) == 1 else "a first kernel ran and wrote nothing"
    except Exception as error:  # a missing C compiler, a driver that is too old, and whatever else
        return f"a first kernel fails ({type(error).__name__}: {error})"


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on a device, on its current stream, without waiting.

    The bytes go through a pinned block of their own, which the allocator gives out again only when the
    copy has been made.
    """
    if device.type == "cpu":
        return host.clone()
    return host.pin_memory().to(device, non_blocking=True)


def pinned_like(host: Tensor, device: torch.device) -> Tensor:
    """Room for a copy of a CPU tensor from which a device can be sent without waiting."""
    return torch.empty_like(host, pin_memory=device.type != "cpu")


def send_(target: Tensor, pinned: Tensor) -> None:
    """Copy a pinned block into a tensor on a device, on its current stream, without waiting."""
    target.copy_(pinned, non_blocking=True)


def chunk_map(sizes: Sequence[int], tile: int) -> Tensor:
    """Row and chunk of every program (int32, ``[programs, 2]``, on the CPU): tiles of tensors of these sizes.

    Empty tensors have no program.
    """
    chunks = torch.tensor([-(-size // tile) for size in sizes], dtype=torch.int64, device="cpu")
    rows = torch.arange(len(sizes), dtype=torch.int64, device="cpu").repeat_interleave(chunks)
    first = (chunks.cumsum(0) - chunks)[rows]
    within = torch.arange(rows.numel(), dtype=torch.int64, device="cpu") - first
    return torch.stack([rows, within], 1).to(torch.int32)


def chunks(sizes: Sequence[int], tile: int, device: torch.device) -> Tensor:
    """``chunk_map`` on a device; kept, since the same tensors come again and again."""
    stream = 0 if device.type == "cpu" else torch.cuda.current_stream(device).cuda_stream
    return _chunks(tuple(sizes), tile, device, stream)


# A map is good on the stream that it was copied on; others get their own.
@functools.lru_cache(maxsize=512)
def _chunks(sizes: tuple[int, ...], tile: int, device: torch.device, stream: int) -> Tensor:
    return upload(chunk_map(sizes, tile), device)


def table(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Numbers (int64) on a device; addresses and sizes go by table, never as arguments.

    An integer argument would be compiled into the kernel where it is 1 or a multiple of 16.
    """
    return upload(torch.tensor(numbers, dtype=torch.int64, device="cpu"), device)


def launch(
    kernel: Any,
    programs: int,
    device: torch.device,
    arguments: Sequence[Any],
    constants: dict[str, Any],
    num_warps: int,
    registers: int | None = None,
) -> None:
    """Run a kernel on a device's current stream.

    Args:
        kernel: a ``@triton.jit`` function; ``arguments`` are its first parameters, in their order.
        programs: how many; with 0 nothing is launched.
        constants: the values of its constexpr parameters.
        registers: the most that a thread may have, on GPUs that let a launch say so.
    """
    if programs == 0:
        return
    options = options_of(num_warps, registers, bool(torch.version.hip))
    guard = contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)
    with guard:
        kernel[(programs,)](*arguments, **constants, **options)


def options_of(num_warps: int, registers: int | None, hip: bool) -> dict[str, Any]:
    """What the compiler is told besides a kernel's constants.

    No operation is contracted into a fused multiply-add (SPEC.md, "Types and rounding").
    """
    options: dict[str, Any] = {"num_warps": num_warps, "enable_fp_fusion": False}
    return options if registers is None or hip else options | {"maxnreg": registers}
