"""The weights of a model or a mapping by label, and which of two such sets belong together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import sharding
from .labels import label_of, shortened
from .weight_bits import same_bits

Ties = Mapping[str, Sequence[str]]


@dataclass(frozen=True, eq=False)
class NamedWeights:
    """Parameters and persistent buffers by label; of tied ones the first name alone.

    Attributes:
        tensors: label → tensor, those of the model itself.
        names: label → the name it had before wrappers' prefixes were taken off.
        ties: first label → the other labels of the same tensor; None where nobody knows (a mapping).
        parameters: labels of parameters; None where nobody knows.
        trainable: labels of parameters that require gradients.
    """

    tensors: Mapping[str, Tensor]
    names: Mapping[str, str]
    ties: Ties | None
    parameters: frozenset[str] | None
    trainable: frozenset[str]

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Label → shape."""
        return {label: tensor.shape for label, tensor in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Label → type."""
        return {label: tensor.dtype for label, tensor in self.tensors.items()}

    def first_label(self, label: str) -> str:
        """The label under which a tensor stands, given any of its labels."""
        for first, others in (self.ties or {}).items():
            if label in others:
                return first
        return label


def named_weights(source: nn.Module | Mapping[str, Tensor], what: str) -> NamedWeights:
    """The weights of a model, or of a mapping such as a state dict; nothing is copied.

    ``what`` it is, for messages: ``"model"``, ``"base"``.

    Raises:
        TypeError: neither a model nor a mapping of tensors.
        ValueError: one label for two tensors; a tensor without strides or memory of its own.
    """
    if isinstance(source, nn.Module):
        return _of_model(source, what)
    if not isinstance(source, Mapping):
        raise TypeError(
            f"{what} is a {type(source).__name__}; a model or a mapping from names to tensors is needed"
        )
    tensors: dict[str, Tensor] = {}
    names = _by_label(source, what)
    for label, name in names.items():
        _check(label, source[name], what)
        tensors[label] = source[name]
    return NamedWeights(tensors, names, None, None, frozenset())


def _of_model(model: nn.Module, what: str) -> NamedWeights:
    persistent = {label_of(name) for name in model.state_dict(keep_vars=True)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = {
        name: buffer
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if label_of(name) in persistent
    }
    names = _by_label([*parameters, *buffers], what)
    tensors: dict[str, Tensor] = {}
    ties: dict[str, list[str]] = {}
    first_of: dict[Any, str] = {}
    for label, name in names.items():
        tensor = parameters[name] if name in parameters else buffers[name]
        _check(label, tensor, what)
        first = first_of.setdefault(_identity(tensor), label)
        if first == label:
            tensors[label] = tensor
        else:
            ties.setdefault(first, []).append(label)
    return NamedWeights(
        tensors=tensors,
        names=names,
        ties=ties,
        parameters=frozenset(label for label in tensors if names[label] in parameters),
        trainable=frozenset(label for label, tensor in tensors.items() if tensor.requires_grad),
    )


def _identity(tensor: Tensor) -> Any:
    """Equal for two names of one weight, also where ``.data`` was shared and not the tensor."""
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _by_label(names: Iterable[str], what: str) -> dict[str, str]:
    labelled: dict[str, str] = {}
    for name in names:
        label = label_of(name)
        if label in labelled:
            raise ValueError(
                f"{what}: {labelled[label]} and {name} have one label, {label!r}; rename one"
            )
        labelled[label] = name
    return labelled


def _check(label: str, tensor: Any, what: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what}: {label} is a {type(tensor).__name__}; only tensors have weights")
    if sharding.is_sharded(tensor):
        raise ValueError(
            f"{what}: {label} is a DTensor, of which this rank has a part. Give whole weights: a plain model "
            "with get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, "
            "cpu_offload=True)), which all ranks call, and mask.gather()"
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"{what}: {label} is not a dense tensor; take it out or make it dense")
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"{what}: {label} is a lazy conjugate; call .resolve_conj() first")
    if tensor.is_meta or (tensor.numel() and tensor.data_ptr() == 0):
        raise ValueError(
            f"{what}: {label}, a {type(tensor).__name__} on {tensor.device}, has no memory of its own; "
            "materialise it first"
        )


def counterparts(
    shapes: Mapping[str, torch.Size],
    dtypes: Mapping[str, torch.dtype],
    ties: Ties | None,
    weights: NamedWeights,
    what: str,
) -> dict[str, list[str]]:
    """For each label of one side the labels of the other, ``weights``, that hold this tensor.

    One, unless ``weights`` is a mapping with several names of a tied weight. Ties that one side alone
    knows are taken from it.

    Args:
        shapes, dtypes, ties: of the one side, as in ``NamedWeights``.
        weights: the other side.
        what: the other side's name, for messages.

    Raises:
        ValueError: a label too many or too few, other shapes, types or ties.
    """
    if ties is not None and weights.ties is not None and _groups(ties) != _groups(weights.ties):
        odd = sorted(", ".join(sorted(group)) for group in _groups(ties) ^ _groups(weights.ties))
        raise ValueError(f"{what}: other weights are tied: {'; '.join(odd[:4])}; tie the same ones")
    known = weights.ties if ties is None else ties
    group_of = {label: group for group in _groups(known or {}) for label in sorted(group)}
    found = {
        label: [
            other
            for other in (label, *sorted(group_of.get(label, frozenset()) - {label}))
            if other in weights.tensors
        ]
        for label in shapes
    }
    missing = [label for label, others in found.items() if not others]
    used = [other for others in found.values() for other in others]
    times = Counter(used)
    extra = [label for label in weights.tensors if label not in times]
    if missing or extra:
        raise ValueError(
            f"{what}: other weights than expected; missing: {shortened(missing) or 'none'}; "
            f"not expected: {shortened(extra) or 'none'}; use the same architecture"
        )
    twice = [label for label, count in times.items() if count > 1]
    if twice:
        raise ValueError(
            f"{what}: {shortened(twice)} is one tied weight, for which the other side has several"
        )
    for label, others in found.items():
        for other in others:
            _check_kind(other, weights.tensors[other], shapes[label], dtypes[label], what)
        first = weights.tensors[others[0]]
        odd = [other for other in others[1:] if not same_bits(first, weights.tensors[other])]
        if odd:
            raise ValueError(f"{what}: {others[0]} and {odd[0]} differ but are tied in the model")
    return found


def _check_kind(
    label: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype, what: str
) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{what}: {label} has shape {tuple(tensor.shape)}, not {tuple(shape)}; use the same "
            "architecture"
        )
    if tensor.dtype != dtype:
        raise ValueError(
            f"{what}: {label} is of {tensor.dtype}, not {dtype}; load it in the type of the run"
        )


def _groups(ties: Ties) -> set[frozenset[str]]:
    return {frozenset((first, *others)) for first, others in ties.items()}
