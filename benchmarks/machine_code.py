"""Compiling Triton kernels for GPUs that are not there, and what their machine code says.

    python -m benchmarks.machine_code [--targets sm_90 gfx942] [--only child_adamw]

compiles every variant of every kernel module and prints a markdown table.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from . import assembly, code_paths, gpu_limits, rounding
from .code_faults import faults_of
from .moved_bytes import TensorBytes, largest_unmasked, widest_elements

KERNELS = "childtune_kernels.backends.triton"
WORKERS = 2


class Variant(Protocol):
    """One compiled form of a kernel, as ``childtune_kernels.backends.triton.launch`` declares it."""

    @property
    def name(self) -> str: ...
    @property
    def kernel(self) -> Any: ...
    @property
    def signature(self) -> dict[str, str]: ...
    @property
    def constants(self) -> dict[str, Any]: ...
    @property
    def num_warps(self) -> int: ...
    @property
    def elementwise(self) -> bool: ...
    @property
    def tile(self) -> int: ...
    @property
    def registers(self) -> int | None: ...
    @property
    def full(self) -> int | None: ...
    @property
    def lanes(self) -> int | None: ...
    @property
    def reduces(self) -> bool: ...


class Task(NamedTuple):
    """What a worker compiles: a variant by its name, since kernels do not travel between processes."""

    module: str
    variant: str
    target: str
    options: tuple[tuple[str, Any], ...] = ()


class Course(NamedTuple):
    """What an element costs on one way through the code; of a loop, and what stands around it, its share."""

    elements: float  # a thread, in a turn of the loop, or all where there is none
    instructions: float
    pipes: dict[str, float]
    accesses: tuple[assembly.Access, ...]  # of ``elements`` elements
    loops: bool
    unavoidable_calls: tuple[str, ...]

    @property
    def bytes_per_element(self) -> float:
        """Bytes an element that move at addresses that differ from lane to lane."""
        return sum(access.bits for access in self.accesses) / 8 / self.elements


class MachineCode(NamedTuple):
    """What one variant became on one target.

    ``chunk``: the way of a full chunk, for kernels with a branch of neighbours, and for those without any
    branches; ``scattered``: the way of elements that lie anywhere, one a thread and access.
    """

    task: Task
    elementwise: bool
    full: int | None
    lanes: int | None
    reduces: bool
    tile: int
    registers: int
    local_bytes: int
    shared_bytes: int
    exchanges: tuple[str, ...]  # shared memory, shuffles and barriers, anywhere in the kernel
    occupancy: float
    chunk: Course | None
    scattered: Course | None
    asked: TensorBytes  # what the source moves in unmasked accesses
    widest: tuple[int, int]  # bits of the widest element that it loads and stores
    slow_paths: tuple[str, ...]
    rounding_faults: tuple[str, ...]
    compile_seconds: float
    read_seconds: float


def compile_for(variant: Variant, target: str, **options: Any) -> Any:
    """Triton's compiled kernel for a target, e.g. ``sm_90``, as a launch there would compile it.

    Every pointer argument counts as divisible by 16, as a launch finds torch's own allocations.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from childtune_kernels.backends.triton.launch import options_of

    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    else:
        gpu = GPUTarget("hip", target, 64)
    aligned: dict[tuple[int, ...], list[list[Any]]] = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(variant.signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(variant.kernel, variant.signature, variant.constants, aligned)
    asked = options_of(variant.num_warps, variant.registers, gpu.backend == "hip")
    return triton.compile(source, target=gpu, options=asked | options)


def read(variant: Variant, task: Task) -> MachineCode:
    """Compile a variant for a task's target and read what came out.

    Raises:
        ValueError: the machine code cannot be followed.
    """
    start = time.perf_counter()
    compiled = compile_for(variant, task.target, **dict(task.options))
    compiled_at = time.perf_counter()
    generation = gpu_limits.GENERATIONS[task.target]
    name = compiled.metadata.name
    if generation.cuda:
        blocks = assembly.read_sass(_disassembled(compiled.asm["cubin"]), name)
        resources = _cuda_resources(compiled.asm["cubin"], name)
        faults = rounding.faults_in_ptx(compiled.asm["ptx"])
    else:
        blocks = assembly.read_amdgcn(compiled.asm["amdgcn"], name)
        resources = _amd_resources(compiled.asm["amdgcn"])
        faults = rounding.faults_in_amdgcn(compiled.asm["amdgcn"], fmas_of_expansions(task.target))
    threads = variant.num_warps * generation.lanes
    opcodes = {item.opcode for block in blocks for item in block.instructions}
    chunk_path = code_paths.reducing_path if variant.reduces else code_paths.full_chunk_path
    chunk, scattered = chunk_path(blocks), code_paths.scattered_path(blocks)
    return MachineCode(
        task=task,
        elementwise=variant.elementwise,
        full=variant.full,
        lanes=variant.lanes,
        reduces=variant.reduces,
        tile=variant.tile,
        registers=resources["registers"],
        local_bytes=resources["local"],
        shared_bytes=compiled.metadata.shared,
        exchanges=tuple(sorted(filter(assembly.is_exchange, opcodes))),
        occupancy=generation.occupancy(resources["registers"], threads, compiled.metadata.shared),
        chunk=_course(chunk, variant.full, variant.tile, threads, generation)
        if variant.full or not variant.lanes
        else None,
        scattered=_course(scattered, variant.lanes, variant.tile, threads, generation)
        if variant.lanes and scattered
        else None,
        asked=largest_unmasked(compiled.asm["ttir"], threads),
        widest=widest_elements(compiled.asm["ttir"]),
        slow_paths=chunk.slow_paths,
        rounding_faults=tuple(faults),
        compile_seconds=compiled_at - start,
        read_seconds=time.perf_counter() - compiled_at,
    )


def _course(
    path: code_paths.Path,
    a_turn: int | None,
    tile: int,
    threads: int,
    generation: gpu_limits.Generation,
) -> Course:
    """Costs of an element on a path whose loop, if it has one, takes ``a_turn`` of the tile's elements."""
    in_all = tile / threads
    elements = a_turn / threads if path.turn and a_turn else in_all
    turns = in_all / elements

    def share(in_path: int, in_turn: int) -> float:
        return (in_path + (turns - 1) * in_turn) / in_all

    in_path, in_turn = (generation.pipes_of(part) for part in (path.instructions, path.turn))
    return Course(
        elements,
        share(generation.counted(path.instructions), generation.counted(path.turn)),
        {pipe: share(count, in_turn.get(pipe, 0)) for pipe, count in in_path.items()},
        path.turn_accesses if path.turn else path.accesses,
        bool(path.turn),
        tuple(code_paths.calls_on(path)),
    )


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run_on(cubin: bytes, tool: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool(tool), *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _disassembled(cubin: bytes) -> str:
    # Without the data-flow analysis (-ndf) it takes a third less time and writes the same text.
    return _run_on(cubin, "nvdisasm", "-c", "-ndf")


def _cuda_resources(cubin: bytes, kernel: str) -> dict[str, int]:
    usage = _run_on(cubin, "cuobjdump", "-res-usage")
    found = re.search(
        rf"Function {re.escape(kernel)}:\s*REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage
    )
    if found is None:
        raise ValueError(f"cuobjdump names no resources of {kernel!r}:\n{usage}")
    return {"registers": int(found[1]), "local": int(found[2]) + int(found[3])}


def _amd_resources(text: str) -> dict[str, int]:
    numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.M)}
    # vgpr_count holds vector and accumulation registers together.
    return {"registers": numbers["vgpr_count"], "local": numbers["private_segment_fixed_size"]}


