"""What a CT_D run leaves behind: Fisher information, mask, child checkpoint and pictures.

The checkpoint is put to the test at once: applied to the pretrained start, it must give the tuned model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from childtune_kernels import ChildMask, apply_child, load_child, save_child
from childtune_kernels.report.densities import densities
from childtune_kernels.report.fisher_spectrum import fisher_spectrum, sentences
from childtune_kernels.report.heat_maps import plot_densities, plot_overlaps
from childtune_kernels.report.overlaps import overlaps, overlaps_table
from childtune_kernels.report.spectrum_plot import plot_fisher_spectrum
from finetuning.children import CHILDREN
from finetuning.comparison import ChildRun
from finetuning.labelled_text import Split

FISHER, MASK, CHECKPOINT = "fisher.safetensors", "child.safetensors", "tuned_child.safetensors"
DENSITY, OVERLAP, SPECTRUM = "child_density.png", "child_overlap.png", "fisher_spectrum.png"


def save_child_files(run: ChildRun, split: Split, folder: Path) -> list[str]:
    """Write all files of the last CT_D run.

    Args:
        run: what ``compare`` kept.
        split: its test rows measure the model that the checkpoint gives.
        folder: where to write; it is there.

    Returns:
        Lines that say what was written and what it shows.

    Raises:
        RuntimeError: the checkpoint does not give the tuned model.
    """
    child = run.networks.child("ct_d")
    assert child is not None
    run.networks.fisher().save(folder / FISHER)
    child.save(folder / MASK)
    save_child(folder / CHECKPOINT, run.tuned.model, child, optimizer=run.tuned.optimizer)
    return [
        f"The last CT_D run (seed {run.seed}), in {folder}/:",
        f"  {FISHER}, {MASK}: Fisher information and child of its training rows",
        *_checked_checkpoint(run, child, split, folder / CHECKPOINT),
        *_pictures(run, child, folder),
    ]


def _checked_checkpoint(run: ChildRun, child: ChildMask, split: Split, path: Path) -> list[str]:
    """Apply the checkpoint to the start model, compare every bit, and say what it weighs."""
    task, tuned = run.contender.task, run.tuned.model
    model = task.new_model(run.seed)
    apply_child(model, path)
    different = different_tensors(tuned, model)
    accuracy = task.accuracy(model, split.test)
    if different or accuracy != run.accuracy:
        raise RuntimeError(
            f"{path} gives another model than the tuned one: {', '.join(different[:6]) or 'accuracy'} "
            f"differs ({accuracy:.2f} %, not {run.accuracy:.2f} %)"
        )
    stored = load_child(path)
    encoder = sum(_bytes(tuned.get_parameter(label)) for label in child.words)
    inside = sum(map(_bytes, [*child.words.values(), *stored.values.values()]))
    whole = sum(map(_bytes, stored.whole.values()))
    weights = sum(map(_bytes, tuned.parameters()))
    size = path.stat().st_size
    return [
        f"  {CHECKPOINT}: {size:,} bytes; the model's weights are {weights:,} ({size / weights:.0%}).",
        f"    Child and mask take {inside:,} bytes of the encoder layers' {encoder:,} "
        f"({inside / encoder:.0%}); what trained densely, {whole:,}, is stored whole.",
        f"    Applied to the pretrained start it gave the tuned model in every bit, {accuracy:.1f} % "
        "on the test data.",
    ]


def different_tensors(first: nn.Module, second: nn.Module) -> list[str]:
    """Names in two models' state dicts whose tensors differ in a bit, shape or type, or are in one only."""
    ours, theirs = first.state_dict(), second.state_dict()
    return sorted(ours.keys() ^ theirs.keys()) + [
        name for name in ours if name in theirs and not _same_bits(ours[name], theirs[name])
    ]


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(*(each.flatten().view(torch.uint8) for each in (first, second)))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _pictures(run: ChildRun, child: ChildMask, folder: Path) -> list[str]:
    spectrum = fisher_spectrum(run.networks.fisher().values(), child)
    shared = overlaps(_children(run))
    title = f"the Fisher child, seed {run.seed}"
    plot_densities(densities(child), folder / DENSITY, title)
    plot_fisher_spectrum(spectrum, folder / SPECTRUM, title)
    plot_overlaps(shared, folder / OVERLAP)
    table = "\n".join(f"    {line}".rstrip() for line in overlaps_table(shared).splitlines())
    return [
        f"  {DENSITY}: the child by layer and kind of weight",
        f"  {SPECTRUM}: {sentences(spectrum)[0]}",
        f"  {OVERLAP}:",
        table,
    ]


def _children(run: ChildRun) -> dict[str, ChildMask]:
    """The children of the last seed and the Fisher child of the seed before, by the name in the picture."""
    found: dict[str, ChildMask] = {}
    for method, name in CHILDREN.items():
        child = run.networks.child(method)
        assert child is not None
        found[f"{name}, seed {run.seed}"] = child.to("cpu")
    if run.earlier is not None:
        found[f"{CHILDREN['ct_d']}, seed {run.seed - 1}"] = run.earlier.to("cpu")
    return found
