"""What is right and what is wrong in small kernels is found, for every GPU generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks import (
    assembly,
    code_faults,
    code_paths,
    gpu_limits,
    machine_code,
    moved_bytes,
    rounding,
)
from benchmarks.machine_code import MachineCode, Task
from childtune_kernels.machine import installed

pytestmark = pytest.mark.skipif(
    installed("triton") is None, reason="Triton is not installed on this platform"
)

TOYS = "tests.toy_kernels"
NVIDIA = ("sm_80", "sm_90", "sm_100")
TARGETS = (*NVIDIA, "gfx942")
SPILLED: tuple[tuple[str, Any], ...] = (("maxnreg", 24),)
FUSED: tuple[tuple[str, Any], ...] = (("enable_fp_fusion", True),)

# What is broken, on which targets, and what the faults then say: nothing but these, and the first of them.
BROKEN: list[tuple[str, tuple[tuple[str, Any], ...], Sequence[str], tuple[str, ...]]] = [
    ("fp32", FUSED, TARGETS, ("contract",)),
    ("bf16", FUSED, TARGETS, ("contract",)),
    ("approximate division", (), NVIDIA, ("div.full.f32: not rounded to nearest",)),
    ("masked only", (), TARGETS, ("there is no branch for full chunks",)),
    ("no hint", (), TARGETS, ("128-bit", "of 64 bits and more")),
    ("two a thread", (), TARGETS, ("128-bit",)),
    ("bf16 of eight", (), NVIDIA, ("bytes of shared memory", "occupancy")),
    ("reduction", (), TARGETS, ("bytes of shared memory",)),
    ("loop", (), TARGETS, ("a loop on the path",)),
    ("narrow sums", (), TARGETS, ("128-bit", "of 64 bits and more")),
    ("many registers", (), TARGETS, ("occupancy, below 50%",)),
    ("fp32", SPILLED, NVIDIA, ("registers are spilled",)),
]
# sm_80 and sm_100 are read as sm_90 is: there, a good kernel stands for the broken ones.
broken = pytest.mark.parametrize(
    ("task", "says"),
    [
        pytest.param(
            Task(TOYS, name, target, options),
            says,
            id=f"{name}-{dict(options)}-{target}",
            marks=[pytest.mark.slow] if target in ("sm_80", "sm_100") else [],
        )
        for name, options, targets, says in BROKEN
        for target in targets
    ],
)
GOOD = {"fp32": 28.0, "bf16": 22.0, "fp16": 22.0}  # bytes an element
good = pytest.mark.parametrize(
    "task",
    [Task(TOYS, name, target) for target in TARGETS for name in GOOD],
    ids=lambda t: f"{t.variant}-{t.target}",
)


@pytest.fixture(scope="module")
def codes(request: pytest.FixtureRequest) -> dict[Task, MachineCode | str]:
    todo = [Task(TOYS, name, target) for target in TARGETS for name in (*GOOD, "sums")]
    asked = (getattr(item, "callspec", None) for item in request.session.items)
    wanted = {each.params.get("task") for each in asked if each is not None}
    broken_ones = [Task(TOYS, n, target, options) for n, options, on, _ in BROKEN for target in on]
    todo += [task for task in broken_ones if task in wanted]
    return machine_code.read_all(todo)


def read(codes: dict[Task, MachineCode | str], task: Task) -> MachineCode:
    code = codes[task]
    assert isinstance(code, MachineCode), code
    return code


@good
def test_a_good_kernel_has_no_fault(codes: dict[Task, MachineCode | str], task: Task) -> None:
    code = read(codes, task)
    assert code_faults.faults_of(code, code_faults.Most(60)) == []
    assert code.chunk is not None
    assert code.chunk.bytes_per_element == GOOD[task.variant]
    assert code.chunk.instructions > 25


@pytest.mark.parametrize("target", TARGETS)
def test_of_a_kernel_that_reduces_the_way_of_wide_loads_is_read(
    codes: dict[Task, MachineCode | str], target: str
) -> None:
    code = read(codes, Task(TOYS, "sums", target))
    assert code_faults.faults_of(code) == []
    assert code.chunk is not None
    loads = [access for access in code.chunk.accesses if not access.store]
    assert {(access.bits, access.guarded) for access in loads} == {(128, False)}


@broken
def test_a_broken_property_is_named_and_nothing_else(
    codes: dict[Task, MachineCode | str], task: Task, says: tuple[str, ...]
) -> None:
    faults = code_faults.faults_of(read(codes, task))
    assert any(says[0] in fault for fault in faults), faults
    assert all(any(words in fault for words in says) for fault in faults), faults


@good
def test_too_many_instructions_are_a_fault(
    codes: dict[Task, MachineCode | str], task: Task
) -> None:
    (fault,) = code_faults.faults_of(read(codes, task), code_faults.Most(20))
    assert "instructions an element of a full chunk, above 20" in fault


@pytest.mark.parametrize("target", NVIDIA)
def test_slow_paths_are_named_and_not_counted(
    codes: dict[Task, MachineCode | str], target: str
) -> None:
    code = read(codes, Task(TOYS, "fp32", target))
    assert ["sqrt_rn" in name or "div_rn" in name for name in code.slow_paths] == [True, True]
    assert code.chunk is not None
    assert code.chunk.unavoidable_calls == ()


def test_the_table_names_a_limit_for_every_gpu(codes: dict[Task, MachineCode | str]) -> None:
    text = machine_code.table(read(codes, Task(TOYS, "fp32", target)) for target in TARGETS)
    for gpu in gpu_limits.GPUS:
        assert f"{gpu.name}: memory, " in text
    # 4.8 TB/s at 28 bytes an element.
    assert "H200: memory, 171 G/s" in text


def test_every_way_of_rounding_otherwise_is_a_fault() -> None:
    (fused,) = rounding.faults_in_ptx("\t@%p1 fma.rn.f32x2 %rd1, %rd2, %rd3, %rd4;\n")
    assert fused == "1 fma.rn.f32x2: contracted"
    ptx = "\tadd.rn.ftz.f32 %f1, %f2, %f3;\n\tmul.f64 %d1, %d2, %d3;\n\tmul.lo.s32 %r1, %r2, %r3;\n"
    assert list(rounding.faults_in_ptx(ptx)) == [
        "1 add.rn.ftz.f32: flushes subnormals",
        "1 mul.f64: not rounded to nearest, or open to contraction",
    ]
    flushing = "\t\t.amdhsa_float_denorm_mode_32 0\n\t\t.amdhsa_float_denorm_mode_16_64 3\n"
    assert list(rounding.faults_in_amdgcn(flushing, rounding.Expansions({}, {}))) == [
        "denormal mode 0 of 32-bit floats: flushes subnormals"
    ]


def test_a_fused_operation_with_a_neutral_operand_rounds_once() -> None:
    alone = "\tv_fma_mix_f32 v1, v19, v19, neg(0) op_sel_hi:[1,1,0]\n\tv_fma_mix_f32 v0, -v0, 1.0, v42\n"
    contracted = "\tv_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]\n"
    nothing = rounding.Expansions({}, {})
    assert list(rounding.faults_in_amdgcn(alone, nothing)) == []
    assert list(rounding.faults_in_amdgcn(contracted, nothing)) == [
        "2 fused multiply-adds where divisions and square roots have 0: contracted"
    ]


def test_occupancy_is_counted_in_whole_blocks() -> None:
    hopper = gpu_limits.GENERATIONS["sm_90"]
    assert hopper.occupancy(64, 128, 0) == 0.5
    assert hopper.occupancy(65, 128, 0) == 28 / 64
    assert hopper.occupancy(32, 128, 100 * 1024) == 8 / 64
    assert gpu_limits.GENERATIONS["gfx942"].occupancy(128, 256, 0) == 0.5


def test_a_path_steps_around_calls_and_follows_the_widest_stores() -> None:
    text = """
