"""Made-up data of GLUE's tasks and a tiny BERT, as glue.py reads them from folders."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

WORDS = ["the", "printer", "server", "is", "out", "of", "paper", "lost", "its", "network", "not"]
TRAIN, VALIDATION, BATCH = 24, 12, 4


def sentence(number: int) -> str:
    return " ".join(WORDS[(number * step) % len(WORDS)] for step in (1, 2, 3, 5))


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def write_model(folder: Path) -> None:
    """A BERT of two narrow layers, without a head, and its tokenizer, in the subfolder `model`."""
    transformers: Any = pytest.importorskip("transformers")

    model, vocabulary = folder / "model", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    model.mkdir()
    (model / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    configuration = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    transformers.set_seed(0)
    transformers.BertModel(configuration).save_pretrained(model)  # heads are drawn by the seed
    transformers.BertTokenizerFast.from_pretrained(model).save_pretrained(model)


def write_data(folder: Path) -> None:
    """RTE with names of labels in csv files, STS-B in json lines, MNLI with numbers."""
    rte_labels = ("entailment", "not_entailment")
    pair, inference = ("sentence1", "sentence2", "label"), ("premise", "hypothesis", "label")
    for split, count in (("train", TRAIN), ("validation", VALIDATION)):
        rows = [(sentence(n), sentence(n + n % 2), rte_labels[n % 2]) for n in range(count)]
        write_csv(folder / "rte" / f"{split}.csv", pair, rows)
        lines = [
            json.dumps(
                dict(zip(pair, (sentence(n), sentence(n + n % 5), n % 5 + 0.25), strict=True))
            )
            for n in range(count)
        ]
        (folder / "stsb").mkdir(exist_ok=True)
        (folder / "stsb" / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        numbered = [(sentence(n), sentence(n + n % 3), n % 3) for n in range(count)]
        name = {"validation": "validation_matched"}.get(split, split)
        write_csv(folder / "mnli" / f"{name}.csv", inference, numbered)
