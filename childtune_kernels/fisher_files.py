"""Fisher sums in files (SPEC.md, "Fisher information")."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._version import __version__
from .progress import progress_of_amount
from .whole_file import open_whole, save_whole

FORMAT = "childtune_kernels.fisher"
VERSION = "1"


@dataclass(frozen=True)
class StoredFisher:
    """What a file holds: sums by label in order of record, and all that is known of them."""

    sums: dict[str, Tensor]
    records_by_size: dict[int, int]
    dense: list[str]
    include: list[str] | None
    exclude: list[str]
    without_gradient: list[str]


def save_fisher(path: str | os.PathLike[str], stored: StoredFisher, kind: str) -> None:
    """Write sums and counts as one safetensors file.

    Raises:
        FileNotFoundError: the directory does not exist.
    """
    sums = {label: total.cpu() for label, total in stored.sums.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "library": __version__,
        "kind": kind,
        "order": json.dumps(list(sums)),
        "records": json.dumps(stored.records_by_size),
        "dense": json.dumps(stored.dense),
        "include": json.dumps(stored.include),
        "exclude": json.dumps(stored.exclude),
        "without_gradient": json.dumps(stored.without_gradient),
        "sha256": _digest(sums.values()),
    }
    save_whole(sums, path, metadata)


def read_fisher(path: str | os.PathLike[str]) -> StoredFisher:
    """Read what ``save_fisher`` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, another version, or one that is damaged or was altered.
    """
    with open_whole(path, FORMAT, VERSION) as file:
        try:
            header = _header(file.metadata())
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path}: the header of the Fisher file is damaged: {error}"
            ) from error
        if set(file.keys()) != set(header["order"]):
            raise ValueError(
                f"{path}: the header of the Fisher file names other tensors than it holds"
            )
        sums = {label: file.get_tensor(label) for label in header["order"]}
        if any(total.dtype != torch.float32 for total in sums.values()):
            raise ValueError(f"{path}: Fisher sums are float32; this file holds something else")
        if _digest(sums.values()) != file.metadata().get("sha256"):
            raise ValueError(
                f"{path}: the Fisher sums are not those that were saved; make them anew"
            )
    return StoredFisher(
        sums,
        {int(size): count for size, count in header["records"].items()},
        header["dense"],
        header["include"],
        header["exclude"],
        header["without_gradient"],
    )


def _header(metadata: Mapping[str, str]) -> dict[str, Any]:
    header = {
        key: json.loads(metadata[key])
        for key in ("order", "records", "dense", "include", "exclude", "without_gradient")
    }
    for key in ("order", "dense", "include", "exclude", "without_gradient"):
        names = header[key]
        if key == "include" and names is None:
            continue
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{key} is not a list of names")
    if len(set(header["order"])) != len(header["order"]) or not header["order"]:
        raise ValueError("order does not name every parameter once")
    if not set(header["without_gradient"]) <= set(header["order"]):
        raise ValueError("without_gradient names parameters that are not in the file")
    if set(header["dense"]) & set(header["order"]):
        raise ValueError("a parameter is both measured and dense")
    for size, count in header["records"].items():
        if int(size) < 1 or type(count) is not int or count < 1:
            raise ValueError(f"{count!r} records of {size} examples")
    return header


def _digest(sums: Collection[Tensor]) -> str:
    """SHA-256 of the bytes of contiguous tensors."""
    digest = hashlib.sha256()
    total_size = sum(total.numel() * total.element_size() for total in sums)
    with progress_of_amount("checksum of Fisher sums", total_size) as advance:
        for total in sums:
            if total.numel():
                size = total.numel() * total.element_size()
                digest.update((ctypes.c_char * size).from_address(total.data_ptr()))
                advance(size)
    return digest.hexdigest()
