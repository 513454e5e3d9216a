"""FisherAccumulator: the diagonal Fisher information of a model's weights, example by example."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor

from . import fisher_parts, fully_sharded, ops, registry, sharding
from .fisher_examples import LossFunction, example_gradients
from .fisher_recording import Recording
from .fisher_scope import Patterns, scope_of
from .fisher_sums import FisherSums, checked_count
from .labels import shortened


class FisherAccumulator(FisherSums):
    """Sums of squared gradients of a model's weights (SPEC.md, "Fisher information").

    A record is one squared gradient: of one example, as the paper has it, or of the mean loss of several,
    which is cheaper and another quantity. Put the model in eval mode: with dropout the squares would
    contain its noise, and batch norm in train mode mixes the examples of a batch. Frozen parameters are
    left out; trainable ones outside the scope train densely under the mask.

    Of DTensors (``fully_shard``, ``parallelize_module``) each rank holds the sums of its parts, and the
    mask is one of parts, too; all ranks record, and call what follows, alike. ``fully_shard`` averages
    gradients over ranks before they are squared: for the paper's squares all ranks run the same example.

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
        if isinstance(model, torch.nn.Module):
            fully_sharded.reshard_(model)
        scope = scope_of(model, include, exclude)
        with torch.inference_mode(False):
            sums = {
                member.label: fisher_parts.zeros_for(member.parameter, offload)
                for member in scope.members
            }
        super().__init__(
            sums,
            {},
            [member.label for member in scope.dense],
            include=scope.include,
            exclude=scope.exclude,
            without_gradient=sums,
        )
        self._choices = {
            device: registry.choose("fisher_accumulate", device, backend)
            for device in {sharding.local_of(total).device for total in sums.values()}
        }
        self._offloaded = offload is not None
        self._model, self._members, self._others = model, scope.members, scope.dense
        self._recording: Recording | None = None
        self._warned = False

    @overload
    @classmethod
    def load(cls, path: str | os.PathLike[str], model: None = None) -> FisherSums: ...

    @overload
    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: torch.nn.Module,
        *,
        offload: str | None = None,
        backend: str | None = None,
    ) -> FisherAccumulator: ...

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: torch.nn.Module | None = None,
        *,
        offload: str | None = None,
        backend: str | None = None,
    ) -> FisherSums:
        """Read what ``save`` wrote.

        Args:
            path: the file.
            model: the model that the sums are of, to go on recording; without it the sums lie on the CPU
                and are for reading, merging and ``child_mask``.
            offload, backend: as at construction.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: another kind of file, a damaged or altered one, or another model.
        """
        stored = FisherSums.load(path)
        if model is None:
            return stored
        fisher = cls(model, stored.include, stored.exclude, offload=offload, backend=backend)
        fisher.merge(stored)
        return fisher

    @contextmanager
    def recording(
        self, examples_per_backward: int | None = None, *, grad_scale: float = 1.0
    ) -> Iterator[FisherAccumulator]:
        """While this block runs, every backward is a record: its gradients are squared and freed one by one.

        One outermost backward is one record, a backward that a checkpoint starts inside it is not. A
        backward that reaches no trainable parameter is not seen, nor is ``torch.autograd.grad``. What
        stood in ``.grad`` is put back at the end, also for parameters outside the scope.

        Args:
            examples_per_backward: of how many examples each backward's loss is the mean; 1, which None
                stands for, gives the paper's Fisher. For a shorter last batch open another block. Under
                ``fully_shard`` it has to be said: 1 where all ranks run the same example, else the
                number of examples of all ranks together.
            grad_scale: the factor S by which the loss is multiplied (``GradScaler.get_scale()``); squares are
                divided by S².

        Raises:
            ValueError: counts below 1, or None under ``fully_shard``; a scale whose 1/S² is not positive and
                finite in fp32.
            RuntimeError: a recording is running already; a gradient arrived twice within one backward; a
                backward raised half-way, after which the sums are of no use (``reset`` clears them);
                gradients that ``fully_shard`` holds back, which stay out of the record.
        """
        examples = self._examples("examples_per_backward", examples_per_backward)
        scale = _square_scale(grad_scale)
        self._require_idle()
        sharded = fully_sharded.modules_of(self._model)
        fully_sharded.require_settled(sharded)
        self._warn_of_training(4)

        def add(label: str, gradient: Tensor) -> None:
            self._add({label: gradient}, scale)

        def count(arrived: set[str]) -> None:
            fully_sharded.require_settled(sharded)
            self._count(examples, arrived)

        records = sum(self._records.values())
        self._recording = Recording(self._members, self._others, add, count)
        try:
            self._recording.start()
            yield self
        finally:
            recording, self._recording = self._recording, None
            fault = fully_sharded.fault_of(sharded)
            fully_sharded.drop_waiting_gradients_(sharded)
            self._broken = recording.stop() or fault is not None or self._broken
        if fault is not None:
            raise RuntimeError(fault)
        self._require_whole()
        if sum(self._records.values()) == records:
            warnings.warn(
                "no backward within recording() reached a parameter of this accumulator. Was the model "
                "sharded (fully_shard, parallelize_module) or were its parameters replaced after the "
                "accumulator was made? Make it afterwards",
                UserWarning,
                stacklevel=3,
            )

    def accumulate(self, examples: int | None = None, *, grad_scale: float = 1.0) -> None:
        """Add what stands in ``.grad`` as one record; the gradients are only read.

        Args:
            examples: of how many examples the loss was the mean, as for ``recording``.
            grad_scale: as for ``recording``.

        Raises:
            ValueError: as ``recording``; a gradient that cannot be squared. Nothing was added.
            RuntimeError: no parameter in scope has a gradient; a recording is running.
        """
        examples, scale = self._examples("examples", examples), _square_scale(grad_scale)
        self._require_idle()
        gradients = {
            member.label: member.parameter.grad
            for member in self._members
            if member.parameter.grad is not None
        }
        if not gradients:
            raise RuntimeError(
                "no parameter in scope has a gradient; call accumulate() after backward and before zero_grad"
            )
        self._warn_of_training(3)
        self._add(gradients, scale)
        self._count(examples, gradients)

    def record_examples(self, loss_fn: LossFunction, batch: Any, chunk: int | None = None) -> None:
        """Add a record for every example of a batch, with gradients by ``torch.func``.

        The sums are those of a loop over the examples up to rounding, whatever the chunk. Parameters,
        buffers, ``.grad`` and random numbers are left alone; a model that draws any is refused.

        Args:
            loss_fn: ``loss_fn(model, example)`` → one number. ``model`` stands for the model and can only
                be called; ``example`` is the batch cut to one example, with a first dimension of 1, so that a
                loss for ordinary batches serves.
            batch: tensors whose first dimension counts examples, alone or in dicts, lists and tuples.
            chunk: how many examples at once; memory grows with chunk · parameters. None takes all.

        Example::

            def loss(model, example):
                return F.cross_entropy(model(example["x"]), example["y"])

            for batch in loader:
                fisher.record_examples(loss, batch, chunk=8)

        Raises:
            ValueError, TypeError: a batch, chunk or loss of another kind.
            RuntimeError: ``torch.func`` cannot run the model: batch norm or dropout in train mode, control
                flow that depends on data, DTensors; ``recording`` with a batch of one can. The message says
                how many examples of the batch are recorded.
        """
        self._require_idle()
        for member in self._members:
            if sharding.is_sharded(member.parameter):
                raise RuntimeError(
                    f"record_examples: torch.func cannot run {member.label}, which is a DTensor; run a "
                    "batch of one at a time within 'with fisher.recording(examples_per_backward=1)', the "
                    "same on all ranks. 0 of this batch's examples are recorded"
                )
        labels = [member.label for member in self._members]
        for gradients in example_gradients(self._model, self._members, loss_fn, batch, chunk):
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
        self._broken = False
        for total in self._sums.values():
            sharding.local_of(total).zero_()
        self._records.clear()
        self._seen.clear()
        self._functional = self._reduced = False

    def _require_whole(self) -> None:
        if self._recording is not None and self._recording.holds_a_part():
            self._broken = True
        super()._require_whole()

    def _require_idle(self) -> None:
        if self._recording is not None:
            raise RuntimeError(
                "this accumulator is recording, and every backward is counted; leave that block first"
            )
        self._require_whole()

    def _add(self, gradients: Mapping[str, Tensor], scale: float) -> None:
        """Add squared gradients, in one call for each device."""
        parts = {
            label: sharding.gradient_part(label, gradient, self._sums[label])
            for label, gradient in gradients.items()
        }
        for label, part in parts.items():
            total = sharding.local_of(self._sums[label])
            ops.check_squares(label, total, part, anywhere=self._offloaded)
        try:
            if self._offloaded:
                for label, part in parts.items():
                    self._add_here({label: part.detach().cpu()}, scale)
            else:
                self._add_here(parts, scale)
        except BaseException:
            self._broken = True
            raise

    def _add_here(self, gradients: Mapping[str, Tensor], scale: float) -> None:
        for device, choice in self._choices.items():
            sums = {label: sharding.local_of(self._sums[label]) for label in gradients}
            labels = [label for label, total in sums.items() if total.device == device]
            ops.fisher_accumulate_(
                [sums[label] for label in labels],
                [gradients[label] for label in labels],
                choice,
                scale,
                labels,
            )

    def _examples(self, what: str, given: int | None) -> int:
        if given is None and fully_sharded.modules_of(self._model):
            raise ValueError(
                f"{what} must be given for a model under fully_shard, which averages gradients over ranks: "
                "1 if all ranks run the same example (the paper's Fisher information), else how many "
                "examples all ranks together average"
            )
        return checked_count(what, 1 if given is None else given)

    def _count(self, examples: int, arrived: Collection[str]) -> None:
        self._add_records({examples: 1})
        self._seen.update(arrived)

    def _warn_of_training(self, stacklevel: int) -> None:
        """Say once that a model in train mode gives other squares than the paper's."""
        if self._warned:
            return
        noisy = [name for name, module in self._model.named_modules() if _mixes_or_draws(module)]
        if noisy:
            self._warned = True
            warnings.warn(
                f"{shortened(noisy)} in train mode: dropout puts its noise into the squares, batch norm "
                "mixes the examples of a batch; call model.eval() before recording",
                UserWarning,
                stacklevel=stacklevel,
            )


def _mixes_or_draws(module: torch.nn.Module) -> bool:
    if not module.training:
        return False
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, torch.nn.modules.batchnorm._BatchNorm)


def _square_scale(grad_scale: float) -> float:
    """1/S², by which squares of gradients of a loss times S are multiplied."""
    try:
        scale = 1.0 / float(grad_scale) ** 2
    except (ZeroDivisionError, OverflowError):
        scale = math.nan
    rounded = float(torch.tensor(scale, dtype=torch.float32, device="cpu"))
    if not (0 < rounded < math.inf and grad_scale > 0):
        raise ValueError(
            f"grad_scale={grad_scale!r} must be positive, and 1/S² positive and finite in float32"
        )
    return scale
