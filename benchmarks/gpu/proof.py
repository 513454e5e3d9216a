"""Right before fast: the test table on the device, and a quick comparison where pytest is missing."""

from __future__ import annotations

import ast
import itertools
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from childtune_kernels import registry
from childtune_kernels.self_check import self_check

from ..environment import ROOT, available_cores
from .setting import Setting, say
from .waits import find_waits

Record = dict[str, Any]

_TESTS = ROOT / "tests"
# Of a tiny run: that the tests are found, run and counted. An interpreted test takes its time.
_TINY_MODULE, _TINY_SELECTION = "tests/ops/test_keep_words.py", "test_steps"
_TINY_FINDINGS = 6
_MOST_AT_ONCE = 8  # each has a CUDA context
# Of pytest-xdist, where it is there and many processors are: compiling is most of a module's time.
_WORKERS = 4


def ops_of(path: Path) -> tuple[str, ...]:
    """The ops that a test module is about: those in its ``OPS``, else by its name in tests/ops/."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OPS":
            found: tuple[str, ...] = tuple(ast.literal_eval(node.value))
            return found
    if path.parent.name != "ops":
        return ()
    named = path.stem.removeprefix("test_")
    return tuple(op for op in registry.TABLE if named.startswith(op))


def run_table(setting: Setting, seconds: float) -> list[Record]:
    """The tests of the Triton column, a process a module.

    Args:
        seconds: after which a module is ended.

    Returns:
        A record a module: its ops and its outcome, "passed", "failed", "no tests", "timed out" or "did not
        run" (something that tests need is missing; not the kernels' fault).
    """
    modules = {path: ops_of(path) for path in sorted(_TESTS.rglob("test_*.py"))}
    modules = {path: ops for path, ops in modules.items() if ops}
    selection: list[str] = []
    if setting.tiny:
        modules = {path: modules[path] for path in [ROOT / _TINY_MODULE]}
        selection = ["-k", _TINY_SELECTION]
    if find_spec("pytest") is None:
        return [
            _record(path, ops, "did not run", "pytest is not installed")
            for path, ops in modules.items()
        ]
    cores = available_cores()
    workers = 0 if setting.tiny or cores < 2 * _WORKERS or not find_spec("xdist") else _WORKERS
    at_once = 1 if setting.tiny else max(1, min(_MOST_AT_ONCE, cores // max(workers, 2)))
    if workers:
        selection += ["--numprocesses", str(workers), "--dist", "worksteal"]
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(at_once) as pool:
        return list(
            pool.map(lambda item: _run_module(item[0], item[1], selection, until), modules.items())
        )


def _record(path: Path, ops: Sequence[str], outcome: str, reason: str | None = None) -> Record:
    record: Record = {
        "module": path.relative_to(ROOT).as_posix(),
        "ops": list(ops),
        "outcome": outcome,
    }
    return record if reason is None else {**record, "reason": reason}


def _run_module(path: Path, ops: Sequence[str], selection: list[str], until: float) -> Record:
    begun = time.monotonic()
    if begun > until:
        return _record(path, ops, "timed out", "before it began")
    with TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.xml"
        command = [
            sys.executable, "-m", "pytest", str(path), "--column", "triton", "--tb", "short",
            "-p", "no:cacheprovider", "--maxfail", "10", "--junitxml", str(counts), *selection,
        ]  # fmt: skip
        process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=until - begun)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return _record(path, ops, "timed out", output[-1000:])
        found = _counts_of(counts)
        outcome = outcome_of(process.returncode, output, found)
        record = _record(path, ops, outcome, None if outcome == "passed" else output[-4000:])
        record["counts"] = found
    record["seconds"] = round(time.monotonic() - begun, 1)
    say(f"  {record['module']}: {outcome} in {record['seconds']} s {found or ''}")
    return record


def _counts_of(path: Path) -> dict[str, int]:
    """How many tests there were, and how many of them did not pass; nothing where pytest wrote nothing."""
    suite = ElementTree.parse(path).getroot().find("testsuite") if path.exists() else None
    if suite is None:
        return {}
    return {kind: int(suite.get(kind, 0)) for kind in ("tests", "failures", "errors", "skipped")}


def outcome_of(returncode: int, output: str, counts: Mapping[str, int]) -> str:
    """What pytest's exit status means for the kernels; a fault in doubt is theirs."""
    if returncode == 0:
        return "passed" if counts.get("tests", 0) > counts.get("skipped", 0) else "did not run"
    if returncode == 5:
        return "no tests"
    if returncode == 4 and "unrecognized arguments: --column" in output:
        return "did not run"
    missing = re.findall(r"ModuleNotFoundError: No module named '(\w+)", output)
    if returncode in (2, 4) and missing and not {"childtune_kernels", "tests"} & set(missing):
        return "did not run"
    return "failed"


