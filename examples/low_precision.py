"""Fine-tune the small encoder in fp32, and in bf16 with each way of keeping bf16 weights.

Data, model, pretraining and training code are those of finetune.py. A run has 300 steps; the learning rate
is the one that validation finds for fp32, and a second, lower one, at which most updates are smaller than
half a place of a bf16 weight. Offline, about ten minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

try:
    import matplotlib  # noqa: F401  (asked for here, before minutes are spent)
    import tqdm  # noqa: F401
except ImportError as error:
    sys.exit(f"{error}; this example needs: python -m pip install matplotlib tqdm")

from finetuning.comparison import Contender, ContenderResult, Plan, validate_learning_rates
from finetuning.labelled_text import (
    InputError,
    fine_tuning_sections,
    read_debian_packages,
    split_rows,
)
from finetuning.methods import Method, check_backend
from finetuning.option_types import device, positive_number, share, whole_number
from finetuning.precision import FP32, Experiment, PrecisionResult, compare_precisions
from finetuning.precision_report import (
    differences,
    precision_table,
    save_loss_plot,
    save_precisions,
    stagnation,
    verdict,
)
from finetuning.pretraining import pretrain
from finetuning.text_models import SmallEncoderSource
from finetuning.training import TextTask, TuningSettings

PRETRAINING_SEED = 0
BATCH_SIZE = 8
LOW_RATE = 5e-5  # AdamW's; usual for large pretrained models


@dataclass(frozen=True)
class Effort:
    """How much a run does."""

    pretraining_epochs: int
    pretraining_stride: int  # every n-th package is used
    learning_rates: tuple[float, ...]  # AdamW's grid
    tuning_seeds: int
    seeds: int
    train_examples: int
    epochs: int  # 25 steps each, where there are 200 examples
    largest_test: int  # rows of the test split, and of the validation split


FULL = Effort(
    pretraining_epochs=4,
    pretraining_stride=1,
    learning_rates=(5e-4, 1e-3, 2e-3),
    tuning_seeds=2,
    seeds=5,
    train_examples=200,
    epochs=12,
    largest_test=1000,
)
SHORT = Effort(
    pretraining_epochs=1,
    pretraining_stride=10,
    learning_rates=(1e-3,),
    tuning_seeds=1,
    seeds=2,
    train_examples=8,
    epochs=2,
    largest_test=30,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; 0 when it went through, 2 for input that cannot be used."""
    options = read_options(arguments)
    try:
        run(options)
    except InputError as error:
        print(f"low_precision.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Pretrain, find fp32's learning rate, compare the precisions, print and save what came out.

    Raises:
        InputError: options that cannot be used.
    """
    started = time.perf_counter()
    effort = SHORT if options.short else FULL
    # The encoder's matrices are too small to share out, see finetune.py; processes share the runs.
    torch.set_num_threads(1)
    check_backend(options.backend, options.device)
    experiment = make_experiment(options, effort)
    rates = choose_learning_rates(options, effort, experiment)
    processes = options.processes or (default_processes(options) if not options.short else 1)
    found = compare_precisions(experiment, rates, options.seeds or effort.seeds, processes)
    print_report(found, experiment, "given" if options.rate else "best for fp32")
    if options.short:
        print("\nThis was --short: the figures say that everything runs, and no more.")
    save_report(found, experiment, options.out)
    seconds = time.perf_counter() - started
    shared = "1 process" if processes == 1 else f"{processes} processes"
    print(f"\n{seconds:.0f} seconds, {shared}; plot and figures are in {options.out}/")


def make_experiment(options: argparse.Namespace, effort: Effort) -> Experiment:
    """Data, and encoders in fp32 and bf16 that are pretrained here and now."""
    packages = read_debian_packages()
    data = fine_tuning_sections(packages)
    pretrained = pretrain(
        packages[:: effort.pretraining_stride], effort.pretraining_epochs, PRETRAINING_SEED
    )
    source = SmallEncoderSource(pretrained)
    tasks = {
        dtype: TextTask(source, data, options.device, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    reserve_p = 1.0 if options.method == "adamw" else options.reserve_p
    return Experiment(
        tasks,
        Method(options.method, reserve_p, options.backend),
        split_rows(len(data.texts)).with_at_most(effort.largest_test),
        effort.train_examples,
        TuningSettings(effort.epochs, BATCH_SIZE),
    )


def choose_learning_rates(
    options: argparse.Namespace, effort: Effort, experiment: Experiment
) -> list[float]:
    """fp32's best on validation rows, and the lower one; both are the method's, AdamW's over sqrt(p)."""
    (low,) = experiment.method.learning_rates([options.low_rate])
    if options.rate is not None:
        return [*experiment.method.learning_rates([options.rate]), low]
    method = experiment.precise_method(FP32)
    contender = Contender(method.title, method, experiment.tasks[torch.float32])
    plan = Plan(
        effort.learning_rates,
        effort.tuning_seeds,
        effort.seeds,
        experiment.train_examples,
        experiment.settings,
    )
    (validation,) = validate_learning_rates([contender], experiment.split, plan)
    return [ContenderResult(method.title, method.name, True, validation).learning_rate, low]


def default_processes(options: argparse.Namespace) -> int:
    """One a CPU core, at most four; a single one on a GPU."""
    return min(4, os.cpu_count() or 1) if options.device.type == "cpu" else 1


def print_report(
    found: Sequence[Sequence[PrecisionResult]], experiment: Experiment, first: str
) -> None:
    """Print a table and sentences for each learning rate, and the verdicts.

    Args:
        found: what ``compare_precisions`` gave.
        experiment: what all runs have in common.
        first: where the first learning rate comes from; the second is low.
    """
    last = steps_an_epoch(experiment)
    for results, which in zip(found, (first, "low"), strict=True):
        print(
            f"\n{experiment.method.title}, learning rate {results[0].learning_rate:.1e} ({which}), "
            f"{last * experiment.settings.epochs} steps, seeds: {len(results[0].runs)}\n"
        )
        print(precision_table(results, last))
        print("\n" + "\n".join([*differences(results), stagnation(results, last)]))
    print("\n" + "\n".join(map(verdict, found)))


def save_report(
    found: Sequence[Sequence[PrecisionResult]], experiment: Experiment, folder: Path
) -> None:
    """Write low_precision.png and low_precision.json."""
    folder.mkdir(parents=True, exist_ok=True)
    caption = (
        f"small encoder, {experiment.method.title}, {experiment.train_examples} training examples, "
        f"{experiment.settings.epochs} epochs, seeds: {len(found[0][0].runs)}"
    )
    about: dict[str, object] = {
        "method": asdict(experiment.method),
        "train_examples": experiment.train_examples,
        "settings": asdict(experiment.settings),
        "torch": torch.__version__,
    }
    save_loss_plot(found, steps_an_epoch(experiment), caption, folder / "low_precision.png")
    save_precisions(found, about, folder / "low_precision.json")


def steps_an_epoch(experiment: Experiment) -> int:
    """Steps in which every training example is seen once."""
    return -(-experiment.train_examples // experiment.settings.batch_size)


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; what is out of range ends the program with a message."""
    parser = argparse.ArgumentParser(
        prog="low_precision.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--method",
        choices=("ct_f", "ct_d", "adamw"),
        default="ct_f",
        help="adamw: FusedChildAdamW without a mask (default: ct_f)",
    )
    parser.add_argument(
        "--reserve-p",
        type=share,
        default=0.3,
        metavar="P",
        help="share of gradient elements or encoder weights that are kept (default: 0.3)",
    )
    parser.add_argument(
        "--rate",
        type=positive_number,
        metavar="LR",
        help="AdamW's learning rate; the method's is LR over sqrt(P) (default: the best of "
        f"{' '.join(f'{rate:g}' for rate in FULL.learning_rates)} for fp32 on validation rows)",
    )
    parser.add_argument(
        "--low-rate",
        type=positive_number,
        default=LOW_RATE,
        metavar="LR",
        help=f"the second learning rate, likewise (default: {LOW_RATE:g})",
    )
    parser.add_argument("--seeds", type=whole_number, metavar="N", help=f"(default: {FULL.seeds})")
    parser.add_argument("--short", action="store_true", help="much less of everything, for a try")
    parser.add_argument(
        "--backend",
        choices=("cpp", "triton", "reference"),
        help="of FusedChildAdamW (default: the fastest that is there)",
    )
    parser.add_argument(
        "--device", type=device, default="cpu", metavar="NAME", help="cpu, cuda, ... (default: cpu)"
    )
    parser.add_argument(
        "--processes",
        type=whole_number,
        metavar="N",
        help="that share the runs; results do not depend on it (default: one a CPU core, at most 4; "
        "1 with --short or on a GPU)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/low_precision"),
        metavar="DIR",
        help="where plot and figures go (default: runs/low_precision)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
