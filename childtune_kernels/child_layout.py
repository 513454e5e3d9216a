"""Where the child's elements lie in compact state (SPEC.md, "Child layouts"): words, indices or runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import ops
from .plan_row import INDICES_UNIT, WORDS_UNIT

# Measured on Zen 4, 2 cores, 32M fp32, a step by each layout at the same density (docs/performance.md). Words
# cost what reading the tensor costs, indices 2 to 4 ns an element of the child, a run about 30 ns and its
# elements. Below one element in sixteen indices also need less memory than words.
_SPARSE = 1 / 16
_RUN_LENGTH = 24
_ELEMENTS_A_RUN = 160
# On GPUs words cost every element instructions, whether in the child or not: on an H200 at every density from
# 0.06 to 0.7 two to three times what indices cost, which beat runs of up to 64 elements, too (2**25 fp32,
# benchmarks/results/2026-11-27-nvidia-h200/layouts.json). So there nothing is laid out by words unasked.
_SPARSE_ON_GPUS = 1
_RUN_LENGTH_ON_GPUS = 64

LAYOUT_KEYS = ("mask_words", "child_ranks", "child_indices", "child_runs")


def is_compact(state: Mapping[str, Tensor]) -> bool:
    """Whether a parameter's state holds the child's elements alone."""
    return "child_exp_avg" in state


def layout_of(state: Mapping[str, Tensor]) -> str:
    """``"dense"`` or the name of the layout of a parameter's state."""
    if not is_compact(state):
        return "dense"
    if "child_runs" in state:
        return "runs"
    return "indices" if "child_indices" in state else "words"


def has_child(state: Mapping[str, Tensor]) -> bool:
    """Whether a fixed mask stands in a parameter's state, in whatever layout."""
    return any(name in state for name in LAYOUT_KEYS)


def child_layout(words: Tensor, numel: int, layout: str | None = None) -> dict[str, Tensor]:
    """The tensors of a layout for mask words, by their names in the state.

    Args:
        words: int32 mask words.
        numel: elements of the parameter.
        layout: ``"words"``, ``"indices"`` or ``"runs"``; None takes what suits the child's density and
            clustering.
    """
    ops.check_words("child", words, numel)
    starts = _starts(words)
    if layout is None:
        runs = ops.count_mask(starts)
        layout = suitable_layout(ops.count_mask(words), runs, numel, words.device)
    if layout == "runs":
        return {"child_runs": _runs(words, starts, numel)}
    if layout == "words":
        return {"mask_words": words, "child_ranks": ops.mask_ranks(words, WORDS_UNIT)}
    # 16 unsigned bits in a signed type, since torch cannot pickle uint16.
    return {
        "child_indices": ops.mask_indices(words, torch.int16),
        "child_ranks": ops.mask_ranks(words, INDICES_UNIT),
    }


def suitable_layout(count: int, runs: int, numel: int, device: torch.device) -> str:
    """The layout for ``count`` child elements in so many runs, among ``numel``, for a device's kernels."""
    on_cpu = device.type == "cpu"
    length = _RUN_LENGTH if on_cpu else _RUN_LENGTH_ON_GPUS
    if count >= length * runs and numel - count >= _ELEMENTS_A_RUN * (runs - 1):
        return "runs"
    sparse = _SPARSE if on_cpu else _SPARSE_ON_GPUS
    return "indices" if count < sparse * numel else "words"


def _starts(words: Tensor) -> Tensor:
    """The words of the first element of every run."""
    before = torch.nn.functional.pad((words[:-1] >> 31) & 1, (1, 0))
    return words & ~((words << 1) | before)


def _ends(words: Tensor) -> Tensor:
    """The words of the last element of every run."""
    after = torch.nn.functional.pad(words[1:] & 1, (0, 1))
    return words & ~(((words >> 1) & 0x7FFFFFFF) | (after << 31))


