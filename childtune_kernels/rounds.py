"""Interleaved timing: a round is one step of everybody, in a new order each time."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .machine import synchronize

#: Round → seconds of the step in that round.
Seconds = dict[int, float]

_WARM_UP_STEPS = 2
# How long a GPU is kept busy before a step is timed on it, in the step's own time on the host; torch counts
# in cycles, of a clock between 1 and 2.2 GHz.
_LEAD, _LONGEST_LEAD, _CYCLES_A_SECOND = 2.0, 0.2, 2.2e9
MINIMAL_ROUNDS = 25


@dataclass(frozen=True)
class Contender:
    """Something to time; ``slow`` ones take part in no more rounds than a median needs."""

    step: Callable[[], object]
    slow: bool = False


def interleave(
    contenders: Mapping[str, Contender],
    rounds: int,
    device: torch.device,
    after_round: Callable[[int], None] = lambda done: None,
    deadline: float = math.inf,
    least: int = 1,
    slow_every: int | None = None,
    warm: bool = False,
) -> dict[str, Seconds]:
    """Time every contender once a round.

    What slows the machine for a while then hits all of them alike, and ratios within a round stay what
    they are; the order is shuffled so that nobody always follows the same neighbour. A GPU is busy with
    something else while the host prepares a step, as it is with a backward in training: the time is that of
    the GPU, and the host's is in it only where the GPU had to wait for more than the step's start.

    Args:
        contenders: by name.
        rounds: how many there are at most.
        device: where the steps run.
        after_round: is told the number of rounds that are done.
        deadline: of ``time.monotonic``; after it no further round begins.
        least: so many rounds are run, whatever the deadline.
        slow_every: slow ones take part in the first and every so many rounds; None: such that of all rounds
            a median gets enough.
        warm: they have stepped before and need no steps to warm up.
    """
    for contender in contenders.values():
        for _ in range(0 if warm else 1 if contender.slow else _WARM_UP_STEPS):
            contender.step()
    synchronize(device)
    leads = {name: _lead_of(contender.step, device) for name, contender in contenders.items()}
    seconds: dict[str, Seconds] = {name: {} for name in contenders}
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    if slow_every is None:
        slow_every = max(1, rounds // MINIMAL_ROUNDS)
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            shuffle(order)
            for name in order:
                if index % slow_every == 0 or not contenders[name].slow:
                    seconds[name][index] = _timed(contenders[name].step, device, leads[name])
            after_round(index + 1)
            if index + 1 >= least and time.monotonic() > deadline:
                break
    finally:
        if collects:
            gc.enable()
    return seconds


def _lead_of(step: Callable[[], object], device: torch.device) -> int:
    """Cycles for which a GPU is to be busy until the host has a step in its queue; steps once."""
    if device.type != "cuda":
        return 0
    begun = time.perf_counter()
    step()
    on_host = time.perf_counter() - begun
    synchronize(device)
    return int(min(_LEAD * on_host, _LONGEST_LEAD) * _CYCLES_A_SECOND)


def _timed(step: Callable[[], object], device: torch.device, lead: int) -> float:
    synchronize(device)
    if device.type == "cuda":  # the device's own clock, which no wake-up of this process enters
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            torch.cuda._sleep(lead)
            begin.record()
            step()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) * 1e-3
    start = time.perf_counter_ns()
    step()
    synchronize(device)
    return (time.perf_counter_ns() - start) * 1e-9


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def ratio(seconds: Seconds, base: Seconds) -> tuple[float, float, float]:
    """Quartiles of the ratio within a round, over the rounds that have both."""
    return quartiles([seconds[index] / base[index] for index in seconds.keys() & base.keys()])