@cache
def fmas_of_expansions(target: str) -> rounding.Expansions:
    """How many fused multiply-adds one division and one square root have of their own on an AMD target."""
    from . import expansion_kernels

    compiled = (compile_for(v, target).asm["amdgcn"] for v in expansion_kernels.VARIANTS)
    return rounding.expansions(compiled)


def prepare_worker(cache_directory: str) -> None:
    """Make a fresh process compile, and not interpret, with a cache that holds nothing yet."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache_directory


def work(task: Task) -> MachineCode | str:
    """One task, in a worker; what went wrong comes back as text."""
    try:
        return read(_variant(task), task)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _variant(task: Task) -> Variant:
    return _variants(task.module, task.target)[task.variant]


@cache
def _variants(module: str, target: str) -> dict[str, Variant]:
    return {v.name: v for v in importlib.import_module(module).variants(target)}


def kernel_modules() -> list[str]:
    """The modules of the Triton column that declare variants."""
    if importlib.util.find_spec(KERNELS) is None:
        return []
    column = importlib.import_module(KERNELS)
    names = [f"{KERNELS}.{module.name}" for module in pkgutil.iter_modules(column.__path__)]
    return [name for name in names if hasattr(importlib.import_module(name), "variants")]


def tasks(modules: Iterable[str], targets: Iterable[str]) -> list[Task]:
    """Every variant of the modules on every target."""
    return [Task(m, name, t) for t in targets for m in modules for name in _variants(m, t)]


def read_all(todo: Sequence[Task], workers: int = WORKERS) -> dict[Task, MachineCode | str]:
    """Compile and read in processes of their own."""
    with (
        tempfile.TemporaryDirectory(prefix="childtune-machine-code-") as directory,
        ProcessPoolExecutor(workers, get_context("spawn"), prepare_worker, (directory,)) as pool,
    ):
        return dict(zip(todo, pool.map(work, todo, chunksize=2), strict=True))


def table(codes: Iterable[MachineCode]) -> str:
    """Markdown: a row a variant, target and way, with the expected limit on each GPU for full chunks."""
    head = "| kernel | target | way | bytes / element | instructions / element | registers | occupancy |"
    head += " limit |"
    rows = [head, "|---|---|---|--:|--:|--:|--:|---|"]
    for code in codes:
        for way, course in (("full chunk", code.chunk), ("one by one", code.scattered)):
            if course is None:
                continue
            limits = "; ".join(
                gpu_limits.limit_of(gpu, course) for gpu in gpu_limits.gpus_of(code.task.target)
            )
            rows.append(
                f"| {code.task.variant} | {code.task.target} | {way} | {course.bytes_per_element:.1f} | "
                f"{course.instructions:.1f} | {code.registers} | {code.occupancy:.0%} | "
                f"{limits if code.chunk is course else ''} |"
            )
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: compile, print the table, name the faults; 1 where there are any."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine_code", description=__doc__)
    known = list(gpu_limits.GENERATIONS)
    parser.add_argument(
        "--targets", nargs="+", choices=known, default=known, help="generations of GPUs"
    )
    modules = kernel_modules()
    parser.add_argument(
        "--modules", nargs="+", choices=modules, default=modules, help="modules of kernels"
    )
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes that compile")
    chosen = parser.parse_args(arguments)
    todo = [t for t in tasks(chosen.modules, chosen.targets) if chosen.only in t.variant]
    if not todo:
        parser.error(f"no variant whose name contains {chosen.only!r} in modules {chosen.modules}")
    results = read_all(todo, chosen.workers)
    codes = [found for found in results.values() if isinstance(found, MachineCode)]
    print(table(codes))
    wrong = {task: [found] for task, found in results.items() if isinstance(found, str)}
    wrong |= {code.task: found for code in codes if (found := faults_of(code))}
    for task, faults in wrong.items():
        print(f"{task.variant} on {task.target}:", *faults, sep="\n  ", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
