"""The formulas of benchmarks/scaling.py give what ranks hold, move and exchange; the page has its tables."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import scaling
from benchmarks.gpu.cases import LLAMA_1B
from benchmarks.scaling import Part, Setting
from benchmarks.traffic import bytes_per_parameter
from benchmarks.variants import Variant
from childtune_kernels import ChildMask, FusedChildAdamW

from .ranks import Ranks

CPU = torch.device("cpu")
# Indices, which GPUs take at p = 0.1 already.
HELD = (*scaling.SETTINGS, Setting("CT_D, p = 0.02", density=0.02))
# Rows that 2 to 4 ranks part unevenly, a tensor of several units of ranks, one with empty parts.
SHAPES = {"up": (1021, 40), "down": (6, 1021), "norm": (3,), "wide": (7, 30, 2)}


class Model(nn.Module):
    """Weights that each rank multiplies with the tokens' sum."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.ones(shape, dtype=dtype)))

    def forward(self, tokens: Tensor) -> Tensor:
        return sum((tokens.sum() * weight).sum() for weight in self.parameters())  # type: ignore[return-value]


@functools.cache
def mask_of(density: float) -> ChildMask:
    generator = torch.Generator().manual_seed(5)
    return ChildMask.from_dense(
        {name: torch.rand(shape, generator=generator) < density for name, shape in SHAPES.items()}
    )


def part_of(name: str, setting: Setting, ranks: int, rank: int) -> Part:
    """What a rank holds, with the child and runs that the mask has there."""
    shape = SHAPES[name]
    elements = scaling.part_elements(shape, ranks, rank)
    if setting.density is None:
        return Part(elements, 0, 0, len(shape))
    first = sum(scaling.part_elements(shape, ranks, before) for before in range(rank))
    child = mask_of(setting.density).dense(name).flatten()[first : first + elements]
    starts = child & ~torch.nn.functional.pad(child[:-1], (1, 0)) if elements else child
    return Part(elements, int(child.sum()), int(starts.sum()), len(shape))


def held_by_all() -> list[tuple[int, int]]:
    return [held(setting) for setting in HELD]


def held(setting: Setting) -> tuple[int, int]:
    """Bytes of a rank's state, and of its parameters and gradients, under FSDP2."""
    dtype = torch.float32 if setting.weight == 4 else torch.bfloat16
    model = Model(dtype)
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    named = list(model.named_parameters())
    weights = sum(2 * each.to_local().nbytes for _, each in named)  # type: ignore[attr-defined]
    if setting.title == "AdamW":
        optimizer: Any = torch.optim.AdamW(model.parameters(), fused=True)
        model(torch.ones(1, dtype=dtype)).backward()
        optimizer.step()
        values = [value for state in optimizer.state.values() for value in state.values()]
        return sum(getattr(each, "_local_tensor", each).nbytes for each in values), weights
    mask = None if setting.density is None else mask_of(setting.density)
    optimizer = FusedChildAdamW(named, child_mask=mask, reserve_p=0.3 if mask is None else 1.0)
    return optimizer.state_bytes(), weights


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_state_is_as_large_as_the_formula_says(ranks: Ranks, world: int) -> None:
    for rank, of_settings in enumerate(ranks.run(world, held_by_all)):
        for setting, (state, weights) in zip(HELD, of_settings, strict=True):
            parts = [part_of(name, setting, world, rank) for name in SHAPES]
            formula = [scaling.state_bytes(setting, part, CPU) for part in parts]
            assert state == sum(formula), (setting.title, rank)
            assert weights == 2 * setting.weight * sum(part.elements for part in parts)


