"""From Fisher information to a child mask: exact selection, and the controls (SPEC.md, "Selection")."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops, part_order, rank_values, sharding
from .child_mask import ChildMask
from .labels import philox_key
from .mask_scope import by_label
from .percentile_rule import percentile_words
from .plan_row import contiguous_map
from .radix_select import (
    NOT_FOUND,
    find_place,
    refuse_unordered,
    words_up_to,
)
from .score_parts import ScoreParts, parts_of
from .sharding import Placed
from .smallest_words import Draw, smallest_words

SCOPES = ("global", "tensor")
RULES = ("exact", "percentile")


def select_child(
    fisher: Mapping[str, Tensor],
    *,
    reserve_p: float | None = None,
    k: int | None = None,
    scope: str = "global",
    granularity: int = 1,
    largest: bool = True,
    dense: Iterable[str] = (),
    rule: str = "exact",
    backend: str | None = None,
) -> ChildMask:
    """The child of the k elements of largest Fisher information (SPEC.md, eq. 14 to 16).

    Exactly k bits are set; elements of equal value follow the order of ``fisher`` and of their index.

    Args:
        fisher: parameter name → Fisher information in the parameter's shape, fp32, all on one
            device. Wrappers' prefixes are taken off the names. bf16, fp16 and non-contiguous
            tensors are copied for the call. With a DTensor among them the child is that of all ranks'
            parts together, to the bit: a collective of all ranks of the default process group. Plain
            tensors must then be the same on all of them.
        reserve_p: the share of the elements (with granularity: of the runs) in the child, in (0, 1].
        k: their number instead, over all parameters; not with scope "tensor".
        scope: "global" ranks all elements together, "tensor" each parameter by itself.
        granularity: 1, or a multiple of 32: whole runs of so many consecutive elements are in or out.
        largest: False takes the elements of smallest Fisher information, a control.
        dense: names of parameters that train densely.
        rule: "percentile" keeps every element at or above the percentile, as the original code does, and
            so everything where most values are 0; with ``reserve_p`` alone.
        backend: None, or the backend to use.

    Returns:
        A mask with the words of every parameter of ``fisher``, on its device; of DTensors those of
        this rank's parts (``ChildMask.parts``).

    Warns:
        UserWarning: k is larger than the number of non-zero values, so that zeros are in the child.

    Raises:
        ValueError: NaN, infinity or a negative value (names the parameter); a run whose sum overflows;
            options out of range (SPEC.md, "Errors"). Where DTensors are among them on all ranks: also other
            names or options on some rank, and runs that a border between parts cuts.
    """
    asked = _Asked(reserve_p, k, scope, granularity, rule, largest)
    scores, shapes, parts = _scores_and_parts(fisher, asked)
    size = _Size(reserve_p, k)
    if rule == "percentile" and reserve_p is not None:
        words = percentile_words(scores, reserve_p, backend, parts)
    else:
        scopes = [scores] if scope == "global" else [{label: scores[label]} for label in scores]
        selections = _select_scopes(scopes, size, granularity, largest, backend, parts)
        words = {label: each for found in selections for label, each in found.words.items()}
    return ChildMask(words, shapes, dense, parts=None if parts is None else parts.sharded)


def _scores_and_parts(
    fisher: Mapping[str, Tensor], asked: _Asked
) -> tuple[dict[str, Tensor], dict[str, torch.Size], ScoreParts | None]:
    """Checked scores of this rank in the order of record, their whole shapes, and how ranks share them."""
    sharded = any(
        isinstance(each, Tensor) and sharding.is_sharded(each) for each in fisher.values()
    )
    with rank_values.agreed() if sharded else nullcontext():
        named = by_label(fisher)
        _check_options(*asked)
        placed: dict[str, Placed | None] = {}
        for label, value in named.items():
            placed[label] = sharding.placed_of(value) if isinstance(value, Tensor) else None
            if placed[label] is not None:
                sharding.check_part(label, value)
        scores = {label: _contiguous_fp32(label, value) for label, value in named.items()}
        if len({value.device for value in scores.values()}) > 1:
            where = ", ".join(f"{label} on {value.device}" for label, value in scores.items())
            raise ValueError(
                f"the Fisher information lies on several devices; move it to one ({where})"
            )
        if asked.granularity > 1:
            for label, of_label in placed.items():
                if of_label is not None:
                    part_order.check_runs(label, of_label, asked.granularity)
    shapes = {label: value.shape for label, value in named.items()}
    if not sharded:
        return scores, shapes, None
    parts = parts_of(placed, shapes, asked._asdict(), scores)
    return (
        {label: scores[label] for label in parts.labels},
        {label: shapes[label] for label in parts.labels},
        parts,
    )


def random_child(
    shapes: Mapping[str, Sequence[int] | Tensor],
    reserve_p: float,
    seed: int,
    *,
    dense: Iterable[str] = (),
) -> ChildMask:
    """A child of as many elements as ``select_child``'s, but drawn at random (SPEC.md, "Random child").

    The same seed and names give the same child on every machine; a smaller ``reserve_p`` a subset of it.

    Args:
        shapes: parameter name → its shape, or a tensor of that shape. With a DTensor among them it is a
            collective of all ranks, and the mask one of this rank's parts (``ChildMask.parts``).
        reserve_p: the share of all elements that is in the child, in (0, 1].
        seed: any int.
        dense: names of parameters that train densely.

    Returns:
        A mask with words on the CPU. A bar shows the passes of a draw that takes more than some seconds,
        where tqdm is installed.

    Raises:
        ValueError: ``reserve_p`` out of range, a seed that is no int, or a name twice.
    """
    tensors = [each for each in shapes.values() if isinstance(each, Tensor)]
    sharded = any(map(sharding.is_sharded, tensors))
    with rank_values.agreed() if sharded else nullcontext():
        _check_share(reserve_p)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed={seed!r} must be an int; the child is a function of it")
        sizes, placed = {}, {}
        for label, shape in by_label(shapes).items():
            sizes[label] = torch.Size(shape.shape if isinstance(shape, Tensor) else shape)
            placed[label] = sharding.placed_of(shape) if isinstance(shape, Tensor) else None
        draws = {label: _draw(seed, label, sizes[label], placed[label]) for label in sizes}
    asked = {"reserve_p": reserve_p, "seed": seed}
    parts = parts_of(placed, sizes, asked) if sharded else None
    if parts is not None:
        draws = {label: draws[label] for label in parts.labels}
    k = child_size(reserve_p, sum(size.numel() for size in sizes.values()))
    words = smallest_words(list(draws.values()), k, parts)
    return ChildMask(
        dict(zip(draws, words, strict=True)),
        {label: sizes[label] for label in draws},
        dense,
        parts=None if parts is None else parts.sharded,
    )


def _draw(seed: int, label: str, size: torch.Size, placed: Placed | None) -> Draw:
    key = philox_key(seed, label)
    if placed is None:
        return Draw(key, size.numel(), contiguous_map(size.numel()))
    part = sharding.part_shape(label, placed)
    return Draw(key, part.numel(), sharding.element_map_of_part(label, placed))


def child_size(reserve_p: float, numel: int) -> int:
    """The number of child elements among ``numel`` (SPEC.md, eq. 14)."""
    return min(numel, max(1, math.floor(Fraction(float(reserve_p)) * numel + Fraction(1, 2))))


class _Asked(NamedTuple):
    """The options of a selection."""

    reserve_p: float | None
    k: int | None
    scope: str
    granularity: int
    rule: str
    largest: bool


class _Size(NamedTuple):
    """What was asked for: a share or a number."""

    reserve_p: float | None
    k: int | None

    def of(self, numel: int, granularity: int = 1) -> int:
        if self.reserve_p is not None:
            return child_size(self.reserve_p, numel)
        if self.k is None or not 1 <= self.k <= numel:
            what = "elements" if granularity == 1 else f"runs of {granularity} elements"
            raise ValueError(f"k={self.k} must lie in 1..{numel}, the number of {what} in scope")
        return self.k


def _check_share(reserve_p: float) -> None:
    number = isinstance(reserve_p, numbers.Real) and not isinstance(reserve_p, bool)
    if not number or not 0 < reserve_p <= 1:
        raise ValueError(f"reserve_p={reserve_p!r} must lie in (0, 1]")


def _check_options(
    reserve_p: float | None, k: int | None, scope: str, granularity: int, rule: str, largest: bool
) -> None:
    if (reserve_p is None) == (k is None):
        raise ValueError(f"reserve_p={reserve_p!r} and k={k!r}: give exactly one of them")
    if reserve_p is not None:
        _check_share(reserve_p)
    elif isinstance(k, bool) or not isinstance(k, int):
        raise ValueError(f"k={k!r} must be an int, the number of elements in the child")
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} must be one of {SCOPES}")
    if scope == "tensor" and k is not None:
        raise ValueError(f"k={k} has no meaning for scope='tensor'; use reserve_p, a share of each")
    if isinstance(granularity, bool) or not isinstance(granularity, int):
        raise ValueError(f"granularity={granularity!r} must be an int")
    if granularity != 1 and (granularity < 32 or granularity % 32):
        raise ValueError(f"granularity={granularity} must be 1 or a multiple of 32")
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} must be one of {RULES}")
    if rule == "percentile" and (
        k is not None or scope != "global" or granularity > 1 or not largest
    ):
        raise ValueError(
            "rule='percentile' goes with reserve_p alone: scope='global', granularity=1, largest=True"
        )


def _contiguous_fp32(label: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        kind = value.layout if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"Fisher information of {label}: {kind}; a dense tensor is needed")
    value = sharding.local_of(value)
    if value.dtype not in (torch.float32, *ops.HALF_TYPES):
        raise ValueError(
            f"Fisher information of {label}: dtype {value.dtype}; use float32 (.float(); values that it "
            "makes equal are then ordered by position)"
        )
    if value.is_meta or (value.numel() and value.data_ptr() == 0):
        raise ValueError(
            f"Fisher information of {label}: a {type(value).__name__} on {value.device} has no memory of "
            "its own; gather or materialise it first"
        )
    return value.detach().to(torch.float32).contiguous()


class _Selection(NamedTuple):
    """The words of one scope, and what says whether they hold: nothing of it has been read.

    ``report``: of each tensor the refused elements, with runs of each tensor the refused scores, then
    the k-th key and how many of it are taken; nothing where k is 0.
    """

    scores: Mapping[str, Tensor]
    words: dict[str, Tensor]
    k: int
    granularity: int
    report: Tensor
    over: ScoreParts | None


def _selected(
    scores: Mapping[str, Tensor],
    size: _Size,
    granularity: int,
    largest: bool,
    backend: str | None,
    parts: ScoreParts | None,
    by_sample: bool = True,
) -> _Selection:
    """The first scores of one scope in the order of eq. 15, by elements or by runs."""
    over = None if parts is None else parts.of(scores, granularity)
    candidates = sum(-(-value.numel() // granularity) for value in scores.values())
    k = size.of(candidates if over is None else over.candidates, granularity)
    values = list(scores.values())
    if k == 0:
        none = {label: _no_words(value) for label, value in scores.items()}
        return _Selection(scores, none, 0, granularity, torch.zeros(0, device="cpu").long(), over)
    counts = []
    if granularity > 1:
        values, refused = ops.run_scores(values, granularity, backend)
        counts.append(refused if over is None else over.summed(refused))
    place, refused = find_place(values, k, largest, backend, by_sample=by_sample, over=over)
    if over is not None and any(torch.cat([*counts, refused]).tolist()):
        # Without an order there is no k-th score; the report says why.
        report = torch.cat([*counts, refused, place.on(refused.device)[:2]])
        return _Selection(scores, {}, k, granularity, report, over)
    words = dict(zip(scores, words_up_to(place, values, largest, backend, over), strict=True))
    if granularity > 1:
        for label, chosen in words.items():
            words[label] = _words_of_runs(chosen, scores[label].numel(), granularity, backend)
    report = torch.cat([*counts, refused, place.on(refused.device)[:2]])
    return _Selection(scores, words, k, granularity, report, over)


def _select_scopes(
    scopes: Sequence[Mapping[str, Tensor]],
    size: _Size,
    granularity: int,
    largest: bool,
    backend: str | None,
    parts: ScoreParts | None,
) -> list[_Selection]:
    """Select in every scope, reading all reports together; warns of zeros."""
    asked = (size, granularity, largest, backend, parts)
    selections = [_selected(scores, *asked) for scores in scopes]
    zeros = _settle(selections, largest)
    for at, count in enumerate(zeros):
        if count == NOT_FOUND:
            selections[at] = _selected(scopes[at], *asked, by_sample=False)
            zeros[at] = _settle([selections[at]], largest)[0]
    _warn_of_zeros(selections, zeros)
    return selections


def _settle(selections: Sequence[_Selection], largest: bool) -> list[int]:
    """Read the reports of all scopes at once: of each k how many have a score of zero, unless wanted.

    ``NOT_FOUND`` for a scope that must be selected again, since a sample misled.

    Raises:
        ValueError: what ``select_child`` says of values.
    """
    reports = [found.report for found in selections if found.k]
    numbers = torch.cat(reports).tolist() if reports else []
    zeros, at = [], 0
    for found in selections:
        report = numbers[at : at + found.report.numel()]
        at += found.report.numel()
        if found.k == 0:
            zeros.append(0)
            continue
        refuse_unordered(found.scores, report[: len(found.scores)], found.over)
        for label, count in zip(found.scores, report[len(found.scores) : -2], strict=False):
            if count:
                raise ValueError(
                    f"Fisher information of {label}: the sum over a run of {found.granularity} elements "
                    "overflows float32; divide all Fisher information by a power of two"
                )
        key, taken = report[-2:]
        zeros.append(taken if taken == NOT_FOUND or (largest and key == 0) else 0)
    return zeros


def _warn_of_zeros(selections: Sequence[_Selection], zeros: Sequence[int]) -> None:
    short = [found for found, count in zip(selections, zeros, strict=True) if count]
    if not short:
        return
    k = sum(found.k for found in short)
    where = (
        f" of {', '.join(next(iter(found.words)) for found in short[:8])}" if len(short) > 1 else ""
    )
    warnings.warn(
        f"k={k} is more than the {k - sum(zeros)} non-zero values of Fisher "
        f"information{where}; the rest of the child are zeros, the first by position. Use a smaller "
        "reserve_p, or more examples",
        UserWarning,
        stacklevel=4,
    )


def _no_words(value: Tensor) -> Tensor:
    return torch.zeros(0, dtype=torch.int32, device=value.device)


def _words_of_runs(run_words: Tensor, numel: int, granularity: int, backend: str | None) -> Tensor:
    """The words of elements of which whole runs are chosen."""
    runs, count = -(-numel // granularity), -(-numel // 32)
    chosen = ops.unpack_mask(run_words, (runs,), backend, tail_is_zero=True)
    words = chosen.repeat_interleave(granularity // 32)[:count].to(torch.int32).neg_()
    if numel % 32:
        words[-1] &= (1 << numel % 32) - 1
    return words
