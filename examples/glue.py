"""The experiment of the Child-Tuning paper on GLUE: vanilla, CT_F and CT_D over p, learning rates and seeds.

Without options: RTE, MRPC, CoLA and STS-B with bert-large-uncased and ten seeds, from the hub; for one
GPU. All methods get the same start, batches, schedule and warm-up at a seed (in the paper's released
code only vanilla warms up: its Child-Tuning trainers read warmup_steps where the command sets
warmup_ratio). CT_F runs at AdamW's learning rate, as there, and at the one at which it moves weights as
far. Finished runs are kept in --out; started again, the grid goes on where it stopped. With --transfer a
model tuned on 5,000 examples of MNLI or SNLI is evaluated on other inference sets as it is.

This script was tested on small made-up data; on GLUE itself it has never been run yet.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import tqdm
except ImportError as missing:
    sys.exit(f"{missing}; this example needs: python -m pip install tqdm matplotlib")

from finetuning.labelled_text import InputError
from finetuning.progress import tell_without_bar
from glue_tasks.data import read_evaluation_set, read_task
from glue_tasks.grid import Grid, Run, Settings, describe
from glue_tasks.options import read_options
from glue_tasks.report import (
    MethodResult,
    caveats,
    columns_of,
    details,
    results_of,
    save_plot,
    summary,
    verdicts,
)
from glue_tasks.results import Results
from glue_tasks.tasks import TASKS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the grid; 0 when it went through, 2 for input that cannot be used."""
    options = read_options(__doc__, arguments)
    try:
        run(options)
    except InputError as error:
        print(f"glue.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Do what is left of the grid, then print and draw what came out.

    Raises:
        InputError: data, a model or options that cannot be used.
    """
    grid = make_grid(options)
    settings = {task: make_settings(options, task) for task in options.tasks}
    results = Results(options.out / "runs.jsonl")
    if results.broken:
        print(
            f"{results.path}: {results.broken} broken lines; what they would have held is run again"
        )
    runs = list(grid.runs(settings))
    print(describe(runs, set(results.scores)))
    if options.dry_run:
        return
    todo = [each for each in runs if each.key not in results.scores]
    if todo and not options.report_only:
        check_devices(options)
        options.out.mkdir(parents=True, exist_ok=True)
        run_all(todo, grid, results, options)
    report(grid, settings, results, options)


def run_all(todo: Sequence[Run], grid: Grid, results: Results, options: argparse.Namespace) -> None:
    """Run what is not finished, task by task, and keep each result at once.

    Raises:
        InputError: see ``tuned_tasks``.
    """
    left = tuned_tasks({each.task: each.settings for each in todo}, options)
    with tqdm.tqdm(total=len(todo), unit="run", disable=None) as progress:
        for number, each in enumerate(todo):
            name = f"{each.task}, seed {each.seed}, {each.configuration.title}"
            progress.set_postfix_str(name)

            def tell(step: int, steps: int, name: str = name) -> None:
                shown = step % 10 == 0 or step == steps
                progress.set_postfix_str(f"{name}: step {step}/{steps}", refresh=shown)

            started = time.perf_counter()
            if each.configuration.method == "ct_d":
                left[each.task].measure(each.seed, grid.shares["ct_d"])
            scores = left[each.task].run(each, tell)
            seconds = round(time.perf_counter() - started, 1)
            results.append(each, scores, seconds=seconds, versions=versions())
            tell_without_bar(f"{name}: {seconds} s")
            progress.update()
            if each.task not in {other.task for other in todo[number + 1 :]}:
                del left[each.task]  # and its data


def tuned_tasks(settings: dict[str, Settings], options: argparse.Namespace) -> dict[str, Any]:
    """Data, tokenizer and model of all tasks: what is missing is said before the first run.

    Raises:
        InputError: what cannot be loaded, or a package that is missing.
    """
    read = {}
    sets = {
        chosen.name: read_evaluation_set(chosen, folder) for chosen, folder in options.evaluate_on
    }
    for name, own in settings.items():
        read[name] = read_task(TASKS[name], options.data)
        count = len(read[name][0].texts)
        if own.train_examples is not None and own.train_examples > count:
            raise InputError(
                f"--train-examples {own.train_examples} is more than the {count} of {name}"
            )
    try:
        from glue_tasks.training import Tokens, TunedTask
    except ImportError as error:
        raise InputError(
            f"{error}; this example needs: python -m pip install transformers accelerate"
        ) from None
    tokens = Tokens(options.model, options.max_length)
    return {
        name: TunedTask(TASKS[name], own, tokens, *read[name], sets, options.cpu)
        for name, own in settings.items()
    }


def report(
    grid: Grid, settings: dict[str, Settings], results: Results, options: argparse.Namespace
) -> None:
    """Print tables and sentences, and draw glue.png."""
    columns: dict[str, list[MethodResult]] = {}
    for column in columns_of(settings, options.hold_out):
        found = results_of(column, grid, settings[column.task], results.scores)
        if not found:
            print(f"\n{column.title}: no configuration is finished on all {grid.seeds} seeds yet")
            continue
        columns[column.title] = found
        metric = TASKS[column.task].metric if column.title == column.task else "accuracy"
        print(f"\n{column.title} ({metric}, %)\n{details(found)}")
        print("\n".join(verdicts(found)))
    if not columns:
        return
    print(f"\nMean ± standard deviation over {grid.seeds} seeds\n{summary(columns)}\n")
    print("\n".join(caveats(next(iter(columns.values())), options.hold_out)))
    try:
        name = Path(options.model).name
        save_plot(columns, f"{name}, {grid.seeds} seeds, validation sets", options.out / "glue.png")
    except ImportError:
        print("No plot: it needs matplotlib (python -m pip install matplotlib)")
    print(f"\nResults are in {options.out}/")


def make_grid(options: argparse.Namespace) -> Grid:
    """What is tried of every method that the options choose."""
    methods: list[str] = []
    for method in options.methods:
        scaled = options.scale_learning_rate
        if method != "ct_f":
            methods.append(method)
            continue
        methods += ["ct_f"] * (scaled != "yes") + ["ct_f_scaled"] * (scaled != "no")
    share_f, share_d = tuple(options.reserve_p_f), tuple(options.reserve_p_d)
    shares = {"ct_f": share_f, "ct_f_scaled": share_f, "ct_d": share_d}
    rates = dict.fromkeys(methods, tuple(options.learning_rates))
    if "vanilla" in rates and options.vanilla_learning_rates:
        rates["vanilla"] = tuple(options.vanilla_learning_rates)
    return Grid(tuple(methods), shares, rates, options.seeds)


def make_settings(options: argparse.Namespace, name: str) -> Settings:
    """What all runs of a task share."""
    data = TASKS[name].hub_set if options.data is None else (options.data / name).resolve()
    places = [
        (chosen.name, str(chosen.hub if folder is None else folder.resolve()))
        for chosen, folder in options.evaluate_on
    ]
    return Settings(
        model=options.model,
        data=str(data),
        max_length=options.max_length,
        batch_size=options.batch_size,
        epochs=options.epochs[name],
        warmup_ratio=options.warmup_ratio,
        weight_decay=options.weight_decay,
        bf16=options.bf16,
        train_examples=options.train_examples,
        evaluate_on=tuple(places),
        fisher_examples=options.fisher_examples,
        fisher_batch_size=options.fisher_batch_size,
    )


def check_devices(options: argparse.Namespace) -> None:
    """Refuse what would change the batches without being asked.

    Raises:
        InputError: several GPUs or ranks.
    """
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "one process runs the grid; start it without torchrun or accelerate launch"
        )
    if torch.cuda.device_count() > 1 and not options.cpu:
        raise InputError(
            f"{torch.cuda.device_count()} GPUs are visible, which would multiply the batch size; set "
            "CUDA_VISIBLE_DEVICES=0, and run other --tasks on the others into the same --out"
        )


def versions() -> dict[str, str]:
    """What a result was computed with."""
    import torch
    import transformers

    import childtune_kernels

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "childtune_kernels": childtune_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
    }


if __name__ == "__main__":
    sys.exit(main())
