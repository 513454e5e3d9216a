"""The C++ column: loads the extension, or keeps the reason why it is absent.

``CHILDTUNE_CPU_CAPABILITY`` (``baseline``, ``avx2`` or ``avx512``) forces an instruction set; without it
the best one this processor has is used.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..plan_row import GROUP_FIELDS, ROW_FIELDS, IndexMap

CAPABILITIES = ("baseline", "avx2", "avx512")
CAPABILITY_VARIABLE = "CHILDTUNE_CPU_CAPABILITY"
REMEDY = (
    "install a C++17 compiler (g++ or clang++) and reinstall with "
    "'pip install --no-build-isolation .', without CHILDTUNE_BUILD_EXT=0"
)

_PACKAGE = Path(__file__).parent.parent


@functools.cache
def load() -> str | None:
    """Load the extension once; None, or the reason why it cannot serve."""
    libraries = sorted(_PACKAGE.glob("_C*.so"))
    if not libraries:
        note = _PACKAGE / "_extension_absent.txt"
        if note.exists():
            return note.read_text().strip()
        # A source tree in the working directory hides an installed package.
        return f"no extension was built in {_PACKAGE}, from where the package was imported"
    try:
        torch.ops.load_library(str(libraries[-1]))
    except OSError as error:
        return f"{libraries[-1].name} does not load: {error.__cause__ or error}"
    kernels = torch.ops.childtune_kernels
    try:
        fields = kernels.row_fields(), kernels.group_fields()
        _methods()
    except (ImportError, AttributeError):
        fields = None
    if fields != (ROW_FIELDS, GROUP_FIELDS):
        return f"{libraries[-1].name} was built from another version of the sources; rebuild it"
    return None


@functools.cache
def _methods() -> Any:
    """The extension as a Python module: methods that take Python's objects as they are."""
    library = sorted(_PACKAGE.glob("_C*.so"))[-1]
    specification = importlib.util.spec_from_file_location("childtune_kernels._C", library)
    assert specification is not None
    return importlib.util.module_from_spec(specification)


def supported_capabilities() -> list[str]:
    """The instruction sets that this build and this processor share, the best one last."""
    if load() is not None:
        return []
    has = torch.ops.childtune_kernels.has_capability
    return [name for code, name in enumerate(CAPABILITIES) if has(code)]


@functools.cache
def _capability(forced: str | None) -> int:
    supported = supported_capabilities()
    name = forced or supported[-1]
    if name not in supported:
        raise RuntimeError(
            f"{CAPABILITY_VARIABLE}={name!r} cannot be used: this processor and build offer "
            f"{', '.join(supported)}; unset the variable or name one of these"
        )
    return CAPABILITIES.index(name)


def capability() -> int:
    """The code of the instruction set in use.

    Raises:
        RuntimeError: ``CHILDTUNE_CPU_CAPABILITY`` names one that is unknown or not supported here.
    """
    return _capability(os.environ.get(CAPABILITY_VARIABLE))


def child_adamw_(
    rows: Sequence[Any],
    row_table: Tensor,
    group_table: Tensor,
    kept: dict[str, Any],
    factor: Any,
    capturing: bool,
) -> None:
    """Update every active row in place (contract: ops.child_adamw_)."""
    del rows, kept, capturing
    step = torch.ops.childtune_kernels.child_adamw_
    if factor is None:
        step(row_table, group_table, None, None, None, None, capability())
    else:
        step(row_table, group_table, *factor, capability())


def gradient_norm(
    rows: Sequence[Any],
    row_table: Tensor,
    group_table: Tensor,
    kept: dict[str, Any],
    words: Tensor | None,
    capturing: bool,
) -> Tensor:
    """Sums of squared gradients (contract: ops.gradient_norm); ``words``: addresses of mask words by row."""
    del rows, kept, capturing
    sums = torch.empty(2, dtype=torch.float64, device="cpu")
    after_mask = words is not None
    torch.ops.childtune_kernels.gradient_norm_(
        row_table,
        group_table,
        row_table if words is None else words,
        after_mask,
        sums,
        capability(),
    )
    return sums


