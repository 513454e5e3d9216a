"""Which parameters of a model have their Fisher information measured, and which train densely."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from . import ops, sharding
from .labels import label_of, shortened

Patterns = str | Iterable[str] | None


@dataclass(frozen=True)
class Member:
    """One trainable parameter: its label, its name in the model, and the tensor."""

    label: str
    name: str
    parameter: Tensor


@dataclass(frozen=True)
class FisherScope:
    """The trainable parameters of a model in its order: measured ones, and ones that train densely."""

    members: tuple[Member, ...]
    dense: tuple[Member, ...]
    include: tuple[str, ...] | None
    exclude: tuple[str, ...]


def scope_of(model: torch.nn.Module, include: Patterns, exclude: Patterns) -> FisherScope:
    """Sort a model's trainable parameters by patterns on their labels (SPEC.md, "Fisher information").

    A tied weight is one parameter, under the label of its first name; any of its names that matches
    decides. Frozen parameters are left out.

    Raises:
        TypeError: no module, or patterns that are not text.
        ValueError: a pattern that matches no parameter, nothing left in scope, two parameters of one label,
            a parameter in scope that has no Fisher information here, as one that
            FullyShardedDataParallel has flattened.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    included = None if include is None else _patterns("include", include)
    excluded = _patterns("exclude", exclude)
    aliases = _aliases(model)
    labels = [label for _, names in aliases for label in map(label_of, names)]
    for option, patterns in (("include", included or ()), ("exclude", excluded)):
        for pattern in patterns:
            _require_match(option, pattern, labels)

    members: list[Member] = []
    dense: list[Member] = []
    for parameter, names in aliases:
        own = [label_of(name) for name in names]
        if not parameter.requires_grad:
            continue
        wanted = included is None or _any_matches(included, own)
        measured = wanted and not _any_matches(excluded, own)
        (members if measured else dense).append(Member(own[0], names[0], parameter))
    _require_distinct([member.label for member in (*members, *dense)])
    if not members:
        raise ValueError(
            f"include={include!r} and exclude={exclude!r} leave no trainable parameter in scope; the "
            f"model has {shortened([member.label for member in dense]) or 'none that trains'}"
        )
    for member in members:
        if sharding.is_sharded(member.parameter):
            sharding.check_part(member.label, member.parameter)
        else:
            sharding.check_whole(member.label, member.parameter)
        ops.check_parameter(member.label, sharding.local_of(member.parameter))
    return FisherScope(tuple(members), tuple(dense), included, excluded)


def layer_patterns(model: torch.nn.Module) -> list[str]:
    """Patterns of the weights in a model's stacks of layers: ``include`` for the scope of the paper's code.

    A stack is an outermost ``nn.ModuleList`` that holds a trainable parameter: ``bert.encoder.layer``,
    ``transformer.h`` of a GPT-2, ``model.layers`` of a Llama, the adapters of LoRA in them. Embeddings,
    poolers, last norms and heads are outside, and train densely.

    Raises:
        TypeError: no module.
        ValueError: the model has no such stack.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    stacks: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{stack}.") for stack in stacks)
        trains = any(parameter.requires_grad for parameter in module.parameters())
        if isinstance(module, torch.nn.ModuleList) and trains and not inside:
            stacks.append(name)
    if not stacks:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList with a trainable parameter, so that its layers are "
            "unknown; give the patterns of what may be in the child, ['*'] for all weights"
        )
    return [f"{label_of(stack)}.*" for stack in stacks]


def near_labels(wanted: str, labels: Sequence[str]) -> list[str]:
    """Labels with a component that resembles one of ``wanted``, or else the first labels."""
    parts = {part for label in labels for part in label.split(".")}
    words = [word for word in re.split(r"[*?.\[\]!]+", wanted) if word]
    close = {near for word in words for near in difflib.get_close_matches(word, sorted(parts))}
    return [label for label in labels if close & set(label.split("."))] or list(labels)


def _aliases(model: torch.nn.Module) -> list[tuple[Tensor, list[str]]]:
    """Every parameter with all its names, in the model's order."""
    names: dict[int, tuple[Tensor, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), (parameter, []))[1].append(name)
    return list(names.values())


def _patterns(option: str, given: Patterns) -> tuple[str, ...]:
    if given is None:
        return ()
    if isinstance(given, str):
        return (given,)
    patterns = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{option}={given!r} must be a pattern or a list of patterns on names")
    return patterns


def _any_matches(patterns: Iterable[str], labels: Iterable[str]) -> bool:
    labels = list(labels)
    return any(fnmatchcase(label, pattern) for pattern in patterns for label in labels)


def _require_match(option: str, pattern: str, labels: Sequence[str]) -> None:
    if not _any_matches([pattern], labels):
        raise ValueError(
            f"{option}: the pattern {pattern!r} matches no parameter; near it are "
            f"{shortened(near_labels(pattern, labels)) or 'none'} (patterns match whole names, '*' any part)"
        )


def _require_distinct(labels: Sequence[str]) -> None:
    seen: set[str] = set()
    for label in labels:
        if label in seen:
            raise ValueError(f"the label {label!r} stands for two parameters; rename one")
        seen.add(label)
