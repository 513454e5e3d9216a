"""A case on a GPU: who is right steps in interleaved rounds, over sets of tensors that no cache can hold."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from childtune_kernels.machine import synchronize
from childtune_kernels.rounds import Contender, Seconds, interleave, quartiles, ratio

from ..cases import Case, Workload
from ..correctness import fault_of
from ..measure import progress_of, ratios_of
from ..peak_memory import tensor_peak
from ..traffic import bytes_per_parameter, state_bytes
from ..variants import GROUPED_SUFFIX, PLAIN, TORCH_FUSED, UNFUSED, Variant
from .bandwidth import copy_contender
from .ledger import Ledger
from .replay import Replay, replay_differs
from .setting import Setting, say
from .variants import eager_of, suffix_of, variants_of

_COPY = "copy"
_COPIED_BYTES, _TINY_COPIED_BYTES = 2**30, 2**14
_SECONDS_OF_ROUNDS = 30.0
_HOST_ROUNDS, _SLOW_HOST_ROUNDS = 25, 5
# Sets of tensors take turns, so that this many level-2 caches go by before one comes back.
_CACHES, _MOST_SETS = 1.5, 64
_USUAL_CACHE = 64 * 2**20  # where torch does not know it


@dataclass
class Entrant:
    """A variant with an optimizer for every set of tensors.

    ``turns`` says which set is next, whoever steps: two variants in a row never find each other's tensors in
    the cache.
    """

    variant: Variant
    turns: Iterator[int]
    optimizers: list[Optimizer] = field(default_factory=list)
    steps: list[Callable[[], object]] = field(default_factory=list)

    def step(self) -> None:
        """One step on the next set."""
        self.steps[next(self.turns)]()


def sets_of(case: Case, device: torch.device) -> int:
    """How many sets of a case's tensors take turns; one where it is far larger than the cache."""
    if device.type != "cuda":
        return 2 if case.limit == "tensors" else 1
    properties = torch.cuda.get_device_properties(device)
    cache = getattr(properties, "L2_cache_size", _USUAL_CACHE)
    of_a_set = 16 * case.parameters
    return min(_MOST_SETS, max(1, math.ceil(_CACHES * cache / of_a_set)))


def measure_case(case: Case, setting: Setting, ledger: Ledger, unproven: Mapping[str, str]) -> None:
    """Check and measure the variants of a case, those of one dtype after the other's."""
    variants = variants_of(case, setting.tiny)
    for dtype in dict.fromkeys(variant.dtype for variant in variants):
        of_dtype = [variant for variant in variants if variant.dtype == dtype]
        right = list(_right_ones(case, of_dtype, setting, ledger, unproven))
        if right:
            records = _race(case, right, setting, ledger)
            ledger.put("records", records, case.name)
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


def _right_ones(
    case: Case,
    variants: Iterable[Variant],
    setting: Setting,
    ledger: Ledger,
    unproven: Mapping[str, str],
) -> Iterable[Variant]:
    """The variants whose results are what they should be, on cut-down tensors."""
    say(f"{case.name}: checking")
    backend = setting.backend("child_adamw")
    for variant in variants:
        ops = ["child_adamw"] + ["bitmask"] * (variant.mask == "fixed")
        refused = [unproven[op] for op in ops if op in unproven]
        fault = None
        if variant.family == "childtune":
            fault = refused[0] if refused else setting.absent("child_adamw")
        try:
            fault = fault or fault_of(eager_of(variant), case, setting.device, backend)
            if fault is None and variant.graph:
                fault = replay_differs(variant, case.miniature(), setting.device, backend)
        except Exception as error:  # a variant that cannot run has no speed; the others have
            fault = f"{type(error).__name__}: {error}"[:1000]
        if fault is None:
            yield variant
        else:
            ledger.fault(case.name, variant.name, fault)


def _race(
    case: Case, variants: Sequence[Variant], setting: Setting, ledger: Ledger
) -> list[dict[str, Any]]:
    device, dtype = setting.device, variants[0].dtype
    count = sets_of(case, device)
    say(f"{case.name}: preparing {count} × {case.parameters:,} parameters of {dtype}")
    workloads = [Workload(case.shapes(), device, seed, dtype) for seed in range(count)]
    turns = itertools.cycle(range(count))
    entrants: dict[str, Entrant] = {}
    for variant in variants:
        try:
            entrants[variant.name] = _prepared(variant, workloads, turns, setting)
        except Exception as error:  # out of memory, say
            ledger.fault(case.name, variant.name, f"{type(error).__name__}: {error}"[:1000])
    copied = _TINY_COPIED_BYTES if setting.tiny else _COPIED_BYTES
    contenders = {_COPY: copy_contender(copied, device)} | {
        name: Contender(entrant.step, entrant.variant.slow) for name, entrant in entrants.items()
    }
    say(f"{case.name}: timing {case.rounds} rounds of {len(contenders)}")
    deadline = time.monotonic() + min(_SECONDS_OF_ROUNDS, max(0.0, setting.left() - 10))
    progress = progress_of(case.name, case.rounds, say)
    seconds = interleave(contenders, case.rounds, device, progress, deadline)
    records = []
    for name, entrant in entrants.items():
        record = _record_of(case, entrant, seconds, 2 * copied, setting)
        record["sets"] = count
        record.update(_host_times(case, entrant, device))
        record["peak_tensor_bytes"] = tensor_peak(entrant.steps[0], device)
        say(
            f"  {name:<24}{record['seconds'] * 1e3:>10.3f} ms"
            f"{record['share_of_copy']:>8.1%} of a copy"
            f"{record.get('ratio_to_fused', math.nan):>8.3f} of torch fused"
        )
        records.append(record)
    return records


