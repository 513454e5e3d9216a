"""Safetensors files that appear only when they are whole, and whose kind is checked at reading."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def save_whole(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]
) -> None:
    """Write tensors of any device and strides as one safetensors file.

    What stood at ``path`` before is there until the new file is complete.

    Raises:
        FileNotFoundError: the directory does not exist.
        OSError: it cannot be written.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is no directory; make it first")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        permissions = partial.stat().st_mode  # of this process's files; safetensors gives 0600
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            partial,
            dict(metadata),
        )
        partial.chmod(permissions)
        os.replace(partial, target)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def open_whole(
    path: str | os.PathLike[str], format: str, version: str, device: str = "cpu"
) -> Iterator[Any]:
    """Open a safetensors file of one format and version; gives safetensors' file object.

    Args:
        path: the file.
        format: what the header's ``format`` must be: ``childtune_kernels.`` and a word that names the kind.
        version: what the header's ``version`` must be.
        device: where its tensors go.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no safetensors file, a damaged one (found inside the block, too), another format or
            version.
    """
    kind = format.rpartition(".")[2].replace("_", " ")
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder and no {kind}; name a file")
    if not os.path.exists(path):
        raise FileNotFoundError(f"nothing lies at {path}; a {kind} file was expected")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != format:
                raise ValueError(f"{path} is no {kind}; its format is {metadata.get('format')!r}")
            if metadata.get("version") != version:
                raise ValueError(
                    f"{path} is a {kind} of version {metadata.get('version')}; this installation "
                    f"reads version {version}: install a newer childtune_kernels"
                )
            yield file
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is not a whole {kind}: {error}") from error
