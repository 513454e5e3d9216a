"""The table op x backend: what is chosen, what is refused, and how it is explained."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch.nn import Parameter

import childtune_kernels
from childtune_kernels import FusedChildAdamW, explain, registry
from childtune_kernels.backends import cpp

REASON = "left out at installation by CHILDTUNE_BUILD_EXT=0"
needs_extension = pytest.mark.skipif(cpp.load() is not None, reason=str(cpp.load()))
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed on this platform"
)
READ_MEMORY = [op for op in registry.TABLE if op != "observe"]
IN_TRITON = [op for op, cells in registry.TABLE.items() if cells["triton"] is not None]


@pytest.fixture(autouse=True)
def nobody_was_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_warned", set())
    monkeypatch.delenv(cpp.CAPABILITY_VARIABLE, raising=False)


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "load", lambda: REASON)


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Triton is not installed: its import fails, and nothing of it was loaded before."""
    from childtune_kernels.backends import triton as column

    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, f"{column.__name__}.launch", raising=False)
    monkeypatch.delattr(column, "launch", raising=False)


def test_every_cell_has_a_module_of_its_op() -> None:
    for op, cells in registry.TABLE.items():
        assert tuple(cells) == registry.BACKENDS
        assert cells["reference"] == f"reference.{op}"
        for backend, cell in cells.items():
            if cell is None:
                continue
            module = registry.Choice(op, backend, True, "").module
            assert module.__name__ == f"childtune_kernels.backends.{cell}"


def test_every_backend_of_an_op_has_the_same_functions() -> None:
    for op, cells in registry.TABLE.items():
        source = inspect.getsource(importlib.import_module(f"childtune_kernels.ops.{op}"))
        called = set(re.findall(r"module\.(\w+)\(", source))
        reference = vars(registry.Choice(op, "reference", True, "").module)
        contract = {name for name in called if inspect.isfunction(reference.get(name))}
        assert contract, op
        for backend in (name for name, cell in cells.items() if cell is not None):
            module = registry.Choice(op, backend, True, "").module
            assert all(inspect.isfunction(getattr(module, name, None)) for name in contract)


@needs_extension
def test_the_best_available_backend_is_chosen() -> None:
    for op in registry.TABLE:
        choice = registry.choose(op, "cpu")
        assert (choice.op, choice.backend, choice.available) == (op, "cpp", True)
        assert any(name in choice.reason for name in cpp.CAPABILITIES)
        assert registry.choose(op, "cpu", "reference").backend == "reference"


@needs_extension
def test_asking_for_what_is_available_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for backend in (None, "cpp", "reference"):
            registry.choose("child_adamw", "cpu", backend)


def test_the_survey_names_every_cell_in_order() -> None:
    cells = registry.survey()
    assert [(cell.op, cell.backend) for cell in cells] == [
        (op, backend) for op in registry.TABLE for backend in registry.BACKENDS
    ]
    assert all(cell.reason for cell in cells)


def marks(text: str) -> dict[tuple[str, str], str]:
    table = [line.split() for line in text.splitlines()[1:-1]]
    return {(op, backend): mark for op, backend, mark, *_ in table}


@needs_extension
def test_explain_marks_what_is_chosen() -> None:
    assert explain is childtune_kernels.registry.explain
    found = marks(explain())
    for op in registry.TABLE:
        assert [found[op, backend] for backend in registry.BACKENDS] == ["-", "*", "+"]
    assert "this op runs on the host" in explain()


