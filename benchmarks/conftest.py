"""Measures each case and contest once, interleaved, and lets every test report its part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import environment, measure, measure_contest, targets
from .cases import CASES, Case
from .contests import CONTESTS, Competitor, Contest
from .correctness import missing_kernel
from .playback import playback
from .variants import Variant, variants_of

Report = Callable[[Case, Variant], None]
ContestReport = Callable[[Contest, Competitor], None]

_OPTIONS = ("--bert-large", "--layouts")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("childtune_kernels benchmarks")
    group.addoption("--device", default="cpu", help="where the tensors lie (default: cpu)")
    group.addoption("--rounds", type=int, help="rounds a case; 25 or more for figures that count")
    group.addoption("--bert-large", action="store_true", help="measure BERT-large too")
    group.addoption("--layouts", action="store_true", help="measure layouts of compact state too")


class Measurements:
    """The cases and contests measured so far in this run."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self.device = torch.device(config.getoption("--device"))
        self.found: dict[str, dict[str, measure.Measured]] = {}

    def of(self, case: Case | Contest, with_times: bool) -> dict[str, measure.Measured]:
        """What was found for a case or contest, which is measured on its first mention."""
        if case.name not in self.found:
            for op in ("child_adamw",) if isinstance(case, Case) else case.ops:
                self._leave_without_kernel(op)
            self._say("")  # ends the line of dots
            self.found[case.name] = self._measured(case, with_times)
        return self.found[case.name]

    def _measured(self, case: Case | Contest, with_times: bool) -> dict[str, measure.Measured]:
        rounds = self._config.getoption("--rounds")
        if isinstance(case, Case):
            if with_times:
                return measure.measure(case, self.device, rounds, self._say)
            return measure.check(case, self.device, self._say)
        if with_times:
            return measure_contest.measure(case, self.device, rounds, self._say)
        return measure_contest.check(case, self.device, self._say)

    def _leave_without_kernel(self, op: str) -> None:
        """Nothing is measured on a CPU without the extension; other devices have some ops only."""
        absent = missing_kernel(op, self.device)
        if absent is not None and self.device.type == "cpu":
            pytest.exit(absent, returncode=1)
        if absent is not None:
            pytest.skip(absent.splitlines()[0].rstrip(":"))

    def records(self) -> list[dict[str, Any]]:
        """The records of all variants, in the order of cases and variants."""
        names = {case.name: [each.name for each in variants_of(case)] for case in CASES.values()}
        return self._records(names)

    def contest_records(self) -> list[dict[str, Any]]:
        """The records of all competitors, in the order of contests and competitors."""
        return self._records(
            {each.name: [one.name for one in each.competitors] for each in CONTESTS.values()}
        )

    def _records(self, names: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
        return [
            found.record
            for case, variants in names.items()
            for variant in variants
            if (found := self.found.get(case, {}).get(variant)) and found.record
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
    """Leave out the cases and contests that are measured by option only."""
    absent = {option for option in _OPTIONS if not config.getoption(option)}
    left_out = [
        item
        for item in items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and any(getattr(each, "option", None) in absent for each in item.callspec.params.values())
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def report_step(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Report:
    """Hands the rounds of one variant of a case to pytest-benchmark, or fails if it is wrong."""
    measurements = request.config.stash[_MEASUREMENTS]

    return lambda case, variant: _play(measurements, benchmark, case, variant.name)


@pytest.fixture
def report_contest(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> ContestReport:
    """Hands the rounds of one competitor to pytest-benchmark, or fails if it is wrong."""
    measurements = request.config.stash[_MEASUREMENTS]
    return lambda contest, competitor: _play(measurements, benchmark, contest, competitor.name)


def _play(
    measurements: Measurements, benchmark: BenchmarkFixture, case: Case | Contest, name: str
) -> None:
    found = measurements.of(case, with_times=benchmark.enabled)[name]
    if found.fault is not None:
        pytest.fail(found.fault, pytrace=False)
    benchmark.group = case.name
    benchmark.extra_info.update(found.record or {})
    playback.load(found.seconds)
    benchmark.pedantic(playback.step, rounds=max(1, len(found.seconds)))


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """Add what pytest-benchmark does not know of the machine to its JSON."""
    machine_info["environment"] = environment.describe(config.stash[_MEASUREMENTS].device)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    measurements = config.stash[_MEASUREMENTS]
    records, contest_records = measurements.records(), measurements.contest_records()
    if records:
        terminalreporter.section("steps")
        for line in _step_lines(records):
            terminalreporter.write_line(line)
    if contest_records:
        terminalreporter.section("contests")
        for line in _contest_lines(contest_records):
            terminalreporter.write_line(line)
    if records or contest_records:
        terminalreporter.section("targets")
        for line in targets.lines(targets.verdicts([*records, *contest_records])):
            terminalreporter.write_line(line, red=line.endswith("missed"))


def _step_lines(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield (
        f"{'case':<20}{'variant':<33}{'rounds':>6}{'ms':>11}{'ns/param':>10}{'GB/s':>8}"
        f"{'of copy':>9}{'to fused':>10}{'extra MiB':>11}"
    )
    for record in records:
        to_fused = record.get("ratio_to_fused")
        yield (
            f"{record['case']:<20}{record['variant']:<33}{record['rounds']:>6}"
            f"{record['seconds'] * 1e3:>11.3f}{record['ns_per_parameter']:>10.3f}"
            f"{record['effective_bytes_per_second'] / 1e9:>8.1f}{record['share_of_copy']:>9.0%}"
            f"{'-' if to_fused is None else format(to_fused, '.3f'):>10}"
            f"{record['peak_total_bytes'] / 2**20:>11.2f}"
        )


def _contest_lines(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"{'contest':<25}{'competitor':<24}{'rounds':>6}{'ms':>11}{'ns/element':>12}  figures"
    for record in records:
        times = f"{'-':>11}{'-':>12}"
        if "seconds" in record:
            times = f"{record['seconds'] * 1e3:>11.3f}{record['ns_per_element']:>12.3f}"
        figures = ", ".join(
            f"{targets.title(measure)} {targets.figure(measure, record[measure])}"
            for measure in targets.MEASURES
            if measure in record and measure != "seconds"
        )
        yield (
            f"{record['case']:<25}{record['variant']:<24}{record['rounds']:>6}{times}  {figures}"
        )
