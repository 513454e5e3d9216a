"""The same fine-tuning in fp32 and in bf16, with the ways in which FusedChildAdamW keeps bf16 weights.

At the same seed all runs start from the same weights, rounded to bf16 where the model is bf16, and see the
same batches. A run is a function of its job, so that several processes can share the jobs.
"""

from __future__ import annotations

import multiprocessing
import pickle
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from tqdm import tqdm

from childtune_kernels import ChildMask, FusedChildAdamW
from finetuning.children import CHILDREN, encoder_patterns
from finetuning.labelled_text import Split
from finetuning.methods import Method
from finetuning.training import TextTask, TunedModel, TuningSettings, child_networks, fine_tune


@dataclass(frozen=True)
class Precision:
    """How weights and moments are kept.

    Args:
        title: its name in the report.
        dtype: of the model: weights, activations and gradients.
        master_weight: of FusedChildAdamW; fp32 weights need none.
        state_dtype: of the moments, None for fp32.
    """

    title: str
    dtype: torch.dtype
    master_weight: str = "auto"
    state_dtype: torch.dtype | None = None


FP32 = Precision("fp32", torch.float32)
SPLIT = Precision("bf16 split", torch.bfloat16, "split")
STOCHASTIC = Precision("bf16 stochastic", torch.bfloat16, "stochastic")
SPLIT_BF16_MOMENTS = Precision("bf16 split, bf16 moments", torch.bfloat16, "split", torch.bfloat16)
NONE = Precision("bf16 none", torch.bfloat16, "none")
PRECISIONS = (FP32, SPLIT, STOCHASTIC, SPLIT_BF16_MOMENTS, NONE)


@dataclass(frozen=True)
class PreciseMethod(Method):
    """A method whose weights and moments are kept in one precision."""

    precision: Precision = FP32

    def optimizer(
        self, model: nn.Module, learning_rate: float, seed: int, child: ChildMask | None
    ) -> FusedChildAdamW:
        """FusedChildAdamW over all of the model's parameters, for AdamW too."""
        return self.fused_optimizer(
            model,
            learning_rate,
            seed,
            child,
            master_weight=self.precision.master_weight,
            state_dtype=self.precision.state_dtype,
        )


@dataclass(frozen=True)
class Job:
    """One fine-tuning run."""

    learning_rate: float
    seed: int
    precision: Precision


@dataclass(frozen=True)
class PrecisionRun:
    """What came out of a job.

    Args:
        accuracy: on test data, in percent.
        losses: training loss of every step.
        moved: 2-norm of what training has added to the weights of the encoder's layers, in full precision.
        unchanged: share of those weights that are at the end what they were at the start.
        weight_bytes: of a weight, on average.
        state_bytes: of the optimizer's state, a weight.
    """

    accuracy: float
    losses: list[float]
    moved: float
    unchanged: float
    weight_bytes: float
    state_bytes: float


@dataclass(frozen=True)
class PrecisionResult:
    """The runs of one precision at one learning rate; ``runs[i]`` is that of seed i."""

    precision: Precision
    learning_rate: float
    runs: list[PrecisionRun]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy of every seed, in percent."""
        return [run.accuracy for run in self.runs]

    def mean_of(self, figure: str) -> float:
        """The mean over the seeds of one of PrecisionRun's numbers."""
        return statistics.mean(getattr(run, figure) for run in self.runs)

    def last_loss(self, steps: int) -> float:
        """The training loss, mean over the last steps and the seeds."""
        return statistics.mean(statistics.mean(run.losses[-steps:]) for run in self.runs)


