"""Where models come from: the small encoder, pretrained here, or a checkpoint of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finetuning.hashed_words import encode_texts, trimmed
from finetuning.labelled_text import InputError
from finetuning.small_encoder import SmallEncoder

Encoded = dict[str, Tensor]


class TextModelSource(Protocol):
    """Makes classifiers that start from the same pretrained weights, and feeds them text."""

    @property
    def name(self) -> str:
        """What the report calls the model."""

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode texts once: tensors whose first dimension counts texts."""

    def new_model(self, label_count: int, seed: int) -> nn.Module:
        """A classifier with pretrained weights and a head drawn from ``seed``."""

    def logits(self, model: nn.Module, batch: Encoded) -> Tensor:
        """Logits, (texts, labels), of some rows of what ``encode`` gave."""


class SmallEncoderSource:
    """Small encoders; ``pretrained`` is what ``pretraining.pretrain`` gave, None: random weights."""

    def __init__(self, pretrained: dict[str, Tensor] | None) -> None:
        self._pretrained = pretrained

    @property
    def name(self) -> str:
        return "small encoder" if self._pretrained else "small encoder, not pretrained"

    def encode(self, texts: Sequence[str]) -> Encoded:
        return {"pieces": encode_texts(texts)}

    def new_model(self, label_count: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = SmallEncoder(label_count)
        if self._pretrained is not None:
            model.load_state_dict(self._pretrained, strict=False)
        return model

    def logits(self, model: nn.Module, batch: Encoded) -> Tensor:
        return model(trimmed(batch["pieces"]))


class CheckpointSource:
    """Sequence classifiers of ``transformers``, from a folder or a hub id.

    Args:
        path_or_id: what ``from_pretrained`` takes.
        longest_text: longer texts are cut off after so many tokens.

    Raises:
        InputError: transformers is not installed, or the tokenizer cannot be loaded.
    """

    def __init__(self, path_or_id: str, longest_text: int) -> None:
        try:
            import transformers
        except ImportError:
            raise InputError(
                "--model needs the package transformers: python -m pip install transformers"
            ) from None
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._model_class: Any = transformers.AutoModelForSequenceClassification
        self._path_or_id = path_or_id
        self._longest_text = longest_text
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path_or_id)
        except (OSError, ValueError) as error:
            raise _cannot_load("tokenizer", path_or_id, error) from None
        self._tokenizer.padding_side = "right"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    @property
    def name(self) -> str:
        return self._path_or_id.rstrip("/").split("/")[-1]

    def encode(self, texts: Sequence[str]) -> Encoded:
        return dict(
            self._tokenizer(
                list(texts),
                truncation=True,
                max_length=self._longest_text,
                padding=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
        )

    def new_model(self, label_count: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        try:
            model = self._model_class.from_pretrained(
                self._path_or_id,
                num_labels=label_count,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
            )
        except (OSError, ValueError) as error:
            raise _cannot_load("model", self._path_or_id, error) from None
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self._tokenizer.pad_token_id
        return model

    def logits(self, model: nn.Module, batch: Encoded) -> Tensor:
        longest = int(batch["attention_mask"].sum(1).max())
        return model(**{key: value[:, :longest] for key, value in batch.items()}).logits


def _cannot_load(what: str, path_or_id: str, error: Exception) -> InputError:
    lines = str(error).splitlines() or [type(error).__name__]
    return InputError(
        f"--model {path_or_id}: cannot load the {what} ({lines[0]}); give a folder with config.json, "
        "weights and tokenizer files, or a hub id that this machine can reach"
    )
