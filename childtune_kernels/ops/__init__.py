"""The contracts, a module an op: arguments are checked here, once, and the chosen kernel is called."""

from .bitmask import (
    check_tails,
    check_words,
    count_mask,
    gather_masked,
    join_words,
    mask_indices,
    mask_ranks,
    pack_mask,
    scatter_masked_,
    unpack_mask,
)
from .child_adamw import child_adamw_
from .fisher_accumulate import check_squares, fisher_accumulate_
from .gradient_norm import gradient_norm
from .keep_words import KEEP_ALL, keep_words
from .master_weight import current_master, joined_master, split_master
from .observe import observe, observe_groups, watch
from .tensors import HALF_TYPES, check_gradient, check_parameter, compute_dtype
from .topk_select import (
    SCORE_UNIT,
    bracket_histogram,
    digit_histogram,
    run_scores,
    select_words,
    take_ties_,
)

__all__ = [
    "HALF_TYPES",
    "KEEP_ALL",
    "SCORE_UNIT",
    "bracket_histogram",
    "check_gradient",
    "check_parameter",
    "check_squares",
    "check_tails",
    "check_words",
    "child_adamw_",
    "compute_dtype",
    "count_mask",
    "current_master",
    "digit_histogram",
    "fisher_accumulate_",
    "gather_masked",
    "gradient_norm",
    "join_words",
    "joined_master",
    "keep_words",
    "mask_indices",
    "mask_ranks",
    "observe",
    "observe_groups",
    "pack_mask",
    "run_scores",
    "scatter_masked_",
    "select_words",
    "split_master",
    "take_ties_",
    "unpack_mask",
    "watch",
]
