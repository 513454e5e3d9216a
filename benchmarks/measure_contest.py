"""Measuring a contest: first that its competitors are right, then their time, then their memory."""

from __future__ import annotations

import time
from typing import Any

import torch

from childtune_kernels.rounds import Contender, Seconds, interleave, quartiles, ratio

from .contests import Competitor, Contest
from .measure import Measured, Say, progress_of
from .peak_memory import peaks_of

Record = dict[str, Any]


def check(contest: Contest, device: torch.device, say: Say) -> dict[str, Measured]:
    """Competitor → its fault, or nothing: no time is taken."""
    say(f"{contest.name}: checking {len(contest.competitors)} competitors")
    faults = contest.faults(contest.miniature(), device)
    found = {}
    for competitor in contest.competitors:
        fault = faults.get(competitor.name)
        if fault is not None:
            fault = f"{competitor.name} in {contest.name}: {fault}; its figures are not reported"
        found[competitor.name] = Measured(fault)
    return found


def measure(
    contest: Contest, device: torch.device, rounds: int | None, say: Say
) -> dict[str, Measured]:
    """Competitor → its record; those with a fault are not timed.

    Args:
        contest: the work and who does it.
        device: where the tensors lie.
        rounds: how many; None takes the contest's own number.
        say: shows a line to whoever is waiting.
    """
    start = time.monotonic()
    found = check(contest, device, say)
    right = [each for each in contest.competitors if found[each.name].fault is None]
    if right:
        say(f"{contest.name}: preparing {contest.elements:,} elements")
        records, seconds = _race(contest, right, device, rounds or contest.rounds, say)
        if contest.memory:
            say(f"{contest.name}: memory of a run, in a process of its own")
            for name, peaks in peaks_of(contest, device).items():
                if name in records:
                    records[name]["result_bytes"] = peaks.pop("result")
                    records[name].update({f"peak_{kind}_bytes": n for kind, n in peaks.items()})
        for name, record in records.items():
            found[name] = Measured(None, tuple(seconds.get(name, {}).values()), record)
    say(f"{contest.name}: done in {time.monotonic() - start:.0f} s")
    return found


def _race(
    contest: Contest, competitors: list[Competitor], device: torch.device, rounds: int, say: Say
) -> tuple[dict[str, Record], dict[str, Seconds]]:
    """The records without memory, and the seconds of those that were timed."""
    prepared = contest.prepare(contest.shapes(), device)
    contenders = {
        each.name: Contender(prepared.steps[each.name], each.slow)
        for each in competitors
        if each.name in prepared.steps
    }
    seconds: dict[str, Seconds] = {}
    if contenders:
        say(f"{contest.name}: timing {rounds} rounds")
        progress = progress_of(contest.name, rounds, say)
        seconds = interleave(contenders, rounds, device, progress)
    records = {}
    for competitor in competitors:
        record = _record_of(contest, competitor, seconds, device)
        records[competitor.name] = {**record, **prepared.figures.get(competitor.name, {})}
    return records, seconds


def _record_of(
    contest: Contest, competitor: Competitor, seconds: dict[str, Seconds], device: torch.device
) -> Record:
    """What is known of a competitor by the clock, as it stands in the results."""
    own = seconds.get(competitor.name, {})
    record: Record = {
        "family": contest.family,
        "case": contest.name,
        "variant": competitor.name,
        "device": device.type,
        "dtype": "float32",
        "elements": contest.elements,
        "tensors": contest.tensors,
        "rounds": len(own),
    }
    if not own:
        return record
    first, median, third = quartiles(list(own.values()))
    record["seconds"] = median
    record["seconds_quartiles"] = [first, third]
    record["ns_per_element"] = median / contest.elements * 1e9
    if competitor.bytes_per_element is not None:
        moved = competitor.bytes_per_element * contest.elements
        record["effective_bytes_per_second"] = moved / median
    record.update(_comparisons_of(contest, competitor, seconds))
    return record


def _comparisons_of(
    contest: Contest, competitor: Competitor, seconds: dict[str, Seconds]
) -> Record:
    by_name = {each.name: each for each in contest.competitors}
    found: Record = {}
    for comparison in contest.comparisons:
        added = [name for name in comparison.plus if name in seconds]
        if comparison.base not in seconds or (comparison.plus and not added):
            continue
        own, base = seconds[competitor.name], seconds[comparison.base]
        if added:
            fastest = min(added, key=lambda name: quartiles([*seconds[name].values()])[1])
            base = {
                index: base[index] + seconds[fastest][index]
                for index in base.keys() & seconds[fastest].keys()
            }
            found[f"{comparison.measure}_plus"] = fastest
        of_bytes = 1.0
        base_bytes = by_name[comparison.base].bytes_per_element
        if comparison.inverted:
            own, base = base, own
            if competitor.bytes_per_element is not None and base_bytes is not None:
                of_bytes = competitor.bytes_per_element / base_bytes
        low, middle, high = (of_bytes * value for value in ratio(own, base))
        found[comparison.measure] = middle
        found[f"{comparison.measure}_quartiles"] = [low, high]
    return found
