"""Child-Tuning as it is usually written: a mask tensor, then AdamW, one tensor operation at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

MaskSampler = Callable[[Tensor, float], Tensor]


def distribution_mask(gradient: Tensor, reserve_p: float) -> Tensor:
    """The mask through ``torch.distributions``, as released implementations draw it."""
    return torch.distributions.Bernoulli(torch.full_like(gradient, reserve_p)).sample()


def direct_mask(gradient: Tensor, reserve_p: float) -> Tensor:
    """The mask by the fastest call that torch has."""
    return torch.empty_like(gradient).bernoulli_(reserve_p)


class UnfusedChildTuning(Optimizer):
    """CT_F from the paper's equations (Xu et al., EMNLP 2021, algorithm 1), with AdamW's update.

    Unlike released implementations it leaves ``p.grad`` as it was, so that a step can be repeated.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        reserve_p: float,
        sample_mask: MaskSampler = distribution_mask,
    ) -> None:
        self._sample_mask = sample_mask
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "reserve_p": reserve_p,
            },
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        mask = self._sample_mask(parameter.grad, group["reserve_p"])
        gradient = parameter.grad * mask / group["reserve_p"]
        (beta1, beta2), lr = group["betas"], group["lr"]
        correction1 = 1 - beta1 ** state["step"]
        correction2 = 1 - beta2 ** state["step"]
        parameter.mul_(1 - lr * group["weight_decay"])
        state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = state["exp_avg_sq"].sqrt().div_(math.sqrt(correction2)).add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], denominator, value=-lr / correction1)
