"""Fused kernels for Child-Tuning: AdamW that updates a child network in one pass over memory."""

from ._version import __version__
from .child_checkpoint import apply_child, child_diff, load_child, save_child
from .child_mask import ChildMask
from .comm_hook import register_child_comm_hook
from .compat import ChildTuningAdamW
from .fisher import FisherAccumulator
from .fisher_scope import layer_patterns
from .group_options import lr_for
from .optimizer import FusedChildAdamW
from .option_scheduler import OptionScheduler
from .registry import explain
from .selection import random_child, select_child

__all__ = [
    "ChildMask",
    "ChildTuningAdamW",
    "FisherAccumulator",
    "FusedChildAdamW",
    "OptionScheduler",
    "__version__",
    "apply_child",
    "child_diff",
    "explain",
    "layer_patterns",
    "load_child",
    "lr_for",
    "random_child",
    "register_child_comm_hook",
    "save_child",
    "select_child",
]
