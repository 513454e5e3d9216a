"""Does clipping cost more than one read of the gradients, and a loss scale anything, within the step?"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import AdamW, Optimizer

from ..cases import BERT_BASE, LARGE_TENSOR_APART, Case, Shapes, Workload
from ..correctness import fault_on
from ..variants import CT_F, OPTIONS, PLAIN, Variant
from .contest import Comparison, Competitor, Contest, Prepared

MAX_GRAD_NORM = 1.0
_SCALE = 1024.0
_STEPS = 3
# Sums in fp32, of some hundred thousand elements; of the weights, as far as steps in fp32 stray.
_NORM_TOLERANCE, _WEIGHT_TOLERANCE = 1e-4, 2e-6

STEP = Competitor("step", "CT_F, p = 0.3", bytes_per_element=28)
CLIPPED = Competitor("step_clipped", "CT_F with max_grad_norm", bytes_per_element=32)
SCALED = Competitor("step_scaled", "CT_F with grad_scale and found_inf", bytes_per_element=28)
# Which of the two reads memory faster depends on the device.
SUM = Competitor("read_sum", "one read: torch.sum, tensor by tensor", bytes_per_element=4)
NORM = Competitor("read_norm", "one read: get_total_norm(foreach=True)", bytes_per_element=4)
TORCH = Competitor(
    "torch_clip_and_step",
    "clip_grad_norm_(foreach=True), then torch AdamW, fused",
    bytes_per_element=40,
)

TO_STEP_AND_READ = Comparison(
    "ratio_to_step_and_read", "time / (step + read)", STEP.name, plus=(SUM.name, NORM.name)
)
TO_STEP = Comparison("ratio_to_step", "time / step", STEP.name)


def _clipped(variant: Variant) -> Variant:
    options = (*variant.options, ("max_grad_norm", MAX_GRAD_NORM))
    return replace(variant, name=f"{variant.name}_clipped", options=options)


_VARIANTS = {STEP.name: CT_F, CLIPPED.name: _clipped(CT_F), SCALED.name: CT_F}


def _set_scale(optimizer: Optimizer, device: torch.device, found_inf: float = 0.0) -> None:
    """What torch.amp.GradScaler sets before it calls step()."""
    scaling = {"grad_scale": _SCALE, "found_inf": found_inf}
    for name, value in scaling.items():
        setattr(optimizer, name, torch.full((), value, device=device))


def _gradients(workload: Workload) -> list[Tensor]:
    return [weight.grad for _, weight in workload.named if weight.grad is not None]


def _sums(gradients: Sequence[Tensor]) -> list[Tensor]:
    return [gradient.sum() for gradient in gradients]


def _clip_and_step(workload: Workload) -> tuple[Optimizer, Callable[[], None]]:
    """torch's way, which writes the clipped gradients."""
    parameters = [parameter for _, parameter in workload.named]
    optimizer = AdamW(parameters, fused=True, **OPTIONS)

    def step() -> None:
        clip_grad_norm_(parameters, MAX_GRAD_NORM, foreach=True)
        optimizer.step()

    return optimizer, step


def _prepare(shapes: Shapes, device: torch.device, backend: str | None = None) -> Prepared:
    """All step the same tensors; torch's way brings their gradients to the norm at which all others clip."""
    workload = Workload(shapes, device)
    steps: dict[str, Callable[[], object]] = {}
    for name, variant in _VARIANTS.items():
        optimizer = variant.build(workload.named, backend)
        workload.share_moments(optimizer)
        if name == SCALED.name:
            _set_scale(optimizer, device)
        steps[name] = optimizer.step
    gradients = _gradients(workload)
    steps[SUM.name] = lambda: _sums(gradients)
    steps[NORM.name] = lambda: get_total_norm(gradients, foreach=True)
    optimizer, steps[TORCH.name] = _clip_and_step(workload)
    workload.share_moments(optimizer)
    return Prepared(steps)


