"""Which layout of compact state is the fastest, by the child's density and by the length of its runs?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from childtune_kernels import ChildMask, FusedChildAdamW, child_layout, ops

from ..cases import LARGE_TENSOR, Shapes, Workload
from ..variants import OPTIONS, random_child_mask
from .contest import Comparison, Competitor, Contest, Prepared

LAYOUTS = ("words", "indices", "runs")
TORCH = Competitor("torch_fused", "torch AdamW, fused")

_DENSITIES = (0.02, 0.06, 0.1, 0.125, 0.2, 0.3, 0.5)
_RUNS = (8, 16, 32, 64, 256)
_DENSITIES_OF_RUNS = (0.1, 0.3)
_STEPS = 3
_CHECKED = 200_003  # more than one unit of every layout


def with_layout(named: list[tuple[str, Any]], mask: ChildMask, layout: str) -> FusedChildAdamW:
    """An optimizer whose compact state has one layout, whatever suits the child."""
    optimizer = FusedChildAdamW(named, child_mask=mask, child_state="compact", seed=0, **OPTIONS)
    for _, parameter in named:
        state = optimizer.state[parameter]
        words = child_layout.mask_words(state, parameter.numel())
        assert words is not None
        for key in child_layout.LAYOUT_KEYS:
            state.pop(key, None)
        state.update(child_layout.child_layout(words, parameter.numel(), layout))
    return optimizer


def _prepare(density: float, run: int, shapes: Shapes, device: torch.device) -> Prepared:
    workload = Workload(shapes, device)
    ((name, weight),) = workload.named
    mask = random_child_mask(workload.named, density, run)
    fused = AdamW([weight], fused=True, **OPTIONS)
    steps: dict[str, Callable[[], object]] = {TORCH.name: fused.step}
    figures: dict[str, dict[str, Any]] = {TORCH.name: {"density": density, "run": run}}
    words = mask.words[name]
    suitable = child_layout.layout_of(
        {"child_exp_avg": weight, **child_layout.child_layout(words, weight.numel())}
    )
    for layout in LAYOUTS:
        optimizer = with_layout(workload.named, mask, layout)
        steps[layout] = optimizer.step
        size = sum(value.nbytes for value in optimizer.state[weight].values())
        figures[layout] = {
            "density": density,
            "run": run,
            "mean_run": _mean_run(words, weight.numel()),
            "suitable": suitable == layout,
            "state_bytes_per_parameter": size / weight.numel(),
        }
    return Prepared(steps, figures)


def _mean_run(words: Tensor, numel: int) -> float:
    child = ops.unpack_mask(words, (numel,))
    starts = int((child[1:] & ~child[:-1]).sum()) + int(child[0])
    return int(child.sum()) / max(1, starts)


def _faults(density: float, run: int, shapes: Shapes, device: torch.device) -> dict[str, str]:
    """All layouts give the weights of the reference with dense state."""
    shapes = dict.fromkeys(shapes, (_CHECKED,))
    faults = {}
    expected = Workload(shapes, device)
    mask = random_child_mask(expected.named, density, run)
    dense = FusedChildAdamW(
        expected.named,
        child_mask=mask,
        child_state="dense",
        backend="reference",
        seed=0,
        **OPTIONS,
    )
    _step_often(expected, dense)
    for layout in LAYOUTS:
        workload = Workload(shapes, device)
        _step_often(workload, with_layout(workload.named, mask, layout))
        if not torch.equal(workload.named[0][1], expected.named[0][1]):
            faults[layout] = "the weights are not bitwise equal to the reference's with dense state"
    return faults


def _step_often(workload: Workload, optimizer: FusedChildAdamW) -> None:
    for _ in range(_STEPS):
        workload.set_gradients()
        optimizer.step()


def _contest(density: float, run: int) -> Contest:
    where = "scattered" if run == 1 else f"in runs of {run}"
    return Contest(
        name=f"layouts_{density}" if run == 1 else f"layouts_{density}_runs_{run}",
        title=f"{density * 100:g} % {where}",
        family="layouts",
        op="child_adamw",
        competitors=(*(Competitor(layout, layout) for layout in LAYOUTS), TORCH),
        make_shapes=LARGE_TENSOR.make_shapes,
        tensors=LARGE_TENSOR.tensors,
        elements=LARGE_TENSOR.parameters,
        prepare=partial(_prepare, density, run),
        faults=partial(_faults, density, run),
        comparisons=(Comparison("ratio_to_fused", "time / torch fused", TORCH.name),),
        option="--layouts",
    )


CONTESTS = (
    *(_contest(density, 1) for density in _DENSITIES),
    *(_contest(density, run) for density in _DENSITIES_OF_RUNS for run in _RUNS),
)
