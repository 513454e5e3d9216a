"""OptionScheduler: a number of the parameter groups that follows a function of the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .group_options import FIXED_KEYS

Schedule = Callable[[int], Any]


class OptionScheduler:
    """Sets an option of an optimizer's groups to a function of the step, as ``LambdaLR`` does for lr.

    Works beside any scheduler of ``torch.optim.lr_scheduler`` that moves another option, and for every
    option that an optimizer reads anew at each step: of FusedChildAdamW ``reserve_p``, ``lr``, ``betas``,
    ``eps`` and ``weight_decay``, and no plan is made anew for them.

    Args:
        optimizer: any optimizer of ``torch.optim``'s kind.
        option: a key that each of its groups has, such as ``"reserve_p"``.
        schedule: gives the option's value at a step, counted from 0; or a list with one such function a
            group, None for groups that keep their value. Groups added later keep theirs, too.

    Changes in place: the groups' option, to ``schedule(0)`` at construction; a tensor is filled.

    Raises:
        ValueError: an option that never moves (the seed, members, names), a group without the option, or a
            list of another length than the groups.
    """

    def __init__(
        self, optimizer: Optimizer, option: str, schedule: Schedule | Sequence[Schedule | None]
    ) -> None:
        groups = optimizer.param_groups
        if option in FIXED_KEYS:
            raise ValueError(
                f"option={option!r} stays as it is for a whole run; move a number such as reserve_p"
            )
        for number, group in enumerate(groups):
            if option not in group:
                raise ValueError(
                    f"option={option!r} is not in group {number}; it has {', '.join(sorted(group))}"
                )
        self._schedules = [schedule] * len(groups) if callable(schedule) else [*schedule]
        if len(self._schedules) != len(groups):
            raise ValueError(
                f"schedule has {len(self._schedules)} functions for {len(groups)} groups; give one a "
                "group, None for those that keep their value"
            )
        self.optimizer = optimizer
        self.option = option
        self.last_step = 0
        self._set()

    def step(self) -> None:
        """Go to the next step; call it after ``optimizer.step()``."""
        self.last_step += 1
        self._set()

    def last_values(self) -> list[Any]:
        """The option's value in every group, as it is now."""
        return [group[self.option] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The option and the count of steps; functions are not saved."""
        return {"option": self.option, "last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved count of steps, and set the groups' option to its value there.

        Raises:
            ValueError: it is of another option.
        """
        if state_dict.get("option") != self.option:
            raise ValueError(
                f"the state dict is of option {state_dict.get('option')!r}, not {self.option!r}"
            )
        self.last_step = int(state_dict["last_step"])
        self._set()

    def _set(self) -> None:
        values = [
            (group, schedule(self.last_step))
            for group, schedule in zip(self.optimizer.param_groups, self._schedules, strict=False)
            if schedule is not None
        ]
        for group, value in values:
            if isinstance(group[self.option], Tensor):
                group[self.option].fill_(value)  # a captured graph reads this very tensor
            else:
                group[self.option] = value
