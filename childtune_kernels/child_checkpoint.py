"""The tuned child alone: save, load, apply, diff (SPEC.md, "Child checkpoints in files")."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import ops, weight_bits
from .child_file import ChildCheckpoint, load_child
from .child_mask import ChildMask
from .group_options import WROTE_OUTSIDE
from .labels import shortened
from .named_weights import NamedWeights, counterparts, named_weights
from .progress import progress_of_amount

__all__ = ["ChildCheckpoint", "apply_child", "child_diff", "load_child", "save_child"]

Weights = nn.Module | Mapping[str, Tensor]


def save_child(
    path: str | os.PathLike[str],
    model: nn.Module,
    mask: ChildMask,
    *,
    optimizer: Optimizer | None = None,
    base: Weights | None = None,
) -> None:
    """Write what Child-Tuning changed in a model: ``apply_child`` puts it into the base model again.

    Stored are the weights inside the child, the mask's words, the parameters that train densely and
    persistent buffers; of a tied weight one entry. All else is the base's and is known by a fingerprint.

    Args:
        path: of the file; it appears only when it is whole.
        model: after training; wrappers (DistributedDataParallel, torch.compile) do not matter.
        mask: the run's mask. What is not in it must not require gradients.
        optimizer: the run's FusedChildAdamW: that it trained this child, and nothing but it, is checked.
        base: the base model or its state dict: that nothing outside the child changed is checked, and
            only buffers that changed are stored. Without it all persistent buffers are.

    Raises:
        ValueError: a mask that does not fit the model, a trainable parameter outside the mask, an
            optimizer of another mask or with ``freeze_non_child=False`` and a weight decay, another base.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; save_child needs a model")
    if not isinstance(mask, ChildMask):
        raise TypeError(f"mask is a {type(mask).__name__}; a ChildMask is needed")
    mask.require_whole("save_child")
    weights = named_weights(model, "model")
    mask = _mask_of(weights, mask)
    if optimizer is not None:
        _check_optimizer(optimizer, weights, mask)
    buffers = [label for label in weights.tensors if label not in (weights.parameters or ())]
    if base is not None:
        buffers = _changed_buffers(named_weights(base, "base"), weights, mask, buffers)
    checkpoint_of(weights, mask, buffers).save(path)


def checkpoint_of(
    weights: NamedWeights, mask: ChildMask, buffers: Iterable[str]
) -> ChildCheckpoint:
    """The checkpoint of tuned weights; ``buffers`` and the mask's dense parameters are stored whole."""
    whole = {
        label: weights.tensors[label].detach() for label in [*sorted(mask.dense_names), *buffers]
    }
    return ChildCheckpoint(
        mask=mask,
        values={
            label: weight_bits.child_values(weights.tensors[label], words)
            for label, words in mask.words.items()
        },
        whole=whole,
        shapes={label: tensor.shape for label, tensor in weights.tensors.items()},
        dtypes={label: tensor.dtype for label, tensor in weights.tensors.items()},
        ties=weights.ties,
        fingerprint=fingerprint(weights.tensors, mask, whole),
    )


def fingerprint(tensors: Mapping[str, Tensor], mask: ChildMask, whole: Iterable[str]) -> str:
    """SHA-256 of the weights outside the child (SPEC.md, "Child checkpoints in files").

    Args:
        tensors: label → weight, of the base or the tuned model.
        mask: elements of its child count as zero bits.
        whole: labels that do not count.
    """
    counted = sorted(tensors.keys() - set(whole))
    digest = weight_bits.BitDigest()
    sizes = {label: tensors[label].numel() * tensors[label].element_size() for label in counted}
    with progress_of_amount("fingerprint of the base", sum(sizes.values())) as advance:
        for label in counted:
            digest.add(label, tensors[label], mask.words.get(label))
            advance(sizes[label])
    return digest.hexdigest()


def _mask_of(weights: NamedWeights, mask: ChildMask) -> ChildMask:
    """The mask under the model's first labels, after a check that the two fit."""
    labels = {label: weights.first_label(label) for label in mask.names}
    parameters = weights.parameters or frozenset()
    unknown = [label for label, first in labels.items() if first not in parameters]
    if unknown:
        raise ValueError(
            f"mask: {shortened(unknown)} is no parameter of the model; give the model the mask was made of"
        )
    if len(set(labels.values())) < len(labels):
        raise ValueError("mask: a tied weight stands in it under two names; keep one")
    loose = [
        label for label in weights.tensors if label in weights.trainable - set(labels.values())
    ]
    if loose:
        raise ValueError(
            f"{shortened(loose)} requires gradients and is not in the mask: nobody knows whether it "
            "changed; name it in the mask (dense=[...]) or freeze it with requires_grad_(False)"
        )
    for label, shape in mask.shapes.items():
        found = weights.tensors[labels[label]].shape
        if found != shape:
            raise ValueError(
                f"mask: {label} has shape {tuple(shape)} in the mask and {tuple(found)} in the model"
            )
    return ChildMask(
        {labels[label]: words for label, words in mask.words.items()},
        {labels[label]: shape for label, shape in mask.shapes.items()},
        [labels[label] for label in mask.dense_names],
    )


