"""Masters of one kind that become those of another, where the two round differently (SPEC.md, section 5)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from childtune_kernels import ChildMask, FusedChildAdamW

from .cases import generator_of, raw_bits

NAME = "layer.weight"
NUMEL = 3001
CHILD = torch.rand(NUMEL, generator=generator_of("kinds of masters")) < 0.4


@pytest.mark.parametrize(("before", "after"), [("fp32", "split"), ("split", "fp32")])
@pytest.mark.parametrize("masked", [False, True])
def test_a_tie_keeps_its_master_but_for_one_place(masked: bool, before: str, after: str) -> None:
    """Half of all ties are rounded to different sides, and yet no weight ends half a place of bf16 away."""
    index = torch.arange(NUMEL, dtype=torch.int32)
    upper = (0x3F80 + index) | (index % 2 << 15)  # of every other one the sign
    bits = (upper << 16) | 0x8000
    ties = bits.view(torch.float32)
    weight = ties.to(torch.bfloat16)
    if before == "split":
        weight = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    mask = ChildMask.from_dense({NAME: CHILD}) if masked else None

    def optimizer_of(kind: str) -> tuple[torch.nn.Parameter, FusedChildAdamW]:
        parameter = torch.nn.Parameter(weight.clone())
        options: dict[str, Any] = {"child_mask": mask, "backend": "reference"}
        return parameter, FusedChildAdamW([(NAME, parameter)], master_weight=kind, **options)

    parameter, saved = optimizer_of(before)
    _, loaded = optimizer_of(after)
    child = CHILD if masked else torch.ones(NUMEL, dtype=torch.bool)
    prefix = "child_" if masked else ""
    if before == "fp32":
        saved.state[parameter][f"{prefix}master_weight"].copy_(ties[child])
    else:
        saved.state[parameter][f"{prefix}master_remainder"].fill_(-(2**15))
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(saved.master_state_dict()[NAME][child], ties[child])
    found = loaded.master_state_dict()[NAME][child]
    assert ((raw_bits(found) - bits[child]).abs() <= 1).all()
