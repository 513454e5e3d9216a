"""Which plans a step takes: one a device, made anew where groups, parameters or state were exchanged."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import exchanged_parameters, graph_capture, ops, registry, sharding, state_tensors
from .group_options import check_seed, check_shared
from .labels import philox_key
from .rank_agreement import RankAgreement
from .step_factor import StepFactor, step_factors
from .step_plan import Row, StepPlan, check_row

_NOTHING_SEEN = b"", b""

Groups = list[dict[str, Any]]


class StepPlanner:
    """The plans of one optimizer, as they are now, and what graphs have captured of them.

    Args:
        backend: the requested backend of op child_adamw, or None.
        agreement: of the ranks over which norms are taken.
    """

    def __init__(self, backend: str | None, agreement: RankAgreement) -> None:
        self.backend = backend
        self.agreement = agreement
        self.captures = graph_capture.Captures()
        self.plans: list[StepPlan] | None = None
        self._given: dict[str, Tensor] = {}  # the parameters that there is state for, by label
        self._sharded: list[Row] = []
        self._planned: list[Any] = []
        self._seen: tuple[Any, Any] = _NOTHING_SEEN
        self._shared: Any = None  # what was seen of options when groups were last found to agree
        self._factor: StepFactor | None = None  # of the last step
        self._is_first = True

    def forget(self, groups: Groups) -> None:
        """Plan anew at the next step: groups or state have been replaced, and go together now."""
        self.plans = None
        self._given = exchanged_parameters.given_by(groups)

    def follow(self, groups: Groups, states: dict[Tensor, Any]) -> None:
        """Take over DTensors that an engine has put in the place of parameters (exchanged_parameters)."""
        with torch.inference_mode(False), torch.no_grad():
            exchanged_parameters.follow_(groups, states, self._given)

    def seed_of_all(self, groups: Groups, states: dict[Tensor, Any]) -> int | None:
        """What RankAgreement.seed_of_all says of the parameters as they are now."""
        if not self.agreement.settled:
            for number, group in enumerate(groups):
                check_group(group, f"group {number}")
                for label, parameter in zip(group["param_names"], group["params"], strict=True):
                    sharding.check_whole(label, parameter)
            self.follow(groups, states)
        return self.agreement.seed_of_all(groups, states)

    def step(
        self,
        groups: Groups,
        states: dict[Tensor, Any],
        grad_scale: Any = None,
        found_inf: Any = None,
    ) -> None:
        """Update every parameter that has a gradient.

        Args:
            grad_scale, found_inf: what ``torch.amp.GradScaler`` has set, or None (SPEC.md, eq. 20).

        Raises:
            ValueError: an option, state or gradient that does not fit; nothing was written.
            RuntimeError: what a CUDA graph cannot hold.
        """
        # What is made in inference mode could never be changed outside it.
        with torch.inference_mode(False), torch.no_grad():
            standing = self._standing_plans(groups, states)
            capturing = graph_capture.check_start(groups, standing)
            plans = self._new_plans(groups, states) if standing is None else standing
            with sharding.gradients_of_parts(self._sharded):
                for plan in plans:
                    plan.refresh(self._seen[1])
                if self._is_first:
                    self._is_first = False
                    _warn_without_gradient(plans)
                self.captures.check_unmoved(plans)
                if self._seen[1] != self._shared:
                    check_shared(groups)
                    self._shared = self._seen[1]
                factors = step_factors(
                    plans, groups[0], grad_scale, found_inf, capturing, self.agreement
                )
                for plan, factor in zip(plans, factors, strict=True):
                    plan.run(factor, capturing)
                self._factor = factors[0] if factors else None
                if capturing:
                    self.captures.add(plans, factors)

    def check(self, groups: Groups, states: dict[Tensor, Any]) -> None:
        """Refuse what a step would refuse now; nothing is stepped.

        Raises:
            ValueError: an option, state or gradient that does not fit.
        """
        with torch.inference_mode(False), torch.no_grad():
            plans = self._standing_plans(groups, states) or self._new_plans(groups, states)
            with sharding.gradients_of_parts(self._sharded):
                for plan in plans:
                    plan.refresh(self._seen[1])
                    plan.drop_copies()

    def plan_of(
        self, label: str, parameter: Tensor, states: Mapping[Tensor, Any], group: dict[str, Any]
    ) -> StepPlan:
        """A plan of one parameter alone.

        Raises:
            ValueError: its state is missing or does not fit.
        """
        row = row_of(label, parameter, states, 0, group)
        device = row.parameter.device
        row.state["step"] = row.step.to(device)
        choice = registry.choose("child_adamw", device, self.backend)
        return StepPlan([row], [group], choice)

    @property
    def norm(self) -> Tensor | None:
        """The norm of the last step's gradients (float64, no dimension), where one was taken."""
        factor = self._factor
        return None if factor is None or factor.sums is None else factor.outcome[0]

    @property
    def skipped(self) -> Tensor:
        """Whether the last step was skipped (bool, no dimension)."""
        factor = self._factor
        return torch.tensor(False) if factor is None else factor.outcome[1] != 0

    def _standing_plans(self, groups: Groups, states: dict[Tensor, Any]) -> list[StepPlan] | None:
        """The plans, unless groups, parameters or state were exchanged by hand since they were made."""
        plans, before = self.plans, self._seen
        if plans:
            seen = ops.observe_groups(groups, states, before, plans[0].observer)
            if seen[0] == before[0] and sharding.parts_stand(self._sharded):
                self._seen = seen
                return plans
        return None

    def _new_plans(self, groups: Groups, states: dict[Tensor, Any]) -> list[StepPlan]:
        self.follow(groups, states)
        plans = self._make_plans(groups, states)
        if plans:
            self._seen = ops.observe_groups(groups, states, _NOTHING_SEEN, plans[0].observer)
            # As long as they live, no other object has the identity of one of them.
            members = (group["params"][:] for group in groups)
            self._planned = [groups[:], *members, *states.values()]
        self.plans = plans
        self._sharded = [row for plan in plans for row in plan.sharded_rows]
        return plans

    def _make_plans(self, all_groups: Groups, states: Mapping[Tensor, Any]) -> list[StepPlan]:
        """One plan a device; the steps of its parameters become views of one tensor."""
        members: dict[torch.device, list[Row]] = {}
        groups: dict[torch.device, Groups] = {}
        for number, group in enumerate(all_groups):
            check_group(group, f"group {number}")
            for label, parameter in zip(group["param_names"], group["params"], strict=True):
                device = sharding.local_of(parameter).device
                of_device = groups.setdefault(device, [])
                if not of_device or of_device[-1] is not group:
                    of_device.append(group)
                row = row_of(label, parameter, states, len(of_device) - 1, group)
                members.setdefault(device, []).append(row)
        plans = []
        for device, rows in members.items():
            choice = registry.choose("child_adamw", device, self.backend)
            steps = torch.stack([row.step.to(device) for row in rows])
            for row, step in zip(rows, steps.unbind(), strict=True):
                row.state["step"] = step
            plans.append(StepPlan(rows, groups[device], choice))
        return plans


