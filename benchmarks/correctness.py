"""Right before fast: every variant is checked on cut-down tensors of its case before it is timed."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from childtune_kernels import ChildMask, FusedChildAdamW, registry

from .cases import DTYPE, Case, Shapes, Workload
from .variants import OPTIONS, Variant, random_child_mask

_STEPS = 5
# Weights are of size 1: rounding in fp32 costs 5e-7; a step that does nothing, or leaves decay out,
# misses by 5e-3 and 5e-5.
_TOLERANCE = 2e-6


def missing_kernel(op: str, device: torch.device) -> str | None:
    """Why only the reference serves an op on a device, or None: its speed is of no interest."""
    choice = registry.choose(op, device)
    if choice.backend != "reference":
        return None
    return f"op {op} has no kernel for {device}, so that nothing is measured:\n{registry.explain(device)}"


def fault_of(
    variant: Variant, case: Case, device: torch.device, backend: str | None = None
) -> str | None:
    """What is wrong with a variant on the tensors of a case, or None."""
    fault = fault_on(variant, case.miniature(), device, backend)
    if fault is None:
        return None
    return f"{variant.name} on {case.name}: {fault}; its speed is not reported"


def fault_on(
    variant: Variant, shapes: Shapes, device: torch.device, backend: str | None = None
) -> str | None:
    """What is wrong with a variant on small tensors, or None.

    Weights of 16 bits without a master round a step away, so that only bits can be compared there, and so do
    moments; optimizers of other packages have their own mathematics.
    """
    checks: list[Callable[[Variant, Shapes, torch.device, str | None], str | None]] = []
    if variant.family == "childtune":
        checks.append(_differs_from_reference)
    if _keeps_fp32(variant):
        if variant.mask != "none":
            checks.append(_keeps_wrongly)
        if variant.mask == "none" or variant.family == "unfused":
            checks.append(_strays_from_adamw)
    for check in checks:
        fault = check(variant, shapes, device, backend)
        if fault is not None:
            return fault
    return None


def _keeps_fp32(variant: Variant) -> bool:
    """Whether nothing of a step is lost beyond the rounding of fp32."""
    if variant.dtype == DTYPE:
        return variant.family != "other"
    options = dict(variant.options)
    masters = options.get("master_weight", "auto") not in ("none", "stochastic")
    return variant.family == "childtune" and masters and "state_dtype" not in options


def _weights(optimizer: Optimizer, workload: Workload) -> dict[str, Tensor]:
    """The weights with all the precision that the optimizer keeps of them."""
    if isinstance(optimizer, FusedChildAdamW):
        return {name: each.detach() for name, each in optimizer.master_state_dict().items()}
    return {name: parameter.detach() for name, parameter in workload.named}


def _clipping(variant: Variant, workload: Workload) -> float:
    """What the variant's clipping multiplies the gradients by (SPEC.md, eq. 20)."""
    limit: float | None = dict(variant.options).get("max_grad_norm")
    if limit is None:
        return 1.0
    gradients = [weight.grad for _, weight in workload.named if weight.grad is not None]
    norm = math.sqrt(sum(float(each.double().square().sum()) for each in gradients))
    return min(1.0, limit / (norm + 1e-6))


def _step_often(optimizer: Optimizer, workload: Workload) -> None:
    for _ in range(_STEPS):
        workload.set_gradients()
        optimizer.step()


def _differs_from_reference(
    variant: Variant, shapes: Shapes, device: torch.device, backend: str | None
) -> str | None:
    results, norms = [], []
    for each in (backend, "reference"):
        workload = Workload(shapes, device, dtype=variant.dtype)
        optimizer = variant.build(workload.named, each)
        _step_often(optimizer, workload)
        results.append([(p, optimizer.state[p]) for _, p in workload.named])
        norm = getattr(optimizer, "last_grad_norm", None)
        norms.append(None if norm is None else float(norm))
    if norms[0] != norms[1]:
        return f"the gradients' norm is {norms[0]} and not {norms[1]}, bit for bit the reference's"
    for name, (weight, state), (expected, expected_state) in zip(shapes, *results, strict=True):
        if not torch.equal(weight, expected):
            return f"weight {name} is not bitwise equal to the reference's"
        for key, tensor in expected_state.items():
            if not torch.equal(state[key], tensor):
                return f"state {key} of {name} is not bitwise equal to the reference's"
    return None


def _dense_state(optimizer: Optimizer) -> dict[int, dict[str, Tensor]]:
    """Moments in the shape of their parameters, by the number of the parameter."""
    if isinstance(optimizer, FusedChildAdamW):
        moments: dict[int, dict[str, Tensor]] = optimizer.to_adamw_state_dict()["state"]
        return moments
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return state


def _keeps_wrongly(
    variant: Variant, shapes: Shapes, device: torch.device, backend: str | None
) -> str | None:
    """In one step without decay just the kept weights move, by lr each; masks and clipping scale."""
    workload = Workload(shapes, device, dtype=variant.dtype)
    before = {name: weight.detach().float().clone() for name, weight in workload.named}
    optimizer = variant.build(workload.named, backend)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    weights = _weights(optimizer, workload)
    all_kept = {name: weights[name] != start for name, start in before.items()}
    moved = total = 0
    scale = (1 - OPTIONS["betas"][0]) / (variant.kept if variant.mask == "bernoulli" else 1.0)
    scale *= _clipping(variant, workload)
    state = _dense_state(optimizer)
    for index, (name, parameter) in enumerate(workload.named):
        kept = all_kept[name]
        moved += int(kept.sum())
        total += parameter.numel()
        assert parameter.grad is not None
        expected = parameter.grad.float() * kept * scale
        if not torch.allclose(state[index]["exp_avg"], expected, rtol=1e-5, atol=0):
            return f"exp_avg of {name} is not the masked gradient after one step"
    if variant.mask == "fixed":
        child = random_child_mask(workload.named, variant.kept, variant.run)
        same = ChildMask.from_dense(all_kept) == child
        return None if same else "the weights that moved are not the child"
    # Six deviations; lr is far above the weights' rounding, so that every kept weight is seen to move.
    margin = 6 * math.sqrt(variant.kept * (1 - variant.kept) / total)
    if abs(moved / total - variant.kept) > margin:
        return f"{moved / total:.4f} of the weights moved instead of {variant.kept} ± {margin:.4f}"
    return None


def _strays_from_adamw(
    variant: Variant, shapes: Shapes, device: torch.device, backend: str | None
) -> str | None:
    """Without a mask (p = 1 where there is one) a variant follows torch's AdamW in fp64."""
    workload = Workload(shapes, device, dtype=variant.dtype)
    optimizer = variant.build(workload.named, backend)
    for group in optimizer.param_groups:
        if "reserve_p" in group:
            group["reserve_p"] = 1.0
    wide = [
        (name, torch.nn.Parameter(parameter.detach().double()))
        for name, parameter in workload.named
    ]
    expected = AdamW(wide, foreach=False, fused=False, **OPTIONS)
    for _ in range(_STEPS):
        workload.set_gradients()
        factor = _clipping(variant, workload)
        for (_, parameter), (_, double) in zip(workload.named, wide, strict=True):
            assert parameter.grad is not None
            double.grad = parameter.grad.double() * factor
        optimizer.step()
        expected.step()
    weights = _weights(optimizer, workload)
    for name, double in wide:
        exact = double.detach()
        distance = (weights[name].double() - exact).abs() / exact.abs().clamp(min=1)
        if not float(distance.max()) <= _TOLERANCE:
            return f"weight {name} is {float(distance.max()):.1e} from AdamW in fp64"
    return None