def _check_optimizer(optimizer: Optimizer, weights: NamedWeights, mask: ChildMask) -> None:
    label_of_tensor = {id(tensor): label for label, tensor in weights.tensors.items()}
    state = optimizer.state_dict()["state"]
    index = 0
    for number, group in enumerate(optimizer.param_groups):
        if "freeze_non_child" not in group:
            raise ValueError(
                f"optimizer is a {type(optimizer).__name__}, which knows no child; give the "
                "FusedChildAdamW of the run"
            )
        for parameter, name in zip(group["params"], group["param_names"], strict=True):
            words = state.get(index, {}).get("mask_words")
            index += 1
            if id(parameter) not in label_of_tensor:
                raise ValueError(f"optimizer: {name} (group {number}) is not of this model")
            label = label_of_tensor[id(parameter)]
            _check_words(label, words, mask, number)
            if words is not None and not group["freeze_non_child"] and group["weight_decay"] != 0:
                raise ValueError(
                    f"optimizer: group {number} has freeze_non_child=False and "
                    f"weight_decay={group['weight_decay']}: decay changed {label} outside the child too; "
                    "save the whole model"
                )
        if group.get(WROTE_OUTSIDE):
            raise ValueError(
                f"optimizer: this run wrote weights outside the present child of group {number}, by decay "
                "(freeze_non_child=False) or before set_child_mask; give the mask "
                "child_diff(base, model) without optimizer=, or save the whole model"
            )


def _check_words(label: str, words: Tensor | None, mask: ChildMask, number: int) -> None:
    if words is None and label in mask.dense_names:
        return
    if words is None or label not in mask.words:
        how = "densely" if words is None else "by a mask"
        raise ValueError(
            f"optimizer: {label} (group {number}) trained {how}, which the given mask does not say; give "
            "the mask of the run"
        )
    if not torch.equal(words.cpu(), mask.words[label].cpu()):
        raise ValueError(
            f"optimizer: {label} (group {number}) trained by another mask than the given one; give the "
            "mask of the run"
        )


def _changed_buffers(
    base: NamedWeights, tuned: NamedWeights, mask: ChildMask, buffers: Iterable[str]
) -> list[str]:
    """The buffers that differ, after a check that nothing else outside the child does."""
    pairs = _pairs(tuned, base, "base")
    own = set(buffers)
    for label, tensor in tuned.tensors.items():
        if label in own or label in mask.dense_names:
            continue
        if not weight_bits.same_bits(pairs[label], tensor, mask.words.get(label)):
            raise ValueError(
                f"base: {label} differs from the model outside the child; give the base of the run and "
                "its mask"
            )
    return [
        label for label in buffers if not weight_bits.same_bits(pairs[label], tuned.tensors[label])
    ]


def _pairs(weights: NamedWeights, other: NamedWeights, what: str) -> dict[str, Tensor]:
    """The other side's tensors under the labels of ``weights``, of equal shape and type."""
    found = counterparts(weights.shapes, weights.dtypes, weights.ties, other, what)
    return {label: other.tensors[others[0]] for label, others in found.items()}


