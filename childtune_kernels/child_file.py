"""ChildCheckpoint: what a child checkpoint holds, and its file (SPEC.md, "Child checkpoints in files")."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from ._version import __version__
from .child_mask import ChildMask
from .named_weights import Ties
from .progress import progress_of_amount
from .weight_bits import BitDigest
from .whole_file import open_whole, save_whole

FORMAT = "childtune_kernels.child_checkpoint"
VERSION = "1"
_ROLES = ("child", "dense", "buffer", "base")
_KEYS = ("members", "ties", "fingerprint", "library")


@dataclass(frozen=True, eq=False)
class ChildCheckpoint:
    """A tuned child without its base model.

    Attributes:
        mask: the child; ``dense_names`` are the parameters that are stored whole.
        values: label → the weights inside the child, in element order, one dimension, the weight's type.
        whole: label → dense parameters and buffers, whole.
        shapes: label → shape, of every weight of the model, those that belong to the base alone too.
        dtypes: label → type, of the same.
        ties: first label → other labels of a tied weight; None where nobody knew.
        fingerprint: of the base, over everything that is not stored here (hexadecimal).
        library: version of this package that wrote it.
    """

    mask: ChildMask
    values: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]
    shapes: Mapping[str, torch.Size]
    dtypes: Mapping[str, torch.dtype]
    ties: Ties | None
    fingerprint: str
    library: str = __version__

    @property
    def buffers(self) -> list[str]:
        """Labels of the stored buffers."""
        return [label for label in self.whole if label not in self.mask.dense_names]

    def role(self, label: str) -> str:
        """``"child"``, ``"dense"``, ``"buffer"``, or ``"base"``: not stored, the base's own."""
        if label in self.values:
            return "child"
        if label in self.mask.dense_names:
            return "dense"
        return "buffer" if label in self.whole else "base"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; it appears only when it is whole."""
        tensors = {f"words.{label}": self.mask.words[label].cpu() for label in self.values}
        tensors |= {f"values.{label}": values for label, values in self.values.items()}
        tensors |= {f"whole.{label}": tensor for label, tensor in self.whole.items()}
        members = {
            label: [_name(self.dtypes[label]), list(shape), self.role(label)]
            for label, shape in self.shapes.items()
        }
        metadata = {
            "members": json.dumps(members),
            "ties": json.dumps(self.ties),
            "fingerprint": self.fingerprint,
            "library": self.library,
        }
        digest = content_digest(tensors, metadata, os.fspath(path))
        save_whole(
            tensors, path, {"format": FORMAT, "version": VERSION, **metadata, "sha256": digest}
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def content_digest(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], what: str = ""
) -> str:
    """The SHA-256 of a child checkpoint's content: its header's entries and every tensor."""
    digest = BitDigest()
    for key in _KEYS:
        digest.add_line(key, metadata.get(key))
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with progress_of_amount(f"digest of {os.path.basename(what)}", total) as advance:
        for name in sorted(tensors):
            digest.add(name, tensors[name])
            advance(tensors[name].numel() * tensors[name].element_size())
    return digest.hexdigest()


def load_child(path: str | os.PathLike[str]) -> ChildCheckpoint:
    """Read a child checkpoint, on the CPU, and check it whole.

    Args:
        path: what ``save_child`` or ``childtune child diff`` wrote.

    Returns:
        Mask, values and whole tensors; ``apply_child`` puts them into a base.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, another version, or one that was cut or altered.
    """
    with open_whole(path, FORMAT, VERSION) as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if content_digest(tensors, metadata, os.fspath(path)) != metadata.get("sha256"):
            raise ValueError(
                f"{path} was altered or damaged: its content is not what its header's sha256 says; "
                "get a fresh copy"
            )
    try:
        return _checkpoint(tensors, metadata)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole child checkpoint: {error}") from error


def _checkpoint(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> ChildCheckpoint:
    members = json.loads(metadata["members"])
    labels: dict[str, list[str]] = {role: [] for role in _ROLES}
    shapes: dict[str, torch.Size] = {}
    dtypes: dict[str, torch.dtype] = {}
    for label, (dtype, sizes, role) in members.items():
        shapes[label], dtypes[label] = _sizes(sizes), _dtype(dtype)
        labels[role].append(label)
    stored = [*labels["dense"], *labels["buffer"]]
    expected = {f"{kind}.{label}" for kind in ("words", "values") for label in labels["child"]}
    expected |= {f"whole.{label}" for label in stored}
    if tensors.keys() != expected:
        odd = sorted(tensors.keys() ^ expected)
        raise ValueError(f"header and tensors disagree about {', '.join(odd[:6])}")
    mask = ChildMask(
        {label: tensors[f"words.{label}"] for label in labels["child"]},
        {label: shapes[label] for label in labels["child"]},
        labels["dense"],
    )
    values = {label: tensors[f"values.{label}"] for label in labels["child"]}
    whole = {label: tensors[f"whole.{label}"] for label in stored}
    for label, tensor in values.items():
        count = ops.count_mask(mask.words[label])
        _check(label, tensor, dtypes[label], torch.Size([count]))
    for label, tensor in whole.items():
        _check(label, tensor, dtypes[label], shapes[label])
    return ChildCheckpoint(
        mask=mask,
        values=values,
        whole=whole,
        shapes=shapes,
        dtypes=dtypes,
        ties=_ties(json.loads(metadata["ties"])),
        fingerprint=metadata["fingerprint"],
        library=metadata["library"],
    )


def _check(label: str, tensor: Tensor, dtype: torch.dtype, shape: torch.Size) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(
            f"{label} is stored as {tuple(tensor.shape)} of {tensor.dtype}; its header and words say "
            f"{tuple(shape)} of {dtype}"
        )


def _sizes(sizes: Any) -> torch.Size:
    if not isinstance(sizes, list) or not all(
        type(size) is int and 0 <= size < 2**63 for size in sizes
    ):
        raise ValueError(f"{sizes!r} is no shape")
    return torch.Size(sizes)


def _dtype(name: Any) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no type of tensors")
    return dtype


def _ties(ties: Any) -> Ties | None:
    if ties is None:
        return None
    if not isinstance(ties, dict) or not all(
        isinstance(others, list) and all(isinstance(other, str) for other in others)
        for others in ties.values()
    ):
        raise ValueError("its ties are not lists of labels")
    return ties
