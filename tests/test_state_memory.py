"""What compact state takes of memory, counted by itself and by the tensors that live after it was made."""

from __future__ import annotations

import gc
import itertools
import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from childtune_kernels import ChildMask, FusedChildAdamW

NUMEL = 1 << 20
DENSITIES = [0.0, 0.002, 0.02, 0.1, 0.12, 0.13, 0.3, 0.6, 0.97, 1.0]
RUNS = [1, 256]
# The plan's tables, its list of what it observed, and a handful of small tensors.
PLAN_BYTES = 2048


def live_tensor_bytes() -> int:
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if type(tensor) in (Tensor, Parameter)
    }
    return sum(storages.values())


def measured(density: float, run: int) -> dict[str, float]:
    """State bytes of one fp32 parameter, as the optimizer counts them and as tensors came to live."""
    generator = torch.Generator().manual_seed(5)
    child = (torch.rand(NUMEL // run, generator=generator) < density).repeat_interleave(run)
    mask = ChildMask.from_dense({"w": child})
    parameter = Parameter(torch.zeros(NUMEL))
    parameter.grad = torch.ones(NUMEL)
    before = live_tensor_bytes()
    optimizer = FusedChildAdamW([("w", parameter)], child_mask=mask)
    optimizer.step()
    return {
        "density": float(child.float().mean()),
        "counted": optimizer.state_bytes(),
        "grown": live_tensor_bytes() - before,
    }


@pytest.fixture(scope="module")
def measurements() -> dict[str, dict[str, float]]:
    """Made by a process of its own, where no other test's tensors come and go."""
    command = [sys.executable, "-m", "tests.test_state_memory"]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, dict[str, float]] = json.loads(run.stdout)
    return found


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("density", DENSITIES)
def test_state_is_as_small_as_promised(
    density: float, run: int, measurements: dict[str, dict[str, float]]
) -> None:
    found = measurements[f"{density} {run}"]
    exact = found["density"]
    bound = 8 * exact + 0.26 if exact >= 0.125 else 10 * exact + 0.01
    assert found["counted"] <= bound * NUMEL
    assert found["counted"] >= 8 * exact * NUMEL
    assert found["counted"] <= found["grown"] <= found["counted"] + PLAN_BYTES


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(
        json.dumps(
            {
                f"{density} {run}": measured(density, run)
                for density, run in itertools.product(DENSITIES, RUNS)
            }
        )
    )
