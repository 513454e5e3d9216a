"""One fine-tuning run: batches, schedule, steps and accuracy, the same for every method."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from childtune_kernels import ChildMask
from finetuning.children import ChildNetworks
from finetuning.labelled_text import LabelledText
from finetuning.methods import Method, mean_loss, state_bytes
from finetuning.text_models import TextModelSource

_WARMUP = 0.1  # of all steps; the learning rate then falls linearly to zero
_EVALUATION_BATCH = 250


@dataclass(frozen=True)
class TuningSettings:
    """What all runs have in common."""

    epochs: int
    batch_size: int


@dataclass(frozen=True)
class TunedModel:
    """A model after fine-tuning, its optimizer, and what that cost: seconds of every step, bytes of state.

    ``losses``: of the batch of every step, before it.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step_seconds: list[float]
    state_bytes: int
    losses: list[float] = field(default_factory=list)


class TextTask:
    """A labelled data set as one kind of model sees it; rows are numbers into ``data``.

    Args:
        source: makes the models.
        data: texts and labels.
        device: where the models run.
        dtype: of their weights, and so of activations and gradients.
    """

    def __init__(
        self,
        source: TextModelSource,
        data: LabelledText,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.source = source
        self.device = device
        self.dtype = dtype
        self._label_count = len(data.label_names)
        self._encoded = {key: value.to(device) for key, value in source.encode(data.texts).items()}
        self._labels = torch.tensor(data.labels, device=device)

    def new_model(self, seed: int) -> nn.Module:
        """A classifier of this task's labels, pretrained but for the head."""
        return self.source.new_model(self._label_count, seed).to(self.device, self.dtype)

    def logits(self, model: nn.Module, rows: Sequence[int]) -> Tensor:
        """Logits, (rows, labels)."""
        index = torch.tensor(rows, device=self.device)
        batch = {key: value[index] for key, value in self._encoded.items()}
        return self.source.logits(model, batch)

    def loss(self, model: nn.Module, rows: Sequence[int]) -> Tensor:
        """Mean cross-entropy over the rows."""
        labels = self._labels[torch.tensor(rows, device=self.device)]
        # In fp32 also for a bf16 model, whose own last place is a hundredth of a loss of 1.
        return mean_loss(self.logits(model, rows).float(), labels)

    def accuracy(self, model: nn.Module, rows: Sequence[int]) -> float:
        """Share of rows whose largest logit is at their label, in percent."""
        model.eval()
        right = 0
        with torch.inference_mode():
            for start in range(0, len(rows), _EVALUATION_BATCH):
                batch = rows[start : start + _EVALUATION_BATCH]
                labels = self._labels[torch.tensor(batch, device=self.device)]
                right += int((self.logits(model, batch).argmax(1) == labels).sum())
        return 100 * right / len(rows)


def child_networks(task: TextTask, method: Method, rows: Sequence[int], seed: int) -> ChildNetworks:
    """The children in the model that ``fine_tune`` starts from at the same seed."""
    model = task.new_model(seed)
    return ChildNetworks(model, task.loss, rows, seed, method.reserve_p, method.backend)


def fine_tune(
    task: TextTask,
    method: Method,
    learning_rate: float,
    seed: int,
    rows: Sequence[int],
    child: ChildMask | None,
    settings: TuningSettings,
) -> TunedModel:
    """Fine-tune a fresh model on the rows.

    Args:
        task: data and model source.
        method: how to tune.
        learning_rate: peak of the schedule.
        seed: of head, batch order, dropout and CT_F's masks.
        rows: training rows.
        child: what ``child_networks`` found for the same rows and seed.
        settings: epochs and batch size.
    """
    model = task.new_model(seed)
    optimizer = method.optimizer(model, learning_rate, seed, child)
    step_count = settings.epochs * math.ceil(len(rows) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _share_of_peak(step, step_count)
    )
    order = list(rows)
    shuffle = random.Random(seed).shuffle
    step_seconds, losses = [], []
    model.train()
    for _ in range(settings.epochs):
        shuffle(order)
        for start in range(0, len(order), settings.batch_size):
            optimizer.zero_grad()
            loss = task.loss(model, order[start : start + settings.batch_size])
            loss.backward()
            losses.append(loss.detach())  # a number only at the end: a GPU is not waited for
            step_seconds.append(_timed_step(optimizer, task.device))
            schedule.step()
    values = torch.stack(losses).tolist()
    return TunedModel(model, optimizer, step_seconds, state_bytes(optimizer), values)


def _share_of_peak(step: int, step_count: int) -> float:
    warmup = max(1, round(_WARMUP * step_count))
    rising = (step + 1) / warmup
    falling = (step_count - step) / max(1, step_count - warmup)
    return max(0.0, min(rising, falling))


def _timed_step(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    _wait_for(device)
    start = time.perf_counter()
    optimizer.step()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    # A GPU's step is only queued when step() returns.
    if device.type == "cuda":
        torch.cuda.synchronize(device)