def watch(states: Sequence[dict[str, Tensor]]) -> Any:
    """Handles of all state tensors (contract: ops.watch)."""
    tensors = list(chain.from_iterable(map(dict.values, states)))
    handles = torch.ops.childtune_kernels.watch_handles(tensors)
    return _methods().watch(tensors, handles)


def observe(
    parameters: tuple[Tensor, ...],
    states: tuple[dict[str, Tensor], ...],
    watched: Any,
    before: tuple[bytes, bytes, bytes],
) -> tuple[bytes, bytes, bytes]:
    """Addresses and looks of parameters, state and gradients (contract: ops.observe)."""
    now: tuple[bytes, bytes, bytes] = _methods().observe(parameters, states, watched, before)
    return now


def observe_groups(
    groups: list[dict[str, Any]], state: dict[Any, Any], before: tuple[bytes, bytes]
) -> tuple[bytes, bytes]:
    """Identities of members and options (contract: ops.observe_groups)."""
    now: tuple[bytes, bytes] = _methods().observe_groups(groups, state, before)
    return now


def keep_words(
    numel: int,
    element_map: IndexMap,
    key: int,
    step: int | Tensor,
    purpose: int,
    threshold: int,
    device: torch.device,
) -> Tensor:
    """Keep bits as mask words (contract: ops.keep_words)."""
    words = torch.empty((numel + 31) // 32, dtype=torch.int32, device=device)
    columns = torch.tensor(element_map.columns(), dtype=torch.int64, device="cpu")
    torch.ops.childtune_kernels.keep_words_(
        words,
        numel,
        columns,
        element_map.is_contiguous,
        key - (key >> 63 << 64),
        int(step),
        purpose,
        threshold,
        capability(),
    )
    return words


def pack_mask(mask: Tensor) -> Tensor:
    """Mask words of a bool tensor (contract: ops.pack_mask)."""
    mask = mask.contiguous()
    words = torch.empty((mask.numel() + 31) // 32, dtype=torch.int32, device="cpu")
    torch.ops.childtune_kernels.pack_mask_(mask, words, capability())
    return words


def unpack_mask(words: Tensor, numel: int) -> Tensor:
    """A bool tensor of mask words (contract: ops.unpack_mask)."""
    mask = torch.empty(numel, dtype=torch.bool, device="cpu")
    torch.ops.childtune_kernels.unpack_mask_(words.contiguous(), mask, capability())
    return mask


def count_mask(words: Tensor) -> int:
    """The number of set bits (contract: ops.count_mask)."""
    count: int = torch.ops.childtune_kernels.count_mask(words.contiguous(), capability())
    return count


def mask_ranks(words: Tensor, unit: int) -> Tensor:
    """Set bits before every unit, and in all (contract: ops.mask_ranks)."""
    units = -(-32 * words.numel() // unit)
    ranks = torch.empty(units + 1, dtype=torch.int64, device="cpu")
    torch.ops.childtune_kernels.mask_ranks_(words.contiguous(), unit, ranks, capability())
    return ranks


_MOVED = 1 << 12  # elements whose ranks are counted before they are moved


def mask_indices(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Where bits are set (contract: ops.mask_indices)."""
    words = words.contiguous()
    ranks = mask_ranks(words, _MOVED)
    indices = torch.empty(int(ranks[-1]), dtype=dtype, device="cpu")
    torch.ops.childtune_kernels.mask_indices_(
        words, ranks, _MOVED, indices, dtype.itemsize, capability()
    )
    return indices


def gather_masked(values: Tensor, words: Tensor, _: int | None = None) -> Tensor:
    """The values where bits are set (contract: ops.gather_masked)."""
    ranks = mask_ranks(words, _MOVED)
    child = torch.empty(int(ranks[-1]), dtype=values.dtype, device="cpu")
    _move(values.contiguous(), child, words, ranks, True)
    return child


def scatter_masked_(values: Tensor, child: Tensor, words: Tensor) -> None:
    """Put values where bits are set (contract: ops.scatter_masked_)."""
    _move(values, child.contiguous(), words, mask_ranks(words, _MOVED), False)


def _move(values: Tensor, child: Tensor, words: Tensor, ranks: Tensor, gather: bool) -> None:
    torch.ops.childtune_kernels.move_masked_(
        words.contiguous(),
        ranks,
        _MOVED,
        values,
        child,
        values.element_size(),
        gather,
        capability(),
    )


def fisher_accumulate_(sums: Sequence[Tensor], gradients: Sequence[Tensor], scale: float) -> None:
    """Add every scaled squared gradient to its sums (contract: ops.fisher_accumulate_)."""
    torch.ops.childtune_kernels.fisher_accumulate_.default(sums, gradients, scale, capability())


def digit_histogram(
    scores: Sequence[Tensor], shift: int, bits: int, prefix: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Counts of one digit, and of refused scores (contract: ops.digit_histogram)."""
    counts = torch.zeros(1 << bits, dtype=torch.int64, device="cpu")
    refused = torch.zeros(len(scores), dtype=torch.int64, device="cpu")
    torch.ops.childtune_kernels.digit_histogram_(
        scores, shift, bits, int(prefix), counts, refused, capability()
    )
    return counts, refused


def bracket_histogram(
    scores: Sequence[Tensor], low: int | Tensor, high: int | Tensor, shift: int | Tensor, bins: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts of the keys in a bracket, above it, and refused (contract: ops.bracket_histogram)."""
    counts = torch.zeros(bins, dtype=torch.int64, device="cpu")
    above = torch.zeros((), dtype=torch.int64, device="cpu")
    refused = torch.zeros(len(scores), dtype=torch.int64, device="cpu")
    low, high = int(low), int(high)
    if low <= high:
        torch.ops.childtune_kernels.bracket_histogram_(
            scores, low, high, int(shift), counts, above, refused, capability()
        )
    return counts, above, refused


def select_words(
    scores: Sequence[Tensor], threshold: int | Tensor, largest: bool, unit: int
) -> tuple[list[Tensor], Tensor]:
    """Words beyond a key and counts of equals (contract: ops.select_words)."""
    words = [_empty(score, 32, torch.int32) for score in scores]
    units = sum(-(-score.numel() // unit) for score in scores)
    ties = torch.empty(units, dtype=torch.int64, device="cpu")
    torch.ops.childtune_kernels.select_words_(
        scores, int(threshold), largest, unit, words, ties, capability()
    )
    return words, ties


def take_ties_(
    scores: Sequence[Tensor],
    words: Sequence[Tensor],
    threshold: int | Tensor,
    quotas: Tensor,
    unit: int,
) -> None:
    """Set the bits of the first equals of each unit (contract: ops.take_ties_)."""
    torch.ops.childtune_kernels.take_ties_(
        scores, int(threshold), quotas.contiguous(), unit, words, capability()
    )


def run_scores(scores: Sequence[Tensor], granularity: int) -> tuple[list[Tensor], Tensor]:
    """Sums of runs, and counts of refused elements (contract: ops.run_scores)."""
    runs = [_empty(score, granularity, torch.float32) for score in scores]
    refused = torch.zeros(len(scores), dtype=torch.int64, device="cpu")
    torch.ops.childtune_kernels.run_scores_(scores, granularity, runs, refused, capability())
    return runs, refused


def _empty(score: Tensor, each: int, dtype: torch.dtype) -> Tensor:
    """Room for one value of every ``each`` elements."""
    return torch.empty(-(-score.numel() // each), dtype=dtype, device="cpu")
