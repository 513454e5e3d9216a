"""The kernels leave the same bits under other compilers and on another processor."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    ROOT / "tests" / "portability" / "kernels_digest.cpp",
    ROOT / "csrc" / "capability.cpp",
    *sorted((ROOT / "csrc" / "capability").glob("*.cpp")),
]
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"]
# compiler, extra flags, what runs its programs
BUILDS = {
    "g++": ("g++", [], []),
    "clang++": ("clang++", [], []),
    "aarch64": ("aarch64-linux-gnu-g++", ["-static"], ["qemu-aarch64-static"]),
}

pytestmark = pytest.mark.slow


def _digest(compiler: str, flags: list[str], runner: list[str], capability: int, out: Path) -> str:
    program = out / f"digest-{compiler}"
    command = [compiler, *FLAGS, *flags, *map(str, SOURCES), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)
    run = subprocess.run(
        [*runner, str(program), str(capability)], check=False, capture_output=True, text=True
    )
    return run.stdout.strip()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    digest = _digest("c++", [], [], 0, tmp_path_factory.mktemp("expected"))
    assert len(digest) == 16
    return digest


@pytest.mark.parametrize("build", BUILDS)
def test_other_compilers_and_processors_agree(build: str, expected: str, tmp_path: Path) -> None:
    compiler, flags, runner = BUILDS[build]
    missing = [tool for tool in (compiler, *runner) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    assert _digest(compiler, flags, runner, 0, tmp_path) == expected


def test_contraction_would_be_seen(expected: str, tmp_path: Path) -> None:
    contracted = ["-ffp-contract=fast", "-march=native"]
    assert _digest("c++", contracted, [], 0, tmp_path) not in ("", expected)
