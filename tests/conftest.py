"""Which columns of the table a run tests, and fixtures that tests of several modules share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from childtune_kernels import registry
from childtune_kernels.backends import cpp

from .columns import COLUMNS, CPP, REFERENCE, TRITON, Column, interpreted
from .launch_record import LaunchRecord
from .quick_interpreter import quicken_interpreter
from .ranks import Ranks

FIXTURES = ("column", "backend")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--column",
        choices=registry.BACKENDS,
        help="run the tests of this column alone, and no test without a column",
    )
    parser.addoption(
        "--record",
        type=Path,
        metavar="FILE",
        help="write to FILE how often each Triton kernel was launched, and how many tests passed",
    )
    parser.addoption(
        "--plain-interpreter",
        action="store_true",
        help="leave Triton's interpreter as it is (tests/quick_interpreter.py)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("record") is not None:
        config.pluginmanager.register(LaunchRecord(config.getoption("record")))
    of_triton = config.getoption("column") == "triton" and interpreted()
    if of_triton and not config.getoption("plain_interpreter"):
        quicken_interpreter()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test the columns that this run tests and that have kernels of the test's ops."""
    chosen = metafunc.config.getoption("column")
    for fixture in FIXTURES:
        if fixture not in metafunc.fixturenames or _is_given(fixture, metafunc):
            continue
        columns = [*([REFERENCE] if fixture == "backend" else []), *COLUMNS]
        if chosen is not None:
            everything = [REFERENCE, *CPP, TRITON]
            columns = [column for column in everything if column.backend == chosen]
        if metafunc.definition.get_closest_marker("threads"):
            columns = [column for column in columns if column != TRITON]
        if metafunc.definition.get_closest_marker("launches"):
            columns = [column for column in columns if column == TRITON]
        ops = ops_of(metafunc.module)
        columns = [column for column in columns if column.has_kernels_of(ops)]
        metafunc.parametrize(fixture, columns, indirect=True, ids=str)


def _is_given(fixture: str, metafunc: pytest.Metafunc) -> bool:
    """Whether a mark of the test itself says what the fixture's value is."""
    for mark in metafunc.definition.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        if fixture in (name.strip() for name in names):
            return True
    return False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    of_a_column = config.getoption("column") is not None
    chosen: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        given: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
        has_column = any(isinstance(given.get(fixture), Column) for fixture in FIXTURES)
        # Where no column can run it, pytest would show such a test as skipped.
        needs_column = of_a_column or item.get_closest_marker("launches") is not None
        (chosen if has_column or not needs_column else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


def ops_of(module: Any) -> tuple[str, ...]:
    """The ops a test module is about: tests/ops/ has a file an op, elsewhere OPS names them."""
    name = module.__name__.rsplit(".", 1)[-1].removeprefix("test_")
    own = tuple(op for op in registry.TABLE if name.startswith(op))
    ops: tuple[str, ...] = getattr(module, "OPS", own)
    assert ops, f"{module.__name__} has tests of columns: name its ops in OPS"
    return ops


@pytest.fixture(scope="session", autouse=True)
def _expected_reference() -> None:
    """Without the extension the one warning of the session comes here, and fails no test."""
    if cpp.load() is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            registry.choose("bitmask", "cpu")


@pytest.fixture(autouse=True)
def _long_doubles_work() -> Iterator[None]:
    """A kernel that used MMX registers would leave the x87 unit, and so NumPy's long doubles, broken."""
    yield
    assert np.longdouble(1) / np.longdouble(4) == 0.25


def _serve(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    column: Column = request.param
    absent = column.absent(ops_of(request.module))
    if absent is not None:
        pytest.skip(absent)
    if column.capability is not None:
        monkeypatch.setenv(cpp.CAPABILITY_VARIABLE, column.capability)
    return column.backend


@pytest.fixture
def column(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend of each column but the reference, its instruction set forced."""
    return _serve(request, monkeypatch)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend of each column, its instruction set forced."""
    return _serve(request, monkeypatch)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch runs on one thread: small tensors are faster so, and a busy machine delays nobody."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes that torch.distributed connects, started at the first use."""
    ranks = Ranks()
    yield ranks
    ranks.stop()
