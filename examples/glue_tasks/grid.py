"""The grid of runs: which methods, with which p, at which learning rates, for which seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

#: Name on the command line and title of a method; CT_F is there at AdamW's rate and at the comparable one.
TITLES = {
    "vanilla": "vanilla",
    "ct_f": "CT_F",
    "ct_f_scaled": "CT_F, rate / sqrt(p)",
    "ct_d": "CT_D",
}


@dataclass(frozen=True)
class Settings:
    """What all runs of a task share; the fields of a run's key, with ``Run``'s own.

    Args:
        model: a hub id or folder.
        data: where train and validation set come from.
        max_length: longer texts are cut off after so many tokens.
        batch_size: training examples a step.
        epochs: over the train set.
        warmup_ratio: share of the steps in which the learning rate rises; it falls linearly after them.
        weight_decay: of weights that the Trainer has decay.
        bf16: autocast.
        train_examples: drawn anew for each seed; None: all.
        evaluate_on: pairs of name and place of the sets of a transfer.
        fisher_examples: CT_D: measured at most; None: all.
        fisher_batch_size: CT_D: examples a squared gradient.
    """

    model: str
    data: str
    max_length: int
    batch_size: int
    epochs: float
    warmup_ratio: float
    weight_decay: float
    bf16: bool
    train_examples: int | None
    evaluate_on: tuple[tuple[str, str], ...]
    fisher_examples: int | None
    fisher_batch_size: int


@dataclass(frozen=True)
class Configuration:
    """What is chosen between: a method, its p, and AdamW's learning rate that it starts from."""

    method: str
    reserve_p: float | None
    learning_rate: float

    @property
    def title(self) -> str:
        """For tables and progress."""
        p = "" if self.reserve_p is None else f" p={self.reserve_p:g}"
        return f"{TITLES[self.method]}{p} at {self.learning_rate:g}"


@dataclass(frozen=True)
class Run:
    """One fine-tuning."""

    task: str
    configuration: Configuration
    seed: int
    settings: Settings

    @property
    def options(self) -> dict[str, Any]:
        """All that decides its result, as JSON has it: what stands here differs, and the run is another."""
        options = {"task": self.task, **asdict(self.configuration), "seed": self.seed}
        options |= asdict(self.settings)
        if self.configuration.method != "ct_d":
            del options["fisher_examples"], options["fisher_batch_size"]
        return json.loads(json.dumps(options))

    @property
    def key(self) -> str:
        """The options in one string."""
        return key_of(self.options)


def key_of(options: dict[str, Any]) -> str:
    """One string for one set of options."""
    return json.dumps(options, sort_keys=True)


@dataclass(frozen=True)
class Grid:
    """What is tried of every method.

    Args:
        methods: keys of ``TITLES``.
        shares: method → its values of p; vanilla has none.
        learning_rates: method → AdamW's rates that it tries.
        seeds: 0, 1, ... up to this number.
    """

    methods: tuple[str, ...]
    shares: dict[str, tuple[float, ...]]
    learning_rates: dict[str, tuple[float, ...]]
    seeds: int

    def configurations(self, method: str | None = None) -> list[Configuration]:
        """Those of a method, or of all."""
        chosen = self.methods if method is None else (method,)
        return [
            Configuration(each, share, rate)
            for each in chosen
            for share in self.shares.get(each, (None,))
            for rate in self.learning_rates[each]
        ]

    def runs(self, settings: dict[str, Settings]) -> Iterator[Run]:
        """All runs, task by task and seed by seed, so that CT_D's share one Fisher run."""
        for task, own in settings.items():
            for seed in range(self.seeds):
                for configuration in self.configurations():
                    yield Run(task, configuration, seed, own)


def describe(runs: Sequence[Run], finished: set[str]) -> str:
    """A line for each task, method and p: its runs, and how many of them are still to do."""
    groups: dict[tuple[str, str, float | None], list[Run]] = {}
    for run in runs:
        place = (run.task, run.configuration.method, run.configuration.reserve_p)
        groups.setdefault(place, []).append(run)
    lines = []
    for (task, method, share), group in groups.items():
        rates = dict.fromkeys(f"{run.configuration.learning_rate:g}" for run in group)
        seeds = len({run.seed for run in group})
        p = "" if share is None else f"p={share:g}"
        left = sum(run.key not in finished for run in group)
        lines.append(
            f"{task:<6}{TITLES[method]:<21}{p:<7}rates {' '.join(rates)}, {seeds} seeds: "
            f"{len(group)} runs, {left} to do"
        )
    todo = [run for run in runs if run.key not in finished]
    fisher = {(run.task, run.seed) for run in todo if run.configuration.method == "ct_d"}
    lines.append(
        f"{len(runs)} runs in all, {len(todo)} to do; {len(fisher)} Fisher runs, one a task and seed"
    )
    return "\n".join(lines)
