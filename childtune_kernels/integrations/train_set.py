"""The Fisher information of a Trainer's train set, after which the Trainer is as it was."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from ..fisher import FisherAccumulator
from ..fisher_scope import Patterns, layer_patterns
from ..progress import progress_of
from .trainer_arguments import whole_number


def fisher_of_train_set(
    trainer: Trainer,
    include: Patterns = None,
    exclude: Patterns = (),
    *,
    max_examples: int | None = None,
    batch_size: int = 1,
    seed: int | None = None,
) -> FisherAccumulator:
    """Measure the Fisher information of a Trainer's model on its train set, before training.

    The loss is the Trainer's own (``compute_loss``), the model in eval mode; bf16 autocast is used where
    training uses it, fp16 is not, in which small gradients would be lost. Of many ranks each measures its
    share of the examples, and all get the same sums. Weights, gradients, random numbers and train modes are
    left as they were. A bar shows the progress on a terminal, unless ``disable_tqdm`` is set.

    Args:
        trainer: before its first step, with the whole model on every rank (no FSDP, no DeepSpeed).
        include, exclude: as for ``FisherAccumulator``, but that ``include=None`` stands for
            ``layer_patterns``; ``"*"`` takes all weights.
        max_examples: measure at most so many, drawn without replacement; None: all of them.
        batch_size: examples a backward; 1 squares the gradient of each, as the paper has it.
        seed: of the draw; None: the Trainer's.

    Returns:
        The sums; ``child_mask(reserve_p)`` makes a child of them.

    Raises:
        ValueError: an iterable dataset without ``max_examples``; fewer examples than ranks; patterns that
            match nothing; numbers below 1.
    """
    if max_examples is not None:
        max_examples = whole_number("max_examples", max_examples)
    batch_size = whole_number("batch_size", batch_size)
    seed = trainer.args.seed if seed is None else seed
    model: Any = trainer.model
    if include is None:
        include = layer_patterns(model)
    with _left_as_it_was(trainer, model):
        loader = trainer.get_train_dataloader()
        if isinstance(loader.dataset, IterableDataset):
            batches, count = _of_stream(trainer, loader, max_examples, batch_size)
        else:
            batches, count = _of_dataset(trainer, loader, max_examples, batch_size, seed)
        if trainer.is_world_process_zero() and not trainer.args.disable_tqdm:
            batches = progress_of(batches, "Fisher information", count)
        fisher = FisherAccumulator(model.eval(), include, exclude)
        # The last batch may be smaller, and is then a record of another kind.
        for examples, alike in itertools.groupby(batches, key=lambda batch: batch[0]):
            with fisher.recording(examples):
                for _, batch in alike:
                    _loss(trainer, model, batch).backward()
    if trainer.args.world_size > 1:
        fisher.reduce()
    return fisher


def _loss(trainer: Trainer, model: nn.Module, batch: Any) -> Any:
    device = trainer.args.device
    # As in training: a loss may have to know how many items it is the mean of.
    (batch,), items = trainer.get_batch_samples(iter([batch]), 1, device)
    inputs = trainer._prepare_inputs(batch)
    autocast = trainer.accelerator.autocast() if trainer.args.bf16 else nullcontext()
    with autocast:
        return trainer.compute_loss(model, inputs, num_items_in_batch=items)


def _of_dataset(
    trainer: Trainer, loader: DataLoader[Any], most: int | None, size: int, seed: int
) -> tuple[Iterator[tuple[int, Any]], int]:
    """This rank's batches, each with its number of examples; and how many there are."""
    total, world = len(loader.dataset), trainer.args.world_size  # type: ignore[arg-type]
    chosen = list(range(total))
    if most is not None and most < total:
        draw = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        chosen = sorted(draw[:most].tolist())
    if not chosen:
        raise ValueError("train_dataset is empty, and nothing can be measured; give examples")
    _check_every_rank_has_one(len(chosen), world)
    # Not the prepared loader's own split, which repeats examples to make ranks even.
    own = chosen[trainer.args.process_index :: world]
    batches: DataLoader[Any] = DataLoader(
        loader.dataset,
        batch_size=size,
        sampler=own,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
    )
    sizes = (min(size, len(own) - first) for first in range(0, len(own), size))
    return zip(sizes, batches, strict=True), len(batches)


def _of_stream(
    trainer: Trainer, loader: DataLoader[Any], most: int | None, size: int
) -> tuple[Iterator[tuple[int, Any]], int]:
    """The same of a dataset that can only be read on: its batches, cut to ``size`` examples."""
    if most is None:
        raise ValueError(
            "fisher_examples is missing: how many examples of an iterable train set shall be measured?"
        )
    rank, world = trainer.args.process_index, trainer.args.world_size
    _check_every_rank_has_one(most, world)
    most = len(range(rank, most, world))

    def cut() -> Iterator[tuple[int, Any]]:
        left = most
        for batch in loader:
            length = min(_length(batch), left)
            for first in range(0, length, size):
                end = min(first + size, length)
                yield end - first, {k: _part(v, first, end) for k, v in batch.items()}
            left -= length
            if left == 0:
                return

    return cut(), math.ceil(most / size)


def _check_every_rank_has_one(examples: int, world: int) -> None:
    if examples < world:
        raise ValueError(
            f"{examples} examples are too few to measure on {world} ranks; every rank needs one"
        )


def _part(value: Any, first: int, end: int) -> Any:
    return value[first:end] if isinstance(value, Tensor) and value.dim() else value


def _length(batch: dict[str, Any]) -> int:
    lengths = {len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()}
    if len(lengths) != 1:
        raise ValueError(
            f"a batch of an iterable train set has tensors of {sorted(lengths)} rows and cannot be cut to "
            "single examples; give a dataset with __len__ and __getitem__"
        )
    return lengths.pop()


@contextmanager
def _left_as_it_was(trainer: Trainer, model: nn.Module) -> Iterator[None]:
    """Random numbers, train modes and the accelerator's loaders are afterwards what they were before."""
    device = trainer.args.device
    training = [(module, module.training) for module in model.modules()]
    loaders = list(trainer.accelerator._dataloaders)
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (collators may draw from it)
    averages = getattr(trainer.args, "average_tokens_across_devices", False)
    # Ranks measure by themselves, and may have one example more or less than others.
    trainer.args.average_tokens_across_devices = False
    others = {} if device.type == "cpu" else {"device_type": device.type}
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device], **others):
            yield
    finally:
        trainer.args.average_tokens_across_devices = averages
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        trainer.accelerator._dataloaders[:] = loaders
        for module, mode in training:
            module.training = mode
