"""ChildMask: named, bitpacked masks of a child network (SPEC.md, "Bit layout" and "Masks in files")."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from . import mask_parts, ops, rank_values, sharding
from .labels import label_of
from .mask_scope import by_label, checked_names, checked_shape, read_header
from .sharding import Placed
from .whole_file import open_whole, save_whole

FORMAT = "childtune_kernels.child_mask"
VERSION = "1"


class ChildMask:
    """The weights of a child network, one bit each, by parameter.

    A mask has a scope: parameters with words, and parameters that train densely (``dense_names``), for
    which it holds no bits. It is made by ``from_dense`` or ``load`` and does not change afterwards.

    Of parameters that are DTensors a mask may hold this rank's parts alone (``parts``), as ``select_child``
    makes it of DTensors. Counts, shares and comparisons are then those of the whole, and collectives: all
    ranks call them alike. ``gather`` makes a whole mask of it.

    Attributes:
        words: label → int32 mask words, shape ``[ceil(numel / 32)]``; child bit of element e is bit
            e mod 32 of word e div 32, bits past the end are 0. Of a part they go by its local elements.
        shapes: label → shape of the whole parameter.
        dense_names: labels in the scope that train densely.
        parts: label → how a parameter is spread of which this rank has words for its part only (shape,
            device_mesh, placements); empty for a whole mask.
    """

    words: Mapping[str, Tensor]
    shapes: Mapping[str, torch.Size]
    dense_names: frozenset[str]
    parts: Mapping[str, Placed]

    def __init__(
        self,
        words: Mapping[str, Tensor],
        shapes: Mapping[str, Iterable[int]],
        dense: Iterable[str] = (),
        *,
        parts: Mapping[str, Placed] | None = None,
    ) -> None:
        """Take words as they are; ``from_dense`` is the usual way.

        Raises:
            ValueError: names that do not agree, words that do not fit their shape, no parameter.
        """
        labelled = by_label(words)
        sizes = {label: checked_shape(label, shape) for label, shape in by_label(shapes).items()}
        dense_names = checked_names(dense)
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
        self.parts = MappingProxyType(by_label(parts or {}))
        self._held = {
            label: sharding.part_shape(label, self.parts[label]) if label in self.parts else shape
            for label, shape in sizes.items()
        }
        for label, tensor in labelled.items():
            ops.check_words(label, tensor, self._held[label].numel(), tail_is_zero=True)
        ops.check_tails(labelled, {label: self._held[label].numel() for label in labelled})
        self.words = MappingProxyType(labelled)
        self.shapes = MappingProxyType(sizes)
        self.dense_names = dense_names
        # label → digest of the whole words that a part was cut from, as far as this rank had them
        self.cut_from: dict[str, str] = {}

    @classmethod
    def from_dense(cls, masks: Mapping[str, Tensor], dense: Iterable[str] = ()) -> ChildMask:
        """Pack bool tensors.

        Args:
            masks: parameter name → bool tensor of the parameter's shape, True in the child. Wrappers'
                prefixes are taken off the names. Of a DTensor the mask holds this rank's part.
            dense: names of parameters that train densely: known to the mask, without bits.

        Raises:
            ValueError: a tensor that is not bool, a name twice, no parameter at all.
        """
        labelled = by_label(masks)
        for label, mask in labelled.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(f"mask of {label}: {kind}; a bool tensor is needed, compare first")
            if sharding.is_sharded(mask):
                sharding.check_part(label, mask)
        words = {label: ops.pack_mask(sharding.local_of(mask)) for label, mask in labelled.items()}
        placed = {label: sharding.placed_of(mask) for label, mask in labelled.items()}
        return cls(
            words,
            {label: mask.shape for label, mask in labelled.items()},
            dense,
            parts={label: each for label, each in placed.items() if each is not None},
        )

    @property
    def names(self) -> list[str]:
        """The labels in the scope: those with words in their order, then the dense ones sorted."""
        return [*self.words, *sorted(self.dense_names)]

    def __contains__(self, name: str) -> bool:
        return label_of(name) in self.words or label_of(name) in self.dense_names

    def dense(self, name: str) -> Tensor:
        """The bool tensor of one parameter, in its shape; of a part the part's.

        Raises:
            KeyError: no words under this name (it trains densely, or is not in the mask).
        """
        label = self._label_with_words(name)
        return ops.unpack_mask(self.words[label], self._held[label])

    def count(self, name: str | None = None) -> int:
        """The number of child elements, of one parameter or of all that have words."""
        labels = self.words if name is None else [self._label_with_words(name)]
        own = {label: ops.count_mask(self.words[label]) for label in labels}
        return sum(mask_parts.counts_of_whole(own, self.parts).values())

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
            label: ops.pack_mask(~ops.unpack_mask(words, self._held[label]))
            for label, words in self.words.items()
        }
        return self._with(inverted)

    def __eq__(self, other: object) -> bool:
        """Whether scopes and bits are the same, of this rank's parts on all ranks."""
        if not isinstance(other, ChildMask):
            return NotImplemented
        if not self._same_scope(other):
            return False
        if other.parts and not self.parts:
            return other == self
        differ = not all(
            torch.equal(words.cpu(), self._like(other, label).cpu())
            for label, words in self.words.items()
        )
        if not self.parts:
            return not differ
        return not int(rank_values.counts_over_ranks(torch.tensor([differ]).long()))

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
        return self._with({label: words.to(device) for label, words in self.words.items()})

    def gather(self) -> ChildMask:
        """The whole mask, on every rank: of parts a collective, of a whole mask itself."""
        if not self.parts:
            return self
        words = {
            label: mask_parts.whole_words(label, words, self.parts[label])
            if label in self.parts
            else words
            for label, words in self.words.items()
        }
        return ChildMask(words, self.shapes, self.dense_names)

    def placed(self, parameters: Iterable[tuple[str, Tensor]]) -> ChildMask:
        """Of a whole mask the parts that go with this rank's parts of named parameters.

        Args:
            parameters: names and tensors, as ``model.named_parameters()`` gives them.

        Raises:
            ValueError: a parameter of another shape than in the mask, or one that is placed otherwise
                than the mask's own part.
        """
        words, parts, cut_from = dict(self.words), dict(self.parts), dict(self.cut_from)
        for name, parameter in parameters:
            label = label_of(name)
            if label not in words:
                continue
            if parameter.shape != self.shapes[label]:
                raise ValueError(
                    f"{label} has shape {tuple(self.shapes[label])} in the mask and "
                    f"{tuple(parameter.shape)} in the model; make the mask from this model"
                )
            words[label] = self.words_for(label, parameter)
            if (placed := sharding.placed_of(parameter)) is not None:
                if label not in parts:
                    cut_from[label] = mask_parts.digest(self.words[label])
                parts[label] = placed
        cut = ChildMask(words, self.shapes, self.dense_names, parts=parts)
        cut.cut_from = cut_from
        return cut

    def words_for(self, label: str, parameter: Tensor) -> Tensor:
        """The words of what this rank has of a parameter, whole or a part.

        Raises:
            ValueError: the mask has words of a part that is placed otherwise.
        """
        wanted, own = sharding.placed_of(parameter), self.parts.get(label)
        words = mask_parts.words_placed(label, self.words[label], own, wanted)
        if words is None:
            theirs = "a plain tensor" if wanted is None else sharding.described(label, wanted)
            raise ValueError(
                f"child_mask: it has words for a part of {sharding.described(label, own)}; here it is "
                f"{theirs}; give mask.gather(), which all ranks call"
            )
        return words

    def require_whole(self, what: str) -> None:
        """Refuse a mask of parts.

        Raises:
            ValueError: names ``what`` needs a whole mask, and the remedy.
        """
        if self.parts:
            raise ValueError(
                f"{what} needs a whole mask, and this one has words for this rank's part of "
                f"{next(iter(self.parts))}; give mask.gather(), which all ranks call"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask as safetensors (SPEC.md, "Masks in files"); a file appears only when it is whole.

        Of parts it is a collective: the whole mask is gathered, rank 0 writes it, and the others wait until
        it is there. An error of rank 0 is raised on all ranks.
        """
        if self.parts:
            whole = self.gather()
            with rank_values.agreed():
                if torch.distributed.get_rank() == 0:
                    whole.save(path)
            return
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
            shapes, dense = read_header(path, file.metadata())
            if set(file.keys()) != set(shapes):
                raise ValueError(
                    f"{path}: the child mask's header names other tensors than it holds"
                )
            words = {label: file.get_tensor(label) for label in shapes}
            return cls(words, shapes, dense)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.parts:
            raise TypeError(
                "a ChildMask of parts cannot be pickled or copied: its meshes belong to this process; use "
                "mask.gather(), which all ranks call"
            )
        return ChildMask, (dict(self.words), dict(self.shapes), self.dense_names)

    def __repr__(self) -> str:
        if self.parts:
            own = sum(map(ops.count_mask, self.words.values()))
            held = sum(shape.numel() for shape in self._held.values())
            return (
                f"ChildMask(this rank's part: {own:,} of {held:,} elements in {len(self.words)} parameters; "
                f"{len(self.dense_names)} train densely)"
            )
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
        if other.parts and not self.parts:
            return other._combined(self, operation)
        combined = {
            label: operation(words, self._like(other, label).to(words.device))
            for label, words in self.words.items()
        }
        return self._with(combined)

    def _with(self, words: Mapping[str, Tensor]) -> ChildMask:
        """A mask of the same scope and parts with other words."""
        return ChildMask(words, self.shapes, self.dense_names, parts=self.parts)

    def _like(self, other: ChildMask, label: str) -> Tensor:
        """Another mask's words of what this one has words of."""
        own, theirs = self.parts.get(label), other.parts.get(label)
        words = mask_parts.words_placed(label, other.words[label], theirs, own)
        if words is None:
            raise ValueError(
                f"the masks hold other parts of {label}; compare their mask.gather(), which all ranks call"
            )
        return words
