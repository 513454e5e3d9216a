"""Op gradient_norm: sums of squared gradients in an order that any hardware can keep (SPEC.md, eq. 19)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .bitmask import unpack_mask
from .philox import keep_mask, mapped_indexes

_COLUMNS, _ROWS = 128, 32  # of a unit


def gradient_norm(rows: Sequence[Any], after_mask: bool) -> Tensor:
    """Σ and Σ' of eq. 19: float64 ``[2]`` on the rows' device (contract: ops.gradient_norm).

    On MPS, which has no fp64, they are computed and stay on the CPU. A row offers ``active``, ``parameter``
    (with its ``grad``), ``mask_words`` or None, ``step``, ``philox_key``, ``element_map`` and ``numbers``
    (``GroupNumbers``).
    """
    every, kept = [], []
    for row in rows:
        squares = _squares(row)
        every.append(_unit_sums(squares))
        if after_mask:
            r = 1.0 / row.numbers.reserve_p
            squares = torch.where(_counts(row), squares, torch.zeros_like(squares))
            kept.append(_unit_sums(squares) * (r * r))
    total = _total(torch.cat(every))
    return torch.stack([_total(torch.cat(kept)) if after_mask else total, total])


def _squares(row: Any) -> Tensor:
    """x of a row before any mask, in the order of local indexes."""
    parameter, device = row.parameter, _has_fp64(row.parameter.device)
    if not row.active:
        return torch.zeros(parameter.numel(), dtype=torch.float64, device=device)
    gradient = parameter.grad.detach().reshape(-1).to(device).to(torch.float64)
    return gradient * gradient


def _has_fp64(device: torch.device) -> torch.device:
    """The device, or the CPU in place of one without fp64."""
    return torch.device("cpu") if device.type == "mps" else device


def _counts(row: Any) -> Tensor:
    """Which elements the coming step does not drop, as bool."""
    count, device = row.parameter.numel(), row.parameter.device
    elements = mapped_indexes(count, row.element_map.base, row.element_map.levels, device)
    counts = keep_mask(elements, row.philox_key, int(row.step) + 1, row.numbers.threshold)
    if row.mask_words is not None:
        counts &= unpack_mask(row.mask_words, count)
    return counts.to(_has_fp64(device))


def _unit_sums(values: Tensor) -> Tensor:
    """The sum of every unit of 4096 values (float64, one dimension), the last one padded with +0."""
    padding = -values.numel() % (_ROWS * _COLUMNS)
    units = torch.nn.functional.pad(values, (0, padding)).view(-1, _ROWS, _COLUMNS)
    sums = torch.zeros_like(units[:, 0])
    for row in units.unbind(1):
        sums = sums + row
    while sums.shape[1] > 1:
        left, right = sums.chunk(2, 1)
        sums = left + right
    return sums.view(-1)


def _total(sums: Tensor) -> Tensor:
    """Sums of units, summed in the same way until one number is left; +0 where there is none."""
    while sums.numel() > 1:
        sums = _unit_sums(sums)
    return sums.sum()