def _faults(shapes: Shapes, device: torch.device, backend: str | None = None) -> dict[str, str]:
    faults = {
        STEP.name: fault_on(CT_F, shapes, device, backend),
        CLIPPED.name: fault_on(_clipped(CT_F), shapes, device, backend),
        SCALED.name: _fault_of_scaling(shapes, device, backend),
        TORCH.name: _fault_of_torch(shapes, device, backend),
        **_faults_of_reads(shapes, device),
    }
    return {name: fault for name, fault in faults.items() if fault is not None}


def _fault_of_scaling(shapes: Shapes, device: torch.device, backend: str | None) -> str | None:
    """A power of two leaves no trace in weights and state, and a step that found an infinity none at all."""
    outcomes = []
    for scaled in (False, True):
        workload = Workload(shapes, device)
        optimizer = CT_F.build(workload.named, backend)
        for step in range(_STEPS):
            workload.set_gradients()
            if scaled:
                for gradient in _gradients(workload):
                    gradient.mul_(_SCALE)
                _set_scale(optimizer, device, found_inf=float(step == 1))
            if scaled or step != 1:
                optimizer.step()
        outcomes.append(
            [
                tensor
                for _, weight in workload.named
                for tensor in (weight, *optimizer.state[weight].values())
            ]
        )
    same = all(map(torch.equal, *outcomes))
    return None if same else "weights and state are not those of steps without a scale"


def _fault_of_torch(shapes: Shapes, device: torch.device, backend: str | None) -> str | None:
    """Both ways of clipping lead to the same weights and moments."""
    ours, theirs = Workload(shapes, device), Workload(shapes, device)
    optimizer = _clipped(PLAIN).build(ours.named, backend)
    reference, step = _clip_and_step(theirs)
    for _ in range(_STEPS):
        for workload in (ours, theirs):
            workload.set_gradients()
        optimizer.step()
        step()
    for (name, found), (_, expected) in zip(ours.named, theirs.named, strict=True):
        moments = optimizer.state[found]["exp_avg"], reference.state[expected]["exp_avg"]
        if not torch.allclose(*moments, rtol=_NORM_TOLERANCE, atol=1e-9):
            return f"exp_avg of {name} is not that of max_grad_norm"
        exact = expected.detach()
        distance = (found.detach() - exact).abs() / exact.abs().clamp(min=1)
        if not float(distance.max()) <= _WEIGHT_TOLERANCE:
            return f"weight {name} is {float(distance.max()):.1e} from that of max_grad_norm"
    return None


def _faults_of_reads(shapes: Shapes, device: torch.device) -> dict[str, str | None]:
    """A read is one of every element."""
    gradients = _gradients(Workload(shapes, device))
    wide = [gradient.double() for gradient in gradients]
    exact = math.sqrt(sum(float(each.square().sum()) for each in wide))
    norm = float(get_total_norm(gradients, foreach=True))
    missed = sum(
        abs(float(found) - float(each.sum()))
        for found, each in zip(_sums(gradients), wide, strict=True)
    )
    return {
        NORM.name: None if abs(norm / exact - 1) <= _NORM_TOLERANCE else f"{norm} is not {exact}",
        SUM.name: None if missed <= _NORM_TOLERANCE * exact else f"the sums miss by {missed}",
    }


def contest_of(
    name: str, case: Case, rounds: int, backend: str | None = None, memory: bool = False
) -> Contest:
    """Steps over the tensors of a case; ``backend`` None takes the best that serves the device."""
    return Contest(
        name=name,
        title=f"Clipping and scaling: {case.title}",
        family="clipping",
        op="gradient_norm",
        more_ops=("child_adamw",),
        competitors=(STEP, CLIPPED, SCALED, SUM, NORM, TORCH),
        make_shapes=case.make_shapes,
        tensors=case.tensors,
        elements=case.parameters,
        prepare=functools.partial(_prepare, backend=backend),
        faults=functools.partial(_faults, backend=backend),
        comparisons=(TO_STEP_AND_READ, TO_STEP),
        rounds=rounds,
        memory=memory,
    )


LARGE = contest_of("clipping_large_tensor", LARGE_TENSOR_APART, rounds=51, memory=True)
BASE = contest_of("clipping_bert_base", BERT_BASE, rounds=51, memory=True)
CONTESTS = (LARGE, BASE)
