"""What a mask says of its scope: labels, shapes, what trains densely; as given and as read from a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch

from .labels import label_of

_V = TypeVar("_V")


def read_header(
    path: str | os.PathLike[str], metadata: Mapping[str, str]
) -> tuple[dict[str, list[int]], list[str]]:
    """The shapes and dense names in a file's metadata.

    Raises:
        ValueError: metadata that lacks them, or of another kind.
    """
    try:
        shapes, dense = json.loads(metadata["shapes"]), json.loads(metadata["dense"])
    except (KeyError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole child mask: {error}") from error
    if not isinstance(shapes, dict) or not all(
        isinstance(sizes, list) for sizes in shapes.values()
    ):
        raise ValueError(f"{path}: the child mask's shapes are not lists of sizes by label")
    if not isinstance(dense, list) or not all(isinstance(name, str) for name in dense):
        raise ValueError(f"{path}: the child mask's dense names are not a list of names")
    return shapes, dense


def checked_shape(label: str, shape: Iterable[int]) -> torch.Size:
    """A parameter's shape.

    Raises:
        ValueError: sizes that are no counts.
    """
    sizes = list(shape)
    if not all(isinstance(size, int) and 0 <= size < 2**63 for size in sizes):
        raise ValueError(f"the child mask gives {label} the shape {sizes!r}; sizes are counts")
    return torch.Size(sizes)


def checked_names(dense: Iterable[str]) -> frozenset[str]:
    """The labels of what trains densely.

    Raises:
        ValueError: text alone, no names, or one label twice.
    """
    if isinstance(dense, str):
        raise ValueError(f"dense={dense!r} must be a list of names; use dense=[{dense!r}]")
    names = list(dense)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"dense={names!r} must be a list of names")
    labels = [label_of(name) for name in names]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(
            f"the label {twice[0]!r} stands for two parameters of the mask; rename one"
        )
    return frozenset(labels)


def by_label(named: Mapping[str, _V]) -> dict[str, _V]:
    """The same values under the labels of their names.

    Raises:
        ValueError: two names have one label.
    """
    labelled: dict[str, _V] = {}
    for name, value in named.items():
        label = label_of(name)
        if label in labelled:
            raise ValueError(
                f"the label {label!r} stands for two parameters of the mask; rename one"
            )
        labelled[label] = value
    return labelled
