"""Fine-tune a text classifier on few examples with AdamW, Child-Tuning F, Child-Tuning D and its controls.

Without options: a small transformer encoder is pretrained on eight sections of the Debian archive
and fine-tuned on descriptions of packages of six other sections. Controls are a random child and the
child of lowest Fisher information, as in the paper. The last Child-Tuning D run is saved: Fisher
information, mask, child checkpoint, pictures. Offline, under three minutes.
"""

from __future__ import annotations

import argparse
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

from finetuning.child_files import save_child_files
from finetuning.comparison import Contender, ContenderResult, Plan, compare
from finetuning.labelled_text import (
    InputError,
    LabelledText,
    fine_tuning_sections,
    read_debian_packages,
    read_labelled_csv,
    split_rows,
)
from finetuning.methods import METHOD_NAMES, Method, check_backend
from finetuning.option_types import device, positive_number, share, whole_number
from finetuning.pretraining import pretrain
from finetuning.report import save_plot, save_results, table, thread_count, verdicts
from finetuning.text_models import CheckpointSource, SmallEncoderSource, TextModelSource
from finetuning.training import TextTask, TuningSettings

PRETRAINING_SEED = 0


@dataclass(frozen=True)
class Effort:
    """How much a run does where the command line does not say otherwise."""

    pretraining_epochs: int
    pretraining_stride: int  # every n-th package is used
    learning_rates: tuple[float, ...]  # AdamW's grid for the small encoder
    checkpoint_learning_rates: tuple[float, ...]  # and for --model
    tuning_seeds: int
    seeds: int
    train_examples: int
    epochs: int
    largest_test: int  # rows of the test split, and of the validation split


