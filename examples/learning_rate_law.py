"""Show what CT_F's reserve_p does to the learning rate: a plot of what was measured here.

Left: how far a weight moves a step. Under a constant gradient Adam moves it by the learning rate, CT_F by
sqrt(p) of that; under gradients of mean zero p changes nothing. Right: a small encoder, pretrained here,
fine-tuned on 200 descriptions of Debian packages at many learning rates: accuracy by the rate as it is, and
by the rate times sqrt(p), where the curves should lie over each other. Offline, some five minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from childtune_kernels import FusedChildAdamW
from childtune_kernels.report.text_table import aligned
from finetuning.labelled_text import (
    Split,
    fine_tuning_sections,
    read_debian_packages,
    split_rows,
)
from finetuning.methods import Method
from finetuning.option_types import whole_number
from finetuning.pretraining import pretrain
from finetuning.text_models import SmallEncoderSource
from finetuning.training import TextTask, TuningSettings, fine_tune

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
TUNED_SHARES = (1.0, 0.3, 0.1)
COLOURS = {1.0: "#4c566a", 0.3: "#2a78b5", 0.1: "#e07b39"}
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
WEIGHTS, STEPS = 20_000, 8_000  # v forgets its start in some thousand steps
TRAIN_EXAMPLES, EPOCHS, BATCH = 200, 8, 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, draw, and write ``learning-rate-law.png`` and ``.json``."""
    options = read_options(arguments)
    torch.set_num_threads(1)  # its matrices are too small to share out
    steps = 400 if options.short else STEPS
    document: dict[str, object] = {
        "constant gradient": {p: step_length(p, steps, noise=False) for p in SHARES},
        "gradients of mean zero": {p: step_length(p, steps, noise=True) for p in SHARES},
        "steps": steps,
    }
    rates = RATES[2:5] if options.short else RATES
    seeds = 1 if options.short else options.seeds
    document |= {"seeds": seeds, "torch": torch.__version__, "accuracy": accuracies(rates, seeds)}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "learning-rate-law"
    path.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    draw(document, path.with_suffix(".png"))
    print(tables(document))
    print(f"{path}.png, {path}.json")
    return 0


def step_length(reserve_p: float, steps: int, *, noise: bool) -> float:
    """Root mean square of a weight's step over the learning rate, once the moments have settled."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(WEIGHTS, dtype=torch.float64, requires_grad=True)
    optimizer = FusedChildAdamW(
        [("weight", weight)], lr=1.0, weight_decay=0.0, reserve_p=reserve_p, seed=0
    )
    squares, settled = 0.0, steps // 2
    mean = torch.zeros(WEIGHTS, dtype=torch.float64)
    for step in range(steps):
        before = weight.detach().clone()
        draw = torch.randn(WEIGHTS, generator=generator, dtype=torch.float64)
        weight.grad = draw if noise else torch.ones_like(weight)
        optimizer.step()
        if step >= settled:
            moved = weight.detach() - before
            mean += moved / (steps - settled)
            squares += moved.square().mean().item() / (steps - settled)
    # A constant gradient's steps add up, so that their mean is what counts.
    return math.sqrt(squares) if noise else mean.abs().mean().item()


def accuracies(rates: Sequence[float], seeds: int) -> dict[float, dict[float, list[float]]]:
    """p → learning rate → accuracy in percent of each seed, on rows that no run trains on."""
    data = fine_tuning_sections(read_debian_packages())
    split = split_rows(len(data.texts)).with_at_most(1000)
    source = SmallEncoderSource(pretrain(read_debian_packages(), 4, 0))
    task = TextTask(source, data, torch.device("cpu"))
    runs = [(p, rate, seed) for seed in range(seeds) for p in TUNED_SHARES for rate in rates]
    found: dict[float, dict[float, list[float]]] = {
        p: {rate: [] for rate in rates} for p in TUNED_SHARES
    }
    for p, rate, seed in tqdm(runs, "fine-tuning", unit="run", disable=None):
        found[p][rate].append(tuned_accuracy(task, split, p, rate, seed))
    return found


def tuned_accuracy(task: TextTask, split: Split, p: float, rate: float, seed: int) -> float:
    """The accuracy of one run, in percent."""
    method = Method("adamw") if p == 1.0 else Method("ct_f", p)
    rows = split.training_set(TRAIN_EXAMPLES, seed)
    tuned = fine_tune(task, method, rate, seed, rows, None, TuningSettings(EPOCHS, BATCH))
    return task.accuracy(tuned.model, split.validation)


def tables(document: Mapping[str, Any]) -> str:
    """What the three panels show, in figures."""
    constant, noise = document["constant gradient"], document["gradients of mean zero"]
    steps = [("reserve_p", "√p", "constant gradient", "gradients of mean zero")]
    steps += [
        (f"{p:g}", f"{math.sqrt(p):.3f}", f"{constant[p]:.3f}", f"{noise[p]:.3f}") for p in constant
    ]
    by_share = document["accuracy"]
    rates = [*next(iter(by_share.values()))]
    accuracy = [("learning rate", *(_title(p) for p in by_share))]
    accuracy += [
        (f"{rate:g}", *(f"{statistics.mean(by_share[p][rate]):.1f}" for p in by_share))
        for rate in rates
    ]
    return (
        f"A weight's step, in learning rates\n{aligned(steps)}\n\n"
        f"Accuracy in %, mean of {document['seeds']} seeds\n{aligned(accuracy)}\n"
    )


def _title(p: float) -> str:
    return "AdamW" if p == 1 else f"CT_F, p = {p:g}"


def draw(document: dict[str, object], path: Path) -> None:
    """Draw the three panels and write a PNG."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    law, plain, scaled = figure.subplots(1, 3)
    _draw_steps(law, document)
    accuracy = document["accuracy"]
    assert isinstance(accuracy, dict)
    _draw_accuracies(plain, accuracy, scale=False)
    _draw_accuracies(scaled, accuracy, scale=True)
    scaled.sharey(plain)
    figure.savefig(path, dpi=150)


def _draw_steps(axes: Axes, document: dict[str, object]) -> None:
    dense = [0.02 + 0.98 * each / 200 for each in range(201)]
    axes.plot(dense, [math.sqrt(p) for p in dense], color="#a9afba", lw=1.5, label="√p")
    for name, marker, colour in (
        ("constant gradient", "o", "#2a78b5"),
        ("gradients of mean zero", "s", "#e07b39"),
    ):
        measured = document[name]
        assert isinstance(measured, dict)
        axes.plot([*measured], [*measured.values()], marker, color=colour, label=name)
    axes.set(title="a weight's step, in learning rates", xlabel="reserve_p", ylim=(0, 1.1))
    axes.legend(frameon=False)
    axes.grid(color="#e4e7ec")


def _draw_accuracies(
    axes: Axes, accuracy: dict[float, dict[float, list[float]]], *, scale: bool
) -> None:
    for p, by_rate in accuracy.items():
        factor = math.sqrt(p) if scale else 1.0
        means = [statistics.mean(values) for values in by_rate.values()]
        axes.plot(
            [rate * factor for rate in by_rate], means, "o-", color=COLOURS[p],
            label=_title(p),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set(
        title="accuracy, %", xlabel="learning rate × √p" if scale else "learning rate as given"
    )
    axes.legend(frameon=False)
    axes.grid(color="#e4e7ec")


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=whole_number, default=5, metavar="N", help="(default: 5)")
    parser.add_argument("--short", action="store_true", help="much less of everything, for a try")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/learning-rate-law"), metavar="DIR",
        help="(default: runs/learning-rate-law)",
    )  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