def _prepared(
    variant: Variant, workloads: Sequence[Workload], turns: Iterator[int], setting: Setting
) -> Entrant:
    """Optimizers that have stepped each set, so that nothing is left to be made or compiled."""
    entrant = Entrant(variant, turns)
    for workload in workloads:
        optimizer = variant.build(workload.named, setting.backend("child_adamw"))
        if variant.family != "other":  # whose state may be of another kind under the same names
            workload.share_moments(optimizer)
        step: Callable[[], object] = optimizer.step
        if variant.graph:
            step = Replay(optimizer, setting.device)
        step()
        entrant.optimizers.append(optimizer)
        entrant.steps.append(step)
    return entrant


def _record_of(
    case: Case,
    entrant: Entrant,
    seconds: Mapping[str, Seconds],
    copy_bytes: int,
    setting: Setting,
) -> dict[str, Any]:
    variant, optimizer = entrant.variant, entrant.optimizers[0]
    own, copy = seconds[variant.name], seconds[_COPY]
    first, median, third = quartiles(list(own.values()))
    _, copy_median, _ = quartiles(list(copy.values()))
    needed = bytes_per_parameter(variant, optimizer, case.parameters)
    step_bytes = needed * case.parameters
    _, time_over_copy, _ = ratio(own, copy)
    record: dict[str, Any] = {
        "case": case.name,
        "variant": variant.name,
        "title": variant.title,
        "family": variant.family,
        "device": setting.device.type,
        "measurement": not setting.tiny,
        "dtype": str(variant.dtype).removeprefix("torch."),
        "parameters": case.parameters,
        "tensors": case.tensors,
        "rounds": len(own),
        "seconds": median,
        "seconds_quartiles": [first, third],
        "ns_per_parameter": median / case.parameters * 1e9,
        "us_per_tensor": median / case.tensors * 1e6,
        "bytes_per_parameter": needed,
        "effective_bytes_per_second": step_bytes / median,
        "copy_bytes_per_second": copy_bytes / copy_median,
        "share_of_copy": step_bytes / copy_bytes / time_over_copy,
        "state_bytes_per_parameter": state_bytes(optimizer) / case.parameters,
    }
    suffix = suffix_of(variant)
    comparisons = [
        ("ratio_to_fused", TORCH_FUSED.name + suffix, False),
        ("speedup_over_fused", TORCH_FUSED.name + suffix, True),
        ("speedup_over_unfused", UNFUSED.name + suffix, True),
        ("ratio_to_plain", PLAIN.name + suffix, False),
    ]
    if variant.grouped:
        one_group = variant.name.removesuffix(GROUPED_SUFFIX)
        comparisons.append(("ratio_to_one_group", one_group, False))
    return record | ratios_of(variant.name, seconds, comparisons)


def _host_times(case: Case, entrant: Entrant, device: torch.device) -> dict[str, Any]:
    """CPU time of a warm step on an idle device, without waiting for it, and until it is done.

    The first also with a new learning rate. On a CPU, where a step is its own device, they are alike.
    """
    rounds = _SLOW_HOST_ROUNDS if entrant.variant.slow else _HOST_ROUNDS
    rounds = min(rounds, case.rounds)
    step, optimizer = entrant.steps[0], entrant.optimizers[0]
    host, whole = _host_medians(step, lambda: None, rounds, device)
    found = {"host_us_per_tensor": host / case.tensors, "seconds_from_idle": whole * 1e-6}
    if not entrant.variant.graph:

        def change_lr() -> None:
            for group in optimizer.param_groups:
                group["lr"] *= 1.0001

        host, _ = _host_medians(step, change_lr, rounds, device)
        found["host_us_per_tensor_new_lr"] = host / case.tensors
    return found


def _host_medians(
    step: Callable[[], object], before: Callable[[], None], rounds: int, device: torch.device
) -> tuple[float, float]:
    """Microseconds until the host has handed over a step, and until the device has done it."""
    times, whole = [], []
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            before()
            synchronize(device)
            begun = time.perf_counter_ns()
            step()
            times.append((time.perf_counter_ns() - begun) * 1e-3)
            synchronize(device)
            whole.append((time.perf_counter_ns() - begun) * 1e-3)
    finally:
        gc.enable()
    return quartiles(times)[1], quartiles(whole)[1]
