"""The comparison: a learning rate for each contender on validation data, then the seeds on test data."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from finetuning.labelled_text import Split
from finetuning.methods import Method
from finetuning.training import TextTask, TuningSettings, find_child, fine_tune

# Far from the seeds of the comparison, so that tuning sees other heads, batches and training sets.
_FIRST_TUNING_SEED = 10_000


@dataclass(frozen=True)
class Contender:
    """A method on a kind of model, under the title that table and plot show."""

    title: str
    method: Method
    task: TextTask
    pretrained: bool = True


@dataclass(frozen=True)
class Plan:
    """How much is spent on every contender, the same for all.

    Args:
        learning_rates: AdamW's grid, ascending; each method derives its own, of the same size, from it.
        tuning_seeds: runs for each learning rate of the grid.
        seeds: runs on test data, 0, 1, ...
        train_examples: rows of every training set.
        settings: epochs and batch size.
    """

    learning_rates: Sequence[float]
    tuning_seeds: int
    seeds: int
    train_examples: int
    settings: TuningSettings


@dataclass
class ContenderResult:
    """What came out for a contender; ``accuracies[i]`` is the test accuracy of seed i in percent.

    Args:
        title: its name in the report.
        pretrained: False for the contender that shows what pretraining gives.
        validation: learning rate → mean validation accuracy in percent.
        accuracies: one a seed.
        step_seconds: every optimizer step of the runs on test data.
        state_bytes: of its optimizer.
    """

    title: str
    pretrained: bool
    validation: dict[float, float]
    accuracies: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    state_bytes: int = 0

    @property
    def learning_rate(self) -> float:
        """The one with the best validation accuracy; of equal ones the smallest."""
        return max(self.validation, key=lambda rate: (self.validation[rate], -rate))

    @property
    def at_edge_of_grid(self) -> bool:
        """Whether a learning rate outside the grid may have been better still."""
        rates = sorted(self.validation)
        return len(rates) > 1 and self.learning_rate in (rates[0], rates[-1])

    @property
    def step_milliseconds(self) -> float:
        """The median optimizer step."""
        return 1000 * statistics.median(self.step_seconds)


def compare(contenders: Sequence[Contender], split: Split, plan: Plan) -> list[ContenderResult]:
    """Tune every contender's learning rate, then run all of them on the same seeds.

    At the same seed all contenders start from the same weights and see the same training rows.
    """
    results = [
        ContenderResult(
            contender.title,
            contender.pretrained,
            _validate_learning_rates(contender, split, plan),
        )
        for contender in contenders
    ]
    total = plan.seeds * len(contenders)
    with tqdm(total=total, desc="seeds", unit="run", disable=None) as progress:
        for seed in range(plan.seeds):
            rows = split.training_set(plan.train_examples, seed)
            # Contenders alternate, so that whatever else the machine does reaches all step times alike.
            for contender, result in zip(contenders, results, strict=True):
                progress.set_postfix_str(contender.title)
                _run_on_test(contender, result, seed, rows, split, plan.settings)
                progress.update()
    return results


def _validate_learning_rates(contender: Contender, split: Split, plan: Plan) -> dict[float, float]:
    method, task = contender.method, contender.task
    rates = method.learning_rates(plan.learning_rates)
    accuracies: dict[float, list[float]] = {rate: [] for rate in rates}
    description = f"learning rate of {contender.title}"
    total = plan.tuning_seeds * len(rates)
    with tqdm(total=total, desc=description, unit="run", disable=None) as progress:
        for seed in range(_FIRST_TUNING_SEED, _FIRST_TUNING_SEED + plan.tuning_seeds):
            rows = split.training_set(plan.train_examples, seed)
            child = find_child(task, method, rows, seed)
            for rate in rates:
                tuned = fine_tune(task, method, rate, seed, rows, child, plan.settings)
                accuracy = task.accuracy(tuned.model, split.validation)
                accuracies[rate].append(accuracy)
                progress.set_postfix_str(f"{rate:.1e}: {accuracy:.1f} %")
                progress.update()
    return {rate: statistics.mean(values) for rate, values in accuracies.items()}


def _run_on_test(
    contender: Contender,
    result: ContenderResult,
    seed: int,
    rows: Sequence[int],
    split: Split,
    settings: TuningSettings,
) -> None:
    method, task = contender.method, contender.task
    child = find_child(task, method, rows, seed)
    tuned = fine_tune(task, method, result.learning_rate, seed, rows, child, settings)
    result.accuracies.append(task.accuracy(tuned.model, split.test))
    result.step_seconds.extend(tuned.step_seconds)
    result.state_bytes = tuned.state_bytes