def compare_quickly(setting: Setting) -> list[Record]:
    """The package's own comparison of child_adamw with the reference, bit for bit."""
    findings = self_check(setting.device)
    return [
        asdict(each) for each in itertools.islice(findings, _TINY_FINDINGS * setting.tiny or None)
    ]


def _gist(reason: str) -> str:
    """The line of pytest's output that says what was missing."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()] or [""]
    return next((line for line in lines if re.search(r"error: |Error: ", line)), lines[-1])[:200]


def unproven(modules: Sequence[Record], findings: Sequence[Record]) -> dict[str, str]:
    """Op → why its speed is not reported."""
    found = {
        op: f"{module['module']} failed"
        for module in modules
        if module["outcome"] == "failed"
        for op in module["ops"]
    }
    wrong = [each for each in findings if not each["equal"]]
    if wrong:
        settings = ", ".join(f"{each['backend']} {each['setting']}" for each in wrong)
        found["child_adamw"] = f"the self-check differs from the reference: {settings}"
    return found


def nothing(reason: str) -> dict[str, Any]:
    """What ``prove`` would have found, where it failed itself: no op is proven."""
    why = f"the check itself failed: {reason}"
    unproven = dict.fromkeys(registry.TABLE, why)
    known: Record = {"modules": [], "self_check": [], "waits": []}
    return {"by": None, "why": why, **known, "unproven": unproven}


def prove(setting: Setting, seconds: float, earlier: list[Record] | None) -> dict[str, Any]:
    """Everything that is known of the kernels' results on this device.

    Args:
        seconds: how long the tests may take.
        earlier: None runs the tests; else they are left out, and this is what an earlier command found.

    Returns:
        ``by``: "pytest" where every module of the table ran, "pytest in part", or "self_check"; ``why``; the
        ``modules``, the findings of the ``self_check``, the ``waits`` of warm steps for the device (they make
        nothing wrong, and the speed shows them), and the ops that are ``unproven``.
    """
    findings = compare_quickly(setting)
    say(f"  self-check: {sum(each['equal'] for each in findings)} of {len(findings)} equal")
    waits = find_waits(setting)
    say(
        f"  warm steps that wait for nothing: {sum(not each['waits'] for each in waits)} of {len(waits)}"
    )
    modules = run_table(setting, seconds) if earlier is None else earlier
    silent = [each for each in modules if each["outcome"] in ("did not run", "timed out")]
    why = None if modules else "the tests were not asked for"
    if silent:
        first = silent[0]
        why = (
            f"{len(silent)} of {len(modules)} modules {first['outcome']}: {_gist(first['reason'])}"
        )
    passed = any(each["outcome"] == "passed" for each in modules)
    if modules and not passed and why is None:
        why = "no module has passed"
    return {
        "by": "pytest" if why is None else "pytest in part" if passed else "self_check",
        "why": why,
        "modules": modules,
        "self_check": findings,
        "waits": waits,
        "unproven": unproven(modules, findings),
    }
