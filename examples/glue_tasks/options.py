"""The command line of glue.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from finetuning.option_types import positive_number, share, whole_number
from glue_tasks.tasks import EVALUATION_SETS, PAPER_TASKS, TASKS, TRANSFER_TASKS, EvaluationSet

LEARNING_RATES = (1e-5, 2e-5, 4e-5)
SHARES_F, SHARES_D = (0.2, 0.3, 0.4), (0.1, 0.2, 0.3)
EPOCHS = (
    3.0  # with batches of 16, 128 tokens, decay 0.01, warm-up 0.1: the command of the released code
)
TRANSFER_EXAMPLES = 5000


def read_options(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; what is out of range ends the program with a message.

    Returns:
        ``epochs`` by task, ``evaluate_on`` as pairs of set and folder (None: the hub); defaults filled in.
    """
    parser = argparse.ArgumentParser(
        prog="glue.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python examples/glue.py --dry-run
  python examples/glue.py --tasks rte mrpc cola stsb --seeds 10 --bf16
  python examples/glue.py --tasks rte --model ./bert-large-uncased --data ./glue --seeds 3
  python examples/glue.py --transfer --evaluate-on mnli-m mnli-mm snli sick=./sick""",
    )
    _add_data_options(parser)
    _add_grid_options(parser)
    _add_training_options(parser)
    _add_run_options(parser)
    options = parser.parse_args(arguments)
    if options.tasks is None:
        options.tasks = list(TRANSFER_TASKS if options.transfer else PAPER_TASKS)
    for name in ("tasks", "methods", "learning_rates", "vanilla_learning_rates", "reserve_p_f", "reserve_p_d"):  # fmt: skip  # noqa: E501
        setattr(options, name, list(dict.fromkeys(getattr(options, name) or ())))
    _fill_in_transfer(parser, options)
    _check_places(parser, options)
    given = dict(options.epochs)
    for task in given:
        if task and task not in options.tasks:
            parser.error(
                f"--epochs {task}=...: {task} is not among --tasks {' '.join(options.tasks)}"
            )
    options.epochs = {task: given.get(task, given.get("", EPOCHS)) for task in options.tasks}
    return options


def ratio(text: str) -> float:
    """A number from 0 on and below 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not within [0, 1)")
    return value


def task_epochs(text: str) -> tuple[str, float]:
    """``N`` or ``TASK=N``, for argparse; the task is empty where none is named."""
    task, _, number = text.rpartition("=")
    if task and task not in TASKS:
        raise argparse.ArgumentTypeError(f"{task!r} is not one of {', '.join(TASKS)}")
    return task, positive_number(number)


def evaluation_set(text: str) -> tuple[EvaluationSet, Path | None]:
    """``NAME`` of a known set or ``NAME=FOLDER``, for argparse."""
    name, joint, folder = text.partition("=")
    if joint and name and folder:
        known = EVALUATION_SETS[name].splits if name in EVALUATION_SETS else ()
        splits = tuple(dict.fromkeys((*known, "validation", "test")))
        return EvaluationSet(name, None, (), splits, None, name), Path(folder)
    if name not in EVALUATION_SETS or joint:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither NAME=FOLDER nor one of {', '.join(EVALUATION_SETS)}"
        )
    return EVALUATION_SETS[name], None


