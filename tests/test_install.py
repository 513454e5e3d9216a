"""Installing without an extension, with one, and what the installed package says of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("childtune_kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile",
           "MANIFEST.in", "SPEC.md", "CHANGELOG.md", "CITATION.cff", "constraints.txt")  # fmt: skip
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
OFFLINE = ("--no-build-isolation", "--no-deps", "--no-index", "--quiet")

PROBE = """
import json, sys, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import childtune_kernels
    parameter = torch.nn.Parameter(torch.ones(3))
    for _ in range(2):
        optimizer = childtune_kernels.FusedChildAdamW([("w", parameter)], reserve_p=0.5)
        parameter.grad = torch.ones(3)
        optimizer.step()
refusal = ""
try:
    parameter.grad = torch.ones(3)
    childtune_kernels.FusedChildAdamW([parameter], backend="cpp").step()
except RuntimeError as error:
    refusal = str(error)
print(json.dumps({
    "file": childtune_kernels.__file__,
    "warnings": [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)],
    "explain": childtune_kernels.explain(),
    "trained": bool((parameter != 1).all()),
    "refusal": refusal,
}))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a source distribution holds, with nothing built in it."""
    copy = tmp_path / "tree"
    copy.mkdir()
    built = shutil.ignore_patterns("*.so", "__pycache__", "_extension_absent.txt")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=built)
        elif source.exists():
            shutil.copy(source, copy / name)
    return copy


def run(command: list[str], environment: Mapping[str, str], directory: Path) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in {"CXX", "CHILDTUNE_BUILD_EXT"}}
    finished = subprocess.run(
        command,
        env=kept | dict(environment),
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def probed(package_root: Path) -> dict[str, Any]:
    """What the package that lies in a directory says of itself, in a process of its own."""
    environment = {"PYTHONPATH": str(package_root)}
    found: dict[str, Any] = json.loads(
        run([sys.executable, "-c", PROBE], environment, package_root)
    )
    assert Path(found["file"]).is_relative_to(package_root)
    return found


def assert_only_the_reference_serves(found: Mapping[str, Any], reason: str) -> None:
    assert found["trained"]
    assert len(found["warnings"]) == 1
    assert reason in found["warnings"][0]
    assert re.search(rf"(?m)^child_adamw +cpp +- +{re.escape(reason)}", found["explain"])
    assert re.search(r"(?m)^child_adamw +reference +\* ", found["explain"])
    assert reason in found["refusal"]
    assert "install a C++17 compiler" in found["refusal"]


def test_the_extension_can_be_left_out(tree: Path) -> None:
    reason = "left out at installation by CHILDTUNE_BUILD_EXT=0"
    (tree / "childtune_kernels" / "_C.so").write_text("of an older build")
    output = run([sys.executable, "setup.py", "build"], {"CHILDTUNE_BUILD_EXT": "0"}, tree)
    assert reason in output
    assert not list(tree.rglob("_C*"))
    assert_only_the_reference_serves(probed(tree / "build" / "lib"), reason)


def test_without_a_compiler_the_installation_works(tree: Path) -> None:
    nowhere, target = tree.parent / "nowhere", tree.parent / "target"
    nowhere.mkdir()
    command = [*PIP, "install", *OFFLINE, "--target", str(target), str(tree)]
    run(command, {"PATH": str(nowhere)}, tree.parent)
    reason = "no C++ compiler was found at installation (looked for c++, g++, clang++)"
    assert_only_the_reference_serves(probed(target), reason)


def test_a_compiler_that_is_named_but_missing_is_said(tree: Path) -> None:
    output = run([sys.executable, "setup.py", "build_py"], {"CXX": "/nowhere/c++ -O1"}, tree)
    note = (tree / "childtune_kernels" / "_extension_absent.txt").read_text()
    assert note == "no C++ compiler was found at installation (looked for /nowhere/c++ -O1)\n"
    assert note.strip() in output
    built = tree / "build" / "lib" / "childtune_kernels"
    assert (built / "_extension_absent.txt").read_text() == note
    assert (built / "py.typed").exists()


def test_a_source_distribution_holds_the_sources(tree: Path) -> None:
    run([sys.executable, "setup.py", "--quiet", "sdist"], {"CHILDTUNE_BUILD_EXT": "0"}, tree)
    (archive,) = (tree / "dist").iterdir()
    with tarfile.open(archive) as opened:
        held = {Path(name).relative_to(Path(name).parts[0]) for name in opened.getnames()}
    sources = {path.relative_to(tree) for path in (tree / "csrc").rglob("*.*")}
    assert sources <= held
    assert {Path("SPEC.md"), Path("LICENSE"), Path("childtune_kernels/py.typed")} <= held


def distributed(tree: Path, environment: Mapping[str, str]) -> Path:
    """What ``make dist`` builds, installed in a virtual environment of its own; gives its ``bin``.

    The environment sees this one's other packages, by links, and nothing of this project.
    """
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "$(BIN)/python -m build --no-isolation --outdir dist" in recipe
    dist = tree.parent / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(tree)]
    run(command, environment, tree.parent)
    (wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    version = re.search(r'"(.+)"', (ROOT / "childtune_kernels" / "_version.py").read_text())
    assert version is not None
    assert wheel.name.startswith(f"childtune_kernels-{version[1]}-")
    assert source.name == f"childtune_kernels-{version[1]}.tar.gz"
    assert f"version: {version[1]}\n" in (tree / "CITATION.cff").read_text(encoding="utf-8")
    clean = tree.parent / "clean"
    run([sys.executable, "-m", "venv", str(clean)], {}, tree.parent)
    (packages,) = clean.glob("lib/python*/site-packages")
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if "childtune" not in package.name and not (packages / package.name).exists():
            (packages / package.name).symlink_to(package)
    python = clean / "bin" / "python"
    nothing = "import importlib.util as u; assert u.find_spec('childtune_kernels') is None"
    run([str(python), "-c", nothing], {}, tree.parent)
    install = ["-m", "pip", "--disable-pip-version-check", "install", *OFFLINE, str(wheel)]
    run([str(python), *install], {}, tree.parent)
    return clean / "bin"


def test_distributions_install_in_a_clean_environment(tree: Path) -> None:
    """Without the extension, which takes minutes to compile; the wheel is made of the source distribution."""
    programs = distributed(tree, {"CHILDTUNE_BUILD_EXT": "0"})
    found = json.loads(run([str(programs / "python"), "-c", PROBE], {}, tree.parent))
    assert Path(found["file"]).is_relative_to(programs.parent)
    assert_only_the_reference_serves(found, "left out at installation by CHILDTUNE_BUILD_EXT=0")
    assert "usage: childtune" in run([str(programs / "childtune"), "--help"], {}, tree.parent)
    told = json.loads(run([str(programs / "childtune"), "info", "--json"], {}, tree.parent))
    assert told["sound"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_compiled_distributions_install_in_a_clean_environment(tree: Path) -> None:
    programs = distributed(tree, {})
    found = json.loads(run([str(programs / "python"), "-c", PROBE], {}, tree.parent))
    assert Path(found["file"]).is_relative_to(programs.parent)
    assert (found["warnings"], found["refusal"], found["trained"]) == ([], "", True)
    told = json.loads(run([str(programs / "childtune"), "info", "--json"], {}, tree.parent))
    assert told["sound"]
    assert "cpp" in {finding["backend"] for finding in told["self_check"]}


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_compiler_that_fails_is_an_error(tree: Path) -> None:
    """Nobody shall get the slow reference without knowing."""
    (tree / "csrc" / "registration.cpp").write_text("#error broken\n")
    for other in (tree / "csrc").rglob("*.cpp"):
        if other.name != "registration.cpp":
            other.unlink()
    finished = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode != 0
    assert "broken" in finished.stdout + finished.stderr
    assert not (tree / "childtune_kernels" / "_extension_absent.txt").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_one_wheel_serves_every_python(tree: Path) -> None:
    wheels = tree.parent / "wheels"
    run([*PIP, "wheel", *OFFLINE, "--wheel-dir", str(wheels), str(tree)], {}, tree.parent)
    (wheel,) = wheels.iterdir()
    assert re.search(r"-cp310-abi3-\w+\.whl$", wheel.name)
    target = tree.parent / "target"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    library = target / "childtune_kernels" / "_C.so"
    assert library.exists()
    assert not (target / "childtune_kernels" / "_extension_absent.txt").exists()
    found = json.loads(run([sys.executable, "-c", PROBE], {"PYTHONPATH": str(target)}, tree.parent))
    assert Path(found["file"]).is_relative_to(target)
    assert found["trained"]
    assert (found["warnings"], found["refusal"]) == ([], "")


UNSTABLE = re.compile(r"_Z\w*?N[VK]*(2at|3c10|5torch)\d")
# What csrc/observe.cpp calls of CPython; all of it is in the stable ABI of 3.10.
STABLE_OF_PYTHON = """
PyBytes_AsString PyBytes_FromStringAndSize PyBytes_Size PyCFunction_GetFlags PyCFunction_GetFunction
PyCapsule_GetPointer PyCapsule_New PyDict_GetItemWithError PyDict_Next PyDict_Size PyErr_Clear PyErr_Occurred
PyErr_SetString PyExc_ImportError PyExc_TypeError PyImport_ImportModule PyList_GetItem PyList_Size
PyLong_AsLongLong PyModule_Create2 PyObject_CallMethod PyObject_CallMethodObjArgs PyObject_GetAttr
PyObject_GetAttrString PyObject_Hash PyTuple_GetItem PyTuple_Pack PyTuple_Size PyType_GetFlags
PyType_IsSubtype PyUnicode_InternFromString _Py_Dealloc _Py_NoneStruct _Py_TrueStruct
"""


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_the_extension_uses_stable_symbols_only() -> None:
    """Those of CPython's limited API (any Python loads it), none of torch's C++ (any later torch does)."""
    libraries = sorted((ROOT / "childtune_kernels").glob("_C*.so"))
    if not libraries:
        pytest.skip("the extension is not built in this tree")
    listed = run(["nm", "-D", "--undefined-only", str(libraries[-1])], {}, ROOT)
    symbols = [line.split()[-1].split("@")[0] for line in listed.splitlines() if line.strip()]
    assert any(symbol.startswith("aoti_torch") or "torch" in symbol for symbol in symbols)
    of_python = {symbol for symbol in symbols if re.match(r"_?Py", symbol)}
    assert of_python <= set(STABLE_OF_PYTHON.split())
    assert [symbol for symbol in symbols if UNSTABLE.match(symbol)] == []
