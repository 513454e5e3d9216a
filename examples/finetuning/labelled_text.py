"""Labelled text: reading a CSV file and splitting it into training pool, validation and test."""

from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DEBIAN_CSV = Path(__file__).resolve().parent.parent / "data" / "debian_packages.csv"
PRETRAINING_SECTIONS = ("admin", "fonts", "games", "math", "net", "science", "sound", "text")


class InputError(ValueError):
    """The user's input cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class LabelledText:
    """Texts with their labels: ``labels[i]`` is the index in ``label_names`` of ``texts[i]``."""

    texts: list[str]
    labels: list[int]
    label_names: list[str]


@dataclass(frozen=True)
class PackageDescription:
    """One row of the Debian file."""

    package: str
    description: str
    section: str


@dataclass(frozen=True)
class Split:
    """Disjoint row numbers: training sets are drawn from ``pool``; ``test`` is used once, at the end."""

    pool: list[int]
    validation: list[int]
    test: list[int]

    def training_set(self, size: int, seed: int) -> list[int]:
        """Draw ``size`` rows of the pool without replacement; the same for the same seed.

        Raises:
            InputError: the pool is smaller than ``size``.
        """
        if size > len(self.pool):
            raise InputError(
                f"--train-examples {size} is more than the {len(self.pool)} rows left beside "
                f"{len(self.validation)} validation and {len(self.test)} test rows"
            )
        return random.Random(seed).sample(self.pool, size)

    def with_at_most(self, rows: int) -> Split:
        """The same split with at most so many rows for the test, and for validation."""
        return Split(self.pool, self.validation[:rows], self.test[:rows])


def read_labelled_csv(path: Path, text_column: str, label_column: str) -> LabelledText:
    """Read a CSV file with a header; rows without a text or a label are left out.

    Returns:
        The rows in the file's order, label names sorted.

    Raises:
        InputError: no such file, not UTF-8, a column the header lacks, or fewer than two labels.
    """
    rows = _read_columns(path, (text_column, label_column))
    pairs = [(text, label) for text, label in rows if text and label]
    return _labelled(pairs, f"column {label_column!r} of {path}")


def read_debian_packages(path: Path = DEBIAN_CSV) -> list[PackageDescription]:
    """Read the Debian package descriptions that come with the examples, in the file's order.

    Raises:
        InputError: the file or one of its columns is missing.
    """
    columns = ("package", "description", "section")
    return [PackageDescription(*row) for row in _read_columns(path, columns)]


def fine_tuning_sections(packages: Sequence[PackageDescription]) -> LabelledText:
    """The descriptions of those sections that pretraining never sees, the section as label."""
    pairs = [
        (row.description, row.section)
        for row in packages
        if row.section not in PRETRAINING_SECTIONS
    ]
    return _labelled(pairs, "the Debian sections")


def split_rows(row_count: int, seed: int = 2021) -> Split:
    """Shuffle rows into test (half, at most 1,000), validation (a quarter, at most 500) and pool.

    Raises:
        InputError: fewer than eight rows.
    """
    if row_count < 8:
        raise InputError(f"{row_count} labelled rows are too few: at least 8 are needed")
    order = list(range(row_count))
    random.Random(seed).shuffle(order)
    test_end = min(1000, row_count // 2)
    validation_end = test_end + min(500, row_count // 4)
    return Split(
        pool=order[validation_end:],
        validation=order[test_end:validation_end],
        test=order[:test_end],
    )


def _read_columns(path: Path, columns: Sequence[str]) -> list[tuple[str, ...]]:
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            missing = [column for column in columns if column not in header]
            if missing:
                raise InputError(
                    f"{path} has no column {missing[0]!r}; its columns are "
                    f"{', '.join(map(repr, header)) or 'none'}"
                )
            return [tuple((row[column] or "").strip() for column in columns) for row in reader]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None
    except csv.Error as error:
        raise InputError(f"{path} is not a readable CSV file: {error}") from None


def _labelled(pairs: Sequence[tuple[str, str]], source: str) -> LabelledText:
    counts = Counter(label for _, label in pairs)
    if len(counts) < 2:
        found = ", ".join(counts) or "none"
        raise InputError(f"{source}: classification needs at least 2 labels, found {found}")
    names = sorted(counts)
    index = {name: position for position, name in enumerate(names)}
    return LabelledText(
        texts=[text for text, _ in pairs],
        labels=[index[label] for _, label in pairs],
        label_names=names,
    )