def _fill_in_transfer(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if not options.transfer:
        if options.evaluate_on:
            parser.error("--evaluate-on has no effect without --transfer; add it")
        options.evaluate_on = []
        return
    for task in options.tasks:
        if task not in TRANSFER_TASKS:
            parser.error(f"--transfer starts from {' or '.join(TRANSFER_TASKS)}, not from {task}")
    if options.evaluate_on is None:
        if options.data is not None:
            parser.error(
                "--transfer with --data needs --evaluate-on: names of known sets that have subfolders of "
                f"{options.data}, or NAME=FOLDER"
            )
        options.evaluate_on = [(each, None) for each in EVALUATION_SETS.values()]
    names = [chosen.name for chosen, _ in options.evaluate_on]
    if len(set(names)) < len(names):
        parser.error(f"--evaluate-on has a name twice: {' '.join(names)}")
    if options.data is not None:
        options.evaluate_on = [
            (chosen, folder or options.data / chosen.folder)
            for chosen, folder in options.evaluate_on
        ]
    options.train_examples = options.train_examples or TRANSFER_EXAMPLES


def _check_places(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what is plainly not there before a grid is printed, and before the hub is asked for it."""
    if options.model.startswith((".", "/", "~")) and not Path(options.model).is_dir():
        parser.error(f"--model {options.model}: there is no such folder; give one, or a hub id")
    if options.data is not None and not options.data.is_dir():
        parser.error(
            f"--data {options.data}: there is no such folder; without --data the hub is asked"
        )
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is a file; name a folder")


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--tasks",
        nargs="+",
        choices=tuple(TASKS),
        metavar="TASK",
        help=f"of {', '.join(TASKS)} (default: {' '.join(PAPER_TASKS)}; with --transfer "
        f"{' '.join(TRANSFER_TASKS)})",
    )
    group.add_argument(
        "--model",
        default="bert-large-uncased",
        metavar="PATH_OR_ID",
        help="a folder or a hub id (default: bert-large-uncased)",
    )
    group.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="a subfolder for each task, with files train and validation (mnli: validation_matched), "
        ".csv, .tsv (without quoting), .jsonl, .json or .parquet, and the columns of the hub's nyu-mll/glue, "
        "a copy of which will do; labels are names or the hub's numbers (default: the hub)",
    )
    group.add_argument(
        "--transfer",
        action="store_true",
        help="evaluate models tuned on MNLI or SNLI on other inference sets as they are",
    )
    group.add_argument(
        "--evaluate-on",
        nargs="+",
        type=evaluation_set,
        metavar="NAME[=FOLDER]",
        help="with --transfer: known sets, or folders with a file validation or test whose labels are names "
        f"(default: {' '.join(EVALUATION_SETS)}, from the hub)",
    )


def _add_grid_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("grid")
    group.add_argument(
        "--methods",
        nargs="+",
        choices=("vanilla", "ct_f", "ct_d"),
        default=["vanilla", "ct_f", "ct_d"],
        help="vanilla is AdamW (default: all)",
    )
    for method, shares in (("f", SHARES_F), ("d", SHARES_D)):
        group.add_argument(
            f"--reserve-p-{method}",
            nargs="+",
            type=share,
            default=list(shares),
            metavar="P",
            help=f"of CT_{method.upper()} (default: {' '.join(map(str, shares))})",
        )
    group.add_argument(
        "--scale-learning-rate",
        choices=("no", "yes", "both"),
        default="both",
        help="CT_F at AdamW's rate, at that over sqrt(P), where it moves weights as far, or as two methods "
        "(default: both)",
    )
    rates = " ".join(f"{rate:g}" for rate in LEARNING_RATES)
    group.add_argument(
        "--learning-rates",
        nargs="+",
        type=positive_number,
        default=list(LEARNING_RATES),
        metavar="LR",
        help=f"that every method tries (default: {rates})",
    )
    group.add_argument(
        "--vanilla-learning-rates",
        nargs="+",
        type=positive_number,
        metavar="LR",
        help="in their place for vanilla, which has no p to choose: as many as the others have pairs",
    )
    group.add_argument(
        "--seeds", type=whole_number, default=10, metavar="N", help="runs each (default: 10)"
    )


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training, the same for every method")
    group.add_argument(
        "--epochs",
        nargs="+",
        type=task_epochs,
        default=[],
        metavar="[TASK=]N",
        help=f"of all tasks, or of one (default: {EPOCHS:g})",
    )
    group.add_argument(
        "--batch-size", type=whole_number, default=16, metavar="N", help="(default: 16)"
    )
    group.add_argument(
        "--max-length", type=whole_number, default=128, metavar="N", help="tokens (default: 128)"
    )
    group.add_argument(
        "--train-examples",
        type=whole_number,
        metavar="N",
        help=f"drawn anew for each seed (default: all; with --transfer {TRANSFER_EXAMPLES})",
    )
    group.add_argument(
        "--warmup-ratio",
        type=ratio,
        default=0.1,
        metavar="R",
        help="share of steps, of all methods (default: 0.1)",
    )
    group.add_argument(
        "--weight-decay", type=ratio, default=0.01, metavar="W", help="(default: 0.01)"
    )
    group.add_argument("--bf16", action="store_true", help="autocast (default: fp32)")
    group.add_argument(
        "--fisher-examples",
        type=whole_number,
        metavar="N",
        help="CT_D measures at most so many, drawn by the seed (default: the whole train set)",
    )
    group.add_argument(
        "--fisher-batch-size",
        type=whole_number,
        default=1,
        metavar="N",
        help="1 squares the gradient of each example, as the paper has it; more squares means of so many, "
        "which is cheaper and another quantity (default: 1)",
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run and report")
    group.add_argument("--dry-run", action="store_true", help="print the list of runs, and stop")
    group.add_argument(
        "--report-only", action="store_true", help="tables and plot of what is finished"
    )
    group.add_argument(
        "--hold-out",
        action="store_true",
        help="choose configurations on one half of the validation set and report the other; no run is "
        "repeated for it",
    )
    group.add_argument("--cpu", action="store_true", help="leave GPUs alone")
    group.add_argument(
        "--out",
        type=Path,
        default=Path("runs/glue"),
        metavar="DIR",
        help="results, a line a finished run, and the plot; a run whose options are there is not done again, "
        "so that other files in --data want another folder "
        "(default: runs/glue)",
    )
