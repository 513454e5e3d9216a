"""Fisher information that ranks record together: each of its own examples, the same sums on all of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed
from torch import Tensor, nn

from childtune_kernels import ChildMask, FisherAccumulator

from .cases import assert_same_bits
from .ranks import Ranks

EXAMPLES = 12


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), nn.Linear(3, 2))


def example(number: int) -> Tensor:
    return torch.randn(1, 6, generator=torch.Generator().manual_seed(number))


def recorded(fisher: FisherAccumulator, model: nn.Sequential, numbers: range) -> None:
    with fisher.recording():
        for number in numbers:
            model[:3](example(number)).square().sum().backward()


def reduced() -> tuple[dict[str, Tensor], dict[int, int], list[str], ChildMask]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = network()
    fisher = FisherAccumulator(model)
    recorded(fisher, model, range(rank, EXAMPLES, world))
    fisher.reduce()
    with pytest.raises(RuntimeError, match="twice would count"):
        fisher.reduce()
    with pytest.warns(UserWarning, match="got no gradient"):
        mask = fisher.child_mask(reserve_p=0.3)
    sums = {label: total.clone() for label, total in fisher.sums.items()}
    found = sums, dict(fisher.records_by_size), fisher.without_gradient, mask
    fisher.reset()
    fisher.reduce()
    return found


def by_rank(world: int) -> dict[str, Tensor]:
    """The same sums, of one process: each rank's, then one after the other."""
    total: dict[str, Tensor] = {}
    for rank in range(world):
        model = network()
        fisher = FisherAccumulator(model)
        recorded(fisher, model, range(rank, EXAMPLES, world))
        for label, of_rank in fisher.sums.items():
            total[label] = total[label] + of_rank if label in total else of_rank.clone()
    return total


@pytest.mark.parametrize("world", [2, 3])
def test_sums_of_ranks_are_added_in_their_order(ranks: Ranks, world: int) -> None:
    expected = by_rank(world)
    results = ranks.run(world, reduced)
    for sums, records, idle, mask in results:
        assert_same_bits(sums, expected)
        assert records == {1: EXAMPLES}
        assert idle == ["3.weight", "3.bias"]
        assert mask == results[0][3]


def other_scope() -> str:
    exclude = ("2.bias",) if torch.distributed.get_rank() else ()
    model = network()
    fisher = FisherAccumulator(model, exclude=exclude)
    recorded(fisher, model, range(2))
    before = {label: total.clone() for label, total in fisher.sums.items()}
    with pytest.raises(ValueError, match=r"scopes of rank 1 and rank 0 differ: 2\.bias") as caught:
        fisher.reduce()
    assert_same_bits(dict(fisher.sums), before)
    return str(caught.value)


def test_other_scopes_are_named_on_all_ranks(ranks: Ranks) -> None:
    first, second = ranks.run(2, other_scope)
    assert first == second


def stopped_half_way() -> None:
    model = network()
    fisher = FisherAccumulator(model)
    recorded(fisher, model, range(2))
    fisher._broken = torch.distributed.get_rank() == 1
    with pytest.raises(RuntimeError, match="stopped half-way"):
        fisher.reduce()


def test_a_part_of_a_record_on_one_rank_stops_all(ranks: Ranks) -> None:
    ranks.run(2, stopped_half_way)


def test_one_process_reduces_nothing() -> None:
    model = network()
    fisher = FisherAccumulator(model)
    recorded(fisher, model, range(3))
    before = {label: total.clone() for label, total in fisher.sums.items()}
    fisher.reduce()
    fisher.reduce()
    assert_same_bits(dict(fisher.sums), before)
