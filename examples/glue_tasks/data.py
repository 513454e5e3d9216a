"""Texts and labels of a task: from the hub, or from a folder of csv, tsv, json lines or parquet files."""

from __future__ import annotations

import csv
import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.labelled_text import InputError
from glue_tasks.tasks import INFERENCE, PAIRS, EvaluationSet, HubSet, Task, accepted_classes, plain

LABEL_COLUMNS = ("label", "gold_label", "entailment_label")
ENDINGS = ("csv", "tsv", "jsonl", "json", "parquet")
_UNLABELLED = {"", "-", "-1", "-1.0", "none", "nan"}


@dataclass(frozen=True)
class Table:
    """The columns of one split.

    Args:
        columns: by name, all of one length.
        label_names: what the numbers in a label column mean, where the data say so.
        source: for messages.
    """

    columns: dict[str, list[Any]]
    label_names: tuple[str, ...] | None
    source: str

    def column(self, *names: str) -> list[Any]:
        """The first of some columns that is there.

        Raises:
            InputError: none of them is.
        """
        for name in names:
            if name in self.columns:
                return self.columns[name]
        wanted = " or ".join(map(repr, names))
        has = ", ".join(map(repr, self.columns)) or "none"
        raise InputError(f"{self.source} has no column {wanted}; its columns are {has}")


@dataclass(frozen=True)
class TextSet:
    """Sentences, or pairs of them, and their labels: numbers of classes, or values of a regression."""

    texts: list[tuple[str, ...]]
    labels: list[float]
    label_names: tuple[str, ...]


def read_task(task: Task, data: Path | None) -> tuple[TextSet, TextSet]:
    """Train and validation set of a task.

    Args:
        task: whose.
        data: a folder with a subfolder for each task; None: the hub.

    Raises:
        InputError: names the file, column or label that is missing or unknown.
    """
    tables = []
    for split in task.splits:
        if data is None:
            tables.append(read_hub(task.hub_set, split, _how_to_give(task)))
        else:
            tables.append(read_folder(data / task.name, split, _how_to_give(task)))
    train, validation = (_of_task(table, task) for table in tables)
    return train, validation


def read_evaluation_set(chosen: EvaluationSet, folder: Path | None) -> TextSet:
    """A set to evaluate on; its labels are numbers of its own ``label_names``.

    Args:
        chosen: which.
        folder: where its files are; None: the hub.

    Raises:
        InputError: as ``read_task``.
    """
    how = (
        f"give it by --evaluate-on {chosen.name}=FOLDER, which holds a file {' or '.join(chosen.splits)} "
        f"({_endings()}) with two columns of sentences and one of labels"
    )
    if folder is not None:
        table = read_folder(folder, chosen.splits, how)
    elif chosen.hub is not None:
        table = read_hub(chosen.hub, chosen.splits[0], how)
    else:
        raise InputError(f"--evaluate-on {chosen.name} is no known set; {how}")
    pair = chosen.columns or _pair_of(table)
    labels = table.column(*LABEL_COLUMNS)
    names = table.label_names or chosen.labels
    if not names:
        if any(_is_number(value) for value in labels if not _is_hidden(value)):
            raise InputError(
                f"{table.source}: its labels are numbers, and nothing says what they mean; write names"
            )
        names = tuple(sorted({plain(value) for value in labels if not _is_hidden(value)}))
    if accepted_classes(names) is None:
        raise InputError(
            f"--evaluate-on {chosen.name}: the labels {', '.join(names)} of {table.source} cannot be "
            f"mapped by name to {', '.join(INFERENCE)}; rename them in its files"
        )
    return _text_set(table, pair, labels, names)


def read_folder(folder: Path, splits: str | Sequence[str], how: str) -> Table:
    """Read the files of the first split that a folder has.

    A split is ``train.csv`` (or .tsv, .jsonl, .json, .parquet), or what the hub's own folders hold:
    ``train-00000-of-00002.parquet`` and so on; or what ``save_to_disk`` wrote.

    Raises:
        InputError: no such folder or file; the end of the message is ``how``.
    """
    splits = [splits] if isinstance(splits, str) else list(splits)
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}; {how}")
    for split in splits:
        if (folder / "dataset_dict.json").exists() and (folder / split).is_dir():
            datasets = _datasets_package("a folder that save_to_disk wrote")
            return _of_dataset(datasets.load_from_disk(str(folder))[split], f"{folder}/{split}")
        pattern = re.compile(rf"{re.escape(split)}(-\d+-of-\d+)?\.({'|'.join(ENDINGS)})")
        files = [path for path in sorted(folder.iterdir()) if pattern.fullmatch(path.name)]
        kinds = {path.suffix for path in files}
        if len(kinds) > 1:
            found = ", ".join(path.name for path in files)
            raise InputError(f"{folder} has the split {split} more than once: {found}; keep one")
        if files:
            parts = [_read_file(path) for path in files]
            columns = {
                name: [value for part in parts for value in part.column(name)]
                for name in parts[0].columns
            }
            return Table(columns, parts[0].label_names, str(files[0]))
    raise InputError(f"{folder} has no file {' or '.join(splits)}.({'|'.join(ENDINGS)}); {how}")


