"""DeepSpeed with FusedChildAdamW as client optimizer, stage by stage; by hand: DeepSpeed is no dependency.

    pip install deepspeed && python -m tests.engines.deepspeed_zero [--ranks 2]

Prints a line a case, and ends with 1 where one neither trains as one device does nor is refused by an error.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.multiprocessing
from torch import Tensor, nn

from childtune_kernels import ChildMask, FusedChildAdamW, random_child

STEPS = 3
#: Case: what the configuration adds, and the type of the weights.
CASES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "ZeRO 0, fp32": ({}, torch.float32),
    "ZeRO 0, fp32, clipping": ({"gradient_clipping": 1.0}, torch.float32),
    "ZeRO 0, bf16": ({"bf16": {"enabled": True}}, torch.bfloat16),
    "ZeRO 1, fp32": ({"zero_optimization": {"stage": 1}}, torch.float32),
    "ZeRO 1, bf16": (
        {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
        torch.bfloat16,
    ),
    "ZeRO 2, fp32": ({"zero_optimization": {"stage": 2}}, torch.float32),
    "ZeRO 2, bf16": (
        {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
        torch.bfloat16,
    ),
    "ZeRO 3, fp32": ({"zero_optimization": {"stage": 3}}, torch.float32),
}
#: Of these each rank must train as one device does; DeepSpeed's clipping has a formula of its own.
TRAINS = {"ZeRO 0, fp32"}
RUNS = {"ZeRO 0, fp32, clipping"}


class Model(nn.Module):
    """Two layers, and, as ``single``, one parameter alone, of which a flat copy has the same count."""

    def __init__(self, single: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(10, 12, bias=not single)
        self.down: nn.Module = nn.Identity() if single else nn.Linear(12, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.down(torch.relu(self.up(tokens)))
        return hidden


def tokens_of(step: int, rank: int) -> Tensor:
    return torch.randn(4, 10, generator=torch.Generator().manual_seed(100 * rank + step))


def mask_of(model: nn.Module) -> ChildMask:
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    return random_child(shapes, 0.5, seed=3)


def optimizer_of(model: nn.Module) -> FusedChildAdamW:
    return FusedChildAdamW(
        model.named_parameters(), lr=1e-2, reserve_p=0.5, seed=7, child_mask=mask_of(model)
    )


def on_one_device(world: int, single: bool) -> dict[str, Tensor]:
    """The weights after training on all ranks' batches at once."""
    model = Model(single)
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        for rank in range(world):
            (model(tokens_of(step, rank)).square().sum() / world).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict())


def under_deepspeed(case: str, rank: int, single: bool) -> dict[str, Tensor]:
    """The weights after training under DeepSpeed."""
    import deepspeed

    added, dtype = CASES[case]
    model = Model(single).to(dtype)
    configuration = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,  # else it clips at 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **added,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer_of(model), config=configuration, dist_init_required=False
    )
    for step in range(STEPS):
        engine.backward(engine(tokens_of(step, rank).to(dtype)).float().square().sum())
        engine.step()
    return dict(engine.module.state_dict())


def outcome(case: str, rank: int, world: int, single: bool) -> tuple[bool, str]:
    """Whether a case did what it must, and what it did."""
    try:
        weights = under_deepspeed(case, rank, single)
    except ValueError as error:
        return case not in TRAINS | RUNS and "fully_shard" in str(error), f"refused: {error}"
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"
    expected = on_one_device(world, single)
    same = all(torch.equal(weights[name], expected[name]) for name in expected)
    return same or case in RUNS, "trains as one device does" if same else "trains, with other bits"


def rank_main(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ.update(address, LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    good = True
    for case in CASES:
        for single in (False, True) if case.endswith("fp32") else (False,):
            met, text = outcome(case, rank, world, single)
            good = good and met
            if rank == 0:
                tensors = "1 tensor" if single else "4 tensors"
                print(f"{'ok ' if met else 'BAD'} {case}, {tensors}: {text}", flush=True)
            torch.distributed.barrier()
    if rank == 0:
        print(f"DeepSpeed {deepspeed.__version__}, torch {torch.__version__}, {world} ranks")
    torch.distributed.destroy_process_group()
    if not good:
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    world = parser.parse_args().ranks
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(rank_main, (world, port), nprocs=world)


if __name__ == "__main__":
    main()
