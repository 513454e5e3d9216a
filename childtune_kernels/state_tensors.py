"""The state of one parameter: made, checked, moved to another child, saved (SPEC.md, section 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import child_layout, ops
from .weight_formats import (
    MASTER_DTYPES,
    MASTER_NAMES,
    MASTERS,
    check_types,
    decays_exactly,
    kept_master,
    key,
    master_kind,
    master_of,
    moment_dtype,
    with_masters_of,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
#: What has a value a weight, or with compact state a value a child element.
ELEMENTWISE = (*MOMENTS, *MASTERS.values())

State = Mapping[str, Tensor]


def _wants_compact(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a parameter with a fixed mask gets compact state.

    Masters of the child alone cannot take decay for the weights outside it: a 16-bit weight's decay is
    lost in its rounding.
    """
    if group["child_state"] != "auto":
        return bool(group["child_state"] == "compact")
    return bool(group["freeze_non_child"]) or not decays_exactly(parameter, group)


def initial_state(
    label: str, parameter: Tensor, words: Tensor | None, group: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Zero moments, step 0, and what masks and 16-bit weights need besides.

    Args:
        words: mask words on the parameter's device, which the state may keep; None without a fixed mask.
        group: the options of the parameter's group.

    Raises:
        ValueError: compact state that the other options do not allow.
    """
    device = parameter.device
    check_types(label, parameter, group)
    state = {"step": torch.zeros((), dtype=torch.int64, device=device)}
    compact = words is not None and _wants_compact(parameter, group)
    shape: Any = parameter.shape
    if words is not None:
        shape = (ops.count_mask(words),) if compact else shape
    for name in MOMENTS:
        dtype = moment_dtype(parameter, group["state_dtype"])
        state[key(name, compact)] = torch.zeros(shape, dtype=dtype, device=device)
    kind = master_kind(parameter, group["master_weight"])
    if kind == "split":
        remainder = torch.zeros(shape, dtype=torch.int16, device=device)
        state[key("master_remainder", compact)] = remainder
    elif kind == "fp32":
        master = master_of(parameter)
        if words is not None and compact:
            master = child_layout.gather_child(master, words)
        state[key("master_weight", compact)] = master
    if words is not None and not compact:
        state["mask_words"] = words
    elif words is not None:
        state |= child_layout.child_layout(words, parameter.numel())
        # Compact tensors do not show for what shape they were made.
        state["child_shape"] = torch.tensor(parameter.shape, dtype=torch.int64, device="cpu")
    check_options(label, parameter, state, group)
    return state


def moved_state(
    label: str,
    parameter: Tensor,
    state: State,
    words: Tensor | None,
    group: Mapping[str, Any],
) -> dict[str, Tensor]:
    """The state that continues ``state`` with another child or layout, in new tensors.

    Moments and masters of elements that are in both children stay, and so does the step. Elements that
    come new have zero moments, and masters made of the weight; so has the master of one that leaves.

    Args:
        state: a state of this parameter, compact or dense.
        words: mask words of the new child; None where all of the parameter trains from now on.
        group: the options of the parameter's group.

    Raises:
        ValueError: compact state that the other options do not allow.
    """
    moved = initial_state(label, parameter, words, group)
    was_compact, compact = child_layout.is_compact(state), child_layout.is_compact(moved)
    old_words = child_layout.mask_words(state, parameter.numel())
    moved["step"].copy_(state["step"])
    state = with_masters_of(parameter, state, kept_master(moved), old_words)
    same = old_words is not None and words is not None and torch.equal(old_words, words)
    for name in ELEMENTWISE:
        source, target = key(name, was_compact), key(name, compact)
        if source not in state or target not in moved:
            continue
        if same and was_compact and compact:
            moved[target] = state[source].to(moved[target].dtype, copy=True)
            continue
        values = state[source]
        if was_compact:
            values = _spread_out(parameter, name, values, old_words)
        if compact:
            assert words is not None
            moved[target].copy_(child_layout.gather_child(values, words))
        elif words is None:
            moved[target].copy_(values)
        else:
            child = ops.unpack_mask(words, parameter.shape)
            if name in MASTERS.values():
                before = torch.ones_like(child)
                if old_words is not None:
                    before = ops.unpack_mask(old_words, parameter.shape)
                child = child | ~before
            moved[target].copy_(torch.where(child, values, moved[target]))
    return moved


def _spread_out(parameter: Tensor, name: str, values: Tensor, words: Tensor | None) -> Tensor:
    """A whole tensor with the child's values; elsewhere moments are zero, masters made of the weight."""
    assert words is not None
    if name == "master_weight":
        whole = master_of(parameter)
    else:
        whole = torch.zeros(parameter.shape, dtype=values.dtype, device=values.device)
    return child_layout.scatter_child_(whole, values, words)


def saved_state(parameter: Tensor, state: State) -> dict[str, Tensor]:
    """A parameter's state as it stands in state dicts: with mask words, whatever the child's layout."""
    words = child_layout.mask_words(state, parameter.numel())
    if words is None:
        return dict(state)
    others = {name: state[name] for name in state if name not in child_layout.LAYOUT_KEYS}
    return {**others, "mask_words": words}


def dense_moments(parameter: Tensor, state: State) -> dict[str, Tensor]:
    """exp_avg and exp_avg_sq of a saved or live state, in the parameter's shape and its computing type."""
    compute = ops.compute_dtype(parameter.dtype)
    if not child_layout.is_compact(state):
        return {name: state[name].to(compute) for name in MOMENTS}
    words = child_layout.mask_words(state, parameter.numel())
    return {
        name: _spread_out(parameter, name, state[key(name, True)], words).to(compute)
        for name in MOMENTS
    }


def check_state(label: str, parameter: Tensor, state: State, *, contents: bool = True) -> None:
    """Refuse state that does not fit its parameter.

    Args:
        contents: look at the numbers of a child's layout too.

    Raises:
        ValueError: a missing tensor, or one of another type, shape, device or layout.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"state {name} of {label} must be a tensor, not {value!r}")
    compact = child_layout.is_compact(state)
    shape: Any = tuple(state["child_exp_avg"].shape[:1]) if compact else tuple(parameter.shape)
    expected = dict.fromkeys(MOMENTS, _moments_of(parameter, state, compact)) | MASTER_DTYPES
    for plain, dtype in expected.items():
        name = key(plain, compact)
        tensor = state.get(name)
        if tensor is None and plain in MASTER_DTYPES:
            continue
        if (
            not isinstance(tensor, Tensor)
            or tensor.dtype != dtype
            or tensor.shape != shape
            or tensor.device != parameter.device
            or not tensor.is_contiguous()
        ):
            raise ValueError(
                f"state {name} of {label} must be a contiguous {dtype} tensor of shape {shape} on "
                f"{parameter.device}; load a state dict with load_state_dict instead of writing into "
                "optimizer.state"
            )
    _check_step(label, parameter, state.get("step"))
    if compact:
        check_shape(label, parameter, state)
        child_layout.check_layout(
            label, state, parameter.device, parameter.numel(), contents=contents
        )
    elif "mask_words" in state:
        words = state["mask_words"]
        ops.check_words(label, words, parameter.numel())
        if words.device != parameter.device or not words.is_contiguous():
            raise ValueError(f"mask of {label}: words must be contiguous, on {parameter.device}")


def _moments_of(parameter: Tensor, state: State, compact: bool) -> torch.dtype:
    """The type that the moments of a state must have: bf16 where both may be and the first one is."""
    compute = ops.compute_dtype(parameter.dtype)
    first = state.get(key("exp_avg", compact))
    rounded = isinstance(first, Tensor) and first.dtype == torch.bfloat16
    return torch.bfloat16 if rounded and compute == torch.float32 else compute


def check_shape(label: str, parameter: Tensor, state: Mapping[str, Any]) -> None:
    """Refuse compact state that was made for a parameter of another shape.

    Raises:
        ValueError: names both shapes.
    """
    shape = state.get("child_shape")
    made_for = tuple(shape.tolist()) if isinstance(shape, Tensor) else shape
    if made_for != tuple(parameter.shape):
        raise ValueError(
            f"compact state of {label} was made for shape {made_for}, the parameter has shape "
            f"{tuple(parameter.shape)}; build the optimizer anew after a change of shape"
        )


def _check_step(label: str, parameter: Tensor, step: Tensor | None) -> None:
    if (
        not isinstance(step, Tensor)
        or step.dtype != torch.int64
        or step.dim() != 0
        or step.device != parameter.device
        or (step.device.type == "cpu" and int(step) < 0)
    ):
        raise ValueError(
            f"state step of {label} must be an int64 tensor of no dimension on {parameter.device}, and "
            "not negative"
        )


def check_options(label: str, parameter: Tensor, state: State, group: Mapping[str, Any]) -> None:
    """Refuse options of a group that do not go with the state of one of its parameters.

    Raises:
        ValueError: masters or compact moments that the options do not have, or the reverse.
    """
    check_types(label, parameter, group)
    compact = child_layout.is_compact(state)
    kind, kept = master_kind(parameter, group["master_weight"]), kept_master(state)
    expected = kind if kind in MASTERS else "none"
    if expected != kept:
        raise ValueError(
            f"state of {label} has {MASTER_NAMES[kept]}, which does not go with "
            f"master_weight={group['master_weight']!r} and a weight of {parameter.dtype}; "
            "build the optimizer anew and load its state dict"
        )
    moments = state[key("exp_avg", compact)].dtype
    if moments != moment_dtype(parameter, group["state_dtype"]):
        raise ValueError(
            f"state of {label} has moments of {moments}, which does not go with "
            f"state_dtype={group['state_dtype']}; build the optimizer anew and load its state dict"
        )
    wanted = group["child_state"]
    if child_layout.has_child(state) and wanted != "auto" and compact != (wanted == "compact"):
        raise ValueError(
            f"state of {label} is {'compact' if compact else 'dense'}, which does not go with "
            f"child_state={wanted!r}; call optimizer.set_child_mask after a change of child_state"
        )
    if compact and decays_exactly(parameter, group) and not group["freeze_non_child"]:
        raise ValueError(
            f"freeze_non_child=False with compact state, a weight of {parameter.dtype} ({label}) and "
            f"master_weight={group['master_weight']!r}: decay outside the child needs more precision than "
            "compact state keeps there; use child_state='dense'"
        )


def state_of(label: str, parameter: Tensor, states: Mapping[Tensor, Any]) -> dict[str, Tensor]:
    """The state of a parameter.

    Raises:
        ValueError: there is none.
    """
    state: dict[str, Tensor] | None = states.get(parameter)
    if not state:
        raise ValueError(
            f"state of {label} is missing, and with it the mask, if it had one; load a state dict, "
            "build the optimizer anew, or add new parameters with add_param_group. An engine that puts flat "
            "copies in their place (DeepSpeed, other than ZeRO 0 with fp32 weights) keeps no indexes of "
            "elements; use fully_shard (FSDP2) instead"
        )
    return state
