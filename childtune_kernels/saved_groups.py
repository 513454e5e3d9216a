"""Which saved group and state every parameter continues, by label or by position (SPEC.md, section 5)."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from .group_options import OPTIONS, WROTE_OUTSIDE, check_seed
from .labels import is_positional, label_of, shortened

ADAMW_OPTIONS = ("lr", "betas", "eps", "weight_decay", "maximize")
_TORCH_ONLY = ("capturable", "differentiable", "decoupled_weight_decay", "fused", "foreach")
# How an optimizer steps and keeps its state, which changes no result: not the saved run's affair.
_OWN_CHOICES = ("child_state", "capturable", "fused", "foreach")
_MEMBERS = ("params", "param_names")

Groups = Sequence[Mapping[str, Any]]


class Continued(NamedTuple):
    """What one group of an optimizer continues."""

    #: The saved number of each of its parameters.
    numbers: list[Any]
    #: The options it takes, without its parameters and their names.
    options: dict[str, Any]
    #: The saved groups that they come from.
    sources: set[int]


def are_own(saved_groups: Groups) -> bool:
    """Whether saved groups are of FusedChildAdamW, and not of ``torch.optim.AdamW``.

    Raises:
        ValueError: some are and some are not, or they are of another optimizer.
    """
    own = ["reserve_p" in saved for saved in saved_groups]
    if any(own) and not all(own):
        raise ValueError(
            "some param_groups of the state dict are of FusedChildAdamW and some are not; it was altered, "
            "or put into other groups on the way: build the optimizer with the groups it was saved with"
        )
    for saved in saved_groups:
        if all(own):
            check_seed(saved.get("seed"), "the state dict")
        else:
            _check_is_adamw(saved)
    return all(own)


def _check_is_adamw(saved: Mapping[str, Any]) -> None:
    """Refuse the groups of optimizers that mean something else by the same state."""
    # RAdam's groups look like AdamW's but for amsgrad.
    coupled = saved.get("decoupled_weight_decay") is False and saved.get("weight_decay")
    if (
        coupled
        or not {"betas", "amsgrad"} <= saved.keys()
        or "momentum_decay" in saved
        or "rho" in saved
    ):
        raise ValueError(
            "the state dict is of another optimizer; load one of AdamW's kind (decoupled decay, betas)"
        )
    if saved.get("amsgrad"):
        raise ValueError("the state dict is of AdamW with amsgrad=True, which is not supported")


def continued(groups: Groups, saved_groups: Groups, *, relabel: bool) -> list[Continued]:
    """What each of an optimizer's groups continues.

    Names decide, whatever the groups; without names, or with ``relabel``, the position does.

    Raises:
        ValueError: other labels, sizes that do not fit by position, or parameters of one group whose
            saved options differ.
    """
    foreign = {*_MEMBERS, *_OWN_CHOICES}
    if not are_own(saved_groups):
        foreign |= set(OPTIONS) - set(ADAMW_OPTIONS) | set(_TORCH_ONLY)
    taken = [
        {name: value for name, value in saved.items() if name not in foreign}
        for saved in saved_groups
    ]
    labels = [group["param_names"] for group in groups]
    saved_labels = [None if relabel else labels_of(saved) for saved in saved_groups]
    named = [of_group for of_group in saved_labels if of_group is not None]
    by_position = len(named) < len(saved_labels) or saved_labels == labels
    if by_position or any(map(is_positional, chain(*named, *labels))):
        _check_sizes(groups, saved_groups)
        _check_labels(labels, saved_labels)
        return [
            Continued(list(saved["params"]), options, {index})
            for index, (saved, options) in enumerate(zip(saved_groups, taken, strict=True))
        ]
    check_same_labels(labels, named)
    result = by_label(labels, named, [saved["params"] for saved in saved_groups], taken)
    for of_group in result:
        if not of_group.numbers and "seed" in taken[0]:
            of_group.options["seed"] = taken[0]["seed"]  # of what is added to it later
    return result


def labels_of(saved: Mapping[str, Any]) -> list[str] | None:
    """The labels of a group's ``param_names``; None where it has none.

    Raises:
        ValueError: another number of names than of parameters.
    """
    names = saved.get("param_names")
    if names is None:
        return None
    if len(names) != len(saved["params"]):
        raise ValueError(
            f"the state dict has {len(names)} param_names for a group of {len(saved['params'])} "
            "parameters; it was altered or cut"
        )
    return [name if is_positional(name) else label_of(name) for name in names]


def _check_sizes(groups: Groups, saved_groups: Groups) -> None:
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(saved["params"]) for saved in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"the state dict has groups of {saved_sizes} parameters, the optimizer of {sizes}, and without "
            "names (or with relabel=True) state goes by position; build the optimizer with the groups it "
            "was saved with"
        )


def _check_labels(
    labels: Sequence[Sequence[str]], saved_labels: Sequence[Sequence[str] | None]
) -> None:
    """Saved labels must be those of construction; a state without labels fits by position."""
    differing = [
        f"{saved} (saved) is not {label}"
        for of_group, saved_of_group in zip(labels, saved_labels, strict=True)
        for label, saved in zip(of_group, saved_of_group or of_group, strict=True)
        if saved != label
    ]
    if differing:
        raise ValueError(
            f"{len(differing)} labels of the state dict differ: {'; '.join(differing[:4])}; Bernoulli "
            "masks follow labels: build the optimizer with the same names, or load with relabel=True"
        )


def check_same_labels(
    labels: Sequence[Sequence[str]],
    saved_labels: Sequence[Sequence[str]],
    holders: tuple[str, str] = ("the state dict", "the optimizer"),
    remedy: str = "",
) -> None:
    """Refuse groups that have not the same labels, each once.

    Args:
        labels: those of each group.
        saved_labels: those of each group that is to be continued.
        holders: who has the saved labels and who the others, for messages.
        remedy: the same; the default is that of loading.

    Raises:
        ValueError: names the labels.
    """
    wanted, found = Counter(chain(*labels)), Counter(chain(*saved_labels))
    for counts, holder in zip((found, wanted), holders, strict=True):
        twice = [label for label, count in counts.items() if count > 1]
        if twice:
            raise ValueError(
                f"{holder} has {shortened(twice, 4)} more than once; give each name once"
            )
    missing = [label for label in wanted if label not in found]
    more = [label for label in found if label not in wanted]
    lacking = [
        f"{holder} lacks {shortened(of_holder, 4)}"
        for holder, of_holder in zip(holders, (missing, more), strict=True)
        if of_holder
    ]
    if lacking:
        remedy = remedy or _remedy(bool(missing), bool(more))
        raise ValueError(f"labels differ: {' and '.join(lacking)}; {remedy}")


def _remedy(missing: bool, more: bool) -> str:
    """What to do when the state dict lacks labels, has more of them, or both."""
    if not more:
        return "build the optimizer without them, load, and add them with add_param_group"
    if not missing:
        return (
            "give the optimizer these too (what has no gradient is skipped), or take them out of params "
            "and param_names in the state dict"
        )
    return (
        "build the optimizer with the parameters and names of the saved run; where only the names changed, "
        "load with relabel=True: by position"
    )


def by_label(
    labels: Sequence[Sequence[str]],
    saved_labels: Sequence[Sequence[str]],
    saved_numbers: Sequence[Sequence[Any]],
    saved_options: Sequence[Mapping[str, Any]],
    where: str = "the state dict",
) -> list[Continued]:
    """What groups of the given labels continue of saved groups with the same labels, in any grouping.

    Args:
        labels: those of each group.
        saved_labels, saved_numbers, saved_options: of each saved group.
        where: who has them, for messages.

    Raises:
        ValueError: parameters of one group whose saved options differ.
    """
    place = {
        label: (number, index)
        for index, of_group in enumerate(saved_labels)
        for label, number in zip(of_group, saved_numbers[index], strict=True)
    }
    result = []
    for of_group in labels:
        first_labels: dict[int, str] = {}
        for label in of_group:
            first_labels.setdefault(place[label][1], label)
        sources = [(label, saved_options[index]) for index, label in first_labels.items()]
        numbers = [place[label][0] for label in of_group]
        result.append(Continued(numbers, _agreed(sources, where), set(first_labels)))
    return result


def _agreed(sources: Sequence[tuple[str, Mapping[str, Any]]], where: str) -> dict[str, Any]:
    """A copy of the options of several saved groups, each under the label of one of its parameters."""
    if not sources:
        return {}
    (first, agreed), *others = sources
    for label, options in others:
        for name in {**agreed, **options}:
            one, other = (given.get(name, _Absent()) for given in (agreed, options))
            if name != WROTE_OUTSIDE and not _same(one, other):
                raise ValueError(
                    f"{name} differs in {where}: {one!r} for {first}, {other!r} for {label}, which are in "
                    f"one group now; put them into groups of their own, or make {name} one in {where}'s "
                    "param_groups"
                )
    # Each group its own tensors: schedulers write into those of one group after the other.
    result = deepcopy(dict(agreed))
    if WROTE_OUTSIDE in result:
        result[WROTE_OUTSIDE] = any(options.get(WROTE_OUTSIDE) for _, options in sources)
    return result


class _Absent:
    """Stands for an option that a group does not have."""

    def __repr__(self) -> str:
        return "nothing"


def _same(one: Any, other: Any) -> bool:
    """Whether two values of an option mean the same: tensors count as their numbers, tuples as lists."""
    try:
        return bool(_plain(one) == _plain(other))
    except (TypeError, ValueError, RuntimeError):
        return False


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def warn_of_lost_differences(
    groups: Groups, new_groups: Groups, sources: Sequence[Iterable[int]]
) -> None:
    """Warn where groups were made to differ in an option but continue one saved group's.

    Args:
        groups, new_groups: before and after loading.
        sources: the saved groups that each of them continues.
    """
    lost: dict[str, str] = {}
    first_of: dict[int, int] = {}
    for index, (group, new_group) in enumerate(zip(groups, new_groups, strict=True)):
        for source in sources[index]:
            other = first_of.setdefault(source, index)
            before, after = groups[other], new_groups[other]
            for name in before.keys() & group.keys() - {*_MEMBERS, *_OWN_CHOICES, *lost}:
                if not _same(before[name], group[name]) and _same(after[name], new_group[name]):
                    lost[name] = (
                        f"{name} ({before[name]!r} with {before['param_names'][0]}, {group[name]!r} with "
                        f"{group['param_names'][0]}; now {after[name]!r})"
                    )
    if lost:
        warnings.warn(
            f"groups differ no longer in {', '.join(lost[name] for name in sorted(lost))}: they were one "
            "group in the saved run, whose options count; set what shall differ after loading",
            UserWarning,
            stacklevel=4,
        )
