"""How weights, masters and moments are stored, and read again (SPEC.md, eq. 12, 17 and 18)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def narrow(master: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight rounded to its storage type; every bf16 NaN becomes 0x7FC0 (SPEC.md, "Types")."""
    narrowed = master.to(dtype)
    return torch.where(master.isnan(), torch.full_like(narrowed, math.nan), narrowed)


def narrow_by_words(value: Tensor, words: Tensor) -> Tensor:
    """Eq. 18: fp32 values rounded to bf16 by random words (int64, 0 .. 2**32-1) of the same shape."""
    bits = (value.view(torch.int32).to(torch.int64) & 0xFFFFFFFF) + (words & 0xFFFF)
    rounded = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(value.isnan(), torch.full_like(rounded, math.nan), rounded)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 17: the bf16 weight and the int16 remainder of fp32 masters."""
    bits = torch.where(master.isnan(), torch.full_like(master, math.nan), master).view(torch.int32)
    weight = (bits + 0x8000) >> 16
    remainder = bits - (weight << 16)
    return weight.to(torch.int16).view(torch.bfloat16), remainder.to(torch.int16)


def current_master(weight: Tensor, master: Tensor) -> Tensor:
    """Eq. 12: the masters, or the stored weights where somebody has written them since."""
    same = narrow(master, weight.dtype).view(torch.int16) == weight.contiguous().view(torch.int16)
    return torch.where(same, master, weight.to(torch.float32))


def joined_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """Eq. 17: the fp32 masters of bf16 weights and int16 remainders of the same shape."""
    high = weight.contiguous().view(torch.int16).to(torch.int32) << 16
    bits = high + remainder.to(torch.int32)
    # No master is stored so: a zero that somebody has written since.
    return torch.where((bits < 0) == (high < 0), bits, high).view(torch.float32)
