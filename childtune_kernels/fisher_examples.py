"""Gradients of single examples of a batch, all at once, by ``torch.func``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from .fisher_scope import Member

LossFunction = Callable[[Callable[..., Any], Any], Tensor]


def example_gradients(
    model: torch.nn.Module,
    members: Sequence[Member],
    loss_fn: LossFunction,
    batch: Any,
    chunk: int | None,
) -> Iterator[list[Tensor]]:
    """The gradients of the members for one example after the other, in the batch's order.

    Arguments are those of ``FisherAccumulator.record_examples``.

    Raises:
        ValueError: no tensors in the batch, or of different lengths; a chunk below 1; a loss that is not one
            number.
        TypeError: something else than tensors in the batch.
        RuntimeError: ``torch.func`` cannot run the model; names the remedy.
    """
    batch = _mapped(batch, lambda tensor: tensor)
    count = _length(batch)
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk={chunk!r} must be a number of examples, 1 or more, or None")
    weights = {member.name: member.parameter.detach() for member in members}
    # torch.func refuses writes into buffers; one that is assigned anew is put back where it was handed over.
    buffers = dict(model.named_buffers())

    def loss_of(weights: dict[str, Tensor], example: Any) -> Tensor:
        def call(*arguments: Any, **options: Any) -> Any:
            return functional_call(model, (weights, buffers), arguments, options)

        loss = loss_fn(call, _mapped(example, lambda tensor: tensor.unsqueeze(0)))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn gave {shape} for one example; it must give one number")
        return loss.reshape(())

    gradients_of = vmap(grad(loss_of), in_dims=(None, 0), randomness="error")
    size = chunk or count
    for start in range(0, count, size):
        piece = _mapped(batch, partial(_examples, first=start, count=size))
        gradients = _run(gradients_of, weights, piece, start, count)
        for example in range(min(size, count - start)):
            yield [gradients[member.name][example] for member in members]


def _run(
    gradients_of: Callable[..., dict[str, Tensor]],
    weights: dict[str, Tensor],
    piece: Any,
    start: int,
    count: int,
) -> dict[str, Tensor]:
    try:
        return gradients_of(weights, piece)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise RuntimeError(
            f"record_examples: torch.func cannot run this model or loss ({error}). Where dropout draws "
            "random numbers or batch norm updates its statistics, call model.eval(); else run a batch of one "
            "at a time within 'with fisher.recording(examples_per_backward=1)'. "
            f"{start} of this batch's {count} examples are recorded"
        ) from error


def _mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed; mappings become dicts, which torch.func sees into."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: _mapped(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = [_mapped(value, change) for value in batch]
        if hasattr(batch, "_fields"):
            return type(batch)(*values)
        return tuple(values) if isinstance(batch, tuple) else values
    raise TypeError(
        f"the batch holds a {type(batch).__name__}; give tensors in dicts, lists and tuples, and let "
        "loss_fn know the rest"
    )


def _examples(tensor: Tensor, first: int, count: int) -> Tensor:
    return tensor[first : first + count]


def _length(batch: Any) -> int:
    """The number of examples: the first size of every tensor."""
    lengths: set[int] = set()

    def measured(tensor: Tensor) -> Tensor:
        lengths.add(tensor.shape[0] if tensor.dim() else 0)
        return tensor

    _mapped(batch, measured)
    if len(lengths) != 1 or 0 in lengths:
        found = ", ".join(map(str, sorted(lengths))) or "no tensor"
        raise ValueError(
            "the tensors of a batch must have the examples as their first dimension, one or more and all "
            f"as many; found {found}"
        )
    return lengths.pop()
