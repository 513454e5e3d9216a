"""The columns of a plan's tables as kernels read them (plan_row.py, SPEC.md, section 4)."""

from __future__ import annotations

import triton
import triton.language as tl

from ...plan_row import GROUP_COLUMN, GROUP_WIDTH, ROW_COLUMN, ROW_WIDTH

ROW = tl.constexpr(ROW_WIDTH)
ACTIVE = tl.constexpr(ROW_COLUMN["active"])
GROUP_INDEX = tl.constexpr(ROW_COLUMN["group"])
NUMEL = tl.constexpr(ROW_COLUMN["numel"])
WEIGHT = tl.constexpr(ROW_COLUMN["weight"])
GRAD = tl.constexpr(ROW_COLUMN["grad"])
EXP_AVG = tl.constexpr(ROW_COLUMN["exp_avg"])
EXP_AVG_SQ = tl.constexpr(ROW_COLUMN["exp_avg_sq"])
MASTER = tl.constexpr(ROW_COLUMN["master"])
MASK_WORDS = tl.constexpr(ROW_COLUMN["mask_words"])
CHILD_COUNT = tl.constexpr(ROW_COLUMN["child_count"])
CHILD_RANKS = tl.constexpr(ROW_COLUMN["child_ranks"])
CHILD_PLACES = tl.constexpr(ROW_COLUMN["child_places"])
STEP = tl.constexpr(ROW_COLUMN["step"])
PHILOX_KEY = tl.constexpr(ROW_COLUMN["philox_key"])
ELEMENT_CONTIGUOUS = tl.constexpr(ROW_COLUMN["element_contiguous"])
STORAGE_CONTIGUOUS = tl.constexpr(ROW_COLUMN["storage_contiguous"])
ELEMENT_MAP = tl.constexpr(ROW_COLUMN["element_map"])
STORAGE_MAP = tl.constexpr(ROW_COLUMN["storage_map"])

GROUP = tl.constexpr(GROUP_WIDTH)
LR = tl.constexpr(GROUP_COLUMN["lr"])
BETA1 = tl.constexpr(GROUP_COLUMN["beta1"])
BETA2 = tl.constexpr(GROUP_COLUMN["beta2"])
EPS = tl.constexpr(GROUP_COLUMN["eps"])
WEIGHT_DECAY = tl.constexpr(GROUP_COLUMN["weight_decay"])
RESERVE_P = tl.constexpr(GROUP_COLUMN["reserve_p"])
THRESHOLD = tl.constexpr(GROUP_COLUMN["threshold"])
FREEZE_NON_CHILD = tl.constexpr(GROUP_COLUMN["freeze_non_child"])
ORIGINAL_CONVENTION = tl.constexpr(GROUP_COLUMN["original_convention"])
CORRECT_BIAS = tl.constexpr(GROUP_COLUMN["correct_bias"])
MAXIMIZE = tl.constexpr(GROUP_COLUMN["maximize"])
MAX_GRAD_NORM = tl.constexpr(GROUP_COLUMN["max_grad_norm"])
SKIP_NONFINITE = tl.constexpr(GROUP_COLUMN["skip_nonfinite"])
LR_ADDRESS = tl.constexpr(GROUP_COLUMN["lr_address"])
LR_IS_DOUBLE = tl.constexpr(GROUP_COLUMN["lr_is_double"])
WEIGHT_DECAY_ADDRESS = tl.constexpr(GROUP_COLUMN["weight_decay_address"])
WEIGHT_DECAY_IS_DOUBLE = tl.constexpr(GROUP_COLUMN["weight_decay_is_double"])


@triton.jit
def address(row, COLUMN: tl.constexpr, TYPE: tl.constexpr):
    """The pointer that stands in a column of a row."""
    return tl.load(row + COLUMN).to(tl.pointer_type(TYPE))