class Exchanged(TorchDispatchMode):
    """Counts the bytes of the whole buffers that collectives gather and scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered: list[int] = []
        self.scattered: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d.") and "allgather" in name:
            self.gathered.append(args[0].nbytes)
        elif name.startswith("c10d.") and "reduce_scatter" in name:
            self.scattered.append(args[1].nbytes)
        return func(*args, **(kwargs or {}))


def exchanged(reshard: bool, sent: torch.dtype) -> tuple[list[int], list[int]]:
    model = Model()
    policy = MixedPrecisionPolicy(param_dtype=sent, reduce_dtype=sent)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    with Exchanged() as mode:
        model(torch.ones(1)).backward()
    return mode.gathered, mode.scattered


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp_exchanges_what_the_formula_says(ranks: Ranks, world: int, reshard: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for gathered, scattered in ranks.run(world, exchanged, reshard, dtype):
            whole = scaling.gathered_elements(SHAPES, world) * dtype.itemsize
            assert gathered == [whole] * (2 if reshard else 1)
            assert scattered == [whole]
            sent = (sum(gathered) + sum(scattered)) * (world - 1) / world
            formula = scaling.sent_by_fsdp(SHAPES, world, dtype.itemsize, 2 if reshard else 1)
            assert formula == pytest.approx(sent, rel=1e-12)


def reduced() -> list[int]:
    """Bytes of the buffers that DistributedDataParallel reduces in a step."""
    model = DistributedDataParallel(Model())
    found: list[int] = []

    def counted(bucket: Any) -> torch.futures.Future[Tensor]:
        found.append(bucket.buffer().nbytes)
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, lambda state, bucket: counted(bucket))
    model(torch.ones(1)).backward()
    return found


def test_ddp_exchanges_what_the_formula_says(ranks: Ranks) -> None:
    for found in ranks.run(2, reduced):
        assert sum(found) == scaling.sent_by_ddp(SHAPES, 2, 4)  # 2 (n - 1) / n is 1 for two


@pytest.mark.parametrize("setting", scaling.SETTINGS, ids=lambda setting: setting.title)
def test_a_step_moves_what_the_benchmarks_count(setting: Setting) -> None:
    dtype = torch.float32 if setting.weight == 4 else torch.bfloat16
    weight = nn.Parameter(torch.zeros(512, 512, dtype=dtype))
    kept = setting.density or 1.0
    variant = Variant(
        name="",
        title="",
        family="torch" if setting.title == "AdamW" else "childtune",
        mask="none" if setting.density is None else "fixed",
        kept=kept,
        dtype=dtype,
    )
    optimizer = variant.build([("weight", weight)])
    part = Part(weight.numel(), weight.numel(), 0, 2)
    if setting.density is not None:
        assert isinstance(optimizer, FusedChildAdamW)
        child = optimizer.state[weight]["child_exp_avg"].numel()
        assert child == pytest.approx(kept * weight.numel(), rel=0.05)
        expected = scaling.expected_part((512, 512), 1, setting.density)
        part = Part(weight.numel(), child, expected.runs, 2)
    counted = bytes_per_parameter(variant, optimizer, weight.numel())
    formula = scaling.moved_bytes(setting, part, CPU) / weight.numel()
    # The benchmarks take the share that was asked for, and count the child's shape to its layout.
    assert formula == pytest.approx(counted, rel=5e-3)


def test_models_are_the_published_ones() -> None:
    counts = [sum(math.prod(each) for each in model.shapes().values()) for model in scaling.MODELS]
    assert counts == [1_235_814_400, 8_030_261_248, 70_553_706_496, 405_853_388_800]
    assert scaling.MODELS[0].shapes() == LLAMA_1B.shapes()


def test_every_element_lies_on_one_rank() -> None:
    for shape in ((10, 3), (7,), (4096, 2)):
        for ranks in (1, 3, 8, 64):
            parts = [scaling.part_elements(shape, ranks, rank) for rank in range(ranks)]
            assert sum(parts) == math.prod(shape)
            assert parts[0] == max(parts)


def test_the_page_shows_the_tables() -> None:
    text = scaling.DOCUMENT.read_text(encoding="utf-8")
    assert scaling.with_tables(text) == text, "run python -m benchmarks.scaling --write"
    records = list(scaling.figures())
    assert [(each["model"], each["gpus"]) for each in records] == [
        (model.title, ranks) for model in scaling.MODELS for ranks in scaling.RANKS
    ]


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="scaling: begin"):
        scaling.with_tables("# Nothing\n")
