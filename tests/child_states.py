"""Compact state in tests: written in a given layout, and spread out to be compared with dense state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from childtune_kernels import FusedChildAdamW, child_layout, ops

LAYOUTS = ("words", "indices", "runs")


def lay_out_children(optimizer: FusedChildAdamW, layout: str) -> None:
    """Write the children of all compact state in one layout, whatever suits them."""
    for parameter, state in optimizer.state.items():
        words = child_layout.mask_words(state, parameter.numel())
        if words is not None:
            for name in child_layout.LAYOUT_KEYS:
                state.pop(name, None)
            state.update(child_layout.child_layout(words, parameter.numel(), layout))


def state_in_full(parameter: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state on the CPU with a value for every weight; compact ones are spread out as dense ones are."""
    parameter = parameter.detach().cpu()
    state = {name: tensor.cpu() for name, tensor in state.items()}
    if "child_exp_avg" not in state:
        return state
    words = child_layout.mask_words(state, parameter.numel())
    assert words is not None
    child = ops.unpack_mask(words, parameter.shape, backend="reference")
    full = {"step": state["step"], "mask_words": words}
    for name in ("exp_avg", "exp_avg_sq", "master_weight", "master_remainder"):
        if f"child_{name}" in state:
            compact = state[f"child_{name}"]
            whole = torch.zeros(parameter.shape, dtype=compact.dtype)
            if name == "master_weight":
                whole.copy_(parameter)
            full[name] = whole.masked_scatter(child, compact)
    return full
