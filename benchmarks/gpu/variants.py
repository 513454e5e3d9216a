"""Who steps on a GPU: torch's optimizers, those of other packages, and childtune_kernels' in all its ways."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from childtune_kernels import FusedChildAdamW

from ..cases import Case
from ..variants import (
    ALONE,
    BF16_SUFFIX,
    BF16_VARIANTS,
    CT_D,
    CT_D_RUNS,
    CT_D_SPARSE,
    CT_D_SPARSEST,
    CT_F,
    FP32_MASTERS,
    PLAIN,
    SPLIT,
    STOCHASTIC_MOMENTS,
    TORCH_FOREACH,
    TORCH_FUSED,
    UNFUSED,
    Format,
    Variant,
    in_bf16,
)
from .cases import BERT_LARGE, GROUPS, LLAMA_1B, ROBERTA_LARGE, SMALL_TENSORS

_GRAPH_SUFFIX = "_graph"


def in_graph(variant: Variant) -> Variant:
    """The same with its step captured into a CUDA graph."""
    return replace(
        variant,
        name=variant.name + _GRAPH_SUFFIX,
        title=f"{variant.title}, CUDA graph",
        options=(*variant.options, ("capturable", True)),
        graph=True,
    )


def eager_of(variant: Variant) -> Variant:
    """The same without a graph, and without the option for one."""
    options = tuple(option for option in variant.options if option[0] != "capturable")
    return replace(variant, options=options, graph=False)


def suffix_of(variant: Variant) -> str:
    """What stands after the names of the variants that this one is compared with."""
    return BF16_SUFFIX if variant.dtype == torch.bfloat16 else ""


def _with_runs(variant: Variant) -> Variant:
    return replace(
        variant, name=f"{variant.name}_runs", title=f"{variant.title} in runs of 256", run=256
    )


def _optimi(parameters: Sequence[Tensor], **options: Any) -> Optimizer:
    optimizer: Optimizer = import_module("optimi").AdamW(parameters, **options)
    return optimizer


def _flashoptim(parameters: Sequence[Tensor], **options: Any) -> Optimizer:
    optimizer: Optimizer = import_module("flashoptim").FlashAdamW(
        parameters, master_weight_bits=None, **options
    )
    return optimizer


def _of_package(package: str, title: str, make: Callable[..., Optimizer]) -> list[Variant]:
    if find_spec(package) is None:
        return []
    return [Variant(package, title, "other", make=make)]


#: Packages whose AdamW is measured too where they are installed.
OTHER_PACKAGES = {
    "optimi": _of_package("optimi", "optimi AdamW", _optimi),
    "flashoptim": _of_package("flashoptim", "flashoptim AdamW, 8-bit moments", _flashoptim),
}
_OTHERS = [variant for found in OTHER_PACKAGES.values() for variant in found]

CT_D_OF_RUNS = (_with_runs(CT_D), CT_D_RUNS, _with_runs(CT_D_SPARSEST))
_CT_D = (CT_D, CT_D_SPARSE, CT_D_SPARSEST, *CT_D_OF_RUNS)

TORCH_GRAPH = in_graph(TORCH_FUSED)
#: Whether this version of the optimizer can be captured.
CAPTURES = "capturable" in inspect.signature(FusedChildAdamW).parameters
_GRAPHS = [in_graph(PLAIN), in_graph(CT_F)] if CAPTURES else []

# torch's own moments are bf16 too, half the bytes of fp32 ones.
_TORCH_BF16 = in_bf16(TORCH_FUSED, Format("", "moments too"))
PLAIN_BF16 = in_bf16(PLAIN, ALONE)
PLAIN_BF16_MASTER = in_bf16(PLAIN, FP32_MASTERS)
_BF16 = (
    _TORCH_BF16,
    PLAIN_BF16,
    PLAIN_BF16_MASTER,
    *(in_bf16(variant, ALONE) for variant in (CT_F, CT_D_SPARSE, CT_D_RUNS)),
    *BF16_VARIANTS,
    in_bf16(CT_D_SPARSE, SPLIT),
)

_EVERYBODY = (
    TORCH_FUSED,
    TORCH_FOREACH,
    TORCH_GRAPH,
    *_OTHERS,
    UNFUSED,
    PLAIN,
    CT_F,
    *_GRAPHS,
    *_CT_D,
    *_BF16,
)
_OF_CASE: dict[str, Sequence[Variant]] = {
    BERT_LARGE.name: _EVERYBODY,
    LLAMA_1B.name: _EVERYBODY,
    # foreach's temporaries are as large as the model.
    "llama_8b_layers": (TORCH_FUSED, UNFUSED, PLAIN, CT_F, *_CT_D, *_BF16),
    SMALL_TENSORS.name: (
        *(TORCH_FUSED, TORCH_FOREACH, TORCH_GRAPH, *_OTHERS, UNFUSED),
        *(PLAIN, CT_F, *_GRAPHS, CT_D_SPARSE),
    ),
    GROUPS.name: tuple(
        each
        for variant in (TORCH_FUSED, PLAIN, CT_F)
        for each in (variant, variant.with_group_each())
    ),
    ROBERTA_LARGE.name: (TORCH_FUSED, PLAIN, CT_F, CT_D_SPARSE),
}
# Interpreted, a step takes a tenth of a second, and a check ten of them: two cases share the variants, one of
# each kernel and of each way to keep weights.
_TINY: dict[str, Sequence[Variant]] = {
    BERT_LARGE.name: [
        *(TORCH_FUSED, TORCH_FOREACH, TORCH_GRAPH, *_OTHERS, UNFUSED),
        *(PLAIN, CT_F, *_GRAPHS, CT_D, CT_D_SPARSEST, CT_D_RUNS),
    ],
    LLAMA_1B.name: [
        *(TORCH_FUSED, PLAIN, _TORCH_BF16, PLAIN_BF16_MASTER),
        *(in_bf16(CT_F, each) for each in (SPLIT, STOCHASTIC_MOMENTS)),
        in_bf16(CT_D_SPARSE, SPLIT),
    ],
    GROUPS.name: [TORCH_FUSED, PLAIN, PLAIN.with_group_each()],
}


def variants_of(case: Case, tiny: bool) -> list[Variant]:
    """The variants that are measured on a case."""
    found = _OF_CASE[case.name]
    if not tiny:
        return list(found)
    few = _TINY.get(case.name, (TORCH_FUSED, PLAIN))
    return [variant for variant in found if variant in few]
