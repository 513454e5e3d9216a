"""What every kernel can work on: checks of parameters and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan_row import DTYPE_CODES

HALF_TYPES = (torch.bfloat16, torch.float16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which a parameter of ``dtype`` is updated: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_parameter(label: str, parameter: Tensor) -> None:
    """Refuse a parameter that no kernel can update.

    Raises:
        ValueError: complex, sparse, another type than fp32, fp64, bf16 and fp16, or a tensor without
            memory of its own (on the meta device).
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
            "its own; materialise it first. After a forward without backward fully_shard leaves such a one: "
            "call model.reshard()"
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
