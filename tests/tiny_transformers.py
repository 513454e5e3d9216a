"""Models of transformers at small sizes, made-up data for them, and what a Trainer does as a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import TrainingArguments

from childtune_kernels import ChildMask, FisherAccumulator, FusedChildAdamW
from childtune_kernels.integrations.transformers import ChildTuningArguments, ChildTuningTrainer

VOCABULARY, LENGTH, EXAMPLES, BATCH = 60, 7, 8, 4

SIZES: dict[str, dict[str, Any]] = {
    "Bert": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "pad_token_id": 0},
}  # fmt: skip
SIZES["Roberta"] = {**SIZES["Bert"], "max_position_embeddings": 20}
SIZES["Llama"] = {**SIZES["Bert"], "num_key_value_heads": 1, "pad_token_id": 0}
HEADS = {"Bert": "ForSequenceClassification", "Roberta": "ForSequenceClassification",
         "GPT2": "LMHeadModel", "Llama": "ForCausalLM"}  # fmt: skip
ARCHITECTURES = tuple(HEADS)
LAYERS = {
    "Bert": "bert.encoder.layer.*",
    "Roberta": "roberta.encoder.layer.*",
    "GPT2": "transformer.h.*",
    "Llama": "model.layers.*",
}


def model_of(architecture: str, dropout: bool = False) -> Any:
    """The same weights at every call; dropout only where asked for."""
    configuration = getattr(transformers, f"{architecture}Config")(
        vocab_size=VOCABULARY, **SIZES[architecture]
    )
    if not dropout:
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop",
                     "attn_pdrop", "attention_dropout"):  # fmt: skip
            if hasattr(configuration, name):
                setattr(configuration, name, 0.0)
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        return getattr(transformers, architecture + HEADS[architecture])(configuration)


def data_of(architecture: str, count: int = EXAMPLES) -> list[dict[str, Any]]:
    """Examples of one length: token ids and a class, or the ids once more for a language model."""
    generator = torch.Generator().manual_seed(5)
    examples: list[dict[str, Any]] = []
    for number in range(count):
        tokens = torch.randint(5, VOCABULARY, (LENGTH,), generator=generator)
        classifies = HEADS[architecture] == "ForSequenceClassification"
        examples.append({"input_ids": tokens, "labels": number % 2 if classifies else tokens})
    return examples


class InOrder(ChildTuningTrainer):
    """Reads the train set in its order."""

    def _get_train_sampler(self, *arguments: Any) -> Any:
        return None


def arguments_of(folder: Path | str, **options: Any) -> TrainingArguments:
    """Four steps on the CPU, at a rate at which a missing term shows."""
    chosen: dict[str, Any] = {
        "per_device_train_batch_size": BATCH, "max_steps": 4, "learning_rate": 0.0123, "weight_decay": 0.1,
        "lr_scheduler_type": "constant", "save_strategy": "no", "logging_steps": 1, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "log_level": "error", "max_grad_norm": 0.5, **options,
    }  # fmt: skip
    return TrainingArguments(str(folder), **chosen)


def trainer_of(
    folder: Path | str,
    tuning: ChildTuningArguments,
    architecture: str = "Bert",
    *,
    kind: type[ChildTuningTrainer] = InOrder,
    model: Any = None,
    dropout: bool = False,
    train_set: Any = None,
    trainer_options: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A Trainer of a small model; ``options`` are those of ``TrainingArguments``."""
    return kind(
        model_of(architecture, dropout) if model is None else model,
        arguments_of(folder, **options),
        train_dataset=data_of(architecture) if train_set is None else train_set,
        child_tuning=tuning,
        **(trainer_options or {}),
    )


def batches_of(examples: list[dict[str, Any]], size: int) -> Iterator[dict[str, Tensor]]:
    """Whole batches in order, again and again."""
    while True:
        for first in range(0, len(examples) - size + 1, size):
            part = examples[first : first + size]
            yield {name: torch.stack([torch.as_tensor(e[name]) for e in part]) for name in part[0]}


def child_by_loop(
    trainer: Any, model: Any, examples: list[dict[str, Any]], patterns: list[str], reserve_p: float
) -> ChildMask:
    """The child that a plain loop over single examples selects."""
    fisher = FisherAccumulator(model.eval(), include=patterns)
    batches = batches_of(examples, 1)
    with fisher.recording():
        for _ in examples:
            (batch,), items = trainer.get_batch_samples(batches, 1, torch.device("cpu"))
            trainer.compute_loss(model, batch, num_items_in_batch=items).backward()
    model.train()
    return fisher.child_mask(reserve_p)


def decays(name: str) -> bool:
    """Whether the Trainer's rule has a parameter decay, for the names of these models."""
    return not any(part in name.lower() for part in ("bias", "norm", "ln_1", "ln_2", "ln_f"))


def train_by_loop(
    trainer: Any,
    model: Any,
    examples: list[dict[str, Any]],
    make: Callable[[list[dict[str, Any]]], FusedChildAdamW],
    *,
    steps: int = 4,
    accumulated: int = 1,
) -> FusedChildAdamW:
    """What a Trainer does with the arguments of ``arguments_of``; only its losses are asked for."""
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    optimizer = make(
        [
            {"params": [(n, p) for n, p in named if decays(n)], "weight_decay": 0.1},
            {"params": [(n, p) for n, p in named if not decays(n)], "weight_decay": 0.0},
        ]
    )
    batches = batches_of(examples, BATCH)
    for _ in range(steps):
        # How a loss is averaged over accumulated batches is the Trainer's affair.
        chosen, items = trainer.get_batch_samples(batches, accumulated, torch.device("cpu"))
        for batch in chosen:
            loss = trainer.compute_loss(model, batch, num_items_in_batch=items)
            (loss if items is not None else loss / accumulated).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def weights_of(model: Any) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: each.detach().clone() for name, each in model.named_parameters()}
