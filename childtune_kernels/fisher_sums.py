"""Sums of squared gradients with their counts: what is read, merged, saved, and made into a mask."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from . import fisher_parts, ops, rank_values, sharding
from .child_mask import ChildMask
from .fisher_files import StoredFisher, read_fisher, save_fisher
from .fisher_scope import near_labels
from .labels import label_of, shortened
from .mask_scope import by_label
from .selection import select_child

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PER_EXAMPLE, BATCH_MEAN, MIXED = "per example", "batch mean squares", "mixed"

_Sums = TypeVar("_Sums", bound="FisherSums")


class FisherSums:
    """The Fisher information of a model's weights without the model (SPEC.md, "Fisher information").

    ``FisherAccumulator`` is one that records; a loaded file is one too, and so is what other programs or
    ranks have summed.

    Args:
        sums: name → contiguous fp32 sum of squared gradients, taken as it is and not copied; of a DTensor
            parameter a DTensor of its placements.
        records_by_size: examples per record → number of records.
        dense: names of parameters that train densely.
        include, exclude: the patterns that led to this scope, for the metadata.
        without_gradient: names among ``sums`` that never got a gradient.

    Raises:
        ValueError: sums of another type, a name twice, counts below 1.
    """

    def __init__(
        self,
        sums: Mapping[str, Tensor],
        records_by_size: Mapping[int, int],
        dense: Iterable[str] = (),
        *,
        include: Iterable[str] | None = None,
        exclude: Iterable[str] = (),
        without_gradient: Iterable[str] = (),
    ) -> None:
        self._sums = by_label(sums)
        for label, total in self._sums.items():
            ops.check_squares(label, sharding.local_of(total), sharding.local_of(total))
        self._dense = tuple(map(label_of, dense))
        both = self._sums.keys() & set(self._dense)
        if both:
            raise ValueError(
                f"{shortened(sorted(both))} cannot be dense and have sums; name them once"
            )
        self.include = None if include is None else tuple(include)
        self.exclude = tuple(exclude)
        self._records = {
            checked_count("examples per record", size): checked_count("records", count)
            for size, count in records_by_size.items()
        }
        self._seen = self._sums.keys() - set(map(label_of, without_gradient))
        # Whether gradients came from torch.func, which gives zeros where there is none.
        self._functional = False
        self._broken = False
        self._reduced = False

    @property
    def sums(self) -> Mapping[str, Tensor]:
        """Label → fp32 sum of squares, in the model's order: the accumulator's own tensors."""
        self._require_whole()
        return MappingProxyType(self._sums)

    @property
    def records_by_size(self) -> Mapping[int, int]:
        """Examples per record → number of records."""
        self._require_whole()
        return MappingProxyType(self._records)

    @property
    def records(self) -> int:
        """The number of records: squared gradients per element."""
        return sum(self.records_by_size.values())

    @property
    def examples(self) -> int:
        """The number of examples that the records were made of."""
        return sum(size * count for size, count in self.records_by_size.items())

    @property
    def kind(self) -> str:
        """``"per example"``, ``"batch mean squares"`` or ``"mixed"``; the first without records."""
        sizes = self.records_by_size.keys()
        if not sizes - {1}:
            return PER_EXAMPLE
        return MIXED if 1 in sizes else BATCH_MEAN

    @property
    def names(self) -> list[str]:
        """The labels in scope, in the model's order."""
        return list(self._sums)

    @property
    def dense_names(self) -> frozenset[str]:
        """The labels of trainable parameters outside the scope."""
        return frozenset(self._dense)

    @property
    def without_gradient(self) -> list[str]:
        """Labels in scope that got no gradient in any record; their Fisher information is zero."""
        self._require_whole()
        return [
            label
            for label, total in self._sums.items()
            if label not in self._seen and not (self._functional and bool(total.any()))
        ]

    def values(self) -> dict[str, Tensor]:
        """Label → Fisher information: the mean square per record, fp32, in new tensors.

        Raises:
            RuntimeError: there is no record.
        """
        return {label: self[label] for label in self._sums}

    def __getitem__(self, name: str) -> Tensor:
        label, records = label_of(name), self._require_records()
        if label not in self._sums:
            why = "trains densely" if label in self._dense else "is not in scope"
            near = near_labels(label, self.names)
            raise KeyError(f"{label} {why}; in scope are {shortened(near)}")
        total = self._sums[label]
        return sharding.placed_as(sharding.local_of(total) / records, total)

    def child_mask(
        self,
        reserve_p: float | None = None,
        *,
        k: int | None = None,
        scope: str = "global",
        granularity: int = 1,
        largest: bool = True,
        rule: str = "exact",
    ) -> ChildMask:
        """The child network of the weights with the most Fisher information.

        Trainable parameters outside the scope train densely, so the mask fits
        ``FusedChildAdamW(model.named_parameters(), child_mask=mask)``; give the optimizer the trainable
        ones alone where some are frozen, which the mask does not know. It is selected from the sums, which
        are in the order of the means; sums on several devices are copied to the CPU. Parameters without
        a gradient draw a warning. Of DTensors it is a collective of all ranks. Arguments: ``select_child``.

        Raises:
            ValueError: as ``select_child``, above all NaN or infinite sums, by name.
            RuntimeError: there is no record.
        """
        self._require_records()
        idle = self.without_gradient
        if idle:
            warnings.warn(
                f"{len(idle)} parameters got no gradient, so their Fisher information is zero: "
                f"{shortened(idle)}; exclude what shall train densely, freeze what shall not train",
                UserWarning,
                stacklevel=2,
            )
        sums = self._sums
        if len({sharding.local_of(total).device for total in sums.values()}) > 1:
            sums = {label: fisher_parts.on_cpu(total) for label, total in sums.items()}
        return select_child(
            sums,
            reserve_p=reserve_p,
            k=k,
            scope=scope,
            granularity=granularity,
            largest=largest,
            dense=self._dense,
            rule=rule,
        )

    def merge(self, other: FisherSums) -> None:
        """Add another accumulator's sums and counts, as of another run over other examples.

        Where one was recorded per example and the other was not, the kind becomes ``"mixed"``. Each sum is
        rounded once more, so that the order of merging can show in the last bits. Of whole sums an
        accumulator of DTensors takes its parts; where the other's are DTensors it is a collective.

        Raises:
            TypeError: no accumulator.
            ValueError: another scope, other shapes. Nothing was added.
            RuntimeError: one of the two holds a part of a record.
        """
        if not isinstance(other, FisherSums):
            raise TypeError(f"other must be a FisherAccumulator, not {type(other).__name__}")
        self._require_whole()
        other._require_whole()
        self._require_scope(other)
        arrived = other._sums.keys() - set(other.without_gradient)
        for label, total in self._sums.items():
            own = sharding.local_of(total)
            own.add_(fisher_parts.for_sums(label, other._sums[label], total).to(own.device))
        self._add_records(dict(other._records))
        self._seen |= arrived

    def reduce(self, process_group: ProcessGroup | None = None) -> None:
        """Add up what the ranks of a group have recorded, each of its own examples; a collective of them.

        Sums are added in the order of the ranks, so that all of them hold the same bits, and so do the
        masks that are made of them. The order of parameters becomes that of the group's first rank.

        Args:
            process_group: None: all ranks. Under tensor parallelism the ranks of one coordinate, which have
                parts of models of their own.

        Changes in place: sums, records and ``without_gradient``, on every rank.

        Raises:
            ValueError: another scope or other shapes on another rank, or sums of DTensors that the ranks
                share; on all ranks, nothing was added.
            RuntimeError: a rank holds a part of a record, or reduced before, since the last ``reset()``.
        """
        if not rank_values.is_distributed(process_group):
            return
        with rank_values.agreed(process_group):
            self._require_whole()
            fisher_parts.require_models_of_their_own(self._sums, process_group)
            if self._reduced:
                raise RuntimeError(
                    "reduce() twice would count examples twice; call reset() between. To add more examples, "
                    "save() what is reduced, reset(), record and reduce() those, and merge() the two"
                )
        shapes = {
            label: (tuple(total.shape), tuple(sharding.local_of(total).shape))
            for label, total in self._sums.items()
        }
        own = shapes, sorted(self._dense), dict(self._records), self._seen, self._functional
        of_ranks = rank_values.gathered_objects(own, process_group)
        first_shapes, first_dense = of_ranks[0][:2]
        for rank, (others, dense, _, _, _) in enumerate(of_ranks):
            odd = sorted(label for label, _ in others.items() ^ first_shapes.items())
            odd += sorted({*dense} ^ {*first_dense})
            if odd:
                named = shortened([*dict.fromkeys(odd)])
                raise ValueError(
                    f"the scopes of rank {rank} and rank 0 differ: {named}; use the same model and "
                    "patterns on all ranks"
                )
        self._sums = {label: self._sums[label] for label in first_shapes}
        for total in self._sums.values():
            rank_values.add_over_ranks_(sharding.local_of(total), process_group)
        self._records = {}
        for _, _, records, _, _ in of_ranks:
            self._add_records(records)
        self._seen = {label for each in of_ranks for label in each[3]}
        self._functional = any(each[4] for each in of_ranks)
        self._reduced = True

    def __iadd__(self: _Sums, other: FisherSums) -> _Sums:
        self.merge(other)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write sums, counts and scope as safetensors; the file appears only when it is whole.

        Of DTensors it is a collective of all ranks: sums are gathered one by one, rank 0 writes the
        whole ones, and the others wait until they are there. An error of rank 0 is raised on all ranks.

        Raises:
            FileNotFoundError: the directory does not exist.
            RuntimeError: the sums hold a part of a record.
        """
        self._require_whole()
        whole = fisher_parts.whole_sums(self._sums)
        with rank_values.agreed() if fisher_parts.any_sharded(self._sums) else nullcontext():
            if whole is not None:
                self._write(path, whole)

    def _write(self, path: str | os.PathLike[str], whole: dict[str, Tensor]) -> None:
        stored = StoredFisher(
            sums=whole,
            records_by_size=dict(self._records),
            dense=list(self._dense),
            include=None if self.include is None else list(self.include),
            exclude=list(self.exclude),
            without_gradient=self.without_gradient,
        )
        save_fisher(path, stored, self.kind)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FisherSums:
        """Read what ``save`` wrote; the sums lie on the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: another kind of file, or a damaged or altered one.
        """
        return FisherSums(**vars(read_fisher(path)))

    def __repr__(self) -> str:
        state = ", stopped half-way" if self._broken else ""
        return (
            f"{type(self).__name__}({len(self._sums)} parameters, {len(self._dense)} dense; "
            f"{sum(self._records.values()):,} records{state})"
        )

    def _add_records(self, records_by_size: Mapping[int, int]) -> None:
        for size, count in records_by_size.items():
            self._records[size] = self._records.get(size, 0) + count

    def _require_whole(self) -> None:
        if self._broken:
            raise RuntimeError(
                "a backward stopped half-way, so the sums hold a part of its gradients; call reset() or "
                "make a new FisherAccumulator, and record from the start"
            )

    def _require_records(self) -> int:
        records = self.records
        if not records:
            raise RuntimeError("there is no record yet; run a backward within recording() first")
        return records

    def _require_scope(self, other: FisherSums) -> None:
        for what, own, others in (
            ("in scope", self._sums.keys(), other._sums.keys()),
            ("dense", set(self._dense), set(other._dense)),
        ):
            if own != others:
                raise ValueError(
                    f"the scopes differ: {shortened(sorted(own ^ others))} is {what} in one of them only; "
                    "use the same model and patterns"
                )
        for label, total in self._sums.items():
            if total.shape != other._sums[label].shape:
                raise ValueError(
                    f"the sums of {label} have shape {tuple(total.shape)} and "
                    f"{tuple(other._sums[label].shape)}; use the same model"
                )


def checked_count(what: str, count: int) -> int:
    """A number of examples or records as it is.

    Raises:
        ValueError: no int of 1 or more.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{what}: {count!r} must be an int, 1 or more")
    return count
