"""Safetensors weights of a model on disk: one file, or a folder with one file or an index of shards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .whole_file import save_whole

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, eq=False)
class WeightFiles:
    """Weights that were read from disk; tensors are mapped, and read from disk when they are used.

    Attributes:
        path: the file or folder.
        tensors: name → tensor.
        files: file name → names of its tensors.
        metadata: file name → its header's metadata.
        index: the content of the index of shards; None where there is none.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    files: Mapping[str, Sequence[str]]
    metadata: Mapping[str, Mapping[str, str]]
    index: Mapping[str, Any] | None


def read_weights(path: str | os.PathLike[str]) -> WeightFiles:
    """Open the weights at a path: a file, or a folder with ``model.safetensors`` or an index of shards.

    Raises:
        FileNotFoundError: there is nothing of the kind.
        ValueError: a damaged file, or a mask, child checkpoint or Fisher file; an index that names
            other files or tensors than there are.
    """
    path = Path(path)
    index: dict[str, Any] | None = None
    folder, names = path, [SINGLE]
    if not path.is_dir():
        folder, names = path.parent, [path.name]
    elif not (path / SINGLE).exists():
        index = _read_index(path)
        names = sorted(set(index["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    files: dict[str, list[str]] = {}
    metadata: dict[str, dict[str, str]] = {}
    for name in names:
        found, metadata[name] = _read_file(
            folder / name, path / INDEX if index is not None else None
        )
        written_as = metadata[name].get("format", "")
        if written_as.startswith("childtune_kernels."):
            raise ValueError(f"{folder / name} is no model; its format is {written_as!r}")
        files[name] = list(found)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise ValueError(f"{folder / name}: {twice[0]} stands in another file too")
        tensors |= found
    if index is not None and index["weight_map"] != {
        tensor: name for name, held in files.items() for tensor in held
    }:
        raise ValueError(f"{path / INDEX} names other tensors than its files hold; get them anew")
    return WeightFiles(path, tensors, files, metadata, index)


def _read_file(path: Path, index: Path | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        expected = f"a safetensors file, or a folder with {SINGLE} or {INDEX},"
        if index is not None:
            expected = f"a shard that {index} names"
        raise FileNotFoundError(f"nothing lies at {path}; {expected} was expected")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has neither {SINGLE} nor {INDEX}; name the folder of safetensors weights, or a file"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names = index["weight_map"].values()
        plain = all(name == os.path.basename(name) and name.strip(".") for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no index of shards: {error!r}") from error
    if not plain or not names:
        raise ValueError(f"{path} names files outside its folder, or none")
    checked: dict[str, Any] = index
    return checked


def check_target(target: str | os.PathLike[str], source: WeightFiles) -> None:
    """Refuse a target that cannot take weights in the layout of ``source``.

    Raises:
        FileNotFoundError: the target's parent directory does not exist.
        FileExistsError: the target folder has something in it, or is a file, or the other way round.
    """
    target = Path(target)
    if not source.path.is_dir():
        if target.is_dir():
            raise FileExistsError(f"{target} is a folder and {source.path} a file; name a file")
    elif target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file and {source.path} a folder; name a folder")
    elif target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} exists and is no empty folder; name another")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is no directory; make it first")


def write_weights(
    target: str | os.PathLike[str],
    source: WeightFiles,
    changed: Callable[[str, Tensor], Tensor],
    advance: Callable[[int], object],
) -> None:
    """Write weights in the layout of ``source``; a file or folder appears only when it is whole.

    Args:
        target: a file where the source is one, else a folder that does not exist or is empty.
        source: gives names, shards, metadata and index.
        changed: from a name and the source's tensor to the tensor to be written.
        advance: is told the bytes of each file that is written.

    Raises:
        FileNotFoundError: the target's parent directory does not exist.
        FileExistsError: the target folder has something in it, or is a file, or the other way round.
    """
    target = Path(target)
    check_target(target, source)

    def write(name: str, path: Path) -> None:
        tensors = {tensor: changed(tensor, source.tensors[tensor]) for tensor in source.files[name]}
        save_whole(tensors, path, source.metadata[name])
        advance(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))

    if not source.path.is_dir():
        write(next(iter(source.files)), target)
        return
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        for name in source.files:
            write(name, partial / name)
        if source.index is not None:
            (partial / INDEX).write_text(
                json.dumps(source.index, indent=2) + "\n", encoding="utf-8"
            )
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
