"""The columns of a step's tables and the maps that stand in them (SPEC.md, sections 2 and 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

MAP_LEVELS = 4

# Each column is 8 bytes. csrc/plan_row.h declares the same ones; backends/cpp.py compares the two.
ROW_FIELDS = (
    "active,group,numel,weight_dtype,grad_dtype,moment_dtype,master_kind,weight,grad,exp_avg,"
    "exp_avg_sq,master,mask_words,child_layout,child_count,run_count,child_ranks,child_places,step,"
    "philox_key,"
    "element_contiguous,storage_contiguous,element_map:9,storage_map:9"
)
GROUP_FIELDS = (
    "lr,beta1,beta2,eps,weight_decay,reserve_p,threshold,freeze_non_child,original_convention,"
    "correct_bias,maximize,stochastic_rounding,max_grad_norm,skip_nonfinite,lr_address,"
    "lr_is_double,weight_decay_address,weight_decay_is_double"
)

# How the child of a row with compact state is written down (SPEC.md, "Child layouts").
LAYOUT_CODES = {"dense": 0, "words": 1, "indices": 2, "runs": 3}
# What stands beside a weight: nothing, an fp32 master (eq. 12) or an int16 remainder (eq. 17).
MASTER_CODES = {"none": 0, "fp32": 1, "split": 2}
WORDS_UNIT = 1 << 12  # elements between two child_ranks of layout "words"
INDICES_UNIT = 1 << 16  # and of layout "indices"

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def _columns(fields: str) -> tuple[dict[str, int], int]:
    columns, at = {}, 0
    for field in fields.split(","):
        name, _, width = field.partition(":")
        columns[name] = at
        at += int(width or 1)
    return columns, at


ROW_COLUMN, ROW_WIDTH = _columns(ROW_FIELDS)
GROUP_COLUMN, GROUP_WIDTH = _columns(GROUP_FIELDS)


class GroupNumbers(NamedTuple):
    """The numbers of one parameter group, in the order of ``GROUP_FIELDS``.

    An address is that of a tensor from which a kernel reads the option itself, or 0; the option's own
    number then says nothing.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    reserve_p: float
    threshold: int
    freeze_non_child: bool
    original_convention: bool
    correct_bias: bool
    maximize: bool
    stochastic_rounding: bool = False
    max_grad_norm: float = 0.0  # 0: no clipping
    skip_nonfinite: bool = False
    lr_address: int = 0
    lr_is_double: bool = False
    weight_decay_address: int = 0
    weight_decay_is_double: bool = False

    @property
    def may_decay(self) -> bool:
        """Whether weights decay, as far as the host knows."""
        on_device = self.lr_address or self.weight_decay_address
        return bool(on_device) or self.lr * self.weight_decay > 0


class IndexMap(NamedTuple):
    """A local index's place elsewhere: a base and up to four (size, stride) levels (SPEC.md, eq. 5).

    ``levels`` go from the outermost to the innermost. Local index i is split into digits by the
    sizes, innermost fastest; its image is ``base + sum(digit * stride)``.
    """

    base: int
    levels: tuple[tuple[int, int], ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether consecutive local indexes have consecutive images."""
        return len(self.levels) <= 1 and all(stride == 1 for _, stride in self.levels)

    def columns(self) -> list[int]:
        """The nine integers of the map in a table row."""
        padded = ((1, 0),) * (MAP_LEVELS - len(self.levels)) + self.levels
        return [self.base, *(number for level in padded for number in level)]


def contiguous_map(numel: int, base: int = 0) -> IndexMap:
    """The map of ``numel`` consecutive elements from ``base`` on."""
    return IndexMap(base, ((numel, 1),))


def strided_map(sizes: Sequence[int], strides: Sequence[int], base: int = 0) -> IndexMap:
    """The map from row-major positions in a shape to offsets under its strides.

    Dimensions that follow one another in memory are joined.

    Raises:
        ValueError: more than four levels remain, or elements share memory.
    """
    levels: list[tuple[int, int]] = []
    if _may_overlap(sizes, strides):
        raise ValueError(f"elements of shape {tuple(sizes)}, strides {tuple(strides)} share memory")
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if len(levels) > MAP_LEVELS:
        raise ValueError(
            f"shape {tuple(sizes)} with strides {tuple(strides)} needs {len(levels)} levels of "
            f"strides; at most {MAP_LEVELS} are supported"
        )
    return IndexMap(base, tuple(levels) or ((1, 1),))


def _may_overlap(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a stride is too short to step over all that the shorter strides span."""
    span = 0
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size > 1 and stride <= span:
            return True
        span += (size - 1) * stride
    return False
