"""The Triton column without a GPU: the tests that hold the C++ kernels to the reference, interpreted.

Triton decides when a kernel is defined whether it is compiled or interpreted, hence processes of their own.
Each must pass, skip nothing and launch the kernels it is there for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from childtune_kernels import registry

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "childtune_kernels" / "backends" / "triton"
KERNEL = re.compile(r"(?m)^@triton\.jit\S*\ndef (\w+_kernel)\(")
AT_ONCE = min(2, os.cpu_count() or 1)


class Run(NamedTuple):
    """A module of tests/ops, or what pytest's ``-k`` selects of it, and the kernels it must launch.

    ``plain``: in the interpreter as Triton has it, not as tests/quick_interpreter.py quickens it.
    """

    op: str
    module: str
    kernels: tuple[str, ...]
    select: str = ""
    part: str = ""
    plain: bool = False

    def __str__(self) -> str:
        return "-".join(filter(None, (self.module, self.part)))


_STEP = ("_step_scalars_kernel", "_child_adamw_dense_kernel", "_child_adamw_words_kernel")
_ALL_OF_STEP = (*_STEP, "_child_adamw_segments_kernel", "_decay_outside_kernel")
# To a kernel the convention is a number: in the usual run a type and mask meet one of the two. A fixed mask
# is met beside a Bernoulli one, and alone with fp32; gradients of fp32 and weights without a master are met,
# but not together, and with bf16 and both masks alone.
_PRODUCT = (
    "column_equals and not compact and not plain-original and not bernoulli-torch and not fixed-original "
    "and not fixed_decaying-torch and not both-original and not both_decaying-torch "
    "and not fp32_gradient_no_master and not fp32_master and not stochastic and not bf16_state "
    "and not fp16_ and (not -fixed or fp32-fixed) and not -both_decaying-original and not -both-original "
    "and (not (no_master or fp32_gradient or fp16) or -both)"
)
# Words of all four purposes in each kernel; the other types take the same code.
_ROUNDED = (
    "column_equals and (bf16_stochastic_bf16_state-plain or bf16_stochastic_bf16_state-both) "
    "and not chosen"
)
_SCALED = (
    "every_column and (before_mask-bf16-plain or before_mask-rounded-CT_F or after_mask-fp32-CT_D) "
    "and not dense"
)
# An element map gives every type the same elements: two types meet all of them.
_SHARDS = (
    "(not alignment or -3) and not -whole- and not fp32_bf16_state "
    "and (-fp32 or (stochastic and (unaligned or blocks)) or -blocks-fp64 or -blocks-bf16 or huge)"
)
_NORM = ("_gradient_norm_kernel", "_gradient_norm_again_kernel")
_NORM_CASES = (
    "(column_equals and (bf16_fp32_gradient-fixed-torch or fp32-both-indices)) "
    "or (sums_are_those and fp64)"
)
_NORM_OTHERS = (
    "not column_equals and not sums_are_those and not another_order "
    "and not (order_of and (float64 or float16 or -4)) and not (whole_units and (float64 or torch.float16))"
)
# The longest first. A run counts from the day its op has a cell in the registry's Triton column.
RUNS = [
    Run("child_adamw", "test_child_adamw", _STEP[:2], _PRODUCT, "dense"),
    Run(
        "child_adamw", "test_child_adamw", _ALL_OF_STEP,
        "column_equals and compact and not chosen and not fp32_gradient_no_master and not fp32_master "
        "and not stochastic and not bf16_state and not fp16_ and (-fp32- or -both-)", "compact",
    ),
    Run("child_adamw", "test_child_adamw", _ALL_OF_STEP[:4], _ROUNDED, "rounded"),
    Run(
        "child_adamw", "test_child_adamw_scaling",
        (*_STEP, "_gradient_norm_kernel", "_gradient_norm_again_kernel"), _SCALED,
    ),
    Run("child_adamw", "test_child_adamw_shards", _STEP, _SHARDS),
    Run("child_adamw", "test_child_adamw", _STEP[:2], "not column_equals", "others"),
    Run(
        "child_adamw", "test_child_adamw_contract", _STEP,
        "not frozen and not dropped_gradients and not fp32_copy",
    ),
    Run("child_adamw", "test_child_adamw_capture", _ALL_OF_STEP[:4]),
    Run("child_adamw", "test_child_adamw_large", _ALL_OF_STEP[:4], plain=True),
    Run("child_adamw", "test_child_adamw_launches", _ALL_OF_STEP[:4]),
    Run(
        "topk_select", "test_topk_select",
        ("_digit_histogram_kernel", "_bracket_histogram_kernel", "_select_words_kernel",
         "_take_ties_kernel", "_run_scores_kernel"),
    ),
    Run(
        "bitmask", "test_bitmask",
        ("_pack_mask_kernel", "_unpack_mask_kernel", "_unit_counts_kernel", "_move_masked_kernel"),
    ),
    Run("keep_words", "test_keep_words", ("_keep_words_kernel",)),
    Run(
        "keep_words", "test_keep_words", ("_keep_words_kernel",), "test_steps or worked_vectors", "plain",
        plain=True,
    ),
    Run("gradient_norm", "test_gradient_norm", _NORM, _NORM_CASES, "cases"),
    Run("gradient_norm", "test_gradient_norm", _NORM, _NORM_OTHERS, "others"),
    Run("gradient_norm", "test_gradient_norm_plans", _NORM, "not (shards_drop and bfloat16)"),
    Run(
        "gradient_norm", "test_gradient_norm_launches", (*_NORM, *_STEP[:2]),
        "not -64 and not (replays and (dense-True or child-False))",
    ),
    Run("fisher_accumulate", "test_fisher_accumulate", ("_fisher_accumulate_kernel",)),
]  # fmt: skip
# Every test of the modules that are cut short above, in the interpreter as Triton has it.
WHOLE = [
    Run("child_adamw", f"test_child_adamw{part}", _STEP, part="all", plain=True)
    for part in ("", "_contract", "_shards", "_scaling")
]
WHOLE += [
    Run("gradient_norm", f"test_gradient_norm{part}", _NORM, part="all", plain=True)
    for part in ("", "_plans", "_launches")
]
ACTIVE = [run for run in RUNS if registry.TABLE[run.op]["triton"] is not None]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed on this platform"
)


class Finished(NamedTuple):
    """How a process of pytest ended."""

    returncode: int
    output: str
    launches: dict[str, int]
    outcomes: dict[str, int]


class Interpreter:
    """Runs test modules in processes of their own, a few at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = ThreadPoolExecutor(AT_ONCE)
        self.processes: list[subprocess.Popen[str]] = []
        self.of_thread = threading.local()

    def start(self, run: Run, *options: str, **fault: Any) -> Future[Finished]:
        """Queue a run, with more options of pytest, folders to import from and what the environment says."""
        return self.pool.submit(self._finish, run, options, **fault)

    def _finish(
        self, run: Run, options: tuple[str, ...], path: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Finished:  # fmt: skip
        name = self.folder / str(uuid.uuid4())
        record, output = name.with_suffix(".json"), name.with_suffix(".txt")
        for file in (record, output):
            file.touch()
        arguments = [
            f"tests/ops/{run.module}.py", "--column", "triton", "--record", str(record), "-k", run.select,
            "-p", "no:cacheprovider", "--tb", "short", "-rfEs", "--maxfail", "5",
            *(["--plain-interpreter"] if run.plain else []), *options,
        ]  # fmt: skip
        job = {"arguments": arguments, "output": str(output), "path": list(path)}
        server = self._server() if environment is None else self._serve(environment)
        assert server.stdin is not None
        assert server.stdout is not None
        print(json.dumps(job), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        assert answer, f"no answer: {server.wait()}"
        recorded: dict[str, Any] = json.loads(record.read_text(encoding="utf-8") or "{}")
        launches, outcomes = recorded.get("launches", {}), recorded.get("outcomes", {})
        return Finished(int(answer), output.read_text(encoding="utf-8"), launches, outcomes)

    def _server(self) -> subprocess.Popen[str]:
        """This thread's process, whose forks are the runs; started at the first use."""
        if not hasattr(self.of_thread, "server"):
            self.of_thread.server = self._serve({})
        server: subprocess.Popen[str] = self.of_thread.server
        return server

    def _serve(self, environment: Mapping[str, str]) -> subprocess.Popen[str]:
        inherited = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
        variables = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **environment}
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.pytest_server"], cwd=ROOT, env=inherited | variables,
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def stop(self) -> None:
        """End what still runs."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    interpreter = Interpreter(tmp_path_factory.mktemp("interpreted"))
    yield interpreter
    interpreter.stop()


@pytest.fixture(scope="module")
def started(
    request: pytest.FixtureRequest, interpreter: Interpreter
) -> dict[Run, Future[Finished]]:
    """All runs that this session's tests ask for, started together."""
    asked = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = {call.params.get("run") for call in asked if call is not None}
    return {run: interpreter.start(run) for run in [*ACTIVE, *WHOLE] if run in wanted}


def check_finished(finished: Finished, run: Run) -> None:
    """Tests ran and passed, none was skipped, and they launched the kernels of the run."""
    assert finished.returncode == 0, finished.output
    assert set(finished.outcomes) <= {"passed", "deselected", "warnings"}, finished.output
    assert finished.outcomes.get("passed", 0) > 0, finished.output
    idle = [kernel for kernel in run.kernels if not finished.launches.get(kernel)]
    assert not idle, f"{idle} never launched; launched were {finished.launches}"


@pytest.mark.parametrize(
    "run", [*ACTIVE, *(pytest.param(run, marks=pytest.mark.slow) for run in WHOLE)], ids=str
)
def test_interpreted(run: Run, started: dict[Run, Future[Finished]]) -> None:
    check_finished(started[run].result(), run)


def test_every_kernel_is_launched_by_a_run() -> None:
    # The kernel in launch.py serves no op: it tries out a GPU.
    paths = [path for path in KERNELS.glob("*.py") if path.name != "launch.py"]
    sources = [path.read_text(encoding="utf-8") for path in paths]
    defined = {name for source in sources for name in KERNEL.findall(source)}
    assert defined == {kernel for run in ACTIVE for kernel in run.kernels}


# That a run can fail: another module serves the column, results are wrong, nothing is interpreted.

FEW = Run("keep_words", "test_keep_words", ("_keep_words_kernel",), "test_steps")
TAKE_THE_REFERENCE = """
from childtune_kernels import registry
registry.TABLE["keep_words"]["triton"] = "reference.keep_words"
"""
INVERT_THE_WORDS = """
from childtune_kernels.backends.triton import keep_words
right = keep_words.keep_words
keep_words.keep_words = lambda *arguments: right(*arguments) ^ 1
"""
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
# A plugin with the fault, what the environment says otherwise, and what the failure's message tells.
FAULTS: dict[str, tuple[str, dict[str, str], str]] = {
    "reference in its place": (TAKE_THE_REFERENCE, {}, "'_keep_words_kernel'. never launched"),
    "wrong results": (INVERT_THE_WORDS, {}, r"FAILED tests/ops/test_keep_words\.py::test_steps"),
    "not interpreted": ("", NO_GPU | {"TRITON_INTERPRET": "0"}, "only under TRITON_INTERPRET=1"),
}


@pytest.fixture(scope="module")
def faulty(
    interpreter: Interpreter, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Future[Finished]]:
    """A few tests with each fault, started together."""
    futures = {}
    for name, (plugin, environment, _) in FAULTS.items():
        folder = tmp_path_factory.mktemp("fault")
        (folder / "fault.py").write_text(plugin, encoding="utf-8")
        futures[name] = interpreter.start(
            FEW, "-p", "fault", path=[str(folder)], environment=environment or None
        )
    return futures


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_fails_where_it_should(fault: str, faulty: dict[str, Future[Finished]]) -> None:
    with pytest.raises(AssertionError, match=FAULTS[fault][2]):
        check_finished(faulty[fault].result(), FEW)
