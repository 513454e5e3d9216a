"""Op fisher_accumulate: sums of squared gradients of many tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import registry
from ..plan_row import DTYPE_CODES


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