def read_hub(place: HubSet, split: str, how: str) -> Table:
    """Load a split from the hub, or from its cache on this machine.

    Raises:
        InputError: it cannot be reached, or ``datasets`` is not installed; the end is ``how``.
    """
    datasets = _datasets_package(f"{place} of the hub", how)
    for name in ("huggingface_hub", "datasets"):  # its retries would be ten lines before the error
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(
            place.path, place.configuration, revision=place.revision, split=split
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot load {place} from the hub ({reason}); {how}") from None
    return _of_dataset(loaded, f"{place} ({split})")


def _how_to_give(task: Task) -> str:
    columns = ", ".join((*task.columns, "label"))
    return (
        f"give --data FOLDER with a subfolder {task.name} that holds {' and '.join(task.splits)} files "
        f"({_endings()}) with the columns {columns}"
    )


def _endings() -> str:
    return ", ".join(f".{ending}" for ending in ENDINGS)


def _datasets_package(what: str, how: str = "") -> Any:
    try:
        import datasets
    except ImportError:
        rest = f"; or {how}" if how else ""
        raise InputError(
            f"{what} needs the package datasets: python -m pip install datasets{rest}"
        ) from None
    return datasets


def _of_dataset(dataset: Any, source: str) -> Table:
    names = None
    for name in LABEL_COLUMNS:
        names = names or getattr(dataset.features.get(name), "names", None)
    columns = {name: list(dataset[name]) for name in dataset.column_names}
    return Table(columns, tuple(names) if names else None, source)


def _read_file(path: Path) -> Table:
    if path.suffix == ".parquet":
        datasets = _datasets_package(str(path))
        from pyarrow import ArrowInvalid, parquet  # datasets brings it

        try:
            return _of_dataset(datasets.Dataset(parquet.read_table(path)), str(path))
        except ArrowInvalid as error:
            raise InputError(f"{path} is no readable parquet file: {error}") from None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(_json_rows(file.read()) if "json" in path.suffix else _csv_rows(file, path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None
    except (csv.Error, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a readable {path.suffix} file: {error}") from None
    names = list(rows[0]) if rows else []
    return Table({name: [row.get(name) for row in rows] for name in names}, None, str(path))


def _csv_rows(file: Any, path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".csv":
        return iter(csv.DictReader(file))
    # As in GLUE's own files: a quotation mark in a tsv file is a quotation mark.
    return iter(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _json_rows(text: str) -> Iterator[dict[str, Any]]:
    if text.lstrip().startswith("["):
        return iter(json.loads(text))
    return (json.loads(line) for line in text.splitlines() if line.strip())


def _pair_of(table: Table) -> tuple[str, str]:
    for pair in PAIRS:
        if all(name in table.columns for name in pair):
            return pair
    expected = "; ".join(", ".join(pair) for pair in PAIRS)
    has = ", ".join(map(repr, table.columns)) or "none"
    raise InputError(
        f"{table.source} has no pair of columns of sentences that is known ({expected}); it has {has}"
    )


def _of_task(table: Table, task: Task) -> TextSet:
    labels = table.column("label")
    if task.labels:
        names = table.label_names
        if names is not None and {plain(name) for name in names} != set(task.labels):
            raise InputError(
                f"{table.source} names its labels {', '.join(names)}; those of {task.name} are "
                f"{', '.join(task.labels)}"
            )
        numbered = _text_set(table, task.columns, labels, names or task.labels)
        # Numbers of the file's names become numbers of the task's, whatever the file's order.
        order = [task.labels.index(plain(name)) for name in numbered.label_names]
        classes: list[float] = [order[int(label)] for label in numbered.labels]
        return TextSet(numbered.texts, classes, task.labels)
    return _text_set(table, task.columns, labels, ())


def _text_set(
    table: Table, columns: Sequence[str], labels: Sequence[Any], names: tuple[str, ...]
) -> TextSet:
    """The rows that have a label; ``names`` is empty for a regression."""
    sentences = [table.column(name) for name in columns]
    texts, found = [], []
    for label, *row in zip(labels, *sentences, strict=True):
        if _is_hidden(label):
            continue
        texts.append(tuple(str(text or "") for text in row))
        found.append(_class_of(label, names, table) if names else _value_of(label, table))
    if not texts:
        raise InputError(f"{table.source} has no labelled row; GLUE's test splits are such files")
    return TextSet(texts, found, names)


def _class_of(label: Any, names: tuple[str, ...], table: Table) -> int:
    if _is_number(label):
        number = float(label)
        if number == int(number) and 0 <= number < len(names):
            return int(number)
    else:
        known = [plain(name) for name in names]
        if plain(label) in known:
            return known.index(plain(label))
    expected = ", ".join(f"{number} or {name}" for number, name in enumerate(names))
    raise InputError(f"{table.source} has a label {label!r}; expected are {expected}")


def _value_of(label: Any, table: Table) -> float:
    value = float(label) if _is_number(label) else math.nan
    if not math.isfinite(value):
        raise InputError(f"{table.source} has a label {label!r}, which is no number")
    return value


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _is_hidden(label: Any) -> bool:
    return str(label).strip().casefold() in _UNLABELLED
