"""The contract of every op: arguments are checked here, once, and the chosen kernel is called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import registry
from .plan_row import DTYPE_CODES, IndexMap

KEEP_ALL = 1 << 32
SCORE_UNIT = 1 << 16  # elements whose equal scores are counted together
HALF_TYPES = (torch.bfloat16, torch.float16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which a parameter of ``dtype`` is updated: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_parameter(label: str, parameter: Tensor) -> None:
    """Refuse a parameter that no kernel can update.

    Raises:
        ValueError: complex, sparse, another type than fp32, fp64, bf16 and fp16, or a tensor without
            memory of its own (on the meta device, or a wrapper as DTensor is).
    """
    if parameter.layout != torch.strided:
        raise ValueError(f"parameter {label}: layout {parameter.layout}; only dense tensors train")
    if parameter.dtype not in DTYPE_CODES:
        raise ValueError(
            f"parameter {label}: dtype {parameter.dtype} is not supported; "
            "use float32, float64, bfloat16 or float16"
        )
    if parameter.numel() and parameter.data_ptr() == 0:
        raise ValueError(
            f"parameter {label}: a {type(parameter).__name__} on {parameter.device} has no memory of "
            "its own; materialise it first (DTensor is not supported yet)"
        )


def check_gradient(label: str, parameter: Tensor, grad: Tensor) -> None:
    """Refuse a gradient that does not fit its parameter.

    Raises:
        ValueError: sparse, another shape or device, or another type than the parameter's (or fp32,
            for parameters of fp32 and below).
    """
    if grad.layout != torch.strided:
        raise ValueError(
            f"gradient of {label}: layout {grad.layout}; sparse gradients are not supported, use "
            "sparse=False in the embedding or keep the parameter out of this optimizer"
        )
    if grad.dtype not in (parameter.dtype, torch.float32) or (
        parameter.dtype == torch.float64 and grad.dtype != torch.float64
    ):
        raise ValueError(
            f"gradient of {label}: dtype {grad.dtype} for a parameter of {parameter.dtype}; "
            "it must be the parameter's own or float32"
        )
    if grad.shape != parameter.shape or grad.device != parameter.device:
        raise ValueError(
            f"gradient of {label}: {tuple(grad.shape)} on {grad.device} for a parameter of "
            f"{tuple(parameter.shape)} on {parameter.device}; run backward again after a change"
        )


def child_adamw_(
    rows: Sequence[Any], row_table: Tensor, group_table: Tensor, choice: registry.Choice
) -> None:
    """One AdamW step of the child networks of all active rows, in place (SPEC.md, eq. 1 to 12).

    Args:
        rows: the rows of a plan (step_plan.Row), for kernels that take tensors.
        row_table: int64 ``[rows, ROW_WIDTH]``, the same rows for kernels that take pointers.
        group_table: float64 ``[groups, GROUP_WIDTH]``, the numbers of the parameter groups.
        choice: what ``registry.choose("child_adamw", device)`` gave for the plan's device.

    Changes in place, for every row whose ``active`` is set: the parameter, exp_avg, exp_avg_sq, the
    master weight, and the step (+1). Gradients are only read.
    """
    if choice.backend == "reference":
        choice.module.child_adamw_(rows)
    else:
        choice.module.child_adamw_(rows, row_table, group_table)


def observe(tensors: Sequence[Tensor], choice: registry.Choice) -> Tensor:
    """Where tensors lie and what they look like, to be compared with another time.

    Args:
        tensors: dense tensors of any device.
        choice: what ``registry.choose("observe", device)`` gave.

    Returns:
        int64 ``[len(tensors), 2]``: the address, and a 64-bit digest of dtype, device, sizes, strides and
        of whether the address is null. Digests of two backends, or processes, do not compare.

    Raises:
        RuntimeError: a tensor without strides, as sparse ones are.
    """
    observed: Tensor = choice.module.observe(tensors)
    return observed


def fisher_accumulate_(
    sums: Sequence[Tensor],
    gradients: Sequence[Tensor],
    choice: registry.Choice,
    scale: float = 1.0,
    labels: Sequence[str] | None = None,
) -> None:
    """Add squared gradients of many tensors to their sums: sum + scale · g² (SPEC.md, eq. 13).

    Args:
        sums: contiguous fp32 tensors of one device, none of them twice.
        gradients: for each the gradient, of its shape and device, in fp32, fp64, bf16 or fp16 and with any
            strides.
        choice: what ``registry.choose("fisher_accumulate", device)`` gave.
        scale: rounded once to fp32.
        labels: names for the messages; without them positions.

    Changes in place: the sums. Gradients are only read.

    Raises:
        ValueError: a scale that is not positive and finite in fp32, sums of another kind, a gradient that
            is sparse, complex, or of another shape or device; nothing was written.
    """
    if len(sums) != len(gradients):
        raise ValueError(f"{len(gradients)} gradients for {len(sums)} sums; give one for each")
    # The reference multiplies by a Python number, which torch rounds to fp32 just so.
    rounded = float(torch.tensor(scale, dtype=torch.float32, device="cpu"))
    if not 0 < rounded < math.inf:
        raise ValueError(f"scale={scale} is {rounded} in fp32; it must be positive and finite")
    for index, (total, gradient) in enumerate(zip(sums, gradients, strict=True)):
        check_squares(labels[index] if labels else f"#{index}", total, gradient)
    places = [total.data_ptr() for total in sums if total.numel()]
    if len(set(places)) < len(places):
        raise ValueError("two of the sums are the same tensor; two threads would write it at once")
    plain = [g.detach().resolve_neg() if g.is_neg() else g.detach() for g in gradients]
    if plain:
        choice.module.fisher_accumulate_(sums, plain, rounded)


def check_squares(label: str, total: Tensor, gradient: Tensor, anywhere: bool = False) -> None:
    """Refuse a gradient whose squares cannot be added to ``total``.

    ``anywhere``: the gradient may lie on another device.

    Raises:
        ValueError: as ``fisher_accumulate_`` says.
    """
    if gradient.layout != torch.strided:
        raise ValueError(
            f"gradient of {label}: layout {gradient.layout}; sparse gradients are not supported, use "
            "sparse=False in the embedding or exclude the parameter"
        )
    if gradient.dtype not in DTYPE_CODES:
        raise ValueError(
            f"gradient of {label}: dtype {gradient.dtype} is not supported; "
            "use float32, float64, bfloat16 or float16, or exclude the parameter"
        )
    if total.dtype != torch.float32 or not total.is_contiguous():
        raise ValueError(
            f"sums of {label}: {total.dtype} with strides {total.stride()}; contiguous float32 is needed"
        )
    if gradient.shape != total.shape or (gradient.device != total.device and not anywhere):
        raise ValueError(
            f"gradient of {label}: {tuple(gradient.shape)} on {gradient.device} for sums of "
            f"{tuple(total.shape)} on {total.device}; make the accumulator after the model has been "
            "changed or moved"
        )


def keep_words(
    numel: int,
    element_map: IndexMap,
    key: int,
    step: int,
    threshold: int,
    purpose: int = 0,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> Tensor:
    """The Bernoulli keep bits of one tensor in one step (SPEC.md, eq. 1 to 5).

    Args:
        numel: number of local elements.
        element_map: from local indexes to element indexes.
        key: 64-bit Philox key, k0 in the low word (``labels.philox_key``).
        step: the parameter's step count, 1 on its first update; used modulo 2**32.
        threshold: T of eq. 3, 1 .. 2**32.
        purpose: the fourth counter word.

    Returns:
        int32 mask words of shape ``[ceil(numel / 32)]``; bits past the end are 0.

    Raises:
        ValueError: a threshold outside 1 .. 2**32.
    """
    if not 1 <= threshold <= KEEP_ALL:
        raise ValueError(f"threshold={threshold} must be between 1 and 2**32")
    device = torch.device(device)
    choice = registry.choose("keep_words", device, backend)
    words: Tensor = choice.module.keep_words(
        numel, element_map, key, step, purpose, threshold, device
    )
    return words


def pack_mask(mask: Tensor, backend: str | None = None) -> Tensor:
    """Mask words (int32, ``[ceil(numel / 32)]``) of a bool tensor, read row-major.

    Raises:
        ValueError: the mask is not bool.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask must be a bool tensor, not {mask.dtype}; compare first (x > 0)")
    words: Tensor = registry.choose("bitmask", mask.device, backend).module.pack_mask(mask)
    return words


