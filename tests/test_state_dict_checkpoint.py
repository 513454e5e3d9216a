"""State dicts as torch.distributed.checkpoint takes and gives them, in one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from childtune_kernels import ChildMask, FusedChildAdamW
from tests.snapshots import assert_identical, untouched, weights_and_state
from tests.toy_parameters import random_tensor


def model_and_mask() -> tuple[nn.Module, ChildMask]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 2)).bfloat16()
    bits = {name: random_tensor(p.shape, 5) > 0 for name, p in model.named_parameters()}
    return model, ChildMask.from_dense(bits)


def train_model(model: nn.Module, optimizer: FusedChildAdamW, steps: range) -> None:
    for step in steps:
        for parameter in model.parameters():
            parameter.grad = random_tensor(parameter.shape, step, parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_round_trip_changes_nothing(flat: bool, steps: int) -> None:
    """Flat state dicts are read by the keys of the resuming optimizer, so that one gets the mask."""
    model, mask = model_and_mask()
    optimizer = FusedChildAdamW(
        model.named_parameters(), lr=0.1, reserve_p=0.5, seed=1, child_mask=mask
    )
    train_model(model, optimizer, range(steps))
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    with untouched(optimizer):
        saved = get_optimizer_state_dict(model, optimizer, options=options)
    other_model, _ = model_and_mask()
    other_model.load_state_dict(model.state_dict())
    other = FusedChildAdamW(
        other_model.named_parameters(), seed=9, child_mask=mask if flat else None
    )
    set_optimizer_state_dict(other_model, other, saved, options=options)
    assert_identical(weights_and_state(optimizer), weights_and_state(other))
    assert other.param_groups[0]["seed"] == 1
    train_model(model, optimizer, range(steps, steps + 3))
    train_model(other_model, other, range(steps, steps + 3))
    assert_identical(weights_and_state(optimizer), weights_and_state(other))
