"""ChildMask: named, bitpacked masks of a child network (SPEC.md, "Bit layout" and "Masks in files")."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import ops
from .labels import label_of
from .whole_file import open_whole, save_whole

FORMAT = "childtune_kernels.child_mask"
VERSION = "1"

_V = TypeVar("_V")


class ChildMask:
    """The weights of a child network, one bit each, by parameter.

    A mask has a scope: parameters with words, and parameters that train densely (``dense_names``), for
    which it holds no bits. It is made by ``from_dense`` or ``load`` and does not change afterwards.

    Attributes:
        words: label → int32 mask words, shape ``[ceil(numel / 32)]``; child bit of element e is bit
            e mod 32 of word e div 32, bits past the end are 0.
        shapes: label → shape of the parameter.
        dense_names: labels in the scope that train densely.
    """

    words: Mapping[str, Tensor]
    shapes: Mapping[str, torch.Size]
    dense_names: frozenset[str]

    def __init__(
        self,
        words: Mapping[str, Tensor],
        shapes: Mapping[str, Iterable[int]],
        dense: Iterable[str] = (),
    ) -> None:
        """Take words as they are; ``from_dense`` is the usual way.

        Raises:
            ValueError: names that do not agree, words that do not fit their shape, no parameter.
        """
        labelled = by_label(words)
        sizes = {label: _checked_shape(label, shape) for label, shape in by_label(shapes).items()}
        dense_names = _checked_names(dense)
        if labelled.keys() != sizes.keys():
            odd = sorted(labelled.keys() ^ sizes.keys())
            raise ValueError(f"words and shapes name different parameters: {', '.join(odd[:8])}")
        both = sorted(dense_names & labelled.keys())
        if both:
            raise ValueError(
                f"{', '.join(both[:8])} cannot be dense and have a mask; name them once"
            )
        if not labelled and not dense_names:
            raise ValueError("a child mask needs at least one parameter")
        for label, tensor in labelled.items():
            ops.check_words(label, tensor, sizes[label].numel(), tail_is_zero=True)
        ops.check_tails(labelled, {label: sizes[label].numel() for label in labelled})
        self.words = MappingProxyType(labelled)
        self.shapes = MappingProxyType(sizes)
        self.dense_names = dense_names

    @classmethod
    def from_dense(cls, masks: Mapping[str, Tensor], dense: Iterable[str] = ()) -> ChildMask:
        """Pack bool tensors.

        Args:
            masks: parameter name → bool tensor of the parameter's shape, True in the child. Wrappers'
                prefixes are taken off the names.
            dense: names of parameters that train densely: known to the mask, without bits.

        Raises:
            ValueError: a tensor that is not bool, a name twice, no parameter at all.
        """
        labelled = by_label(masks)
        for label, mask in labelled.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(f"mask of {label}: {kind}; a bool tensor is needed, compare first")
        words = {label: ops.pack_mask(mask) for label, mask in labelled.items()}
        return cls(words, {label: mask.shape for label, mask in labelled.items()}, dense)

    @property
    def names(self) -> list[str]:
        """The labels in the scope: those with words in their order, then the dense ones sorted."""
        return [*self.words, *sorted(self.dense_names)]

    def __contains__(self, name: str) -> bool:
        return label_of(name) in self.words or label_of(name) in self.dense_names

    def dense(self, name: str) -> Tensor:
        """The bool tensor of one parameter, in its shape.

        Raises:
            KeyError: no words under this name (it trains densely, or is not in the mask).
        """
        label = self._label_with_words(name)
        return ops.unpack_mask(self.words[label], self.shapes[label])

    def count(self, name: str | None = None) -> int:
        """The number of child elements, of one parameter or of all that have words."""
        labels = self.words if name is None else [self._label_with_words(name)]
        return sum(ops.count_mask(self.words[label]) for label in labels)

    def numel(self, name: str | None = None) -> int:
        """The number of elements in scope, of one parameter or of all that have words."""
        labels = self.words if name is None else [self._label_with_words(name)]
        return sum(self.shapes[label].numel() for label in labels)

    def density(self, name: str | None = None) -> float:
        """The share of child elements among those in scope; parameters that train densely do not count.

        Raises:
            ValueError: there are no elements in scope.
        """
        numel = self.numel(name)
        if numel == 0:
            raise ValueError("density of a mask without elements in scope is undefined")
        return self.count(name) / numel

    def __and__(self, other: ChildMask) -> ChildMask:
        """Elements in both. Raises ValueError where the scopes differ."""
        return self._combined(other, torch.bitwise_and)

    def __or__(self, other: ChildMask) -> ChildMask:
        """Elements in either. Raises ValueError where the scopes differ."""
        return self._combined(other, torch.bitwise_or)

    def __invert__(self) -> ChildMask:
        """The elements in scope that are not in the child; what trains densely still does."""
        inverted = {
            label: ops.pack_mask(~ops.unpack_mask(words, self.shapes[label]))
            for label, words in self.words.items()
        }
        return ChildMask(inverted, self.shapes, self.dense_names)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChildMask):
            return NotImplemented
        return self._same_scope(other) and all(
            torch.equal(words.cpu(), other.words[label].cpu())
            for label, words in self.words.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def overlap(self, other: ChildMask) -> float:
        """|a ∩ b| / |a|: the share of this child that is in the other too (the paper's Figure 3).

        Raises:
            ValueError: this child is empty, or the scopes differ.
        """
        count = self.count()
        if count == 0:
            raise ValueError("overlap of an empty child is undefined")
        return (self & other).count() / count

    def jaccard(self, other: ChildMask) -> float:
        """|a ∩ b| / |a ∪ b|.

        Raises:
            ValueError: both children are empty, or the scopes differ.
        """
        union = (self | other).count()
        if union == 0:
            raise ValueError("jaccard of two empty children is undefined")
        return (self & other).count() / union

    def to(self, device: torch.device | str) -> ChildMask:
        """The same mask with its words on a device."""
        moved = {label: words.to(device) for label, words in self.words.items()}
        return ChildMask(moved, self.shapes, self.dense_names)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask as safetensors (SPEC.md, "Masks in files"); a file appears only when it is whole."""
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "shapes": json.dumps({label: list(shape) for label, shape in self.shapes.items()}),
            "dense": json.dumps(sorted(self.dense_names)),
        }
        save_whole(self.words, path, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> ChildMask:
        """Read a mask written by ``save``.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: another kind of file, another version, or words that do not fit.
        """
        with open_whole(path, FORMAT, VERSION, str(device)) as file:
            shapes, dense = _read_header(path, file.metadata())
            if set(file.keys()) != set(shapes):
                raise ValueError(
                    f"{path}: the child mask's header names other tensors than it holds"
                )
            words = {label: file.get_tensor(label) for label in shapes}
            return cls(words, shapes, dense)

    def __reduce__(self) -> tuple[Any, ...]:
        return ChildMask, (dict(self.words), dict(self.shapes), self.dense_names)

    def __repr__(self) -> str:
        if self.numel() == 0:
            return f"ChildMask({len(self.words)} parameters, {len(self.dense_names)} dense)"
        return (
            f"ChildMask({self.count():,} of {self.numel():,} elements in {len(self.words)} parameters, "
            f"density {self.density():.4f}; {len(self.dense_names)} train densely)"
        )

    def _label_with_words(self, name: str) -> str:
        label = label_of(name)
        if label not in self.words:
            why = "trains densely" if label in self.dense_names else "is not in this mask"
            raise KeyError(
                f"{label} {why}; the mask has words for {', '.join(list(self.words)[:6])}"
            )
        return label

    def _same_scope(self, other: ChildMask) -> bool:
        return dict(self.shapes) == dict(other.shapes) and self.dense_names == other.dense_names

    def _combined(
        self, other: ChildMask, operation: Callable[[Tensor, Tensor], Tensor]
    ) -> ChildMask:
        if not isinstance(other, ChildMask):
            return NotImplemented
        if not self._same_scope(other):
            odd = sorted(
                label
                for label in {*self.names, *other.names}
                if self.shapes.get(label) != other.shapes.get(label)
                or (label in self.dense_names) != (label in other.dense_names)
            )
            among, more = len({*self.names, *other.names}), ", …" if len(odd) > 5 else ""
            raise ValueError(
                f"the masks differ in scope at {len(odd)} of {among} parameters: "
                f"{', '.join(odd[:5])}{more}; compare equal scopes"
            )
        combined = {
            label: operation(words, other.words[label].to(words.device))
            for label, words in self.words.items()
        }
        return ChildMask(combined, self.shapes, self.dense_names)


def _read_header(
    path: str | os.PathLike[str], metadata: Mapping[str, str]
) -> tuple[dict[str, list[int]], list[str]]:
    """The shapes and dense names in a file's metadata."""
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


def _checked_shape(label: str, shape: Iterable[int]) -> torch.Size:
    sizes = list(shape)
    if not all(isinstance(size, int) and 0 <= size < 2**63 for size in sizes):
        raise ValueError(f"the child mask gives {label} the shape {sizes!r}; sizes are counts")
    return torch.Size(sizes)


def _checked_names(dense: Iterable[str]) -> frozenset[str]:
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