def apply_child(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> None:
    """Turn a base model into the tuned one, bit for bit.

    Everything is checked before anything is written. A model that is tuned already stays so.

    Args:
        model: the base model, of the run's architecture, types and ties.
        path: what ``save_child`` wrote.
        strict: False applies the child to a base with another fingerprint, too; the outcome is then not
            the tuned model.

    Changes in place: the stored weights and buffers; they stay the same tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is not whole; other names, shapes, types, ties; another base.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; apply_child needs a model")
    checkpoint = load_child(path)
    weights = named_weights(model, "model")
    found = check_base(checkpoint, weights, "model", strict=strict)
    targets = {label: weights.tensors[others[0]] for label, others in found.items()}
    _check_writable(checkpoint, targets)
    for label, tensor in targets.items():
        write_tuned_(tensor, label, checkpoint)


def check_base(
    checkpoint: ChildCheckpoint, weights: NamedWeights, what: str, *, strict: bool
) -> dict[str, list[str]]:
    """Refuse a base that the checkpoint is not of.

    Returns:
        For each label of the checkpoint the base's labels of this tensor.

    Raises:
        ValueError: other names, shapes, types or ties; another fingerprint, if ``strict``.
    """
    found = counterparts(checkpoint.shapes, checkpoint.dtypes, checkpoint.ties, weights, what)
    if strict:
        tensors = {label: weights.tensors[others[0]] for label, others in found.items()}
        own = fingerprint(tensors, checkpoint.mask, checkpoint.whole)
        if own != checkpoint.fingerprint:
            raise ValueError(
                f"{what}: not the base this child was tuned from (fingerprint {own[:12]}… outside the "
                f"child, not {checkpoint.fingerprint[:12]}…); use that base: strict=False (--no-strict) "
                "takes this one, but the outcome is then not the tuned model"
            )
    return found


def _check_writable(checkpoint: ChildCheckpoint, targets: Mapping[str, Tensor]) -> None:
    for label, tensor in targets.items():
        stored = label in checkpoint.values or label in checkpoint.whole
        if stored and any(
            size > 1 and stride == 0
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            raise ValueError(
                f"model: elements of {label} share memory; call .contiguous() on it first"
            )


def write_tuned_(tensor: Tensor, label: str, checkpoint: ChildCheckpoint) -> None:
    """Write what the checkpoint stores under a label into a base tensor, in place."""
    if label in checkpoint.values:
        weight_bits.set_child_values_(
            tensor, checkpoint.mask.words[label], checkpoint.values[label]
        )
    elif label in checkpoint.whole:
        weight_bits.set_bits_(tensor, checkpoint.whole[label])


def child_diff(base: Weights, tuned: Weights) -> ChildMask:
    """The mask of the weights whose bits differ: NaN payloads and the sign of zero count.

    Models give their parameters (of a tied weight the first name), mappings their floating point
    tensors; integers, which no optimizer trains, are left out.

    Args:
        base: the weights before training: a model, or name → tensor.
        tuned: the same weights after it, of equal names, shapes and types.

    Returns:
        A mask with words for every such weight, changed or not.

    Raises:
        ValueError: other names, shapes or types on one side; no floating point tensor.
    """
    before, after = named_weights(base, "base"), named_weights(tuned, "tuned")
    before, after = _in_scope(before, after), _in_scope(after, before)
    own, other, what = (
        (after, before, "base") if after.ties is not None else (before, after, "tuned")
    )
    pairs, words = _pairs(own, other, what), {}
    total = sum(tensor.nbytes for tensor in pairs.values())
    with progress_of_amount("comparing", total) as advance:
        for label, tensor in own.tensors.items():
            words[label] = weight_bits.changed_words(pairs[label], tensor)
            advance(tensor.nbytes)
    return ChildMask(words, own.shapes)


def _in_scope(weights: NamedWeights, other: NamedWeights) -> NamedWeights:
    """The parameters alone, as far as one side knows them, else what is floating point."""
    scope = {label for label, tensor in weights.tensors.items() if tensor.is_floating_point()}
    known = weights if weights.parameters is not None else other
    if known.parameters is not None:
        aliases = (alias for others in (known.ties or {}).values() for alias in others)
        scope = {*known.parameters, *aliases}
    kept = {label: tensor for label, tensor in weights.tensors.items() if label in scope}
    return replace(weights, tensors=kept)


def diff_checkpoint(base: NamedWeights, tuned: NamedWeights) -> ChildCheckpoint:
    """The checkpoint that turns ``base`` into ``tuned``, for weights whose run nobody has at hand.

    A floating point tensor of which so much changed that words and values are no smaller is stored
    whole, and so is every other kind of tensor that changed.

    Raises:
        ValueError: other names, shapes or types on one side; no floating point tensor differs.
    """
    words, dense, other = {}, [], []
    pairs = _pairs(tuned, base, "base")
    total = sum(tensor.nbytes for tensor in pairs.values())
    with progress_of_amount("comparing", total) as advance:
        for label, tensor in tuned.tensors.items():
            advance(tensor.nbytes)
            if weight_bits.same_bits(pairs[label], tensor):
                continue
            if not tensor.is_floating_point():
                other.append(label)
                continue
            changed = weight_bits.changed_words(pairs[label], tensor)
            size = 4 * changed.numel() + ops.count_mask(changed) * tensor.element_size()
            if size < tensor.numel() * tensor.element_size():
                words[label] = changed
            else:
                dense.append(label)
    if not words and not dense:
        raise ValueError("tuned: no floating point weight differs from the base; there is no child")
    mask = ChildMask(words, {label: tuned.tensors[label].shape for label in words}, dense)
    return checkpoint_of(tuned, mask, other)