def unpack_mask(words: Tensor, shape: Sequence[int], backend: str | None = None) -> Tensor:
    """The bool tensor of ``shape`` that mask words stand for.

    Raises:
        ValueError: words of another type or number, or with bits set past the end.
    """
    numel = torch.Size(shape).numel()
    check_words("mask", words, numel)
    module = registry.choose("bitmask", words.device, backend).module
    mask: Tensor = module.unpack_mask(words, numel)
    return mask.view(tuple(shape))


def count_mask(words: Tensor, backend: str | None = None) -> int:
    """The number of bits set in mask words."""
    count: int = registry.choose("bitmask", words.device, backend).module.count_mask(words)
    return count


def digit_histogram(
    scores: Sequence[Tensor], shift: int, bits: int, prefix: int, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """One pass of a radix selection over all tensors (SPEC.md, eq. 15).

    Of the scores whose key, shifted right by ``shift + bits``, is ``prefix``, the number for each
    value of the ``bits`` key bits above the lowest ``shift``.

    Args:
        scores: contiguous fp32 tensors on one device; not changed.
        shift, bits: where the digit lies in the key's 31 bits.
        prefix: the key's bits above the digit.

    Returns:
        int64 ``[2**bits]`` counts, and int64 ``[len(scores)]``: how many scores of each tensor are NaN,
        infinite or negative. Those are looked for in the first pass only (``shift + bits == 31``), and counts
        have a meaning only where there are none.

    Raises:
        ValueError: scores that are no contiguous fp32 tensors of one device, or bits outside the key.
    """
    device = _check_scores(scores)
    if not (shift >= 0 < bits and shift + bits <= 31 and 0 <= prefix < 1 << (31 - shift - bits)):
        raise ValueError(
            f"digit (shift={shift}, bits={bits}, prefix={prefix}) leaves a key's 31 bits"
        )
    module = registry.choose("topk_select", device, backend).module
    counts, refused = module.digit_histogram(scores, shift, bits, prefix)
    return counts, refused


def select_words(
    scores: Sequence[Tensor],
    threshold: int,
    largest: bool,
    unit: int = SCORE_UNIT,
    backend: str | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Mask words of the scores beyond a key, and where those equal to it are (SPEC.md, eq. 15).

    Args:
        scores: contiguous fp32 tensors on one device, without NaN, infinity and negatives.
        threshold: a key, or -1, or 2**31 - 1; the child's keys lie above it (``largest``) or below.
        unit: equal scores are counted for every ``unit`` elements of a tensor, a multiple of 64.

    Returns:
        int32 mask words for each tensor, and int64 counts of the equal ones, one for each unit: tensor by
        tensor, ``ceil(numel / unit)`` of them each.

    Raises:
        ValueError: scores of another kind, a threshold or unit out of range.
    """
    device = _check_scores(scores)
    if not -1 <= threshold < 1 << 31:
        raise ValueError(f"threshold={threshold} must be a key of 31 bits, or -1")
    _check_unit(unit)
    module = registry.choose("topk_select", device, backend).module
    words, ties = module.select_words(scores, threshold, largest, unit)
    return words, ties


def take_ties_(
    scores: Sequence[Tensor],
    words: Sequence[Tensor],
    threshold: int,
    quotas: Tensor,
    unit: int = SCORE_UNIT,
    backend: str | None = None,
) -> None:
    """Set the bits of the first scores equal to a key, ``quotas`` many in each unit (SPEC.md, eq. 15).

    Args:
        scores, threshold, unit: as for ``select_words``.
        words: what ``select_words`` gave; changed in place.
        quotas: int64 ``[units]``, each at most the unit's count of equal scores.

    Raises:
        ValueError: scores of another kind, words or quotas that do not fit them.
    """
    device = _check_scores(scores)
    _check_unit(unit)
    units = sum(-(-score.numel() // unit) for score in scores)
    if quotas.dtype != torch.int64 or quotas.shape != (units,) or len(words) != len(scores):
        raise ValueError(
            f"{len(words)} words and quotas of {quotas.dtype} {tuple(quotas.shape)} for {len(scores)} "
            f"tensors; expected as many words, and int64 ({units},)"
        )
    for at, (score, target) in enumerate(zip(scores, words, strict=True)):
        check_words(f"scores {at}", target, score.numel())
    module = registry.choose("topk_select", device, backend).module
    module.take_ties_(scores, words, threshold, quotas, unit)


def run_scores(
    scores: Sequence[Tensor], granularity: int, backend: str | None = None
) -> tuple[list[Tensor], Tensor]:
    """The score of every run of ``granularity`` elements (SPEC.md, eq. 16).

    Args:
        scores: contiguous fp32 tensors on one device; not changed.
        granularity: elements in a run, a multiple of 32.

    Returns:
        fp32 ``[ceil(numel / granularity)]`` for each tensor, and int64 ``[len(scores)]``: how many
        elements of each tensor are NaN, infinite or negative.

    Raises:
        ValueError: scores of another kind, or another granularity.
    """
    device = _check_scores(scores)
    if granularity < 32 or granularity % 32:
        raise ValueError(f"granularity={granularity} must be a multiple of 32")
    module = registry.choose("topk_select", device, backend).module
    runs, refused = module.run_scores(scores, granularity)
    return runs, refused


def _check_unit(unit: int) -> None:
    if unit < 64 or unit % 64:
        raise ValueError(f"unit={unit} must be a multiple of 64")


def _check_scores(scores: Sequence[Tensor]) -> torch.device:
    """The device that all scores share, after a check of what they are."""
    for at, score in enumerate(scores):
        if score.dtype != torch.float32 or not score.is_contiguous():
            raise ValueError(
                f"scores {at}: {score.dtype}, strides {score.stride()}; make it contiguous fp32"
            )
        if score.device != scores[0].device:
            raise ValueError(
                f"scores {at}: on {score.device}, the first on {scores[0].device}; use one device"
            )
    if not scores:
        raise ValueError("no scores were given; select among one tensor at least")
    return scores[0].device


def check_words(label: str, words: Tensor, numel: int) -> None:
    """Refuse mask words that are not those of ``numel`` elements.

    Raises:
        ValueError: not int32, not one dimension of ``ceil(numel / 32)`` words, or bits past the end.
    """
    count = (numel + 31) // 32
    if not isinstance(words, Tensor):
        raise ValueError(f"mask of {label}: words must be a tensor, not {type(words).__name__}")
    if words.dtype != torch.int32 or words.shape != (count,):
        raise ValueError(
            f"mask of {label}: words of {words.dtype} and shape {tuple(words.shape)} for {numel} "
            f"elements; expected int32 and ({count},)"
        )
    tail = numel % 32
    if tail and int(words[-1]) & 0xFFFFFFFF & (0xFFFFFFFF << tail):
        raise ValueError(f"mask of {label}: bits are set past its {numel} elements")