def test_without_the_extension_the_reference_serves_with_one_warning(
    without_extension: None,
) -> None:
    parameter = Parameter(torch.ones(3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer = FusedChildAdamW([parameter])
            for _ in range(2):
                parameter.grad = torch.ones(3)
                optimizer.step()
            optimizer.summary()
    assert [warning.category for warning in caught] == [RuntimeWarning]
    (absent,) = [
        c.reason for c in registry.survey() if (c.op, c.backend) == ("child_adamw", "triton")
    ]
    message = f"slow reference on cpu (triton: {absent}; cpp: {REASON})"
    assert message in str(caught[0].message)
    assert "reference" in optimizer.summary()
    assert bool((parameter != 1.0).all())


def test_without_the_extension_explain_tells_why(without_extension: None) -> None:
    found = marks(explain())
    for op in registry.TABLE:
        assert [found[op, backend] for backend in registry.BACKENDS] == ["-", "-", "*"]
    assert explain().count(REASON) == len(registry.TABLE)


def test_without_the_extension_asking_for_it_is_an_error(without_extension: None) -> None:
    parameter = Parameter(torch.ones(3))
    message = (
        f"'cpp' cannot serve child_adamw on cpu: {REASON}; install a C.*17 compiler .*reinstall"
    )
    with pytest.raises(RuntimeError, match=message):
        registry.choose("child_adamw", "cpu", "cpp")
    with pytest.raises(RuntimeError, match=message):
        FusedChildAdamW([parameter], backend="cpp")
    assert bool((parameter == 1.0).all())


def test_without_the_extension_asking_for_the_reference_warns_of_nothing(
    without_extension: None,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.choose("child_adamw", "cpu", "reference").available


@needs_extension
@pytest.mark.parametrize("device", ["cuda", "mps", "meta"])
def test_what_reads_no_memory_serves_every_device(device: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.choose("observe", device).backend == "cpp"
    assert marks(explain(device))["observe", "cpp"] == "*"


def test_observing_by_the_reference_is_no_slow_step(without_extension: None) -> None:
    """On a device whose steps have a kernel nothing of a tensor's size runs in the reference."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.choose("observe", "cuda").backend == "reference"


@needs_extension
def test_an_extension_without_its_python_methods_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent() -> None:
        raise ImportError("dynamic module does not define module export function")

    monkeypatch.setattr(cpp, "_methods", absent)
    reason = cpp.load.__wrapped__()
    assert reason is not None
    assert "built from another version of the sources; rebuild it" in reason


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend='cuda' is unknown; use one of .*'reference'"):
        registry.choose("child_adamw", "cpu", "cuda")


def test_a_backend_without_a_kernel_of_the_op() -> None:
    with pytest.raises(RuntimeError, match="'triton' cannot serve observe on cpu: no kernel"):
        registry.choose("observe", "cpu", "triton")


@needs_triton
def test_gpus_prefer_triton() -> None:
    device = torch.device("cuda", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for op in IN_TRITON:
            choice = registry.choose(op, device)
            assert (choice.backend, choice.reason) == ("triton", "compiled when first used")
            assert not choice.on_request
            assert registry.choose(op, device, "triton") == choice
            assert registry.choose(op, device, "reference").backend == "reference"
    found = marks(explain("cuda"))
    for op in IN_TRITON:
        assert [found[op, backend] for backend in registry.BACKENDS] == ["*", "-", "+"]


def test_the_extension_never_takes_tensors_of_a_gpu() -> None:
    message = (
        "backend='cpp' cannot serve .* on cuda: serves CPU tensors, not cuda; use backend=None"
    )
    for op in READ_MEMORY:
        with pytest.raises(RuntimeError, match=message) as caught:
            registry.choose(op, "cuda", "cpp")
        assert "compiler" not in str(caught.value)


def test_a_gpu_without_triton_runs_the_reference_with_one_warning(without_triton: None) -> None:
    why = r"slow reference on cuda \(triton: triton does not load \(.*\); pip install triton; cpp: serves CPU"
    with pytest.warns(RuntimeWarning, match=why) as caught:
        chosen = [registry.choose(op, "cuda").backend for op in [*IN_TRITON, *READ_MEMORY]]
    assert set(chosen) == {"reference"}
    assert len(caught) == 1
    for op in IN_TRITON:
        with pytest.raises(
            RuntimeError, match=f"'triton' cannot serve {op} on cuda: triton does not"
        ):
            registry.choose(op, "cuda", "triton")


def test_a_triton_that_fails_to_load_is_left_out(
    without_triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it raises: on a Python or torch it was not made for, that is not always ImportError."""

    class Broken:
        def __getattr__(self, name: str) -> object:
            raise RuntimeError("made for another torch")

    monkeypatch.setitem(sys.modules, "triton", Broken())
    with pytest.raises(RuntimeError, match=r"does not load .made for another torch.; pip install"):
        registry.choose("keep_words", "cuda", "triton")


@needs_triton
@pytest.mark.parametrize("name", ["mps", "xpu", "meta"])
def test_triton_serves_no_other_devices(name: str) -> None:
    for op in IN_TRITON:
        with pytest.raises(
            RuntimeError, match=f"serves CUDA and HIP devices, not {name}; use back"
        ):
            registry.choose(op, name, "triton")


@needs_triton
@needs_extension
def test_triton_takes_tensors_of_a_cpu_in_its_interpreter_alone() -> None:
    """There too it serves only those who name it: the extension is a thousand times faster."""
    script = """
import torch
from childtune_kernels import explain, registry
for op in registry.TABLE:
    print(op, registry.choose(op, "cpu").backend)
try:
    print(registry.choose("keep_words", "cpu", "triton").backend)
except RuntimeError as error:
    print(error)
print(explain())
"""
    outputs = {}
    for interpret in ("1", "0"):
        environment = os.environ | {"TRITON_INTERPRET": interpret}
        command = [sys.executable, "-W", "error::RuntimeWarning", "-c", script]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        lines = finished.stdout.splitlines()
        count = len(registry.TABLE)
        assert lines[:count] == [f"{op} cpp" for op in registry.TABLE]
        outputs[interpret] = lines[count]
        found = marks("\n".join(lines[count + 1 :]))
        expected = "+" if interpret == "1" else "-"
        for op in IN_TRITON:
            assert [found[op, backend] for backend in registry.BACKENDS] == [expected, "*", "+"]
    assert outputs["1"] == "triton"
    assert (
        "CPU tensors only under TRITON_INTERPRET=1, set before Triton is imported" in outputs["0"]
    )


def test_devices_without_kernels_run_the_reference_with_one_warning() -> None:
    with pytest.warns(RuntimeWarning, match="slow reference on mps .*serves CPU tensors, not mps"):
        assert registry.choose("child_adamw", "mps").backend == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.choose("bitmask", "mps").backend == "reference"
    with pytest.raises(RuntimeError, match="serves CPU tensors, not mps; use backend=None"):
        registry.choose("child_adamw", "mps", "cpp")


@needs_extension
@pytest.mark.parametrize("name", ["avx1024", "AVX2", "neon "])
def test_an_unknown_capability_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpp.CAPABILITY_VARIABLE, name)
    parameter = Parameter(torch.ones(3))
    message = f"CHILDTUNE_CPU_CAPABILITY={name!r} cannot be used: .*baseline.*; unset the variable"
    optimizer = FusedChildAdamW([parameter])
    parameter.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert bool((parameter == 1.0).all())
    monkeypatch.delenv(cpp.CAPABILITY_VARIABLE)
    optimizer.step()
    assert int(optimizer.state[parameter]["step"]) == 1


@needs_extension
def test_a_capability_of_other_processors_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cpp._capability.cache_clear()
    monkeypatch.setattr(cpp, "supported_capabilities", lambda: ["baseline"])
    monkeypatch.setenv(cpp.CAPABILITY_VARIABLE, "avx512")
    try:
        with pytest.raises(
            RuntimeError, match=r"'avx512' cannot be used: .* offer baseline; unset"
        ):
            registry.choose("child_adamw", "cpu")
    finally:
        cpp._capability.cache_clear()


@needs_extension
def test_a_capability_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpp.supported_capabilities()[0] == "baseline"
    for name in cpp.supported_capabilities():
        monkeypatch.setenv(cpp.CAPABILITY_VARIABLE, name)
        assert registry.choose("child_adamw", "cpu").reason == f"compiled, runs {name}"
        assert f"runs {name}" in explain()


@needs_extension
def test_a_stale_extension_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "ROW_FIELDS", "active,group")
    reason = cpp.load.__wrapped__()
    assert reason is not None
    assert "built from another version of the sources; rebuild it" in reason
