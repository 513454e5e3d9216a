"""`accelerate` with DistributedDataParallel and FSDP2 trains as one device does, and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from childtune_kernels import FusedChildAdamW, random_child

from .accelerate_launch import as_launched
from .cases import assert_same_bits
from .ranks import Ranks
from .test_engines import Model

pytest.importorskip("accelerate")

STEPS = 4
BETWEEN = 2  # saved before this one
ACCUMULATED = 2


def optimizer_of(model: nn.Module, child: bool) -> FusedChildAdamW:
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    mask = random_child(shapes, 0.5, seed=3) if child else None
    return FusedChildAdamW(
        model.named_parameters(), lr=1e-2, weight_decay=0.1, reserve_p=0.5, seed=7, child_mask=mask
    )


def tokens_of(step: int, rank: int) -> Tensor:
    return torch.randn(4, 10, generator=torch.Generator().manual_seed(100 * rank + step))


def accelerator_of(engine: str, mixed_precision: str) -> Any:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    accelerator = Accelerator(
        cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=ACCUMULATED
    )
    if engine == "fsdp2":
        # accelerate takes FSDP for accelerators alone; nothing of what follows needs one.
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=50
        )
        if mixed_precision != "no":
            plugin.set_mixed_precision(mixed_precision)
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return accelerator


def train(accelerator: Any, prepared: Any, steps: range) -> None:
    model, optimizer = prepared
    for step in steps:
        with accelerator.accumulate(model):
            loss = model(tokens_of(step, accelerator.process_index)).float().square().sum()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1e6)
            optimizer.step()
            optimizer.zero_grad()


def whole_weights(model: Any) -> dict[str, Tensor]:
    weights = {}
    for name, value in model.named_parameters():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        weights[name.removeprefix("module.")] = whole.detach().clone()
    return weights


def accelerated(
    engine: str, child: bool, mixed_precision: str, folder: str | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights after training, and again from what was saved in between."""
    with as_launched():
        accelerator = accelerator_of(engine, mixed_precision)
        model = Model()
        first = accelerator.prepare(model, optimizer_of(model, child))
        train(accelerator, first, range(BETWEEN))
        if folder is not None:
            accelerator.save_state(folder)
        train(accelerator, first, range(BETWEEN, STEPS))
        weights = again = whole_weights(first[0])
        if folder is not None:
            fresh = Model()
            with torch.no_grad():
                for weight in fresh.parameters():
                    weight.zero_()
            accelerator._models.clear()
            accelerator._optimizers.clear()
            second = accelerator.prepare(fresh, optimizer_of(fresh, child))
            accelerator.load_state(folder)
            train(accelerator, second, range(BETWEEN, STEPS))
            again = whole_weights(second[0])
        return weights, again


def on_one_device(world: int, child: bool) -> dict[str, Tensor]:
    """The weights after training on all batches of all ranks."""
    model = Model()
    optimizer = optimizer_of(model, child)
    for step in range(STEPS):
        losses = [model(tokens_of(step, rank)).square().sum() for rank in range(world)]
        (sum(losses) / (world * ACCUMULATED)).backward()
        if step % ACCUMULATED == ACCUMULATED - 1:
            optimizer.step()
            optimizer.zero_grad()
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize("child", [False, True], ids=["CT_F", "CT_F in CT_D"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_an_accelerated_run_is_that_of_one_device(
    ranks: Ranks, engine: str, child: bool, tmp_path: Path
) -> None:
    expected = on_one_device(2, child)
    for weights, again in ranks.run(2, accelerated, engine, child, "no", str(tmp_path / "run")):
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
        assert_same_bits(again, weights)


@pytest.mark.parametrize(
    ("engine", "mixed_precision"),
    [("ddp", "bf16"), ("ddp", "fp16"), ("fsdp2", "bf16"), ("fsdp2", "fp16")],
)
def test_mixed_precision_comes_close(ranks: Ranks, engine: str, mixed_precision: str) -> None:
    expected = on_one_device(2, child=False)
    for weights, _ in ranks.run(2, accelerated, engine, False, mixed_precision, None):
        assert all(value.dtype == torch.float32 for value in weights.values())
        found, wanted = (
            torch.cat([each[name].flatten() for name in expected]) for each in (weights, expected)
        )
        # A step is as long for a gradient near 0, whose sign may be another in bf16; masks are the same.
        assert ((found - wanted).abs() < 5e-3).float().mean() > 0.95
        # Mixed precision has been at work.
        assert any(not torch.equal(weights[name], value) for name, value in expected.items())
