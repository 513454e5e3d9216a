"""Measuring a case: first that its variants are right, then their time, then their memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from childtune_kernels.rounds import Contender, Seconds, interleave, quartiles, ratio

from .cases import BYTES_PER_PARAMETER, DTYPE, LARGE_TENSOR, Case
from .correctness import fault_of
from .peak_memory import Peaks, peaks_of
from .traffic import bytes_per_parameter, state_bytes
from .variants import GROUPED_SUFFIX, TORCH_FUSED, UNFUSED, Variant, variants_of, workloads_of

Say = Callable[[str], None]

_COPY = "copy"


@dataclass(frozen=True)
class Measured:
    """What was found for one variant: either it is wrong, or its times and all that follows from them."""

    fault: str | None
    seconds: tuple[float, ...] = ()
    record: dict[str, Any] | None = None


class Sizes(NamedTuple):
    """Bytes a parameter: what a step is counted to move, and what the state takes."""

    moved: float
    state: float

    @classmethod
    def of(cls, variant: Variant, optimizer: torch.optim.Optimizer, case: Case) -> Sizes:
        """Those of a variant. An fp32 step counts for a dense one, whatever a child leaves out of it."""
        moved: float = BYTES_PER_PARAMETER
        if variant.dtype != DTYPE:
            moved = bytes_per_parameter(variant, optimizer, case.parameters)
        return cls(moved, state_bytes(optimizer) / case.parameters)


def check(case: Case, device: torch.device, say: Say) -> dict[str, Measured]:
    """Variant → its fault, or nothing: no time is taken."""
    say(f"{case.name}: checking {len(variants_of(case))} variants")
    return {
        variant.name: Measured(fault_of(variant, case, device)) for variant in variants_of(case)
    }


def measure(case: Case, device: torch.device, rounds: int | None, say: Say) -> dict[str, Measured]:
    """Variant → its record; those with a fault are not timed.

    Args:
        case: the tensors.
        device: where they lie.
        rounds: how many; None takes the case's own number.
        say: shows a line to whoever is waiting.
    """
    start = time.monotonic()
    found = check(case, device, say)
    right = [variant for variant in variants_of(case) if found[variant.name].fault is None]
    if right:
        seconds, sizes = time_steps(case, right, device, rounds or case.rounds, say)
        say(f"{case.name}: memory of a step, in a process of its own")
        peaks = peaks_of(case, device)
        for variant in right:
            name = variant.name
            record = record_of(case, variant, seconds, peaks[name], sizes[name], device)
            found[name] = Measured(None, tuple(seconds[name].values()), record)
    say(f"{case.name}: done in {time.monotonic() - start:.0f} s")
    return found


def time_steps(
    case: Case, variants: list[Variant], device: torch.device, rounds: int, say: Say
) -> tuple[dict[str, Seconds], dict[str, Sizes]]:
    """Seconds of every variant and of a copy, interleaved, and the bytes of each variant."""
    say(f"{case.name}: preparing {case.parameters:,} parameters")
    workloads = workloads_of(case, device)
    contenders = {_COPY: Contender(copy_of(case, device))}
    sizes = {}
    for variant in variants:
        workload = workloads[variant.dtype]
        optimizer = variant.build(workload.named)
        workload.share_moments(optimizer)
        sizes[variant.name] = Sizes.of(variant, optimizer, case)
        contenders[variant.name] = Contender(optimizer.step, variant.slow)
    say(f"{case.name}: timing {rounds} rounds")
    return interleave(contenders, rounds, device, progress_of(case.name, rounds, say)), sizes


def progress_of(name: str, rounds: int, say: Say) -> Callable[[int], None]:
    """Called after every round, says now and then how far the measurement is."""
    begun = last = time.monotonic()

    def show_progress(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 10:
            last = now
            say(f"{name}: round {done} of {rounds} after {now - begun:.0f} s")

    return show_progress


def copy_of(case: Case, device: torch.device) -> Callable[[], object]:
    """A copy of as many elements as the case has, up to the large tensor's."""
    source = torch.ones(_copied_elements(case), device=device, dtype=DTYPE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _copied_elements(case: Case) -> int:
    return min(case.parameters, LARGE_TENSOR.parameters)


def record_of(
    case: Case,
    variant: Variant,
    seconds: dict[str, Seconds],
    peaks: Peaks,
    sizes: Sizes,
    device: torch.device,
) -> dict[str, Any]:
    """All that is known of a variant, as it stands in the results."""
    own, copy = seconds[variant.name], seconds[_COPY]
    first, median, third = quartiles(list(own.values()))
    _, copy_median, _ = quartiles(list(copy.values()))
    step_bytes = sizes.moved * case.parameters
    copy_bytes = 2 * DTYPE.itemsize * _copied_elements(case)
    _, time_over_copy, _ = ratio(own, copy)
    record: dict[str, Any] = {
        "case": case.name,
        "variant": variant.name,
        "device": device.type,
        "dtype": str(variant.dtype).removeprefix("torch."),
        "parameters": case.parameters,
        "tensors": case.tensors,
        "rounds": len(own),
        "seconds": median,
        "seconds_quartiles": [first, third],
        "ns_per_parameter": median / case.parameters * 1e9,
        "us_per_tensor": median / case.tensors * 1e6,
        "effective_bytes_per_second": step_bytes / median,
        "copy_bytes_per_second": copy_bytes / copy_median,
        "share_of_copy": step_bytes / copy_bytes / time_over_copy,
        "bytes_per_parameter": sizes.moved,
        "state_bytes_per_parameter": sizes.state,
    }
    comparisons = [
        ("ratio_to_fused", TORCH_FUSED.name, False),
        ("speedup_over_unfused", UNFUSED.name, True),
    ]
    if variant.grouped:
        comparisons.append(("ratio_to_one_group", variant.name.removesuffix(GROUPED_SUFFIX), False))
    record.update(ratios_of(variant.name, seconds, comparisons))
    record.update({f"peak_{kind}_bytes": size for kind, size in peaks.items()})
    return record


def ratios_of(
    name: str, seconds: Mapping[str, Seconds], comparisons: Iterable[tuple[str, str, bool]]
) -> dict[str, Any]:
    """What a variant's time is in relation to others', with quartiles.

    Args:
        name: the variant.
        seconds: of everybody, by name; who is missing is not compared with.
        comparisons: the ratio's name, whose time is the base, and whether more is better.
    """
    found: dict[str, Any] = {}
    for key, base, inverted in comparisons:
        if base not in seconds:
            continue
        own, other = seconds[name], seconds[base]
        low, middle, high = ratio(other, own) if inverted else ratio(own, other)
        found[key] = middle
        found[f"{key}_quartiles"] = [low, high]
    return found
