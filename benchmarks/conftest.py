"""Measures each case once, interleaved, and lets every test report its variant of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import environment, measure, targets
from .cases import CASES, Case
from .correctness import missing_kernel
from .playback import playback
from .variants import Variant, variants_of

Report = Callable[[Case, Variant], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("childtune_kernels benchmarks")
    group.addoption("--device", default="cpu", help="where the tensors lie (default: cpu)")
    group.addoption("--rounds", type=int, help="rounds a case; 25 or more for figures that count")
    group.addoption("--bert-large", action="store_true", help="measure BERT-large too")


class Measurements:
    """The cases measured so far in this run."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self.device = torch.device(config.getoption("--device"))
        self.found: dict[str, dict[str, measure.Measured]] = {}

    def of(self, case: Case, with_times: bool) -> dict[str, measure.Measured]:
        """What was found for a case, which is measured on its first mention."""
        if case.name not in self.found:
            absent = missing_kernel(self.device)
            if absent is not None:
                pytest.exit(absent, returncode=1)
            self._say("")  # ends the line of dots
            if with_times:
                rounds = self._config.getoption("--rounds")
                self.found[case.name] = measure.measure(case, self.device, rounds, self._say)
            else:
                self.found[case.name] = measure.check(case, self.device, self._say)
        return self.found[case.name]

    def records(self) -> list[dict[str, Any]]:
        """The records of all variants, in the order of cases and variants."""
        return [
            found.record
            for case in CASES.values()
            for variant in variants_of(case)
            if (found := self.found.get(case.name, {}).get(variant.name)) and found.record
        ]

    def _say(self, line: str) -> None:
        terminal = self._config.pluginmanager.getplugin("terminalreporter")
        capture = self._config.pluginmanager.getplugin("capturemanager")
        if terminal is None or capture is None:
            return
        with capture.global_and_fixture_disabled():
            terminal.write_line(line)
            terminal.flush()


_MEASUREMENTS = pytest.StashKey[Measurements]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_MEASUREMENTS] = Measurements(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases that are measured by option only."""
    if config.getoption("--bert-large"):
        return
    left_out = [
        item
        for item in items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and getattr(item.callspec.params.get("case"), "by_option", False)
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def report_step(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Report:
    """Hands the rounds of one variant of a case to pytest-benchmark, or fails if it is wrong."""
    measurements = request.config.stash[_MEASUREMENTS]

    def report(case: Case, variant: Variant) -> None:
        found = measurements.of(case, with_times=benchmark.enabled)[variant.name]
        if found.fault is not None:
            pytest.fail(found.fault, pytrace=False)
        benchmark.group = case.name
        benchmark.extra_info.update(found.record or {})
        playback.load(found.seconds)
        benchmark.pedantic(playback.step, rounds=max(1, len(found.seconds)))

    return report


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """Add what pytest-benchmark does not know of the machine to its JSON."""
    machine_info["environment"] = environment.describe(config.stash[_MEASUREMENTS].device)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    records = config.stash[_MEASUREMENTS].records()
    if not records:
        return
    terminalreporter.section("steps")
    for line in _step_lines(records):
        terminalreporter.write_line(line)
    terminalreporter.section("targets")
    for line in targets.lines(targets.verdicts(records)):
        terminalreporter.write_line(line, red=line.endswith("missed"))


def _step_lines(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield (
        f"{'case':<15}{'variant':<19}{'rounds':>6}{'ms':>11}{'ns/param':>10}{'GB/s':>8}"
        f"{'of copy':>9}{'to fused':>10}{'extra MiB':>11}"
    )
    for record in records:
        to_fused = record.get("ratio_to_fused")
        yield (
            f"{record['case']:<15}{record['variant']:<19}{record['rounds']:>6}"
            f"{record['seconds'] * 1e3:>11.3f}{record['ns_per_parameter']:>10.3f}"
            f"{record['effective_bytes_per_second'] / 1e9:>8.1f}{record['share_of_copy']:>9.0%}"
            f"{'-' if to_fused is None else format(to_fused, '.3f'):>10}"
            f"{record['peak_total_bytes'] / 2**20:>11.2f}"
        )
