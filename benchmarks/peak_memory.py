"""How much memory a step needs beside parameters, gradients and state, or a contest's run beside its result.

Measured in a process of its own, in three ways: the peak of torch's allocator (exact), the peak of Python's
allocations (exact), and the growth of the resident set (all there is, in the kernel's coarse counts).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from childtune_kernels import ChildMask
from childtune_kernels.machine import synchronize

from .cases import CASES, Case
from .contests import CONTESTS, Contest
from .environment import ROOT
from .variants import variants_of, workloads_of

Peaks = dict[str, int]

_MMAP_THRESHOLD = 64 * 1024


def peaks_of(case: Case | Contest, device: torch.device) -> dict[str, Peaks]:
    """Variant or competitor → its peaks in bytes, measured in a new process.

    Raises:
        RuntimeError: the process failed; its message says how.
    """
    # Large blocks come from the system and go back to it, so that each is seen in the resident set;
    # a fixed threshold also keeps glibc from raising it.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(_MMAP_THRESHOLD)}
    command = [sys.executable, "-m", "benchmarks.peak_memory", case.name, "--device", str(device)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring memory of {case.name} failed:\n{done.stderr[-2000:]}")
    peaks: dict[str, Peaks] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def measure(case: Case, device: torch.device) -> dict[str, Peaks]:
    """Variant → its peaks in bytes, measured in this process."""
    workloads = workloads_of(case, device)
    peaks = {}
    for variant in variants_of(case):
        workload = workloads[variant.dtype]
        optimizer = variant.build(workload.named)
        workload.share_moments(optimizer)
        peaks[variant.name] = _peaks(optimizer.step, 1 if variant.slow else 3, device)
    return peaks


def measure_contest(contest: Contest, device: torch.device) -> dict[str, Peaks]:
    """Competitor → its peaks in bytes beyond what a run returns, measured in this process."""
    steps = contest.prepare(contest.shapes(), device).steps
    peaks = {}
    for competitor in contest.competitors:
        step = steps[competitor.name]
        returned = bytes_of(step())
        found = _peaks(step, 1 if competitor.slow else 3, device)
        beyond = max(0, found["total"] - returned)
        peaks[competitor.name] = {**found, "total": beyond, "result": returned}
    return peaks


def _peaks(step: Callable[[], object], repeats: int, device: torch.device) -> Peaks:
    for _ in range(repeats - 1):
        step()
    found = {
        "resident": _least(resident_growth, step, repeats),
        "python": _least(python_peak, step, 1),
        "tensors": tensor_peak(step, device),
    }
    found["total"] = max(found["resident"], found["python"] + found["tensors"])
    return found


def bytes_of(result: object) -> int:
    """Bytes of the tensors in what a run returned."""
    if isinstance(result, ChildMask):
        return sum(words.nbytes for words in result.words.values())
    if isinstance(result, dict):
        return sum(map(bytes_of, result.values()))
    return result.nbytes if isinstance(result, Tensor) else 0


def _least(
    measure_once: Callable[[Callable[[], object]], int], step: Callable[[], object], repeats: int
) -> int:
    """The least of some measurements: other threads and lazy loading only ever add to one."""
    return min(measure_once(step) for _ in range(repeats))


def resident_growth(step: Callable[[], object]) -> int:
    """Bytes by which the resident set outgrows its size before the step; 0 where this is not Linux."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return 0
    _give_back_free_memory()
    clear.write_text("5")  # sets the peak to the present size
    before = _peak_resident()
    step()
    return _peak_resident() - before


def _peak_resident() -> int:
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _give_back_free_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def python_peak(step: Callable[[], object]) -> int:
    """The peak of what Python allocates during the step."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        step()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def tensor_peak(step: Callable[[], object], device: torch.device) -> int:
    """The peak of what torch's allocators give out during the step."""
    if device.type != "cpu":
        synchronize(device)
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        step()
        synchronize(device)
        return torch.accelerator.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    # Every allocation and release stands in the raw events only; tables sum them up by operator.
    results = profile.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def main() -> None:
    """Print the peaks of a case or contest as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peak_memory", description=__doc__)
    parser.add_argument("case", choices=[*CASES, *CONTESTS])
    parser.add_argument("--device", default="cpu", type=torch.device)
    options = parser.parse_args()
    name, device = options.case, options.device
    peaks = (
        measure(CASES[name], device) if name in CASES else measure_contest(CONTESTS[name], device)
    )
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
