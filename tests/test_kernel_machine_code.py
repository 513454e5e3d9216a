"""The package's own kernels, compiled for GPUs that are not there: what their machine code must not do."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from benchmarks import code_faults, machine_code
from benchmarks.code_faults import Most
from benchmarks.machine_code import MachineCode, Task
from childtune_kernels.machine import installed

# Registers and instructions are the compiler's: another Triton spills elsewhere and counts otherwise.
pytestmark = pytest.mark.skipif(
    not (installed("triton") or "").startswith("3.9."), reason="the bounds are those of Triton 3.9"
)

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}

# Instructions an element, measured with Triton 3.9 and rounded up by a tenth: of NVIDIA's targets, of AMD's.
# What is rounded by words was measured for sm_90 and gfx942.
MOST: dict[str, tuple[Most, Most]] = {
    "bitmask": (Most(46), Most(51)),
    "dense 32": (Most(62, 107), Most(47, 78)),
    "dense 32 bernoulli": (Most(101, 233), Most(72, 182)),
    "dense 64": (Most(102, 142), Most(67, 88)),
    "dense 64 bernoulli": (Most(226, 283), Most(170, 192)),
    "dense 16": (Most(84, 132), Most(64, 98)),
    "dense 16 bernoulli": (Most(123, 258), Most(90, 201)),
    "fixed 32": (Most(76, 128), Most(59, 95)),
    "fixed 32 bernoulli": (Most(116, 258), Most(84, 198)),
    "fixed 64": (Most(124, 174), Most(90, 112)),
    "fixed 64 bernoulli": (Most(256, 319), Most(196, 216)),
    "fixed 16": (Most(99, 154), Most(77, 114)),
    "fixed 16 bernoulli": (Most(140, 286), Most(103, 219)),
    "words 32": (Most(57, 118), Most(45, 107)),
    "words 32 bernoulli": (Most(88, 294), Most(70, 230)),
    "words 64": (Most(86, 164), Most(63, 126)),
    "words 64 bernoulli": (Most(200, 316), Most(163, 236)),
    "words 16": (Most(78, 146), Most(62, 127)),
    "words 16 bernoulli": (Most(112, 334), Most(87, 250)),
    "indices 32": (Most(None, 105), Most(None, 88)),
    "indices 32 bernoulli": (Most(None, 250), Most(None, 205)),
    "indices 64": (Most(None, 162), Most(None, 102)),
    "indices 64 bernoulli": (Most(None, 284), Most(None, 213)),
    "indices 16": (Most(None, 131), Most(None, 109)),
    "indices 16 bernoulli": (Most(None, 279), Most(None, 226)),
    "runs 32": (Most(65, 130), Most(47, 92)),
    "runs 32 bernoulli": (Most(93, 249), Most(72, 204)),
    "runs 64": (Most(115, 180), Most(67, 102)),
    "runs 64 bernoulli": (Most(210, 290), Most(170, 213)),
    "runs 16": (Most(88, 158), Most(64, 114)),
    "runs 16 bernoulli": (Most(114, 276), Most(90, 225)),
    "dense 32 drawn": (Most(127, 297), Most(101, 265)),
    "dense 32 drawn bernoulli": (Most(143, 357), Most(122, 343)),
    "dense 16 drawn": (Most(153, 491), Most(126, 473)),
    "dense 16 drawn bernoulli": (Most(166, 550), Most(147, 571)),
    # Words and a fixed mask: 80 registers (device_plan.cut_of).
    "fixed 32 drawn": (Most(145, 296, 0.37), Most(114, 285)),
    "fixed 32 drawn bernoulli": (Most(154, 355, 0.37), Most(134, 363)),
    "fixed 16 drawn": (Most(168, 490, 0.37), Most(139, 503)),
    "fixed 16 drawn bernoulli": (Most(178, 548, 0.37), Most(159, 601)),
    "words 32 drawn": (Most(114, 369), Most(99, 311)),
    "words 32 drawn bernoulli": (Most(129, 420), Most(119, 389)),
    "words 16 drawn": (Most(137, 574), Most(124, 483)),
    "words 16 drawn bernoulli": (Most(152, 613), Most(144, 566)),
    "indices 32 drawn": (Most(None, 312), Most(None, 285)),
    "indices 32 drawn bernoulli": (Most(None, 371), Most(None, 364)),
    "indices 16 drawn": (Most(None, 374), Most(None, 368)),
    "indices 16 drawn bernoulli": (Most(None, 432), Most(None, 446)),
    "runs 32 drawn": (Most(121, 319), Most(101, 285)),
    "runs 32 drawn bernoulli": (Most(137, 381), Most(122, 363)),
    "runs 16 drawn": (Most(146, 381), Most(126, 492)),
    "runs 16 drawn bernoulli": (Most(158, 442), Most(147, 590)),
    "outside 32": (Most(None, 48), Most(None, 24)),
    "outside 64": (Most(None, 60), Most(None, 26)),
    "outside 16": (Most(None, 56), Most(None, 29)),
    "fisher_accumulate": (Most(21, 189), Most(7.5, 20)),
    "gradient_norm plain": (Most(6.6), Most(5.8)),
    "gradient_norm fixed": (Most(18), Most(14.5)),
    "gradient_norm bernoulli": (Most(37), Most(36)),
    "gradient_norm both": (Most(41), Most(37)),
    "gradient_norm again": (Most(11), Most(13.6)),
    "keep_words": (Most(261), Most(455)),
    "step_scalars": (Most(483), Most(491)),
    "topk_select": (Most(37), Most(310)),
}


def family(variant: str) -> str:
    """The row of the table above that a variant belongs to."""
    if variant.startswith("gradient_norm"):
        return " ".join(variant.split("-")[:2])
    found = re.match(r"child_adamw-(\w+)-(b?float\d+)", variant)
    if found is None:
        return variant.split()[0]
    bits = {"float64": "64", "float32": "32"}.get(found[2], "16")
    drawn = " drawn" * draws(variant)
    return f"{found[1]} {bits}{drawn}" + " bernoulli" * variant.endswith("bernoulli")


def draws(variant: str) -> bool:
    """Whether a step rounds by random words."""
    return bool({"stochastic", "bf16_moments"} & {*variant.split("-")})


def expected_bytes(variant: str) -> float | None:
    """What a full chunk of a step, or of a norm, moves an element; None for other kernels."""
    parts = variant.split("-")
    if parts[0] == "gradient_norm" and parts[1] != "again":
        return BYTES[parts[2]]
    if parts[0] != "child_adamw" or parts[1] in ("indices", "outside"):
        return None
    weight, grad = BYTES[parts[2]], BYTES[parts[3]]
    moment = 2 if "bf16_moments" in parts else 8 if weight == 8 else 4
    masters = 8 * ("master" in parts) + 4 * ("split" in parts)
    return 2 * weight + grad + 4 * moment + masters


_SPLIT_CT_F = "child_adamw-{}-bfloat16-bfloat16-split-bernoulli"

TASKS = machine_code.tasks(machine_code.kernel_modules(), TARGETS)


def _is_slow(task: Task) -> bool:
    """What has its like beside it: most types of a kernel, and on other targets than sm_90 most kernels."""
    parts = task.variant.split("-")
    if task.target != "sm_90":
        return task.variant not in (_SPLIT_CT_F.format("dense"), "keep_words", "step_scalars")
    if parts[0] == "gradient_norm":
        # A type is widened, a mask kind drops, each by itself: both at once where registers are scarcest.
        return parts[-1] not in ("float32", "again") and parts[1:] != ["both", "bfloat16"]
    if parts[0] != "child_adamw":
        return task.variant.startswith("bitmask move") and parts[0].split()[-1] in ("16", "64")
    if parts[1] == "outside":
        return parts[2] != "float32"
    drawn = "-stochastic-bf16_moments-bernoulli" in task.variant and parts[1] in ("dense", "words")
    split = task.variant == _SPLIT_CT_F.format(parts[1])
    return not (
        split or (_is_usual(parts) and parts[2] == "float32") or (drawn and parts[2] == parts[3])
    )


def _is_usual(parts: Sequence[str]) -> bool:
    """Whether a variant of the step is one that people get who choose no types."""
    masters = {"float32": [], "float64": [], "bfloat16": ["split"], "float16": ["master"]}
    kinds = [part for part in parts[4:] if part != "bernoulli"]
    return parts[2] == parts[3] and kinds == ([] if parts[1] == "outside" else masters[parts[2]])


by_task = pytest.mark.parametrize(
    "task",
    [
        pytest.param(
            task,
            id=f"{task.variant}-{task.target}",
            marks=[pytest.mark.slow] if _is_slow(task) else [],
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
        # With a fixed mask a thread reads a whole word, or two, for its four elements, or its two of fp64.
        words = 4 if "-fixed-" in task.variant or "-both-" in task.variant else 0
        assert 0 <= code.chunk.bytes_per_element - expected <= words


def test_every_kernel_is_there() -> None:
    families = {family(task.variant) for task in TASKS}
    assert families == set(MOST)
    assert len(TASKS) > 4 * 104
