"""Fixtures that tests of several modules share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from childtune_kernels import registry
from childtune_kernels.backends import cpp

from .cases import COLUMNS, REFERENCE, Column


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


def _serve(column: Column, monkeypatch: pytest.MonkeyPatch) -> str:
    absent = column.absent()
    if absent is not None:
        pytest.skip(absent)
    if column.capability is not None:
        monkeypatch.setenv(cpp.CAPABILITY_VARIABLE, column.capability)
    return column.backend


@pytest.fixture(params=COLUMNS, ids=str)
def column(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend of each column but the reference, its instruction set forced."""
    return _serve(request.param, monkeypatch)


@pytest.fixture(params=[REFERENCE, *COLUMNS], ids=str)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend of each column, its instruction set forced."""
    return _serve(request.param, monkeypatch)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch runs on one thread: small tensors are faster so, and a busy machine delays nobody."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)
