"""From every kind of run to every other, by state dict, in other groups: one table (SPEC.md, section 5)."""

from __future__ import annotations

import itertools
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from childtune_kernels import FusedChildAdamW
from tests.child_states import state_in_full
from tests.columns import REFERENCE, Column
from tests.snapshots import assert_identical
from tests.test_state_dict import saved_and_loaded
from tests.toy_parameters import SHAPES, toy_mask, toy_parameters, train

OPS = ("child_adamw",)
BOTH_BACKENDS = pytest.mark.parametrize(
    "backend", [REFERENCE, Column("cpp")], indirect=True, ids=str
)
STEPS = 3

Parameters = dict[str, Parameter]
Grouping = tuple[tuple[str, ...], ...]

DECAYING = ("embedding.weight", "layer.weight")
GROUPINGS: dict[str, Grouping] = {
    "one": (tuple(SHAPES),),
    "decay or not": (DECAYING, ("layer.bias", "nothing", "scale")),
    "each alone": tuple((name,) for name in SHAPES),
    "another order": (("scale", "layer.bias"), ("layer.weight", "embedding.weight"), ("nothing",)),
}
KINDS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "plain": {},
    "CT_F": {"reserve_p": 0.4},
    "CT_D dense": {"masked": True, "child_state": "dense"},
    "CT_D compact": {"masked": True, "child_state": "compact"},
    "both": {"masked": True, "child_state": "compact", "reserve_p": 0.4},
}
# Saved in the one, loaded into the other; where the groups are joined, all decay alike.
MOVES = [
    ("one", "decay or not"),
    ("decay or not", "each alone"),
    ("each alone", "another order"),
    ("another order", "one"),
    ("decay or not", "another order"),
]


class Case(NamedTuple):
    source: str
    target: str
    groups: tuple[str, str]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.source} to {self.target}, {self.groups[0]} to {self.groups[1]}, {self.dtype}"

    @property
    def decay_alike(self) -> bool:
        return "one" in self.groups


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASES = [
    Case(source, target, MOVES[index % len(MOVES)], DTYPES[index % len(DTYPES)])
    for index, (source, target) in enumerate(itertools.product(KINDS, KINDS))
    if (source, target) != ("AdamW", "AdamW")
]


def groups_of(parameters: Parameters, grouping: str, decay_alike: bool) -> list[dict[str, Any]]:
    return [
        {
            "params": [(name, parameters[name]) for name in names],
            "weight_decay": 0.3 if decay_alike or names[0] in DECAYING else 0.0,
        }
        for names in GROUPINGS[grouping]
    ]


def made(
    kind: str,
    parameters: Parameters,
    groups: list[dict[str, Any]],
    backend: str,
    *,
    mask_seed: int = 7,
    **options: Any,
) -> Optimizer:
    if kind == "AdamW":
        return AdamW(groups, **options)
    kept = dict(KINDS[kind])
    mask = toy_mask(parameters, mask_seed, dense=["scale"]) if kept.pop("masked", False) else None
    return FusedChildAdamW(groups, **kept, child_mask=mask, backend=backend, seed=1, **options)


def copied(parameters: Parameters) -> Parameters:
    return {name: Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}


def outcome(parameters: Parameters, optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights and state by name, of dense and of compact state alike."""
    found = {f"{name} weight": p.detach().clone() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        for key, tensor in state_in_full(parameter, optimizer.state[parameter]).items():
            found[f"{name} {key}"] = tensor.clone()
    return found


def by_the_plain_way(
    case: Case, source: Optimizer, parameters: Parameters, backend: str
) -> tuple[Parameters, Optimizer]:
    """What the moved run must equal: the run itself, or the target in the groups of the source."""
    if "AdamW" not in case[:2]:
        return parameters, source
    twins = copied(parameters)
    groups = groups_of(twins, case.groups[0], case.decay_alike)
    target = made(case.target, twins, groups, backend)
    state = source.state_dict()
    if isinstance(source, FusedChildAdamW):
        state = source.to_adamw_state_dict()
    else:
        for group in state["param_groups"]:
            del group["param_names"]  # by position
    target.load_state_dict(state)
    return twins, target


def assert_moments_arrived(source: Optimizer, parameters: Parameters, moved: Parameters,
                           target: Optimizer) -> None:  # fmt: skip
    """Steps and, inside the target's child, moments are those of the source."""
    for name, parameter in parameters.items():
        old = state_in_full(parameter, source.state[parameter])
        new = state_in_full(moved[name], target.state[moved[name]])
        assert float(old["step"]) == float(new["step"]) == STEPS
        inside = torch.ones(parameter.shape, dtype=torch.bool)
        if "mask_words" in new and "mask_words" not in old:
            inside = toy_mask(parameters).dense(name)
        for moment in ("exp_avg", "exp_avg_sq"):
            expected = torch.where(inside, old[moment], 0.0).to(new[moment].dtype)
            assert torch.equal(new[moment], expected), (name, moment)
            assert name == "nothing" or name == "scale" or bool(expected.any())


@BOTH_BACKENDS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_from_every_kind_to_every_kind(case: Case, backend: str) -> None:
    """The loading optimizer is made with other options, another mask, and other groups."""
    parameters = toy_parameters(case.dtype)
    groups = groups_of(parameters, case.groups[0], case.decay_alike)
    source = made(case.source, parameters, groups, backend, lr=0.1, betas=(0.8, 0.95))
    train(source, parameters, range(STEPS))
    moved = copied(parameters)
    mask_seed = 7 if case.source == "AdamW" else 70
    target_groups = groups_of(moved, case.groups[1], decay_alike=True)
    target = made(case.target, moved, target_groups, backend, mask_seed=mask_seed, lr=7.0)
    if isinstance(source, FusedChildAdamW) and case.target == "AdamW":
        state = saved_and_loaded(source.to_adamw_state_dict(groups=target.param_groups))
    else:
        state = saved_and_loaded(source.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the state dict's mask of .* differs")
        target.load_state_dict(state)
    assert_moments_arrived(source, parameters, moved, target)
    expected_parameters, expected = by_the_plain_way(case, source, parameters, backend)
    assert_identical(outcome(moved, target), outcome(expected_parameters, expected))
    train(target, moved, range(STEPS, STEPS + 3))
    train(expected, expected_parameters, range(STEPS, STEPS + 3))
    assert_identical(outcome(moved, target), outcome(expected_parameters, expected))
    decays = {
        name: group["weight_decay"]
        for group, names in zip(target.param_groups, GROUPINGS[case.groups[1]], strict=True)
        for name in names
    }
    assert decays == {n: 0.3 if case.decay_alike or n in DECAYING else 0.0 for n in SHAPES}