FULL = Effort(
    pretraining_epochs=4,
    pretraining_stride=1,
    learning_rates=(5e-4, 1e-3, 2e-3, 4e-3),
    checkpoint_learning_rates=(2e-5, 5e-5, 1e-4, 2e-4),
    tuning_seeds=3,
    seeds=5,
    train_examples=200,
    epochs=8,
    largest_test=1000,
)
SHORT = Effort(
    pretraining_epochs=1,
    pretraining_stride=4,
    learning_rates=(2e-3, 4e-3),
    checkpoint_learning_rates=(5e-5, 1e-4),
    tuning_seeds=1,
    seeds=3,
    train_examples=80,
    epochs=3,
    largest_test=300,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; 0 when it went through, 2 for input that cannot be used."""
    options = read_options(arguments)
    try:
        run(options)
    except InputError as error:
        print(f"finetune.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Read data, make the model source, compare the methods, print and save what came out.

    Raises:
        InputError: files or options that cannot be used.
    """
    started = time.perf_counter()
    effort = SHORT if options.short else FULL
    set_threads(options)
    check_backend(options.backend, options.device)
    data = read_data(options)
    split = split_rows(len(data.texts)).with_at_most(effort.largest_test)
    plan = make_plan(options, effort)
    split.training_set(plan.train_examples, seed=0)  # too few rows shall be said before pretraining
    print(
        f"{len(data.label_names)} labels, {plan.train_examples} training examples a run, "
        f"{len(split.validation)} for validation, {len(split.test)} for the test"
    )
    source = make_source(options, effort)
    contenders = make_contenders(options, data, source)
    found = compare(contenders, split, plan)
    print_report(found.results, source, plan)
    if options.short:
        print("\nThis was --short: the accuracies say that everything runs, and no more.")
    save_report(found.results, source, plan, options.out)
    if found.child_run is not None:
        print("\n" + "\n".join(save_child_files(found.child_run, split, options.out)))
    seconds = time.perf_counter() - started
    print(f"\n{seconds:.0f} seconds, {thread_count()}; plot and figures are in {options.out}/")


def set_threads(options: argparse.Namespace) -> None:
    """Use as many CPU threads as the options say; one for the small encoder if they say nothing.

    Its matrices are too small to share out: a second thread gains next to nothing on a free core, and
    where other work wants the core, every operation waits until both threads had their turn.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    elif options.model is None:
        torch.set_num_threads(1)


def read_data(options: argparse.Namespace) -> LabelledText:
    """The user's CSV file, or the Debian sections that pretraining does not see.

    Raises:
        InputError: see ``read_labelled_csv``.
    """
    if options.csv is None:
        return fine_tuning_sections(read_debian_packages())
    return read_labelled_csv(options.csv, options.text_column, options.label_column)


def make_plan(options: argparse.Namespace, effort: Effort) -> Plan:
    """The plan of the run: the effort's numbers, and the options' where given."""
    rates = effort.checkpoint_learning_rates if options.model else effort.learning_rates
    return Plan(
        learning_rates=tuple(sorted(options.learning_rates or rates)),
        tuning_seeds=effort.tuning_seeds,
        seeds=options.seeds or effort.seeds,
        train_examples=options.train_examples or effort.train_examples,
        settings=TuningSettings(options.epochs or effort.epochs, options.batch_size),
    )


def make_source(options: argparse.Namespace, effort: Effort) -> TextModelSource:
    """The checkpoint of ``--model``, or small encoders, pretrained here and now.

    Raises:
        InputError: see ``CheckpointSource``.
    """
    if options.model is not None:
        return CheckpointSource(options.model, options.max_tokens)
    packages = read_debian_packages()[:: effort.pretraining_stride]
    return SmallEncoderSource(pretrain(packages, effort.pretraining_epochs, PRETRAINING_SEED))


def make_contenders(
    options: argparse.Namespace, data: LabelledText, source: TextModelSource
) -> list[Contender]:
    """The chosen methods and, for the small encoder, AdamW on one that was not pretrained."""
    task = TextTask(source, data, options.device)
    contenders = []
    if options.model is None:
        untrained = TextTask(SmallEncoderSource(None), data, options.device)
        contenders.append(
            Contender("AdamW, not pretrained", Method("adamw"), untrained, pretrained=False)
        )
    for name in options.methods:
        method = Method(name, 1.0 if name == "adamw" else options.reserve_p, options.backend)
        contenders.append(Contender(method.title, method, task))
    return contenders


def print_report(results: Sequence[ContenderResult], source: TextModelSource, plan: Plan) -> None:
    """Print the table and a sentence for each difference that matters."""
    print(f"\n{source.name}, {plan.train_examples} examples; seeds: {plan.seeds}\n")
    print(table(results))
    said = verdicts(results)
    if said:
        print("\n" + "\n".join(said))


def save_report(
    results: Sequence[ContenderResult], source: TextModelSource, plan: Plan, folder: Path
) -> None:
    """Write finetune.png and finetune.json."""
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, object] = {
        "model": source.name,
        "plan": asdict(plan),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    save_results(results, about, folder / "finetune.json")
    caption = (
        f"{source.name}, {plan.train_examples} training examples, {plan.settings.epochs} epochs, "
        f"{plan.seeds} seeds, {thread_count()}; learning rate tuned for each method on validation data"
    )
    save_plot(results, caption, folder / "finetune.png")


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; what is out of range ends the program with a message."""
    parser = argparse.ArgumentParser(
        prog="finetune.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python examples/finetune.py
  python examples/finetune.py --train-examples 400 --reserve-p 0.1 --seeds 8
  python examples/finetune.py --model google/bert_uncased_L-4_H-256_A-4
  python examples/finetune.py --csv tickets.csv --text-column subject --label-column team""",
    )
    add_input_options(parser)
    add_run_options(parser)
    options = parser.parse_args(arguments)
    options.methods = list(dict.fromkeys(options.methods))
    return options


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what is tuned on what."""
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        help="sequence classifier of transformers, a folder or a hub id (default: a small encoder, "
        "pretrained here)",
    )
    group.add_argument(
        "--max-tokens",
        type=whole_number,
        default=64,
        metavar="N",
        help="with --model: longer texts are cut off (default: 64)",
    )
    group.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="labelled texts, UTF-8 with a header (default: Debian package descriptions)",
    )
    group.add_argument(
        "--text-column", default="text", metavar="NAME", help="of --csv (default: text)"
    )
    group.add_argument(
        "--label-column", default="label", metavar="NAME", help="of --csv (default: label)"
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how, how often and where to."""
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--methods",
        nargs="+",
        choices=METHOD_NAMES,
        default=list(METHOD_NAMES),
        help="ct_d_random and ct_d_lowest are CT_D's controls, with a random child and one of lowest "
        "Fisher information (default: all)",
    )
    group.add_argument(
        "--reserve-p",
        type=share,
        default=0.3,
        metavar="P",
        help="share of gradient elements that CT_F keeps, and of encoder weights in the child "
        "networks of CT_D and its controls (default: 0.3)",
    )
    group.add_argument(
        "--seeds", type=whole_number, metavar="N", help="runs a method on test data (default: 5)"
    )
    group.add_argument(
        "--train-examples",
        type=whole_number,
        metavar="N",
        help="drawn anew for each seed (default: 200)",
    )
    group.add_argument(
        "--epochs", type=whole_number, metavar="N", help="of fine-tuning (default: 8)"
    )
    group.add_argument(
        "--batch-size", type=whole_number, default=16, metavar="N", help="(default: 16)"
    )
    group.add_argument(
        "--learning-rates",
        nargs="+",
        type=positive_number,
        metavar="LR",
        help="AdamW's grid; the other methods take the same over sqrt(P) (default: "
        f"{' '.join(f'{rate:g}' for rate in FULL.learning_rates)}; with --model "
        f"{' '.join(f'{rate:g}' for rate in FULL.checkpoint_learning_rates)})",
    )
    group.add_argument("--short", action="store_true", help="much less of everything, for a try")
    group.add_argument(
        "--backend",
        choices=("cpp", "triton", "reference"),
        help="of FusedChildAdamW (default: the fastest that is there)",
    )
    group.add_argument(
        "--device", type=device, default="cpu", metavar="NAME", help="cpu, cuda, ... (default: cpu)"
    )
    group.add_argument(
        "--threads",
        type=whole_number,
        metavar="N",
        help="of the CPU (default: 1 for the small encoder, torch's choice with --model)",
    )
    group.add_argument(
        "--out",
        type=Path,
        default=Path("runs/finetune"),
        metavar="DIR",
        help="where plots, figures and the child's files go (default: runs/finetune)",
    )


if __name__ == "__main__":
    sys.exit(main())
