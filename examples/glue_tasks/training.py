"""One run: a fresh model, fine-tuned by ChildTuningTrainer and evaluated; Fisher information once a seed."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import transformers
from transformers import DataCollatorWithPadding, TrainingArguments

from childtune_kernels import ChildMask
from childtune_kernels.integrations.transformers import (
    ChildTuningArguments,
    ChildTuningTrainer,
    fisher_of_train_set,
)
from finetuning.labelled_text import InputError
from glue_tasks.data import TextSet
from glue_tasks.grid import Configuration, Run, Settings
from glue_tasks.metrics import METRICS, accuracy
from glue_tasks.tasks import INFERENCE, Task, accepted_classes

Examples = list[dict[str, Any]]
OnStep = Callable[[int, int], None]
_EVALUATION_BATCH = 64
_HALVES_SEED = 2021


class Tokens:
    """The tokenizer of a model, and the model with a new head.

    Args:
        model: a hub id or folder.
        max_length: longer texts are cut off.

    Raises:
        InputError: the tokenizer cannot be loaded.
    """

    def __init__(self, model: str, max_length: int) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.model, self.max_length = model, max_length
        try:
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise _cannot_load(model, "tokenizer", error) from None
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def encode(self, texts: TextSet) -> Examples:
        """Token ids and labels, unpadded."""
        sentences = [list(each) for each in zip(*texts.texts, strict=True)]
        encoded = self.tokenizer(*sentences, truncation=True, max_length=self.max_length)
        names = list(encoded)
        rows = zip(*(encoded[name] for name in names), strict=True)
        return [
            {**dict(zip(names, row, strict=True)), "labels": label}
            for row, label in zip(rows, texts.labels, strict=True)
        ]

    def new_model(self, outputs: int, seed: int) -> Any:
        """Pretrained weights, with a head of so many outputs that is drawn from ``seed``.

        Raises:
            InputError: the weights cannot be loaded.
        """
        transformers.set_seed(seed)
        try:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                self.model, num_labels=outputs, ignore_mismatched_sizes=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise _cannot_load(self.model, "weights", error) from None
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model


@dataclass
class TunedTask:
    """Everything that the runs of one task share.

    Args:
        task: what is learned.
        settings: of all runs.
        tokens: tokenizer and model.
        train, validation: its sets.
        evaluate_on: name → set, of a transfer.
        cpu: never use a GPU.
    """

    task: Task
    settings: Settings
    tokens: Tokens
    train: TextSet
    validation: TextSet
    evaluate_on: dict[str, TextSet]
    cpu: bool = False

    def __post_init__(self) -> None:
        self._masks: dict[float, ChildMask] = {}
        self._masks_seed: int | None = None

    # Tokens are made when a task's first run asks for them.
    @cached_property
    def _train(self) -> Examples:
        return self.tokens.encode(self.train)

    @cached_property
    def _validation(self) -> Examples:
        return self.tokens.encode(self.validation)

    @cached_property
    def _evaluate_on(self) -> dict[str, tuple[Examples, np.ndarray]]:
        return {
            name: (self.tokens.encode(texts), right_classes(texts.label_names))
            for name, texts in self.evaluate_on.items()
        }

    def measure(self, seed: int, shares: Sequence[float]) -> None:
        """Measure Fisher information of a seed's model on its train set, and make CT_D's children of it."""
        if self._masks_seed == seed and all(share in self._masks for share in shares):
            return
        settings = self.settings
        # A bar of its own: Fisher information takes a backward an example.
        trainer, folder = self._trainer(seed, 0.0, ChildTuningArguments("none"), bar=True)
        with folder:
            fisher = fisher_of_train_set(
                trainer,
                max_examples=settings.fisher_examples,
                batch_size=settings.fisher_batch_size,
            )
        self._masks = {share: fisher.child_mask(share).to("cpu") for share in shares}
        self._masks_seed = seed

    def run(self, run: Run, on_step: OnStep = lambda step, steps: None) -> dict[str, float]:
        """Fine-tune and evaluate; of CT_D after ``measure``.

        Returns:
            In percent: ``validation``, ``first_half`` and ``second_half`` of it, ``on NAME`` for each set
            of a transfer.
        """
        chosen = run.configuration
        mask = self._masks[chosen.reserve_p] if chosen.method == "ct_d" else None  # type: ignore[index]
        trainer, folder = self._trainer(
            run.seed, chosen.learning_rate, child_tuning_of(chosen, mask), on_step
        )
        with folder:
            trainer.train()
            return self._scores(trainer)

    def _scores(self, trainer: ChildTuningTrainer) -> dict[str, float]:
        metric = METRICS[self.task.metric]
        predicted = self._predicted(trainer, self._validation)
        labels = np.asarray(self.validation.labels)
        scores = {"validation": metric(predicted, labels)}
        for name, rows in zip(("first_half", "second_half"), halves(len(labels)), strict=True):
            scores[name] = metric(predicted[rows], labels[rows])
        for name, (examples, right) in self._evaluate_on.items():
            own = [int(label) for label in self.evaluate_on[name].labels]
            hits = right[own, self._predicted(trainer, examples)]
            scores[f"on {name}"] = accuracy(hits, np.ones_like(hits))
        return scores

    def _predicted(self, trainer: ChildTuningTrainer, examples: Examples) -> Any:
        # Without labels: those of another set's numbers would be another loss, or none.
        inputs = [{k: v for k, v in each.items() if k != "labels"} for each in examples]
        logits = trainer.predict(inputs).predictions  # type: ignore[arg-type]
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits.argmax(1) if self.task.labels else logits[:, 0]

    def _trainer(
        self,
        seed: int,
        learning_rate: float,
        tuning: ChildTuningArguments,
        on_step: OnStep | None = None,
        bar: bool = False,
    ) -> tuple[ChildTuningTrainer, tempfile.TemporaryDirectory[str]]:
        """A Trainer of a fresh model; all methods get the same schedule, batches and start at a seed."""
        settings, examples = self.settings, self._train
        if settings.train_examples is not None:
            rows = random.Random(seed).sample(range(len(examples)), settings.train_examples)
            examples = [examples[row] for row in rows]
        folder = tempfile.TemporaryDirectory()
        steps = math.ceil(settings.epochs * math.ceil(len(examples) / settings.batch_size))
        arguments = TrainingArguments(
            folder.name,
            learning_rate=learning_rate,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=_EVALUATION_BATCH,
            num_train_epochs=settings.epochs,
            # Steps, since transformers 4 and 5 spell the ratio differently.
            warmup_steps=math.ceil(settings.warmup_ratio * steps),
            lr_scheduler_type="linear",
            weight_decay=settings.weight_decay,
            bf16=settings.bf16,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=not bar,
            log_level="error",
            use_cpu=self.cpu,
        )
        trainer = ChildTuningTrainer(
            self.tokens.new_model(len(self.task.labels) or 1, seed),
            arguments,
            train_dataset=examples,
            data_collator=DataCollatorWithPadding(self.tokens.tokenizer),
            child_tuning=tuning,
            callbacks=[] if on_step is None else [_TellSteps(on_step)],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer, folder


class _TellSteps(transformers.TrainerCallback):
    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._on_step(state.global_step, state.max_steps)


def child_tuning_of(chosen: Configuration, mask: ChildMask | None) -> ChildTuningArguments:
    """What the Trainer is told of a configuration; ``mask``: CT_D's child."""
    if chosen.method == "vanilla":
        return ChildTuningArguments("none")
    if chosen.method == "ct_d":
        return ChildTuningArguments("D", child_mask=mask, child_checkpoint=False)
    return ChildTuningArguments(
        "F", chosen.reserve_p, scale_learning_rate=chosen.method == "ct_f_scaled"
    )


def halves(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the two halves of a validation set, the same in every run."""
    order = np.random.default_rng(_HALVES_SEED).permutation(count)
    return np.sort(order[: count // 2]), np.sort(order[count // 2 :])


def right_classes(names: Sequence[str]) -> np.ndarray:
    """(label of an evaluation set, class of the model) → whether the class is right."""
    accepted = accepted_classes(names) or []
    return np.array([[label in each for label in INFERENCE] for each in accepted])


def _cannot_load(model: str, what: str, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(
        f"--model {model}: cannot load the {what} ({reason}); give a folder with config.json, weights and "
        "tokenizer files, or a hub id that this machine can reach"
    )
