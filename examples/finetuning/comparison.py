"""The comparison: a learning rate for each contender on validation data, then the seeds on test data."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from childtune_kernels import ChildMask
from finetuning.children import CHILDREN, ChildNetworks
from finetuning.labelled_text import Split
from finetuning.methods import Method
from finetuning.progress import tell_without_bar
from finetuning.training import TextTask, TunedModel, TuningSettings, child_networks, fine_tune

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
        method: one of METHOD_NAMES.
        pretrained: False for the contender that shows what pretraining gives.
        validation: learning rate → mean validation accuracy in percent.
        accuracies: one a seed.
        step_seconds: every optimizer step of the runs on test data.
        state_bytes: of its optimizer.
    """

    title: str
    method: str
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


@dataclass(frozen=True)
class ChildRun:
    """The last CT_D run on test data, for its checkpoint and pictures.

    Args:
        contender: what ran.
        seed: of the run.
        tuned: the model after it, with its optimizer.
        accuracy: on test data, in percent.
        networks: the children of this seed, with the Fisher information behind them.
        earlier: the Fisher child of the seed before; None after a single one.
    """

    contender: Contender
    seed: int
    tuned: TunedModel
    accuracy: float
    networks: ChildNetworks
    earlier: ChildMask | None


@dataclass(frozen=True)
class Comparison:
    """A result for every contender, and the last CT_D run where CT_D took part."""

    results: list[ContenderResult]
    child_run: ChildRun | None


def compare(contenders: Sequence[Contender], split: Split, plan: Plan) -> Comparison:
    """Tune every contender's learning rate, then run all of them on the same seeds.

    At the same seed all contenders start from the same weights and see the same training rows; methods
    with a fixed child share one Fisher run.
    """
    validation = validate_learning_rates(contenders, split, plan)
    results = [
        ContenderResult(contender.title, contender.method.name, contender.pretrained, accuracies)
        for contender, accuracies in zip(contenders, validation, strict=True)
    ]
    child_run = None
    total = plan.seeds * len(contenders)
    with tqdm(total=total, desc="seeds", unit="run", disable=None) as progress:
        for seed in range(plan.seeds):
            rows = split.training_set(plan.train_examples, seed)
            networks = _networks(contenders, rows, seed)
            # Contenders alternate, so that whatever else the machine does reaches all step times alike.
            for contender, result in zip(contenders, results, strict=True):
                progress.set_postfix_str(contender.title)
                tuned = _run_on_test(contender, result, networks, seed, rows, split, plan.settings)
                if contender.method.name == "ct_d" and networks is not None:
                    earlier = child_run and child_run.networks.child("ct_d")
                    accuracy = result.accuracies[-1]
                    child_run = ChildRun(contender, seed, tuned, accuracy, networks, earlier)
                progress.update()
            tell_without_bar(f"seed {seed + 1} of {plan.seeds} is done")
    return Comparison(results, child_run)


def _networks(
    contenders: Sequence[Contender], rows: Sequence[int], seed: int
) -> ChildNetworks | None:
    """The children of a seed for all contenders that train one; None where none does."""
    for contender in contenders:
        if contender.method.name in CHILDREN:
            return child_networks(contender.task, contender.method, rows, seed)
    return None


def validate_learning_rates(
    contenders: Sequence[Contender], split: Split, plan: Plan
) -> list[dict[float, float]]:
    """For each contender: learning rate → mean accuracy over the tuning seeds."""
    rates = [contender.method.learning_rates(plan.learning_rates) for contender in contenders]
    found: list[dict[float, list[float]]] = [{rate: [] for rate in own} for own in rates]
    total = plan.tuning_seeds * sum(map(len, rates))
    with tqdm(total=total, desc="learning rates", unit="run", disable=None) as progress:
        for seed in range(_FIRST_TUNING_SEED, _FIRST_TUNING_SEED + plan.tuning_seeds):
            rows = split.training_set(plan.train_examples, seed)
            networks = _networks(contenders, rows, seed)
            for contender, accuracies in zip(contenders, found, strict=True):
                child = networks.child(contender.method.name) if networks else None
                for rate, values in accuracies.items():
                    tuned = fine_tune(
                        contender.task, contender.method, rate, seed, rows, child, plan.settings
                    )
                    values.append(contender.task.accuracy(tuned.model, split.validation))
                    progress.set_postfix_str(f"{contender.title}, {rate:.1e}: {values[-1]:.1f} %")
                    progress.update()
            done = seed - _FIRST_TUNING_SEED + 1
            tell_without_bar(f"learning rates: seed {done} of {plan.tuning_seeds} is done")
    return [{rate: statistics.mean(values) for rate, values in own.items()} for own in found]


def _run_on_test(
    contender: Contender,
    result: ContenderResult,
    networks: ChildNetworks | None,
    seed: int,
    rows: Sequence[int],
    split: Split,
    settings: TuningSettings,
) -> TunedModel:
    method, task = contender.method, contender.task
    child = networks.child(method.name) if networks else None
    tuned = fine_tune(task, method, result.learning_rate, seed, rows, child, settings)
    result.accuracies.append(task.accuracy(tuned.model, split.test))
    result.step_seconds.extend(tuned.step_seconds)
    result.state_bytes = tuned.state_bytes
    return tuned
