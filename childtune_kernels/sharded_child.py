"""Compact state of sharded parameters in state dicts: the whole child's, in pieces (SPEC.md, section 10)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import child_layout, mask_parts, ops, sharding
from .state_tensors import ELEMENTWISE, check_shape
from .weight_formats import key

#: What a state dict has an element of the child for.
OF_CHILD = tuple(key(name, True) for name in ELEMENTWISE)

# A block of 2**22 elements is put in order at a time.
_BLOCK_OF_WORDS = 1 << 17

State = Mapping[str, Any]


def saved_child(label: str, parameter: Tensor, saved: State) -> dict[str, Any]:
    """The saved state of a sharded parameter with a fixed mask, as any other placement can load it.

    Mask words are those of the whole parameter, moments and masters those of all its child elements in
    row-major order, as without shards; each is a DTensor of one dimension of which a rank has a piece.
    A collective of the ranks that hold the parameter, one tensor after the other. Values of the child alone
    travel, and no dense tensor is made.

    Args:
        parameter: a DTensor.
        saved: of this rank's part, with ``mask_words``.
    """
    like: Any = parameter
    if like.device_mesh.get_coordinate() is None:
        return {name: value for name, value in saved.items() if name != "mask_words"}
    words = _whole_words(label, saved["mask_words"], parameter)
    pieces: dict[str, Any] = {"mask_words": _in_pieces(words, parameter)}
    if "child_shape" in saved:
        pieces["child_shape"] = torch.tensor(parameter.shape)
    for name, value in saved.items():
        if name in OF_CHILD:
            child = _child_of_whole(label, value, words, parameter)
            pieces[name] = _in_pieces(child, parameter)
        elif name in ELEMENTWISE:
            pieces[name] = sharding.placed_as(value, parameter)
        elif name not in pieces:
            pieces[name] = value
    return pieces


def own_words(label: str, current: Tensor | None) -> Tensor:
    """The words of the mask that an optimizer has, where a state dict tells none, with a warning.

    torch.distributed.checkpoint reads flat state dicts by the keys of live state, where words may be missing.

    Raises:
        ValueError: it has none.
    """
    if current is None:
        raise ValueError(
            f"state of {label} has moments of a child without mask_words; it was altered or cut, or it is "
            "flat and the optimizer was built with another mask: build it with the run's mask"
        )
    warnings.warn(
        "the state dict is flat and tells no masks: children are taken to be those that the optimizer has",
        UserWarning,
        stacklevel=2,
    )
    return current


def child_of_part(
    label: str, parameter: Tensor, saved: State, current: Tensor | None
) -> dict[str, Any]:
    """Of a saved state of a child what goes with this rank's part of a sharded parameter.

    A collective of the ranks that hold the parameter.

    Args:
        current: the mask words of this rank's part now. They serve where a flat state dict was read by the
            keys of live state, which on some rank lay in another layout than words.

    Raises:
        ValueError: words or child values that do not fit the parameter.
    """
    words = saved.get("mask_words")
    if sharding.on_any_rank(words is None, parameter):
        words = _whole_words(label, own_words(label, current), parameter)
    assert words is not None
    words = sharding.whole_of(words)
    ops.check_words(label, words, parameter.numel())
    of_part = sharding.words_of_part(label, words, parameter)
    read = {**saved, "mask_words": of_part}
    if "child_shape" in saved:
        check_shape(label, parameter, saved)
        read["child_shape"] = torch.tensor(sharding.local_of(parameter).shape)
    for name in OF_CHILD:
        if not isinstance(saved.get(name), Tensor):
            continue
        child = sharding.whole_of(saved[name])
        count = ops.count_mask(words)
        if child.shape != (count,):
            raise ValueError(
                f"state {name} of {label} is {tuple(child.shape)} in the state dict; expected shape "
                f"({count},), an element for each of its mask"
            )
        whole = child.new_zeros(parameter.shape)
        child_layout.scatter_child_(whole, child, words.to(child.device))
        part = sharding.part_of(label, whole, parameter).contiguous()
        read[name] = child_layout.gather_child(part, of_part.to(part.device))
    return read


def _whole_words(label: str, words: Tensor, parameter: Tensor) -> Tensor:
    placed = sharding.placed_of(parameter)
    assert placed is not None
    return mask_parts.whole_words(label, words, placed)


def _child_of_whole(label: str, child: Tensor, words: Tensor, parameter: Tensor) -> Tensor:
    """The child's values of all parts, in row-major order of the whole."""
    count = torch.tensor([child.numel()], device=child.device)
    counts = sharding.of_all_parts(count, parameter).view(-1)
    padded = child.new_zeros(int(counts.max()))
    padded[: child.numel()] = child
    of_parts = sharding.of_all_parts(padded, parameter)
    if sharding.is_cut_in_order(parameter):
        return of_parts[torch.arange(padded.numel(), device=child.device) < counts[:, None]]
    return torch.cat([*_in_order(of_parts, words, sharding.numbers_of_parts(label, parameter))])


def _in_order(of_parts: Tensor, words: Tensor, numbers: Sequence[Tensor]) -> Iterator[Tensor]:
    """Values of the parts, each in the order of its own, as their elements lie in the whole."""
    tables = [table.to(words.device) for table in numbers]
    total = of_parts.shape[0]
    taken = torch.zeros(total, dtype=torch.int64, device=words.device)
    for first in range(0, words.numel(), _BLOCK_OF_WORDS):
        block = words[first : first + _BLOCK_OF_WORDS]
        elements = ops.mask_indices(block) + 32 * first
        part = torch.zeros_like(elements)
        for table in reversed(tables):
            part += table[elements % table.numel()]
            elements //= table.numel()
        # The how manieth of its part's in this block each element is.
        order = part.argsort(stable=True)
        counts = part.bincount(minlength=total)
        before = counts.cumsum(0) - counts
        within = torch.empty_like(part)
        within[order] = torch.arange(part.numel(), device=part.device) - before[part[order]]
        yield of_parts[part, taken[part] + within]
        taken += counts


def _in_pieces(vector: Tensor, parameter: Tensor) -> Tensor:
    """A vector that every rank has, as a DTensor of which each keeps a piece."""
    from torch.distributed.tensor import distribute_tensor

    like: Any = parameter
    placements = sharding.placements_along_first(like)
    cut = distribute_tensor(vector, like.device_mesh, placements, src_data_rank=None)
    placed = sharding.Placed(vector.shape, like.device_mesh, tuple(placements))
    # A piece of its own: the vector goes.
    return sharding.placed_by(cut.to_local().clone(), placed)
