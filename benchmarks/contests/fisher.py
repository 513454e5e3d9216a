"""Are squares of gradients added as fast as torch.add adds tensors with as many bytes?"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from childtune_kernels import ops, registry

from ..cases import BERT_BASE, LARGE_TENSOR, Case, Shapes
from .contest import Comparison, Competitor, Contest, Prepared

# A sum is read and written, a gradient read.
OURS = Competitor("fisher_accumulate", "fisher_accumulate_", bytes_per_element=12)
OURS_BF16 = Competitor(
    "fisher_accumulate_bf16", "fisher_accumulate_, bf16 gradients", bytes_per_element=10
)
ADD = Competitor("torch_add", "torch.add(out=), tensor by tensor", bytes_per_element=12)

_TYPES = {OURS.name: torch.float32, OURS_BF16.name: torch.bfloat16}


def _tensors(shapes: Shapes, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator(device).manual_seed(0)
    sums = [torch.zeros(shape, device=device) for shape in shapes.values()]
    gradients = [
        torch.randn(shape, generator=generator, device=device) for shape in shapes.values()
    ]
    return sums, gradients


def _accumulate(
    sums: Sequence[Tensor], gradients: Sequence[Tensor], backend: str | None = None
) -> None:
    choice = registry.choose("fisher_accumulate", sums[0].device, backend)
    ops.fisher_accumulate_(sums, gradients, choice)


def _add(sums: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for total, gradient in zip(sums, gradients, strict=True):
        torch.add(total, gradient, out=total)


def _prepare(shapes: Shapes, device: torch.device, backend: str | None = None) -> Prepared:
    """All competitors add to the same sums."""
    sums, gradients = _tensors(shapes, device)
    half = [gradient.bfloat16() for gradient in gradients]
    return Prepared(
        {
            OURS.name: lambda: _accumulate(sums, gradients, backend),
            OURS_BF16.name: lambda: _accumulate(sums, half, backend),
            ADD.name: lambda: _add(sums, gradients),
        }
    )


def _faults(shapes: Shapes, device: torch.device, backend: str | None = None) -> dict[str, str]:
    faults = {}
    for name, dtype in _TYPES.items():
        found, gradients = _tensors(shapes, device)
        expected, _ = _tensors(shapes, device)
        typed = [gradient.to(dtype) for gradient in gradients]
        for _ in range(2):
            _accumulate(found, typed, backend)
            _accumulate(expected, typed, backend="reference")
        if not all(map(torch.equal, found, expected)):
            faults[name] = "the sums are not bitwise equal to the reference's"
    return faults


def contest_of(name: str, case: Case, rounds: int, backend: str | None = None) -> Contest:
    """Accumulation over the tensors of a case; ``backend`` None takes the best that serves the device."""
    return Contest(
        name=name,
        title=f"Fisher accumulation: {case.title}",
        family="fisher",
        op="fisher_accumulate",
        competitors=(OURS, OURS_BF16, ADD),
        make_shapes=case.make_shapes,
        tensors=case.tensors,
        elements=case.parameters,
        prepare=functools.partial(_prepare, backend=backend),
        faults=functools.partial(_faults, backend=backend),
        comparisons=(Comparison("rate_to_add", "rate / torch.add", ADD.name, inverted=True),),
        rounds=rounds,
    )


LARGE = contest_of("fisher_large_tensor", LARGE_TENSOR, rounds=51)
BASE = contest_of("fisher_bert_base", BERT_BASE, rounds=51)
CONTESTS = (LARGE, BASE)
