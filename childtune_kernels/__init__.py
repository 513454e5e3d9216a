"""Fused kernels for Child-Tuning: AdamW that updates a child network in one pass over memory."""

from ._version import __version__
from .child_mask import ChildMask
from .fisher import FisherAccumulator
from .group_options import lr_for
from .optimizer import FusedChildAdamW
from .registry import explain
from .selection import random_child, select_child

__all__ = [
    "ChildMask",
    "FisherAccumulator",
    "FusedChildAdamW",
    "__version__",
    "explain",
    "lr_for",
    "random_child",
    "select_child",
]
