"""The table that FusedChildAdamW.summary() prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import child_layout, sharding

_HEADER = ("parameter", "shape", "p", "child", "decay", "backend", "state bytes")


def child_shares(
    groups: Sequence[Mapping[str, Any]], states: Mapping[Tensor, Mapping[str, Tensor]]
) -> tuple[float, float]:
    """The share of the elements that are in the child, and the share that a step gives a gradient.

    What trains densely is in the child whole. The second share is the expected one, with ``reserve_p`` as it
    is now. Of DTensors both are those of this rank's parts.
    """
    elements = child = 0
    kept = 0.0
    for group in groups:
        for parameter in group["params"]:
            numel = sharding.local_of(parameter).numel()
            state = states[parameter]
            count = child_layout.child_count(state) if child_layout.has_child(state) else numel
            elements, child = elements + numel, child + count
            kept += count * float(group["reserve_p"])
    return child / max(1, elements), kept / max(1, elements)


def summary_table(
    groups: Sequence[Mapping[str, Any]],
    states: Mapping[Tensor, Mapping[str, Tensor]],
    backends: Mapping[torch.device, str],
) -> str:
    """A row a parameter: label, shape, p, child density, decay, backend, state bytes; then a total.

    Of DTensors density, bytes and total are those of this rank's parts.
    """
    rows = [_HEADER]
    sharded = False
    total_bytes = total_elements = total_child = 0
    for group in groups:
        for label, parameter in zip(group["param_names"], group["params"], strict=True):
            state = states[parameter]
            size = sum(t.numel() * t.element_size() for t in state.values())
            numel = sharding.local_of(parameter).numel()
            child, density = numel, "dense"
            if child_layout.has_child(state):
                child = child_layout.child_count(state)
                density = f"{child / max(1, numel):.4f}"
            rows.append(
                (
                    label,
                    "x".join(map(str, parameter.shape)) or "scalar",
                    f"{group['reserve_p']:g}",
                    density,
                    f"{group['weight_decay']:g}",
                    backends[parameter.device],
                    f"{size:,}",
                )
            )
            total_bytes += size
            total_elements += numel
            total_child += child
            sharded |= sharding.is_sharded(parameter)
    share = f"{total_child / max(1, total_elements):.4f}"
    total = "this rank's" if sharded else "total"
    rows.append((total, f"{total_elements:,}", "", share, "", "", f"{total_bytes:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in rows]  # fmt: skip
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