@dataclass(frozen=True)
class Experiment:
    """What all jobs have in common.

    Args:
        tasks: the data set as models of each type see it.
        method: how to tune.
        split: training sets are drawn from its pool, accuracy is measured on its test rows.
        train_examples: rows of every training set.
        settings: epochs and batch size.
    """

    tasks: Mapping[torch.dtype, TextTask]
    method: Method
    split: Split
    train_examples: int
    settings: TuningSettings

    def run(self, job: Job) -> PrecisionRun:
        """Fine-tune one model and measure it."""
        rows = self.split.training_set(self.train_examples, job.seed)
        task, method = self.tasks[job.precision.dtype], self.precise_method(job.precision)
        child = None
        if method.name in CHILDREN:
            # One child for all: bf16 gradients would find a slightly different one.
            networks = child_networks(self.tasks[torch.float32], method, rows, job.seed)
            child = networks.child(method.name)
        tuned = fine_tune(task, method, job.learning_rate, job.seed, rows, child, self.settings)
        accuracy = task.accuracy(tuned.model, self.split.test)
        return _measured(tuned, task.new_model(job.seed), accuracy)

    def precise_method(self, precision: Precision) -> PreciseMethod:
        """The method, with weights and moments kept in this precision."""
        return PreciseMethod(
            self.method.name, self.method.reserve_p, self.method.backend, precision
        )


def compare_precisions(
    experiment: Experiment, learning_rates: Sequence[float], seeds: int, processes: int
) -> list[list[PrecisionResult]]:
    """Run every precision at every learning rate with seeds 0, 1, ...

    Args:
        experiment: what all runs have in common.
        learning_rates: peaks of the schedule.
        seeds: runs of each precision at each rate.
        processes: that share the runs; the results do not depend on it.

    Returns:
        For each learning rate its results, in the order of PRECISIONS.
    """
    jobs = [
        Job(rate, seed, precision)
        for rate in learning_rates
        for seed in range(seeds)
        for precision in PRECISIONS
    ]
    found: dict[Job, PrecisionRun] = {}
    with tqdm(total=len(jobs), desc="precisions", unit="run", disable=None) as progress:
        for job, run in zip(jobs, _runs(experiment, jobs, processes), strict=True):
            found[job] = run
            progress.set_postfix_str(f"{job.precision.title}: {run.accuracy:.1f} %")
            progress.update()
    return [
        [
            PrecisionResult(each, rate, [found[Job(rate, seed, each)] for seed in range(seeds)])
            for each in PRECISIONS
        ]
        for rate in learning_rates
    ]


def _measured(tuned: TunedModel, start: nn.Module, accuracy: float) -> PrecisionRun:
    assert isinstance(tuned.optimizer, FusedChildAdamW)
    end, weights = tuned.optimizer.master_state_dict(), dict(start.named_parameters())
    # Of the layers alone: most embeddings stand in no training text, and only decay moves them.
    layers = [
        name
        for name in weights
        if any(fnmatchcase(name, pattern) for pattern in encoder_patterns(start))
    ]
    differences = torch.cat(
        [(end[name] - weights[name].detach().float()).flatten() for name in layers]
    )
    count = sum(weight.numel() for weight in weights.values())
    return PrecisionRun(
        accuracy=accuracy,
        losses=tuned.losses,
        moved=float(differences.norm()),
        unchanged=int((differences == 0).sum()) / len(differences),
        weight_bytes=sum(weight.nbytes for weight in weights.values()) / count,
        state_bytes=tuned.state_bytes / count,
    )


# The experiment of a worker process: it comes once, not with every job.
_of_this_process: list[Experiment] = []


def _runs(experiment: Experiment, jobs: Sequence[Job], processes: int) -> Iterator[PrecisionRun]:
    if processes == 1:
        yield from map(experiment.run, jobs)
        return
    # Spawned, since a fork has none of torch's threads; as bytes, since torch would hand tensors over
    # in shared memory, of which containers have little.
    context, experiment_bytes = multiprocessing.get_context("spawn"), pickle.dumps(experiment)
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(processes, context, _begin, (experiment_bytes, threads)) as pool:
        yield from pool.map(_run_here, jobs)


def _begin(experiment_bytes: bytes, threads: int) -> None:
    torch.set_num_threads(threads)
    _of_this_process[:] = [pickle.loads(experiment_bytes)]


def _run_here(job: Job) -> PrecisionRun:
    return _of_this_process[0].run(job)
