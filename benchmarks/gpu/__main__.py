"""``python -m benchmarks.gpu``: check, measure, and write one JSON and its tables."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from childtune_kernels import registry
from childtune_kernels.machine import installed

from .. import environment, targets
from ..environment import ROOT
from . import bandwidth, build, contests, proof, report, steps, verdicts
from .cases import cases_for
from .ledger import Ledger
from .setting import Setting, say
from .variants import CAPTURES, OTHER_PACKAGES

# A tiny run measures nothing, so that no machine is too slow for it.
_MINUTES, _TINY_MINUTES = 7.0, 60.0
_BUILD_SECONDS = 90.0
_SHARE_FOR_TESTS = 0.4
_TINY_NOTE = "not a measurement: a tiny run on a CPU, whose times say nothing about a GPU"
TESTS, COPY, SWEEP = "tests", "copy", "sweep"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", metavar="SECTION,...", help="these sections alone")
    parser.add_argument("--minutes", type=float, help=f"time for everything ({_MINUTES})")
    parser.add_argument(
        "--sweep", action="store_true", help="compare configurations of the kernels instead"
    )
    parser.add_argument(
        "--tiny", action="store_true",
        help="no measurement: everything in little on the CPU, under TRITON_INTERPRET=1",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, help="the JSON (benchmarks/results/<date>-<gpu>.json)"
    )
    parser.add_argument("--resume", action="store_true", help="keep what the JSON has already")
    parser.add_argument("--overwrite", action="store_true", help="replace a JSON that is there")
    options = parser.parse_args(arguments)
    options.minutes = options.minutes or (_TINY_MINUTES if options.tiny else _MINUTES)
    if options.tiny and os.environ.get("TRITON_INTERPRET", "0") == "0":
        parser.error("--tiny interprets the kernels: set TRITON_INTERPRET=1")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU; TRITON_INTERPRET=1 with --tiny tries the command without")
    options.refuse = parser.error
    return options


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _head(setting: Setting, options: argparse.Namespace, built: dict[str, Any]) -> dict[str, Any]:
    """What is known before anything is run."""
    now = datetime.datetime.now(datetime.timezone.utc)
    described = environment.describe(setting.device)
    described["cuda"] = torch.version.cuda or torch.version.hip
    for package in OTHER_PACKAGES:
        described[package] = installed(_DISTRIBUTIONS.get(package, package))
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        described["multiprocessors"] = properties.multi_processor_count
        described["memory_bytes"] = properties.total_memory
        described["cache_bytes"] = properties.L2_cache_size
    return {
        "kind": "gpu",
        "tiny": setting.tiny,
        "clock": "torch.cuda.Event" if setting.device.type == "cuda" else "perf_counter",
        "measurement": not setting.tiny,
        "note": _TINY_NOTE if setting.tiny else None,
        "date": now.date().isoformat(),
        "datetime": now.isoformat(),
        "commit": _git("rev-parse", "HEAD") or os.environ.get("CHILDTUNE_COMMIT"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "environment": described,
        "extension": built,
        "served_by": {
            op: registry.choose(op, setting.device, setting.backend(op)).backend
            for op in registry.TABLE
        },
        "captures": CAPTURES,
        "titles": {},
    }


_DISTRIBUTIONS = {"optimi": "torch-optimi"}


def _output(options: argparse.Namespace, head: dict[str, Any]) -> Path:
    if options.output is not None:
        path: Path = options.output
        return path
    folder = ROOT / "benchmarks" / "results" if not options.tiny else ROOT / "runs"
    parts = [head["date"], "tiny" * options.tiny, report.slug_of(head), "sweep" * options.sweep]
    return folder / f"{'-'.join(filter(None, parts))}.json"


def _chosen(options: argparse.Namespace, known: list[str]) -> list[str]:
    if options.only is None:
        return [name for name in known if (name == SWEEP) <= options.sweep]
    chosen = [name.strip() for name in options.only.split(",")]
    unknown = set(chosen) - set(known)
    if unknown:
        options.refuse(f"--only={','.join(sorted(unknown))}: the sections are {', '.join(known)}")
    return chosen


def run(setting: Setting, ledger: Ledger, chosen: list[str], minutes: float) -> None:
    """Run the chosen sections in their order, until time is up."""
    result = ledger.result
    with ledger.section(TESTS):
        seconds = _SHARE_FOR_TESTS * 60 * minutes
        earlier = result.get("proof", {}).get("modules", [])
        result["proof"] = proof.prove(setting, seconds, None if TESTS in chosen else earlier)
    if result["sections"][TESTS]["state"] == "failed":
        result["proof"] = proof.nothing(result["sections"][TESTS]["reason"])
    unproven: dict[str, str] = result["proof"]["unproven"]
    for op, reason in unproven.items():
        say(f"no speed of {op} is reported: {reason}")
    if COPY in chosen:
        with ledger.section(COPY):
            result["copy"] = bandwidth.measure_copies(setting)
            for record in result["copy"]:
                say(f"  {record['bytes']:>12,} bytes: {record['bytes_per_second'] / 1e9:,.0f} GB/s")
    copy = max((record["bytes_per_second"] for record in result.get("copy", [])), default=None)
    for name, case in cases_for(setting.device, setting.tiny).items():
        if _is_due(name, chosen, setting, ledger):
            result["titles"][name] = case.title
            with ledger.section(name):
                steps.measure_case(case, setting, ledger, unproven)
            _judge(ledger)
    for name, contest in contests.contests_for(setting).items():
        if _is_due(name, chosen, setting, ledger):
            result["titles"][name] = contest.title
            with ledger.section(name):
                contests.measure_contest(contest, setting, ledger, unproven, copy)
            _judge(ledger)
    if SWEEP in chosen:
        with ledger.section(SWEEP):
            from . import sweep  # loads Triton, which a machine may not have

            sweep.run_sweep(setting, ledger, unproven)
        for line in report.configurations(result["sweep"]):
            say(line)


def _judge(ledger: Ledger) -> None:
    """Bring the verdicts up to date: a run that is killed leaves them too."""
    ledger.result["targets"] = verdicts.verdicts(ledger.result)
    ledger.write()


def _is_due(name: str, chosen: list[str], setting: Setting, ledger: Ledger) -> bool:
    if name not in chosen:
        return False
    if setting.left() < 0:
        ledger.leave_out(name, "out of time; --only and --resume run it on its own")
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns 0, or 1 where something is wrong or a section failed."""
    options = _options(arguments)
    begun = time.monotonic()
    device = (
        torch.device("cpu") if options.tiny else torch.device("cuda", torch.cuda.current_device())
    )
    setting = Setting(device, options.tiny, begun + 60 * options.minutes)
    say("building the C++ extension where it is not there ...")
    built = build.build_extension(_BUILD_SECONDS)
    reason = built.get("reason", "").strip().splitlines()
    say(f"C++ extension: {': '.join([built['state'], *reason[-1:]])} (kernels on GPUs need none)")
    head = _head(setting, options, built)
    ledger = Ledger(_output(options, head), head)
    names = [*cases_for(device, options.tiny), *contests.contests_for(setting)]
    chosen = _chosen(options, [TESTS, COPY, *names, SWEEP])
    if options.sweep and options.only is None:
        chosen = [COPY, SWEEP]
    if ledger.path.exists() and not (options.resume or options.overwrite or options.tiny):
        options.refuse(f"{ledger.path} is there; --resume adds to it, --overwrite replaces it")
    if options.resume and not ledger.path.exists():
        say(f"--resume: {ledger.path} is not there yet, and is begun")
    elif options.resume:
        try:
            ledger.resume(json.loads(ledger.path.read_text(encoding="utf-8")))
        except (KeyError, ValueError) as error:
            options.refuse(f"--resume {ledger.path}: {error}")
    say(f"{head['environment']['device_name']}, results in {ledger.path}")
    if setting.tiny:
        say(_TINY_NOTE)
    run(setting, ledger, chosen, options.minutes)
    return _finish(ledger)


def _finish(ledger: Ledger) -> int:
    """Verdicts, tables and picture; returns the exit status."""
    result = ledger.result
    result["finished"] = True
    _judge(ledger)
    tables, picture = (ledger.path.with_suffix(suffix) for suffix in (".md", ".png"))
    tables.write_text(report.section(result, None) + "\n", encoding="utf-8")
    try:
        if report.draw(result, picture):
            tables.write_text(report.section(result, picture.name) + "\n", encoding="utf-8")
    except Exception as error:  # the figures matter more than their picture
        say(f"no picture: {type(error).__name__}: {error}")
    judged = [target for target in result["targets"] if target["value"] is not None]
    for line in targets.lines(judged):
        say(line)
    say(
        f"{len(result['targets']) - len(judged)} of {len(result['targets'])} targets are not measured"
    )
    say(f"{ledger.path}: written after {result['seconds']:.0f} s")
    failed = [name for name, entry in result["sections"].items() if entry["state"] == "failed"]
    waits = any(each["waits"] for each in result["proof"]["waits"])
    return 1 if failed or waits or result["proof"]["unproven"] else 0


if __name__ == "__main__":
    sys.exit(main())
