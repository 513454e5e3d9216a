"""The package's own kernels, compiled for GPUs that are not there: what their machine code must not do."""

from __future__ import annotations

import re

import pytest

from benchmarks import code_faults, machine_code
from benchmarks.code_faults import Most
from benchmarks.machine_code import MachineCode, Task

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}

# Instructions an element, measured with Triton 3.9 and rounded up by a tenth: of NVIDIA's targets, of AMD's.
MOST: dict[str, tuple[Most, Most]] = {}


def family(variant: str) -> str:
    """The row of the table above that a variant belongs to."""
    found = re.match(r"child_adamw-(\w+)-(b?float\d+)", variant)
    if found is None:
        return variant.split()[0]
    bits = {"float64": "64", "float32": "32"}.get(found[2], "16")
    return f"{found[1]} {bits}" + " bernoulli" * variant.endswith("bernoulli")


def expected_bytes(variant: str) -> float | None:
    """What a full chunk of a step moves an element; None for other kernels."""
    parts = variant.split("-")
    if parts[0] != "child_adamw" or parts[1] in ("indices", "outside"):
        return None
    weight, grad = BYTES[parts[2]], BYTES[parts[3]]
    moment = 8 if weight == 8 else 4
    # A thread reads a whole mask word for its four elements, or for its two of fp64.
    word = {"fixed": moment / 4}.get(parts[1], 0)
    return 2 * weight + grad + 4 * moment + 8 * ("master" in parts) + word


def is_short(task: Task) -> bool:
    """Of the other targets, one variant of each kernel and mask kind in fp32 and in bf16 with masters."""
    if task.target == "sm_90" or not task.variant.startswith("child_adamw"):
        return True
    return "-float32-float32" in task.variant or "-bfloat16-float32-master" in task.variant


TASKS = machine_code.tasks(machine_code.kernel_modules(), TARGETS)
by_task = pytest.mark.parametrize(
    "task",
    [
        pytest.param(
            task,
            id=f"{task.variant}-{task.target}",
            marks=[] if is_short(task) else pytest.mark.slow,
        )
        for task in TASKS
    ],
)


@pytest.fixture(scope="module")
def codes(request: pytest.FixtureRequest) -> dict[Task, MachineCode | str]:
    """Of the variants that this run asks for."""
    asked = (getattr(item, "callspec", None) for item in request.session.items)
    wanted = {each.params.get("task") for each in asked if each is not None}
    return machine_code.read_all([task for task in TASKS if task in wanted])


@by_task
def test_a_kernel_is_compiled_to_what_it_should_be(
    codes: dict[Task, MachineCode | str], task: Task
) -> None:
    code = codes[task]
    assert isinstance(code, MachineCode), code
    most = MOST[family(task.variant)][task.target == "gfx942"]
    assert code_faults.faults_of(code, most) == []
    if (expected := expected_bytes(task.variant)) is not None:
        assert code.chunk is not None
        assert code.chunk.bytes_per_element == expected


def test_every_kernel_is_there() -> None:
    families = {family(task.variant) for task in TASKS}
    assert families == set(MOST)
    assert len(TASKS) > 4 * 104
