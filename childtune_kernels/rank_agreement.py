"""What ranks that train together must agree on, asked before their first step (SPEC.md, section 10)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import child_layout, mask_parts, parameters, rank_values, sharding
from .child_mask import ChildMask
from .group_options import OPTIONS
from .labels import Aliases, shortened

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Groups = Sequence[Mapping[str, Any]]
#: By label, by what it is of the parameter, and how that stands on one rank.
Statement = dict[str, dict[str, str]]

# These change no bit of a result.
_OF_NO_CONSEQUENCE = ("fused", "foreach", "capturable", "child_state")
# Of what ranks say, this may differ: the first rank that holds a sharded parameter, or nothing.
_HOLDER = "first holder"
_MOST_NAMED = 8
_MASK = "the child_mask"
_WHENCE_MASKS = (
    "made of each rank's own scores? FisherAccumulator.reduce() adds those of all ranks up"
)


class RankAgreement:
    """Whether the ranks of a process group train the same child, and with which seed.

    Attributes:
        group: the ranks that train together; None: all of ``torch.distributed``.
        aliases: of weights that two of them hold.
        seed_given: whether somebody chose the seed; else that of the group's rank 0 is taken.
        first_holders: where ranks hold different parameters, as the stages of a pipeline do, or parts on
            different meshes: label → the first rank that holds it, or that is in a mesh which holds its
            parts. Empty where all are alike.
    """

    def __init__(self, group: ProcessGroup | None, aliases: Aliases, seed_given: bool) -> None:
        self.group = group
        self.aliases = aliases
        self.seed_given = seed_given
        self.first_holders: dict[str, int] = {}
        self._masks: list[ChildMask] = []
        self.settled = False

    def __deepcopy__(self, memo: dict[int, Any]) -> RankAgreement:
        return RankAgreement(self.group, self.aliases, self.seed_given)

    def __reduce__(self) -> tuple[Any, ...]:
        # A process group is of this process; who unpickles has all ranks.
        return RankAgreement, (None, self.aliases, self.seed_given)

    def open(self, *masks: ChildMask | None) -> None:
        """Ask again before the next step: groups, masks or state have been replaced.

        Args:
            masks: that parameters have been given whole, where a rank's state may have a part alone.
        """
        self.settled = False
        self._masks += [mask for mask in masks if mask is not None]

    def seed_of_all(self, groups: Groups, states: Mapping[Tensor, Any]) -> int | None:
        """The seed of all ranks, where this one was given none; None where it keeps its own.

        A collective of the group, the first time: every rank must come.

        Raises:
            ValueError: ranks differ, and in what; on all of them.
        """
        if self.settled:
            return None
        seed = None
        self._require_meshes_within(groups)
        if rank_values.is_distributed(self.group):
            seed = self._settle(groups, states)
        else:
            # Tied weights of one process have one name: the other one is never met.
            labels = {label for label, _ in parameters.by_label(groups)}
            _check_aliases([(labels, self.aliases.labels, self.aliases.met)], alone=True)
        self.settled = True
        self._masks.clear()
        return seed

    def _require_meshes_within(self, groups: Groups) -> None:
        """Refuse a group that has some of the ranks which hold a parameter, and not all of them."""
        ranks: set[int] | None = None
        for label, parameter in parameters.by_label(groups):
            if not sharding.is_sharded(parameter):
                continue
            if ranks is None:
                ranks = set(torch.distributed.get_process_group_ranks(self.group))
            placed: Any = sharding.placed_of(parameter)
            others = sorted(set(placed.device_mesh.mesh.flatten().tolist()) - ranks)
            if others:
                raise ValueError(
                    f"process_group= has ranks {sorted(ranks)}, and {sharding.described(label, placed)} lies "
                    f"on rank {others[0]}, too; give a group of all ranks that train together, or none"
                )

    def _settle(self, groups: Groups, states: Mapping[Tensor, Any]) -> int | None:
        aliases = self.aliases
        statement = _statement(groups, states, self._masks)
        own = statement, aliases.labels, aliases.met
        told = statement, sorted(aliases.labels.items()), sorted(aliases.met)
        digest = hashlib.sha256(repr(told).encode()).digest()
        seed = int(groups[0]["seed"]) % 2**64
        said = bytes([self.seed_given]) + seed.to_bytes(8, "little") + digest
        with rank_values.said_when_late():
            of_ranks = rank_values.gathered(
                torch.frombuffer(bytearray(said), dtype=torch.uint8), self.group
            )
        heard = [bytes(each.tolist()) for each in of_ranks]
        seeds = [int.from_bytes(each[1:9], "little") for each in heard]
        differing = [
            f"seed={seeds[rank]} on rank {rank}, {seeds[0]} on rank 0"
            for rank, each in enumerate(heard)
            if each[0] and seeds[rank] != seeds[0]
        ]
        of_all = [own]
        if any(each[9:] != heard[0][9:] for each in heard):
            of_all = rank_values.gathered_objects(own, self.group)
        _check_aliases([(each.keys(), given, met) for each, given, met in of_all])
        statements = [each for each, _, _ in of_all]
        differing += _differences(statements)
        group = torch.distributed.group.WORLD if self.group is None else self.group
        ranks = torch.distributed.get_process_group_ranks(group)
        self.first_holders = _first_holders(statements, ranks[: len(statements)])
        if differing:
            more = f"; and {len(differing) - _MOST_NAMED} more" * (len(differing) > _MOST_NAMED)
            raise ValueError(
                f"ranks that train together differ: {'; '.join(differing[:_MOST_NAMED])}{more}. Give all of "
                "them the same, or name those that do train together: process_group="
            )
        return None if self.seed_given else seeds[0]

    def counted(self, rows: Sequence[Any]) -> list[int]:
        """Which of a plan's rows this rank counts where something is summed over ranks: each once in all."""
        first = 0 if self.group is None else torch.distributed.get_global_rank(self.group, 0)
        rank = torch.distributed.get_rank()
        found = []
        for index, row in enumerate(rows):
            holder = rank if row.sharded is None else sharding.first_rank_of(row.sharded)
            usual = first if row.sharded is None else holder
            replica = row.sharded is not None and not sharding.is_first_replica(row.sharded)
            if self.first_holders.get(row.label, usual) == holder and not replica:
                found.append(index)
        return found


