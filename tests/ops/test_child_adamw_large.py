"""Op child_adamw beyond 2**31 elements: windows of a tensor do what they do by themselves.

Such a tensor, with its gradient and state, takes 40 GB: on GPUs that have as much it is stepped; elsewhere a
small one shows that the windows are compared as they should be.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from childtune_kernels import ChildMask, FusedChildAdamW, ops, registry, state_tensors
from childtune_kernels.labels import philox_key
from childtune_kernels.plan_row import contiguous_map
from childtune_kernels.step_plan import Row, StepPlan

from ..cases import SEED, assert_same_bits
from ..child_states import state_in_full
from ..columns import device_of

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW = 4097
BYTES_NEEDED = 60e9


def _numel(device: torch.device) -> int:
    roomy = device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > BYTES_NEEDED
    return 2**31 + 3 * WINDOW + 1 if roomy else 6 * WINDOW + 1


def _window(whole: Tensor, start: int) -> Tensor:
    return whole.flatten()[start : start + WINDOW].cpu().clone()


def _expected(
    weight: Tensor, grad: Tensor, child: Tensor | None, start: int, group: dict[str, Any]
) -> dict[str, Tensor]:
    """A step of the reference on a window alone, as a shard of the whole."""
    parameter = torch.nn.Parameter(weight.clone())
    words = None if child is None else ops.pack_mask(child, backend="reference")
    state = state_tensors.initial_state("w", parameter, words, group)
    row = Row("w", parameter, state, 0, philox_key(SEED, "w"), contiguous_map(WINDOW, start))
    parameter.grad = grad
    plan = StepPlan([row], [group], registry.choose("child_adamw", "cpu", "reference"))
    with torch.no_grad():
        plan.refresh()
        plan.run()
    return {"weight": parameter.detach(), **_moments(parameter, state)}


def _moments(parameter: Tensor, state: Any) -> dict[str, Tensor]:
    full = state_in_full(parameter, state)
    return {name: full[name] for name in state_tensors.MOMENTS}


@pytest.mark.parametrize("density", [None, 0.02, 0.3], ids=["dense", "indices", "words"])
def test_windows_of_a_large_tensor(density: float | None, column: str) -> None:
    device = device_of(column)
    numel = _numel(device)
    generator = torch.Generator(device).manual_seed(1)
    whole = torch.nn.Parameter(torch.randn(numel, generator=generator, device=device))
    whole.grad = torch.randn(numel, generator=generator, device=device)
    mask = child = None
    if density is not None:
        child = torch.rand(numel, generator=generator, device=device) < density
        mask = ChildMask.from_dense({"w": child})
    optimizer = FusedChildAdamW(
        [("w", whole)], 1e-2, reserve_p=0.3, child_mask=mask, seed=SEED, backend=column,
        child_state="dense" if density is None else "compact",
    )  # fmt: skip
    group = {**optimizer.param_groups[0], "child_state": "dense"}
    starts = [0, numel // 2 + 1, numel - 2 * WINDOW - 1, numel - WINDOW]
    before = {
        start: (_window(whole.detach(), start), _window(whole.grad, start)) for start in starts
    }
    optimizer.step()
    after = {"weight": whole.detach()}
    if density is None:
        after |= {name: optimizer.state[whole][name] for name in state_tensors.MOMENTS}
    for start in starts:
        own = None if child is None else _window(child, start)
        expected = _expected(*before[start], own, start, group)
        found = {name: _window(tensor, start) for name, tensor in after.items()}
        assert_same_bits(found, {name: expected[name] for name in found})
        assert not torch.equal(found["weight"], before[start][0])