def _runs(words: Tensor, starts_of_runs: Tensor, numel: int) -> Tensor:
    starts = ops.mask_indices(starts_of_runs)
    ends = ops.mask_indices(_ends(words)) + 1
    ranks = torch.nn.functional.pad((ends - starts).cumsum(0), (1, 0))
    return torch.stack([torch.nn.functional.pad(starts, (0, 1), value=numel), ranks], 1)


def mask_words(state: Mapping[str, Tensor], numel: int) -> Tensor | None:
    """The mask words of a parameter's state, from whatever layout it has; None without a fixed mask."""
    if "mask_words" in state:
        return state["mask_words"]
    if not has_child(state):
        return None
    if "child_runs" in state:
        starts, ranks = state["child_runs"].unbind(1)
        change = torch.zeros(numel + 1, dtype=torch.int8, device=starts.device)
        change[starts[:-1]] = 1
        change[starts[:-1] + ranks.diff()] = -1
        return ops.pack_mask(change[:-1].cumsum(0, dtype=torch.int8).bool())
    ranks = state["child_ranks"]
    unit = torch.arange(ranks.numel() - 1, device=ranks.device)
    within = state["child_indices"].to(torch.int64) % INDICES_UNIT
    child = torch.zeros(numel, dtype=torch.bool, device=ranks.device)
    child[within + unit.repeat_interleave(ranks.diff()) * INDICES_UNIT] = True
    return ops.pack_mask(child)


def child_count(state: Mapping[str, Tensor]) -> int:
    """The number of child elements of a parameter's state with a fixed mask."""
    if is_compact(state):
        return state["child_exp_avg"].numel()
    return ops.count_mask(state["mask_words"])


def gather_child(values: Tensor, words: Tensor) -> Tensor:
    """The child's elements of a tensor, one after the other in row-major order."""
    return ops.gather_masked(values, words)


def scatter_child_(values: Tensor, child: Tensor, words: Tensor) -> Tensor:
    """Put the child's elements in their places of a contiguous tensor; returns it."""
    ops.scatter_masked_(values, child, words)
    return values


def check_layout(
    label: str, state: Mapping[str, Any], device: torch.device, numel: int, *, contents: bool
) -> None:
    """Refuse compact state whose layout is not written as the kernels read it.

    Args:
        contents: look at every number too, on CPUs: whether the layout is that of any child of ``numel``
            elements. A kernel that followed another one would write anywhere.

    Raises:
        ValueError: tensors of other types, sizes or devices, or of another number of child elements.
    """
    layout = layout_of(state)
    found = {name: state[name] for name in LAYOUT_KEYS if name in state}
    right = _has_form(layout, found, state["child_exp_avg"].numel(), device, numel)
    if right and contents and device.type == "cpu":
        try:
            words = mask_words(state, numel)
            again = {} if words is None else child_layout(words, numel, layout)
            right = all(torch.equal(tensor, again[name]) for name, tensor in found.items())
        except (RuntimeError, IndexError, ValueError):
            right = False
    if not right:
        raise ValueError(
            f"the child of {label} is not written as layout {layout} has it ({', '.join(found)}); use "
            "optimizer.set_child_mask or load_state_dict instead of writing into optimizer.state"
        )


def _has_form(
    layout: str, found: Mapping[str, Any], count: int, device: torch.device, numel: int
) -> bool:
    """Whether the tensors of a layout have the types and sizes for ``count`` of ``numel`` elements."""
    if not all(isinstance(tensor, Tensor) for tensor in found.values()):
        return False
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    if layout == "words":
        expected["mask_words"] = (torch.int32, ((numel + 31) // 32,))
        expected["child_ranks"] = (torch.int64, (-(-numel // WORDS_UNIT) + 1,))
    elif layout == "indices":
        expected["child_indices"] = (torch.int16, (count,))
        expected["child_ranks"] = (torch.int64, (-(-numel // INDICES_UNIT) + 1,))
    else:
        expected["child_runs"] = (torch.int64, (*found["child_runs"].shape[:1], 2))
    return found.keys() == expected.keys() and all(
        (tensor.dtype, tuple(tensor.shape)) == expected[name]
        and tensor.device == device
        and tensor.is_contiguous()
        for name, tensor in found.items()
    )