def _statement(
    groups: Groups, states: Mapping[Tensor, Any], masks: Sequence[ChildMask]
) -> Statement:
    """What this rank says of its parameters."""
    statement: Statement = {}
    for group in groups:
        of_group = {
            name: str(value.item() if isinstance(value, Tensor) else value)
            for name, value in ((name, group[name]) for name in OPTIONS)
            if name not in _OF_NO_CONSEQUENCE
        }
        for label, parameter in zip(group["param_names"], group["params"], strict=True):
            state = states.get(parameter) or {}
            statement[label] = {
                "shape": str(tuple(parameter.shape)),
                "dtype": str(parameter.dtype),
                "steps": str(int(state.get("step", 0))),
                _MASK: _mask_of(label, parameter, state, masks),
                **of_group,
                _HOLDER: "" if (first := sharding.first_rank_of(parameter)) is None else str(first),
            }
    return statement


def _mask_of(
    label: str, parameter: Tensor, state: Mapping[str, Tensor], masks: Sequence[ChildMask]
) -> str:
    """A digest of a parameter's whole mask, as far as this rank knows it."""
    if not child_layout.has_child(state):
        return "none"
    if not sharding.is_sharded(parameter):
        words = child_layout.mask_words(state, parameter.numel())
    else:
        # The last mask that was given replaced the others; one of parts has been agreed on where it was made.
        known = (mask for mask in reversed(masks) if label in mask.words)
        mask = next(known, None)
        if mask is None:
            return "a part"
        if label in mask.parts:
            return mask.cut_from.get(label, "a part")
        words = mask.words[label]
    assert words is not None
    return mask_parts.digest(words)


def _differences(statements: Sequence[Statement]) -> list[str]:
    """What ranks say otherwise of a parameter than the first rank that has it, and which lack some."""
    labels_of: dict[tuple[str, str], list[str]] = {}
    first: dict[str, tuple[int, dict[str, str]]] = {}
    for rank, statement in enumerate(statements):
        for label, said in statement.items():
            holder, others = first.setdefault(label, (rank, said))
            for what, value in said.items():
                if value != others[what] and what != _HOLDER:
                    how = _how_it_differs(what, (value, rank), (others[what], holder))
                    labels_of.setdefault((what, how), []).append(label)
    found = [f"{what} of {shortened(labels, 3)} {how}" for (what, how), labels in labels_of.items()]
    # Stages of a pipeline hold others' parameters; a rank that holds some of another's lacks the rest.
    whole = max(range(len(statements)), key=lambda rank: len(statements[rank]))
    for rank, statement in enumerate(statements):
        lacking = statements[whole].keys() - statement.keys()
        if lacking and statement.keys() < statements[whole].keys():
            found.append(
                f"{len(lacking)} parameters of rank {whole} are missing on rank {rank}: "
                f"{shortened(sorted(lacking), 3)}"
            )
    return found


def _how_it_differs(what: str, one: tuple[str, int], other: tuple[str, int]) -> str:
    (value, rank), (expected, holder) = one, other
    if what == _MASK:
        if "none" not in (value, expected):
            return f"on rank {rank} is another than on rank {holder} ({_WHENCE_MASKS})"
        value, expected = ("none" if digest == "none" else "given" for digest in (value, expected))
    return f"is {value} on rank {rank} and {expected} on rank {holder}"


def _first_holders(statements: Sequence[Statement], ranks: Sequence[int]) -> dict[str, int]:
    if all(statement == statements[0] for statement in statements):
        return {}
    holders: dict[str, int] = {}
    for rank, statement in zip(ranks, statements, strict=True):
        for label, said in statement.items():
            holder = int(said[_HOLDER] or rank)
            holders[label] = min(holder, holders.get(label, holder))
    return holders


def _check_aliases(
    of_ranks: Sequence[tuple[Set[str], Mapping[str, str], Set[str]]], *, alone: bool = False
) -> None:
    """Refuse an alias for a weight that no rank has under the one name, or none under the other.

    Args:
        of_ranks: of every rank its labels, its aliases, and those of them that its names have met.
        alone: the process has all of the model, and of tied weights one name.

    Raises:
        ValueError: names the alias.
    """
    met = {name for _, _, of_rank in of_ranks for name in of_rank}
    by_own_name: set[str] = set()
    for labels, aliases, of_rank in of_ranks:
        by_own_name |= labels - {aliases[name] for name in of_rank}
    for _, aliases, _ in of_ranks:
        for name, label in aliases.items():
            if label not in by_own_name or not (alone or name in met):
                missing = name if label in by_own_name else label
                raise ValueError(
                    f"aliases={{{name!r}: {label!r}}}: no parameter of any rank is called {missing!r}; give "
                    "the names that the two stages have for the weight"
                )
