"""The example's children: how they are found, who shares them, and how tuned models are compared."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from childtune_kernels import ChildMask

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
sys.path.insert(0, str(EXAMPLES))

from finetuning import child_files, children, comparison, labelled_text  # noqa: E402
from finetuning.children import CHILDREN, ChildNetworks  # noqa: E402
from finetuning.methods import METHOD_NAMES, Method  # noqa: E402
from finetuning.training import TextTask, TunedModel, TuningSettings  # noqa: E402


class Toy(nn.Module):
    """An embedding, two layers in a list, dropout and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(3, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        states = self.embedding(inputs)
        for layer in self.layers:
            states = torch.tanh(layer(states))
        return self.head(self.dropout(states))


INPUTS = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))


def toy_loss(model: nn.Module, rows: Sequence[int]) -> Tensor:
    return model(INPUTS[list(rows)]).square().sum(1).mean()


def toy_networks(reserve_p: float = 0.3, seed: int = 5) -> ChildNetworks:
    torch.manual_seed(0)
    return ChildNetworks(Toy(), toy_loss, range(12), seed, reserve_p)


def values(mask: ChildMask, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What lies inside and outside the child, of all parameters together."""
    bits = torch.cat([mask.dense(label).flatten() for label in mask.words])
    flat = torch.cat([tensors[label].flatten() for label in mask.words])
    return flat[bits], flat[~bits]


class TestChildNetworks:
    def test_only_the_layers_are_in_scope(self) -> None:
        for method in CHILDREN:
            mask = toy_networks().child(method)
            assert mask is not None
            assert list(mask.words) == [
                "layers.0.weight",
                "layers.0.bias",
                "layers.1.weight",
                "layers.1.bias",
            ]
            outside = {"embedding.weight", "embedding.bias", "head.weight", "head.bias"}
            assert mask.dense_names == outside
            assert mask.count() == 12  # round(0.3 * 40)

    def test_the_fisher_information_is_of_single_rows_without_dropout(self) -> None:
        networks = toy_networks()
        found = networks.fisher()
        torch.manual_seed(0)
        model = Toy().eval()
        expected = {name: torch.zeros(()) for name in found.names}
        for row in range(12):
            model.zero_grad()
            toy_loss(model, [row]).backward()
            for name in expected:
                gradient = model.get_parameter(name).grad
                assert gradient is not None
                expected[name] = expected[name] + gradient.square() / 12
        assert (found.kind, found.examples) == ("per example", 12)
        for name, tensor in found.values().items():
            torch.testing.assert_close(tensor, expected[name])

    def test_the_two_fisher_children_are_the_ends_of_the_order(self) -> None:
        networks = toy_networks()
        highest, lowest = networks.child("ct_d"), networks.child("ct_d_lowest")
        assert highest is not None
        assert lowest is not None
        fisher = networks.fisher().values()
        inside, outside = values(highest, fisher)
        assert inside.min() >= outside.max()
        inside, outside = values(lowest, fisher)
        assert inside.max() <= outside.min()

    def test_the_random_child_is_a_function_of_the_seed_and_needs_no_fisher_run(self) -> None:
        networks = toy_networks()
        child = networks.child("ct_d_random")
        assert child == toy_networks().child("ct_d_random")
        assert child != toy_networks(seed=6).child("ct_d_random")
        assert networks._fisher.records == 0

    def test_both_fisher_children_share_one_run(self) -> None:
        calls = []

        def counted(model: nn.Module, rows: Sequence[int]) -> Tensor:
            calls.append(list(rows))
            return toy_loss(model, rows)

        networks = ChildNetworks(Toy(), counted, range(12), 5, 0.3)
        for method in ("ct_d", "ct_d_lowest", "ct_d", "ct_d_random"):
            networks.child(method)
        assert calls == [[row] for row in range(12)]

    @pytest.mark.parametrize("method", ["adamw", "ct_f"])
    def test_methods_without_a_fixed_child_get_none(self, method: str) -> None:
        assert toy_networks().child(method) is None

    def test_a_model_without_layers_is_refused(self) -> None:
        for model in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ModuleList())):
            with pytest.raises(labelled_text.InputError, match="use --methods adamw ct_f"):
                children.encoder_patterns(model)


class TestComparedModels:
    def test_a_bit_of_difference_is_named(self) -> None:
        first, second = Toy(), Toy()
        second.load_state_dict(first.state_dict())
        assert child_files.different_tensors(first, second) == []
        with torch.no_grad():
            second.layers[1].get_parameter("bias")[2] = -0.0
            first.layers[1].get_parameter("bias")[2] = 0.0
        assert child_files.different_tensors(first, second) == ["layers.1.bias"]
        assert "extra.weight" in child_files.different_tensors(
            first, nn.ModuleDict({"extra": nn.Linear(1, 1)})
        )


class TestComparison:
    def test_every_seed_has_one_fisher_run_for_all_methods(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[int] = []
        given: list[tuple[int, str, ChildMask | None]] = []

        def networks_of(task: object, method: Method, rows: object, seed: int) -> ChildNetworks:
            made.append(seed)
            return toy_networks(seed=seed)

        def tuned(
            task: object, method: Method, rate: float, seed: int, rows: object, child: ChildMask | None,
            settings: object,
        ) -> TunedModel:  # fmt: skip
            given.append((seed, method.name, child))
            return TunedModel(nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)]), [0.001], 0)

        monkeypatch.setattr(comparison, "child_networks", networks_of)
        monkeypatch.setattr(comparison, "fine_tune", tuned)
        contenders = [
            comparison.Contender(name, Method(name, 0.3), cast(TextTask, FixedAccuracy()))
            for name in METHOD_NAMES
        ]
        plan = comparison.Plan((1e-3, 2e-3), 2, 3, 4, TuningSettings(1, 16))
        found = comparison.compare(contenders, labelled_text.split_rows(40), plan)
        assert made == [10_000, 10_001, 0, 1, 2]
        for seed, name, child in given:
            assert child == toy_networks(seed=seed).child(name)
        runs_a_method = plan.tuning_seeds * len(plan.learning_rates) + plan.seeds
        assert len(given) == len(METHOD_NAMES) * runs_a_method
        assert found.child_run is not None
        assert found.child_run.seed == 2
        assert found.child_run.earlier == toy_networks(seed=1).child("ct_d")


class FixedAccuracy:
    """A task that nothing is learnt in."""

    def accuracy(self, model: nn.Module, rows: Sequence[int]) -> float:
        return 50.0