.text.toy:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
        /*0020*/                   STG.E desc[UR4][R0.64], R4 ;
        /*0030*/                   EXIT ;
.L_x_0:
        /*0040*/              @P1 BRA `(.L_x_1) ;
        /*0050*/                   CALL.REL.NOINC `($slow) ;
.L_x_1:
        /*0060*/                   STG.E.128 desc[UR4][R0.64], R4 ;
        /*0070*/                   MOV R0, UR8 ;
        /*0078*/                   STG.E.128 desc[UR4][R0.64], R4 ;
        /*0080*/                   EXIT ;
$slow:
        /*0090*/                   RET.REL.NODEC R2 `(toy) ;
"""
    path = code_paths.full_chunk_path(assembly.read_sass(text, "toy"))
    assert [item.opcode for item in path.instructions] == [
        *("S2R", "BRA", "BRA", "STG.E.128", "MOV", "STG.E.128", "EXIT")
    ]
    assert path.accesses == (assembly.Access(True, 128, False),), "R0 is then overwritten"
    assert path.slow_paths == ("$slow",)
    inevitable = text.replace("@P1 BRA `(.L_x_1)", "NOP")
    assert code_paths.calls_on(code_paths.full_chunk_path(assembly.read_sass(inevitable, "toy")))


def test_code_that_cannot_be_followed_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot follow BRX"):
        assembly.read_sass(".text.toy:\n        /*0000*/   BRX R2 -0x10 ;\n", "toy")
    with pytest.raises(ValueError, match="no machine code of kernel 'other'"):
        assembly.read_sass(".text.toy:\n        /*0000*/   EXIT ;\n", "other")
    with pytest.raises(ValueError, match="no way leads"):
        code_paths.full_chunk_path(assembly.read_sass(".text.toy:\n  /*0000*/   RET ;\n", "toy"))


