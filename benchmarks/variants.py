"""Who is measured: the optimizers that step the tensors of a case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from childtune_kernels import ChildMask, FusedChildAdamW
from childtune_kernels.unfused import UnfusedChildTuning, direct_mask, distribution_mask

from .cases import Case, Workload

NamedParameters = Sequence[tuple[str, Tensor]]

OPTIONS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
}
GROUPED_SUFFIX, BF16_SUFFIX = "_groups", "_bf16"


@dataclass(frozen=True)
class Variant:
    """An optimizer with its options.

    ``kept`` is the share of gradient elements that reach the update, drawn anew at every step
    (``mask`` "bernoulli") or once for all ("fixed"; in runs of ``run`` elements). ``slow``: takes part in
    few rounds. ``grouped``: every tensor is a parameter group of its own. ``dtype``: of weights and
    gradients. ``graph``: its step is captured into a CUDA graph and replayed. ``make`` builds the optimizers
    of other packages (family "other").
    """

    name: str
    title: str
    family: Literal["torch", "unfused", "childtune", "other"]
    options: tuple[tuple[str, Any], ...] = ()
    mask: Literal["none", "bernoulli", "fixed"] = "none"
    kept: float = 1.0
    run: int = 1
    slow: bool = False
    grouped: bool = False
    dtype: torch.dtype = torch.float32
    graph: bool = False
    make: Callable[..., Optimizer] | None = None

    def build(self, named: NamedParameters, backend: str | None = None) -> Optimizer:
        """The optimizer over parameters; ``backend`` is childtune_kernels' own option."""
        parameters: list[Any] = list(named)
        if self.grouped:
            parameters = [{"params": [entry]} for entry in named]
        options = {**OPTIONS, **dict(self.options)}
        if self.make is not None:
            return self.make([parameter for _, parameter in named], **options)
        if self.family == "torch":
            return AdamW(parameters, **options)
        if self.family == "unfused":
            return UnfusedChildTuning(parameters, reserve_p=self.kept, **options)
        if self.mask == "fixed":
            options["child_mask"] = random_child_mask(named, self.kept, self.run)
        elif self.mask == "bernoulli":
            options["reserve_p"] = self.kept
        return FusedChildAdamW(parameters, seed=0, backend=backend, **options)

    def with_group_each(self) -> Variant:
        """The same with every tensor in a group of its own."""
        return replace(
            self,
            name=self.name + GROUPED_SUFFIX,
            title=f"{self.title}, a group a tensor",
            grouped=True,
        )


class Format(NamedTuple):
    """How bf16 weights and their moments are kept; ``name`` is a part of a variant's."""

    name: str
    title: str
    options: tuple[tuple[str, Any], ...] = ()


_BF16_MOMENTS = ("state_dtype", torch.bfloat16)
ALONE = Format("", "without masters", (("master_weight", "none"),))
FP32_MASTERS = Format("master", "fp32 masters", (("master_weight", "fp32"),))
SPLIT = Format("split", "split masters", (("master_weight", "split"),))
STOCHASTIC = Format("stochastic", "stochastic rounding", (("master_weight", "stochastic"),))
SPLIT_MOMENTS = Format(
    "split_moments", "split masters, bf16 moments", (*SPLIT.options, _BF16_MOMENTS)
)
STOCHASTIC_MOMENTS = Format(
    "stochastic_moments", "stochastic rounding, bf16 moments", (*STOCHASTIC.options, _BF16_MOMENTS)
)


def in_bf16(variant: Variant, kept: Format) -> Variant:
    """The same with bf16 weights and gradients."""
    return replace(
        variant,
        name="_".join(filter(None, (variant.name, kept.name))) + BF16_SUFFIX,
        title=f"{variant.title}, bf16, {kept.title}",
        options=(*variant.options, *kept.options),
        dtype=torch.bfloat16,
    )


def random_child_mask(named: NamedParameters, density: float, run: int = 1) -> ChildMask:
    """A child network chosen at random: single weights, or runs as a coarser granularity selects them."""
    device = named[0][1].device
    generator = torch.Generator(device).manual_seed(1)
    masks = {}
    for name, parameter in named:
        runs = -(-parameter.numel() // run)
        chosen = torch.rand(runs, generator=generator, device=device) < density
        masks[name] = chosen.repeat_interleave(run)[: parameter.numel()].view(parameter.shape)
    return ChildMask.from_dense(masks)


TORCH_FUSED = Variant("torch_fused", "torch AdamW, fused", "torch", (("fused", True),))
TORCH_FOREACH = Variant("torch_foreach", "torch AdamW, foreach", "torch", (("foreach", True),))
UNFUSED = Variant(
    name="unfused",
    title="unfused Child-Tuning, p = 0.3",
    family="unfused",
    options=(("sample_mask", distribution_mask),),
    mask="bernoulli",
    kept=0.3,
    slow=True,
)
UNFUSED_DIRECT = replace(
    UNFUSED,
    name="unfused_direct",
    title="unfused, mask by bernoulli_",
    options=(("sample_mask", direct_mask),),
)
PLAIN = Variant("plain", "FusedChildAdamW, plain", "childtune")
CT_F = Variant("ct_f_0.3", "CT_F, p = 0.3", "childtune", mask="bernoulli", kept=0.3)
CT_D = Variant("ct_d_0.3", "CT_D, 30 % child", "childtune", mask="fixed", kept=0.3)
CT_D_SPARSE = replace(CT_D, name="ct_d_0.1", title="CT_D, 10 % child", kept=0.1)
CT_D_SPARSEST = replace(CT_D, name="ct_d_0.02", title="CT_D, 2 % child", kept=0.02)
CT_D_RUNS = replace(
    CT_D_SPARSE, name="ct_d_0.1_runs", title="CT_D, 10 % child in runs of 256", run=256
)
CT_D_DENSE = replace(
    CT_D,
    name="ct_d_0.3_dense",
    title="CT_D, 30 % child, dense state",
    options=(("child_state", "dense"),),
)
CT_D_VARIANTS = (CT_D, CT_D_SPARSE, CT_D_SPARSEST, CT_D_RUNS, CT_D_DENSE)

VARIANTS = (
    TORCH_FUSED,
    TORCH_FOREACH,
    UNFUSED,
    UNFUSED_DIRECT,
    PLAIN,
    CT_F,
    *CT_D_VARIANTS,
)
GROUPED_VARIANTS = tuple(variant.with_group_each() for variant in (TORCH_FUSED, PLAIN, CT_F))

PLAIN_SPLIT, CT_F_SPLIT = in_bf16(PLAIN, SPLIT), in_bf16(CT_F, SPLIT)
BF16_VARIANTS = (
    PLAIN_SPLIT,
    CT_F_SPLIT,
    *(
        in_bf16(variant, kept)
        for kept in (STOCHASTIC, SPLIT_MOMENTS, STOCHASTIC_MOMENTS)
        for variant in (PLAIN, CT_F)
    ),
)


def variants_of(case: Case) -> tuple[Variant, ...]:
    """The variants that are measured on a case."""
    return VARIANTS + GROUPED_VARIANTS * case.grouped + BF16_VARIANTS * case.bf16


def workloads_of(case: Case, device: torch.device) -> dict[torch.dtype, Workload]:
    """The tensors that the variants of a case step, by dtype."""
    dtypes = dict.fromkeys(variant.dtype for variant in variants_of(case))
    return {dtype: Workload(case.shapes(), device, dtype=dtype) for dtype in dtypes}
