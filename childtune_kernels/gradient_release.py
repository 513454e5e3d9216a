"""Gradient release: parameters are updated while backward runs (SPEC.md, "Gradient release")."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from . import child_layout, graph_capture, sharding
from .child_gradients import ChildGradients
from .state_tensors import state_of
from .step_plan import StepPlan
from .step_planner import StepPlanner, check_group


class _Owner(Protocol):
    """What a release needs of its optimizer."""

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    _planner: StepPlanner
    _gradient_release: GradientRelease | None


class GradientRelease:
    """What ``FusedChildAdamW.release_gradients`` returns: a handle, and a context manager.

    A parameter is updated as soon as backward has accumulated its gradient, with the options of that moment,
    and ``.grad`` becomes None. ``step()`` updates whatever else has a gradient. A compiled model hands over
    all gradients of a graph at once. Under ``DistributedDataParallel`` a gradient is not averaged yet
    when it is used, so that ranks diverge unseen; ``clip_grad_norm_`` finds no gradients and clips nothing.

    With ``compact_gradients`` the gradients of the child alone are kept, summed in fp32 (fp64 for fp64
    parameters), ``[child elements]`` a parameter; ``step()`` makes of them one dense gradient at a
    time. Parameters without a fixed mask keep ordinary gradients.

    The optimizer keeps the handle; hooks on the parameters know it by a weak reference, so that they end
    with the optimizer. A copy of the optimizer (``pickle``, ``copy.deepcopy``) is not released.

    Args:
        optimizer: the optimizer whose parameters are updated.
        compact_gradients: keep the child's gradients for ``step()`` instead of updating at once.

    Raises:
        ValueError: a group with ``max_grad_norm`` or ``skip_nonfinite``, now or later;
            ``compact_gradients`` without a fixed mask.
        RuntimeError: another release, a step captured into a CUDA graph. From backward or ``step()``: a
            gradient that comes a second time, a GradScaler, a capture.

    Source: SPEC.md, "Gradient release".
    """

    def __init__(self, optimizer: _Owner, compact_gradients: bool) -> None:
        optimizer._planner.captures.refuse("release_gradients()", "replays know nothing of it")
        optimizer._planner.follow(optimizer.param_groups, optimizer.state)
        _check_groups(optimizer.param_groups)
        if compact_gradients and not any(map(child_layout.has_child, optimizer.state.values())):
            raise ValueError(
                "compact_gradients=True keeps the gradients of a child, and no parameter has a fixed mask; "
                "use compact_gradients=False, or give the optimizer a child_mask"
            )
        members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if compact_gradients and any(map(sharding.is_sharded, members)):
            raise ValueError(
                "compact_gradients=True is for parameters of one device, and some are DTensors, whose "
                "gradients are sharded already; use compact_gradients=False"
            )
        self._optimizer = weakref.ref(optimizer)
        self._compact = compact_gradients
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._places: dict[Tensor, tuple[int, int]] = {}
        self._plans: dict[Tensor, StepPlan] = {}
        self._updated: dict[Tensor, str] = {}
        self._kept = ChildGradients()
        self._checked = False
        # Parameters of several devices get their gradients from as many threads of autograd.
        self._lock = threading.RLock()
        self._hook_parameters(optimizer.param_groups)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the child gradients kept for the next step; 0 without ``compact_gradients``."""
        return self._kept.nbytes

    def remove(self) -> None:
        """End the release; the optimizer steps as ever. Calling it again does nothing.

        Raises:
            RuntimeError: gradients are kept that no step has used; nothing has changed.
        """
        if self._kept.labels:
            raise RuntimeError(
                f"remove() while gradients of {_names(self._kept.labels)} are kept: they would be lost; call "
                "optimizer.step() or optimizer.zero_grad() first"
            )
        for hook in self._hooks.values():
            hook.remove()
        for known in (self._hooks, self._places, self._plans, self._updated):
            known.clear()
        optimizer = self._optimizer()
        if optimizer is None or optimizer._gradient_release is not self:
            return
        optimizer._gradient_release = None

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._kept.clear()
        self.remove()

    def begin_iteration(self) -> None:
        """Forget what has arrived since the last step, kept sums too: ``zero_grad()`` was called."""
        self._updated.clear()
        self._kept.clear()
        self._checked = False

    def renew(self) -> None:
        """Look at the optimizer anew: groups or state have been replaced."""
        self._plans.clear()
        self._places.clear()
        self._checked = False
        optimizer = self._optimizer()
        if optimizer is not None:
            self._hook_parameters(optimizer.param_groups)

    def check_between_iterations(self, what: str) -> None:
        """Refuse to exchange state between a gradient and the end of its iteration.

        Raises:
            RuntimeError: a parameter's gradient has come, and neither step() nor zero_grad() since.
        """
        for known, past in (
            (self._updated, "have been applied"),
            (self._kept.labels, "are kept"),
        ):
            if known:
                raise RuntimeError(
                    f"{what} in the middle of an iteration of release_gradients(): gradients of "
                    f"{_names(known)} {past}; call optimizer.step() or optimizer.zero_grad() first"
                )

    def step(self) -> None:
        """End an iteration: update from kept sums, and whatever has a gradient that no hook took.

        Raises:
            RuntimeError: a GradScaler, a capture, or a gradient of a parameter that has been updated.
            ValueError: as the ordinary step; weights and state are as before.
        """
        optimizer = self._optimizer()
        assert optimizer is not None
        self._check_scaler(optimizer)
        _check_groups(optimizer.param_groups)
        for device in {parameter.device for parameter in self._hooks}:
            _check_capture(device)
        for parameter, label in self._updated.items():
            if parameter.grad is not None:
                raise RuntimeError(_came_twice(label))
        if self._compact:
            for parameter in self._hooks:
                if parameter.grad is not None:
                    self._arrive(optimizer, parameter)
            self._kept.check(optimizer.state)
        # This checks every row, and steps those whose gradients are where they always are.
        optimizer._planner.step(optimizer.param_groups, optimizer.state)
        for parameter in self._kept.labels:
            self._step_kept(optimizer, parameter)
        self.begin_iteration()
        self._hook_parameters(optimizer.param_groups)

    def _check_scaler(self, optimizer: _Owner) -> None:
        scaled = [
            name
            for name in ("grad_scale", "found_inf")
            if getattr(optimizer, name, None) is not None
        ]
        if scaled:
            done = ""
            if self._updated:
                done = f"; gradients of {_names(self._updated)} have been applied, scaled"
            raise RuntimeError(
                f"{' and '.join(scaled)} set by a GradScaler, with release_gradients(): the scale is known "
                f"only after backward{done}. Use bf16 without a scaler, or an "
                "ordinary step, and start again from a checkpoint"
            )

    def _hook_parameters(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """See to it that the parameters of these groups have a hook, and no others."""
        members = dict.fromkeys(parameter for group in groups for parameter in group["params"])
        for parameter in [parameter for parameter in self._hooks if parameter not in members]:
            self._hooks.pop(parameter).remove()
            self._plans.pop(parameter, None)
        for parameter in members:
            # Of a tensor that keeps its gradient without being a leaf, step() finds it.
            if parameter in self._hooks or not parameter.is_leaf or parameter.is_inference():
                continue
            hook = partial(_on_gradient, weakref.ref(self))
            frozen = not parameter.requires_grad
            # torch gives a frozen parameter no hook, yet keeps one: it is there once the parameter trains.
            parameter.requires_grad_(True)
            self._hooks[parameter] = parameter.register_post_accumulate_grad_hook(hook)
            parameter.requires_grad_(not frozen)

    def take(self, parameter: Tensor) -> None:
        """Use the gradient that backward has just accumulated, and free it."""
        optimizer = self._optimizer()
        if optimizer is not None and parameter.grad is not None:
            with self._lock:
                self._arrive(optimizer, parameter)

    def _arrive(self, optimizer: _Owner, parameter: Tensor) -> None:
        place = self._place_of(optimizer.param_groups, parameter)
        if place is None:
            return
        label, group = place
        state = state_of(label, parameter, optimizer.state)
        if self._compact and not child_layout.has_child(state):
            return
        _check_options(group, label)
        _check_capture(parameter.device)
        if parameter in self._updated:
            raise RuntimeError(_came_twice(label))
        if not self._checked:
            self._check_all(optimizer, parameter)
        # What is made in inference mode could never be changed outside it.
        with torch.inference_mode(False), torch.no_grad():
            if self._compact:
                self._kept.add(label, parameter, state)
            else:
                plan = self._plan_of(optimizer, label, parameter, group)
                with sharding.gradients_of_parts(plan.sharded_rows):
                    plan.refresh()
                    plan.run()
                self._updated[parameter] = label
            parameter.grad = None

    def _check_all(self, optimizer: _Owner, parameter: Tensor) -> None:
        """Before anything of an iteration is written, refuse what a step would refuse."""
        _check_groups(optimizer.param_groups)
        # The plans of all parameters then look as they do in step().
        gradient, parameter.grad = parameter.grad, None
        try:
            optimizer._planner.check(optimizer.param_groups, optimizer.state)
        finally:
            parameter.grad = gradient
        self._checked = True

    def _place_of(
        self, groups: Sequence[dict[str, Any]], parameter: Tensor
    ) -> tuple[str, dict[str, Any]] | None:
        """Label and group of a parameter, wherever it stands now; None: it has been taken out."""
        for _ in range(2):
            number, index = self._places.get(parameter, (len(groups), 0))
            if number < len(groups):
                group = groups[number]
                if index < len(group["params"]) and group["params"][index] is parameter:
                    check_group(group, f"group {number}")
                    return group["param_names"][index], group
            self._places = {
                member: (number, index)
                for number, group in enumerate(groups)
                for index, member in enumerate(group["params"])
            }
        return None

    def _plan_of(
        self, optimizer: _Owner, label: str, parameter: Tensor, group: dict[str, Any]
    ) -> StepPlan:
        """The plan of one parameter, made anew if its group, label or state is another."""
        plan = self._plans.get(parameter)
        if (
            plan is None
            or plan.groups[0] is not group
            or plan.rows[0].label != label
            or plan.rows[0].state is not optimizer.state.get(parameter)
            or not sharding.parts_stand(plan.sharded_rows)
        ):
            plan = optimizer._planner.plan_of(label, parameter, optimizer.state, group)
            self._plans[parameter] = plan
        return plan

    @torch.inference_mode(False)
    @torch.no_grad()
    def _step_kept(self, optimizer: _Owner, parameter: Tensor) -> None:
        """Step one parameter by its kept sums: the one dense gradient that exists meanwhile."""
        place = self._place_of(optimizer.param_groups, parameter)
        if place is not None:
            plan = self._plan_of(optimizer, place[0], parameter, place[1])
            words = plan.rows[0].mask_words
            assert words is not None
            with self._kept.as_gradient(parameter, words):
                plan.refresh()
                plan.run()
        self._kept.drop(parameter)


# Compiled autograd breaks its graph here: a plan reads addresses, which a trace has not.
@torch._disable_dynamo
def _on_gradient(release: weakref.ref[GradientRelease], parameter: Tensor) -> None:
    """The hook of a parameter; one whose optimizer is gone does nothing."""
    present = release()
    if present is not None:
        present.take(parameter)


def _names(known: Mapping[Tensor, str]) -> str:
    first = next(iter(known.values()))
    return first if len(known) == 1 else f"{first} and {len(known) - 1} others"


def _check_options(group: Mapping[str, Any], where: str) -> None:
    for name in ("max_grad_norm", "skip_nonfinite"):
        value = group.get(name)
        if value is not None and value is not False:
            raise ValueError(
                f"{name}={value!r} (group of {where}) needs all gradients before the first update, and "
                "release_gradients() updates each parameter as its own arrives; take one of them out"
            )


def _check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    for group in groups:
        if group["param_names"]:
            _check_options(group, group["param_names"][0])


def _check_capture(device: torch.device) -> None:
    if graph_capture.is_capturing(device):
        raise RuntimeError(
            "a capture into a CUDA graph, with release_gradients(): its replays would run none of the "
            "updates; remove() the handle before the capture"
        )


def _came_twice(label: str) -> str:
    return (
        f"the gradient of {label} came a second time before step() or zero_grad(); with release_gradients() "
        "the first has been applied and freed. Call step() after every backward, checkpoint weights that "
        "segments share with use_reentrant=False, or, to accumulate gradients, use "
        "release_gradients(compact_gradients=True) or no release. DistributedDataParallel hands gradients "
        "over twice: use fully_shard(model, reshard_after_forward=False), or no release"
    )