def test_the_largest_unmasked_branch_is_what_a_full_chunk_moves() -> None:
    text = """
      %a = tt.load %scalar : !tt.ptr<i64> loc(#loc1)
      %b = tt.load %p : tensor<1024x!tt.ptr<f32>> loc(#loc1)
      scf.if %1 {
        %c = tt.load %q evictionPolicy = evict_first : tensor<1024x!tt.ptr<bf16>> loc(#loc2)
        tt.store %p, %b : tensor<1024x!tt.ptr<f32>> loc(#loc1)
      } else {
        %c = tt.load %q, %mask, %cst : tensor<1024x!tt.ptr<bf16>> loc(#loc2)
        tt.store %p, %b, %mask : tensor<1024x!tt.ptr<f32>> loc(#loc1)
      } loc(#loc3)
"""
    found = moved_bytes.largest_unmasked(text, threads=128)
    assert found == moved_bytes.TensorBytes(loaded=(32, 16), stored=(32, 0))


def test_elements_one_by_one_are_counted_by_turns_without_what_can_be_gone_around() -> None:
    text = """
.text.toy:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 BRA `(.L_x_9) ;
        /*0020*/                   STG.E.128 desc[UR4][R0.64], R4 ;
        /*0030*/                   EXIT ;
.L_x_9:
        /*0040*/                   MOV R8, R0 ;
.L_x_0:
        /*0050*/              @!P2 LDG.E R4, desc[UR4][R8.64] ;
        /*0060*/              @!P1 BRA `(.L_x_1) ;
        /*0070*/                   LDG.E R5, desc[UR4][UR6] ;
        /*0080*/                   IMAD R4, R4, R5, RZ ;
        /*0090*/                   CALL.REL.NOINC `($slow) ;
.L_x_1:
        /*00a0*/              @!P2 STG.E desc[UR4][R8.64], R4 ;
        /*00b0*/               @P4 CALL.REL.NOINC `(.L_x_2) ;
        /*00c0*/                   BRA `(.L_x_0) ;
.L_x_2:
        /*00d0*/                   EXIT ;
$slow:
        /*00e0*/                   RET.REL.NODEC R2 `(toy) ;
"""
    blocks = assembly.read_sass(text, "toy")
    path = code_paths.scattered_path(blocks)
    assert path is not None
    assert [item.opcode for item in path.turn] == [
        *("LDG.E", "BRA", "STG.E", "CALL.REL.NOINC", "BRA")
    ]
    assert path.turn_accesses == (
        assembly.Access(False, 32, True),
        assembly.Access(True, 32, True),
    )
    assert code_paths.calls_on(path) == [], "to a place of the kernel itself it is a jump"
    assert not code_paths.full_chunk_path(blocks).turn
    assert code_paths.scattered_path(assembly.read_sass(text.split(".L_x_9:")[0], "toy")) is None


def test_wide_accesses_of_elements_anywhere_are_a_fault(
    codes: dict[Task, MachineCode | str],
) -> None:
    code = read(codes, Task(TOYS, "fp32", "sm_90"))
    scattered = code._replace(lanes=128, scattered=code.chunk, widest=(32, 32))
    assert code_faults.faults_of(scattered) == [
        f"{what} of 128 bits of elements anywhere, which have 32 at most"
        for what in ("loads", "stores")
    ]
    (nowhere,) = code_faults.faults_of(code._replace(lanes=128, scattered=None))
    assert nowhere.startswith("no way for elements that lie anywhere")


def test_fused_operations_of_integers_are_no_contraction() -> None:
    division = "\tv_fmac_f32_e32 v2, 0x4f800000, v7\n\tv_fmac_f32_e32 v2, 0xcf800000, v7\n"
    conversion = "\tv_floor_f64_e32 v[2:3], v[2:3]\n\tv_fma_f64 v[0:1], v[2:3], s[0:1], v[0:1]\n"
    nothing = rounding.Expansions({}, {})
    assert list(rounding.faults_in_amdgcn(division + conversion, nothing)) == []
    assert len(list(rounding.faults_in_amdgcn(conversion.split("\n")[1] + "\n", nothing))) == 1