def check_group(group: Mapping[str, Any], where: str) -> None:
    """Refuse a group whose seed is none, or whose labels do not go with its parameters.

    Raises:
        ValueError: names the group.
    """
    check_seed(group["seed"], where)
    if len(group["param_names"]) != len(group["params"]):
        raise ValueError(
            f"{where} has {len(group['params'])} parameters and {len(group['param_names'])} param_names; "
            "change both, or use add_param_group. An engine that flattens parameters (DeepSpeed, other "
            "than ZeRO 0 with fp32 weights) keeps no indexes of elements; use fully_shard (FSDP2) instead"
        )


def row_of(
    label: str,
    parameter: Tensor,
    states: Mapping[Tensor, Any],
    group_index: int,
    group: Mapping[str, Any],
) -> Row:
    """The checked row of a parameter in a plan whose group ``group_index`` is ``group``.

    Raises:
        ValueError: no kernel can update it, or its state is missing or does not fit.
    """
    part = sharding.local_of(parameter)
    ops.check_parameter(label, part)
    row = Row(
        label=label,
        parameter=part,
        state=state_tensors.state_of(label, parameter, states),
        group_index=group_index,
        philox_key=philox_key(group["seed"], label),
        element_map=sharding.element_map_of(label, parameter),
        sharded=None if part is parameter else parameter,
    )
    check_row(row)
    return row


def _warn_without_gradient(plans: Sequence[StepPlan]) -> None:
    """Say of a first step that it changes nothing, which is seldom meant."""
    rows = [row for plan in plans for row in plan.rows]
    # Released gradients are gone, and their rows have stepped.
    if rows and all(row.parameter.grad is None and not int(row.step) for row in rows):
        warnings.warn(
            f"the first step finds no gradient at any of {len(rows)} parameters, and changes nothing. Was "
            "the model sharded (fully_shard, parallelize_module) or were its parameters replaced after the "
            "optimizer was made? Then make the optimizer afterwards; else call backward() first",
            UserWarning,
            stacklevel=2,
        )
