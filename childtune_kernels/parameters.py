"""What an optimizer is given: parameters with their labels, and the words of their masks."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from . import ops, sharding
from .child_mask import ChildMask
from .labels import is_positional, label_of, positional_label, shortened
from .plan_row import strided_map


def by_label(groups: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Label and tensor of every parameter, in the order of the groups."""
    for group in groups:
        yield from zip(group["param_names"], group["params"], strict=True)


def labelled(
    group: Mapping[str, Any],
    known: Sequence[tuple[str, Tensor]],
    where: str,
    label_of: Callable[[str], str] = label_of,
) -> tuple[list[str], list[Tensor]]:
    """The labels and tensors of what a group gives as ``params``.

    A group taken from another optimizer brings its names as ``param_names``.

    ``known``: labels and tensors of the groups before it; ``where``: the group, for messages;
    ``label_of``: name → label.

    Raises:
        TypeError: no tensors, or a set of them.
        ValueError: some with names and some without, a label or tensor twice, a tensor that no kernel
            can update, parameters of which a ZeroRedundancyOptimizer has given this rank its share.
    """
    _check_all_are_there(where)
    names, tensors = _split_names(group["params"], where)
    if names is None and not any(map(is_positional, group.get("param_names", ["#"]))):
        names = list(group["param_names"])
        if len(names) != len(tensors):
            raise ValueError(
                f"param_names ({where}): {len(names)} names for {len(tensors)} parameters"
            )
    if names is None:
        labels = [positional_label(len(known) + index) for index in range(len(tensors))]
    else:
        labels = [label_of(name) for name in names]
        if any(map(is_positional, labels)):
            raise ValueError(
                f"params ({where}): names that begin with '#' stand for positions; rename"
            )
    if known and tensors and is_positional(known[0][0]) != (names is None):
        raise ValueError(
            f"params ({where}): some groups have names and some have not; name them all"
        )
    seen_labels = {label for label, _ in known}
    for label, tensor in zip(labels, tensors, strict=True):
        if label in seen_labels:
            raise ValueError(f"the label {label!r} ({where}) stands for two parameters; rename one")
        seen_labels.add(label)
        _check_tensor(label, tensor)
    _check_memory([*known, *zip(labels, tensors, strict=True)], where)
    return labels, tensors


def _check_all_are_there(where: str) -> None:
    """Refuse to be built inside ZeroRedundancyOptimizer.

    It sorts parameters, deals them out to the ranks and leaves their names behind: positions, and with them
    masks, would depend on the number of ranks, and two parameters on two ranks would draw the same mask.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return
    # What it hands over does not show where it comes from; only the caller does.
    builder = module.ZeroRedundancyOptimizer._init_local_optimizer.__code__
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is builder:
            raise ValueError(
                f"params ({where}): ZeroRedundancyOptimizer gives each rank some parameters, without their "
                "names, so that masks would depend on the number of ranks; shard optimizer state with "
                "fully_shard(model, reshard_after_forward=False) (FSDP2) instead"
            )


def _check_memory(members: Sequence[tuple[str, Tensor]], where: str) -> None:
    """Refuse a tensor twice, and contiguous ones that share a byte: two threads would update it."""
    spans = []
    for order, (label, member) in enumerate(members):
        tensor = sharding.local_of(member)
        start = tensor.data_ptr() if tensor.numel() else id(tensor)
        contiguous = tensor.numel() > 0 and tensor.is_contiguous()
        end = start + tensor.numel() * tensor.element_size() if contiguous else start + 1
        spans.append((str(tensor.device), start, end, order, label))
    spans.sort()
    for before, after in itertools.pairwise(spans):
        if before[0] == after[0] and after[1] < before[2]:
            first, second = sorted((before, after), key=lambda span: span[3])
            raise ValueError(
                f"parameter {second[4]} ({where}) is the same tensor as {first[4]}, or shares its "
                "memory; pass each weight once"
            )


def _split_names(params: Any, where: str) -> tuple[list[str] | None, list[Tensor]]:
    if isinstance(params, Tensor):
        params = [params]
    if isinstance(params, set):
        raise TypeError(f"params ({where}) is a set, whose order changes; pass a list")
    entries = list(params)
    names = [entry[0] for entry in entries if isinstance(entry, tuple)]
    tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
    if names and len(names) != len(entries):
        raise ValueError(f"params ({where}): some have names and some have not; name them all")
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"params ({where}) holds a {type(tensor).__name__}; only tensors train")
    return names or None, tensors


def _check_tensor(label: str, tensor: Tensor) -> None:
    sharding.element_map_of(label, tensor)
    tensor = sharding.local_of(tensor)
    ops.check_parameter(label, tensor)
    try:
        strided_map(tensor.shape, tensor.stride())
    except ValueError as error:
        raise ValueError(f"parameter {label}: {error}; call .contiguous() on it") from None


def mask_words(
    mask: ChildMask | None, labels: Sequence[str], parameters: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Copies of the mask words of the parameters in a mask's scope, on the parameters' devices.

    Of a sharded parameter they are those of this rank's part.

    Raises:
        ValueError: no ChildMask, parameters without names, a parameter that the mask does not know or
            knows with another shape, a part that is placed otherwise.
    """
    if mask is None:
        return {}
    if not isinstance(mask, ChildMask):
        raise ValueError(
            f"child_mask must be a ChildMask, not {type(mask).__name__}; use ChildMask.from_dense"
        )
    # A mask of names says nothing of positions; one of positions was made for these very parameters.
    if any(map(is_positional, labels)) and not any(map(is_positional, mask.names)):
        raise ValueError("child_mask needs names; pass model.named_parameters() as params")
    unknown = [label for label in labels if label not in mask]
    frozen = {
        label
        for label, parameter in zip(labels, parameters, strict=True)
        if not parameter.requires_grad
    }
    if unknown and frozen.issuperset(unknown):
        raise ValueError(
            f"child_mask: it does not know {shortened(unknown)}, which require no gradient; give the "
            "optimizer what trains: [(n, p) for n, p in model.named_parameters() if p.requires_grad]"
        )
    if unknown:
        what = "no name of it matches" if len(unknown) == len(labels) else "it does not know"
        raise ValueError(
            f"child_mask: {what} {shortened(unknown)}; it knows {shortened(mask.names)}; give what "
            "shall train densely as dense=[...] when making the mask"
        )
    words = {}
    for label, parameter in zip(labels, parameters, strict=True):
        if label in mask.dense_names:
            continue
        if mask.shapes[label] != parameter.shape:
            raise ValueError(
                f"child_mask: {label} has shape {tuple(mask.shapes[label])} in the mask and "
                f"{tuple(parameter.shape)} in the optimizer; make the mask from this model"
            )
        words[label] = mask.words_for(label, parameter).to(parameter.device, copy=True)
    return words
