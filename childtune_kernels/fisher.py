"""FisherAccumulator: the diagonal Fisher information of a model's weights, example by example."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from . import ops, registry
from .child_mask import ChildMask
from .fisher_examples import LossFunction, example_gradients
from .fisher_files import StoredFisher, read_fisher, save_fisher
from .fisher_recording import Recording
from .fisher_scope import FisherScope, Patterns, near_labels, scope_of, shortened
from .labels import label_of
from .selection import select_child

PER_EXAMPLE, BATCH_MEAN, MIXED = "per example", "batch mean squares", "mixed"
_NO_SCOPE = FisherScope((), (), None, ())


class FisherAccumulator:
    """Sums of squared gradients of a model's weights (SPEC.md, "Fisher information").

    A record is one squared gradient: of one example, as the paper has it, or of the mean loss of several,
    which is cheaper and another quantity. Put the model in eval mode: with dropout the squares would
    contain its noise, and batch norm in train mode mixes the examples of a batch. Frozen parameters are
    left out; trainable ones outside the scope train densely under the mask.

    Args:
        model: its parameters are read; nothing of it changes.
        include: patterns (``fnmatch``) on parameter names; None takes all. One pattern may be text alone.
        exclude: patterns of parameters to leave out, whatever ``include`` says.
        offload: ``"cpu"`` keeps the sums in main memory and moves gradients there a tensor at a time;
            None keeps them beside the parameters.
        backend: of op fisher_accumulate; None takes the first available one.

    Example::

        fisher = FisherAccumulator(model.eval(), exclude=("*embeddings*", "classifier*"))
        with fisher.recording():
            for example in loader:  # batch size 1
                loss(model, example).backward()
        mask = fisher.child_mask(reserve_p=0.3)

    Raises:
        TypeError: no module, or patterns that are not text.
        ValueError: a pattern that matches no parameter; nothing in scope; an unknown ``offload`` or
            ``backend``.
        RuntimeError: the chosen backend does not serve here.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        include: Patterns = None,
        exclude: Patterns = (),
        *,
        offload: str | None = None,
        backend: str | None = None,
    ) -> None:
        if offload not in (None, "cpu"):
            raise ValueError(f"offload={offload!r} is unknown; use 'cpu' or None")
        scope = scope_of(model, include, exclude)
        sums = {
            member.label: torch.zeros(
                member.parameter.shape,
                dtype=torch.float32,
                device=offload or member.parameter.device,
            )
            for member in scope.members
        }
        dense = [member.label for member in scope.dense]
        self._begin(sums, dense, scope.include, scope.exclude, backend)
        self._model, self._scope, self._offload = model, scope, offload

    @classmethod
    def from_sums(
        cls,
        sums: Mapping[str, Tensor],
        records_by_size: Mapping[int, int],
        dense: Iterable[str] = (),
        *,
        include: Iterable[str] | None = None,
        exclude: Iterable[str] = (),
        without_gradient: Iterable[str] = (),
        backend: str | None = None,
    ) -> FisherAccumulator:
        """An accumulator without a model, of sums that were made elsewhere; it cannot record.

        Args:
            sums: name → contiguous fp32 tensor, taken as it is and not copied.
            records_by_size: examples per record → number of records.
            dense: names of parameters that train densely.
            include, exclude: the patterns that led to this scope, for the metadata.
            without_gradient: names among ``sums`` that never got a gradient.
            backend: as at construction.

        Raises:
            ValueError: sums of another type, or counts below 1.
        """
        labelled = {label_of(name): total for name, total in sums.items()}
        for label, total in labelled.items():
            ops.check_squares(label, total, total)
        fisher = cls.__new__(cls)
        patterns = None if include is None else tuple(include)
        fisher._begin(labelled, map(label_of, dense), patterns, tuple(exclude), backend)
        for size, count in records_by_size.items():
            fisher._records[_checked_examples(size)] = _checked_examples(count)
        fisher._seen = labelled.keys() - set(map(label_of, without_gradient))
        return fisher

    def _begin(
        self,
        sums: dict[str, Tensor],
        dense: Iterable[str],
        include: tuple[str, ...] | None,
        exclude: tuple[str, ...],
        backend: str | None,
    ) -> None:
        self._sums = sums
        self._dense = tuple(dense)
        self.include, self.exclude = include, exclude
        self._backend = backend
        self._choices = {
            device: registry.choose("fisher_accumulate", device, backend)
            for device in {total.device for total in sums.values()}
        }
        self._model: torch.nn.Module | None = None
        self._scope, self._offload = _NO_SCOPE, None
        self._recording: Recording | None = None
        self._warned = False
        self._forget()

    def _forget(self) -> None:
        self._records: dict[int, int] = {}
        self._seen: set[str] = set()
        self._functional = False
        self._broken = False

    # Recording

    @contextmanager
    def recording(
        self, examples_per_backward: int = 1, *, grad_scale: float = 1.0
    ) -> Iterator[FisherAccumulator]:
        """While this block runs, every backward is a record: its gradients are squared and freed one by one.

        One outermost backward is one record, a backward that a checkpoint starts inside it is not. A
        backward that reaches no trainable parameter is not seen, nor is ``torch.autograd.grad``. What stood in
        ``.grad`` is put back at the end, also for parameters outside the scope.

        Args:
            examples_per_backward: of how many examples each backward's loss is the mean; 1 gives the paper's
                Fisher. For a shorter last batch open another block.
            grad_scale: the factor S by which the loss is multiplied (``GradScaler.get_scale()``); squares are
                divided by S².

        Raises:
            ValueError: counts below 1, or a scale whose 1/S² is not positive and finite in fp32.
            RuntimeError: a recording is running already; a gradient arrived twice within one backward; a
                backward raised half-way, after which the sums are of no use (``reset`` clears them).
        """
        examples, scale = _checked_examples(examples_per_backward), _square_scale(grad_scale)
        self._require_model("recording")
        self._require_whole()
        if self._recording is not None:
            raise RuntimeError("this accumulator is recording already; leave that block first")
        self._warn_of_training()

        def add(label: str, gradient: Tensor) -> None:
            self._add({label: gradient}, scale)

        def count(arrived: set[str]) -> None:
            self._count(examples, arrived)

        self._recording = Recording(self._scope.members, self._scope.dense, add, count)
        self._recording.start()
        try:
            yield self
        finally:
            recording, self._recording = self._recording, None
            self._broken = recording.stop() or self._broken
        self._require_whole()

    def accumulate(self, examples: int = 1, *, grad_scale: float = 1.0) -> None:
        """Add what stands in ``.grad`` as one record; the gradients are only read.

        Args:
            examples: of how many examples the loss was the mean.
            grad_scale: as for ``recording``.

        Raises:
            ValueError: as ``recording``; a gradient that cannot be squared. Nothing was added.
            RuntimeError: no parameter in scope has a gradient; a recording is running.
        """
        examples, scale = _checked_examples(examples), _square_scale(grad_scale)
        self._require_model("accumulate")
        self._require_whole()
        if self._recording is not None:
            raise RuntimeError("while recording, backward itself is counted; leave that block first")
        gradients = {
            member.label: member.parameter.grad
            for member in self._scope.members
            if member.parameter.grad is not None
        }
        if not gradients:
            raise RuntimeError(
                "no parameter in scope has a gradient; call accumulate() after backward and before zero_grad"
            )
        self._warn_of_training()
        self._add(gradients, scale)
        self._count(examples, gradients)

    def record_examples(
        self, loss_fn: LossFunction, batch: Any, chunk: int | None = None
    ) -> None:
        """Add a record for every example of a batch, with gradients by ``torch.func``.

        The sums are those of a loop over the examples up to rounding, whatever the chunk. Parameters, buffers,
        ``.grad`` and random numbers are left alone; a model that draws random numbers is refused.

        Args:
            loss_fn: ``loss_fn(model, example)`` → one number. ``model`` stands for the model and can only be
                called; ``example`` is the batch cut to one example, with a first dimension of 1, so that a loss
                for ordinary batches serves.
            batch: tensors whose first dimension counts examples, alone or in dicts, lists and tuples.
            chunk: how many examples at once; memory grows with chunk · parameters. None takes all.

        Example::

            def loss(model, example):
                return F.cross_entropy(model(example["x"]), example["y"])

            for batch in loader:
                fisher.record_examples(loss, batch, chunk=8)

        Raises:
            ValueError, TypeError: a batch, chunk or loss of another kind.
            RuntimeError: ``torch.func`` cannot run the model: batch norm or dropout in train mode, control flow
                that depends on data; ``recording`` with a batch of one can. The message says how many examples
                of the batch are recorded.
        """
        model = self._require_model("record_examples")
        self._require_whole()
        if self._recording is not None:
            raise RuntimeError("while recording, backward itself is counted; leave that block first")
        labels = [member.label for member in self._scope.members]
        for gradients in example_gradients(model, self._scope.members, loss_fn, batch, chunk):
            self._add(dict(zip(labels, gradients, strict=True)), 1.0)
            # torch.func gives zeros where there is no gradient; without_gradient looks at the sums.
            self._functional = True
            self._count(1, ())

    def reset(self) -> None:
        """Set sums and counts to zero, also after a backward that stopped half-way.

        Raises:
            RuntimeError: a recording is running.
        """
        if self._recording is not None:
            raise RuntimeError("this accumulator is recording; leave that block first")
        for total in self._sums.values():
            total.zero_()
        self._forget()

    # Reading

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
        return self._sums[label] / records

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
        ``FusedChildAdamW(model.named_parameters(), child_mask=mask)``. It is selected from the sums, which are in
        the order of the means. Parameters without a gradient draw a warning. Arguments: ``select_child``.

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
        return select_child(
            self._sums,
            reserve_p=reserve_p,
            k=k,
            scope=scope,
            granularity=granularity,
            largest=largest,
            dense=self._dense,
            rule=rule,
            backend=self._backend,
        )

    # Several runs, and files

    def merge(self, other: FisherAccumulator) -> None:
        """Add another accumulator's sums and counts, as of another run over other examples.

        Where one was recorded per example and the other was not, the kind becomes ``"mixed"``.

        Raises:
            TypeError: no accumulator.
            ValueError: another scope, other shapes.
            RuntimeError: one of the two is recording, or holds a part of a record.
        """
        if not isinstance(other, FisherAccumulator):
            raise TypeError(f"other must be a FisherAccumulator, not {type(other).__name__}")
        for one in (self, other):
            one._require_whole()
            if one._recording is not None:
                raise RuntimeError("an accumulator that is recording cannot be merged; leave that block")
        self._require_scope(other._sums, other._dense, "the other accumulator")
        arrived = other._sums.keys() - set(other.without_gradient)
        for label, total in self._sums.items():
            total.add_(other._sums[label].to(total.device))
        for size, count in dict(other._records).items():
            self._records[size] = self._records.get(size, 0) + count
        self._seen |= arrived

    def __iadd__(self, other: FisherAccumulator) -> FisherAccumulator:
        self.merge(other)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write sums, counts and scope as safetensors; the file appears only when it is whole.

        Raises:
            FileNotFoundError: the directory does not exist.
            RuntimeError: the sums hold a part of a record.
        """
        include = None if self.include is None else list(self.include)
        stored = StoredFisher(
            dict(self.sums),
            dict(self._records),
            list(self._dense),
            include,
            list(self.exclude),
            self.without_gradient,
        )
        save_fisher(path, stored, self.kind)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: torch.nn.Module | None = None,
        *,
        offload: str | None = None,
        backend: str | None = None,
    ) -> FisherAccumulator:
        """Read what ``save`` wrote; with a model the accumulator can go on recording.

        Args:
            path: the file.
            model: the model that the sums are of; without it they lie on the CPU.
            offload, backend: as at construction.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: another kind of file, a damaged or altered one, or another model.
        """
        stored = read_fisher(path)
        fisher = cls.from_sums(
            stored.sums,
            stored.records_by_size,
            stored.dense,
            include=stored.include,
            exclude=stored.exclude,
            without_gradient=stored.without_gradient,
            backend=backend,
        )
        if model is None:
            return fisher
        whole = cls(model, stored.include, stored.exclude, offload=offload, backend=backend)
        whole.merge(fisher)
        return whole
