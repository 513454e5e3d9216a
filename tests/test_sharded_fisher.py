"""Fisher information of models under FSDP2, tensor parallelism and both: parts of the sums of one device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

from childtune_kernels import (
    ChildMask,
    FisherAccumulator,
    FusedChildAdamW,
    fisher_sums,
    select_child,
    sharding,
)
from childtune_kernels.fisher_sums import FisherSums

from .cases import assert_same_bits
from .ranks import Ranks
from .test_distributed_selection import written_twice
from .test_sharded_training import Model, both, fsdp, tensor_parallel, tokens_of

EXAMPLES = 3
PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def world_size() -> int:
    return torch.distributed.get_world_size()


def of_two_layers() -> Model:
    """Without the norm, which ``both`` and parts of columns do without."""
    model = Model()
    model.norm = nn.Identity()  # type: ignore[assignment]
    return model


def two_layers_sharded() -> nn.Module:
    model = of_two_layers()
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size(),)))
    return model


def offloaded() -> nn.Module:
    return fsdp(offload=True)


def record(fisher: FisherAccumulator, model: nn.Module, rank: int = 0, **options: Any) -> None:
    with fisher.recording(**options):
        for number in range(EXAMPLES):
            model(tokens_of(number, rank)).square().sum().backward()


def of_one_device(model: nn.Module | None = None, rank: int = 0) -> dict[str, Tensor]:
    model = Model() if model is None else model
    fisher = FisherAccumulator(model)
    record(fisher, model, rank)
    return dict(fisher.sums)


def whole(sums: Any) -> dict[str, Tensor]:
    return {label: sharding.whole_of(total) for label, total in sums.items()}


def squares_in_parts(make: Callable[[], nn.Module]) -> tuple[dict[str, Tensor], ChildMask]:
    model = make()
    fisher = FisherAccumulator(model, exclude="idle*", backend="cpp")
    record(fisher, model, examples_per_backward=1)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert fisher.records_by_size == {1: EXAMPLES}
    assert fisher.without_gradient == []
    parameters = dict(model.named_parameters())
    for name, total in fisher.sums.items():
        assert sharding.placed_of(total) == sharding.placed_of(parameters[name])
        assert sharding.placed_of(fisher[name]) == sharding.placed_of(parameters[name])
        mean = sharding.local_of(total) / EXAMPLES
        assert_same_bits({name: sharding.local_of(fisher[name])}, {name: mean})
    child = fisher.child_mask(reserve_p=0.3)
    assert set(child.parts) == {
        name for name in child.words if sharding.is_sharded(parameters[name])
    }
    FusedChildAdamW(parameters.items(), child_mask=child)
    return whole(fisher.sums), child.gather()


@pytest.mark.parametrize(
    ("world", "make"),
    [(1, fsdp), (2, fsdp), (2, offloaded), (2, tensor_parallel), (3, fsdp), (4, tensor_parallel),
     (4, fsdp), (4, both)],
)  # fmt: skip
def test_parts_are_those_of_one_device(
    ranks: Ranks, world: int, make: Callable[[], nn.Module]
) -> None:
    model = of_two_layers() if make is both else Model()
    [expected] = ranks.run(1, of_one_device, model)  # as many threads
    del expected["idle.weight"], expected["idle.bias"]
    results = ranks.run(world, squares_in_parts, make)
    for sums, child in results:
        assert_same_bits(sums, results[0][0])
        assert child == select_child(sums, reserve_p=0.3, dense=["idle.weight", "idle.bias"])
        if make in (fsdp, offloaded) and world != 3:
            # The mean of 1, 2 or 4 equal numbers is that number.
            assert_same_bits(sums, expected)
        for label, total in sums.items():
            torch.testing.assert_close(total, expected[label], rtol=1e-5, atol=1e-6)


def averages() -> dict[str, Tensor]:
    """Each rank has examples of its own: a record is the square of the average over ranks."""
    model, (rank, world) = fsdp(), (torch.distributed.get_rank(), world_size())
    fisher = FisherAccumulator(model, exclude="idle*")
    with pytest.raises(ValueError, match=r"examples_per_backward must be given.*under fully_shard"):
        record(fisher, model, rank)
    with pytest.raises(ValueError, match="examples must be given"):
        fisher.accumulate()
    record(fisher, model, rank, examples_per_backward=4 * world)
    assert fisher.kind == "batch mean squares"
    assert fisher.examples == EXAMPLES * 4 * world
    recorded = {label: sharding.local_of(total).clone() for label, total in fisher.sums.items()}
    fisher.reset()
    assert not any(sharding.local_of(total).any() for total in fisher.sums.values())
    for number in range(EXAMPLES):
        model(tokens_of(number, rank)).square().sum().backward()
        fisher.accumulate(4 * world)
        model.zero_grad()
    assert_same_bits(
        {label: sharding.local_of(total) for label, total in fisher.sums.items()}, recorded
    )
    return whole(fisher.sums)


def test_fully_shard_squares_averages_and_says_so(ranks: Ranks) -> None:
    model = Model()
    expected = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for number in range(EXAMPLES):
        model.zero_grad()
        for rank in range(2):
            (model(tokens_of(number, rank)).square().sum() / 2).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                expected[name] += parameter.grad.square()
    for sums in ranks.run(2, averages):
        for label, total in sums.items():
            torch.testing.assert_close(total, expected[label], rtol=1e-5, atol=1e-6)


class Surrounded(nn.Module):
    """A sharded module between plain ones; the gradients of what comes last are the first to arrive."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.inner, self.head = Model(), nn.Linear(3, 3)
        self.reentrant = reentrant

    def forward(self, tokens: Tensor) -> Tensor:
        if self.reentrant is None:
            hidden = self.inner(tokens)
        else:
            tokens = tokens.requires_grad_()
            hidden = checkpoint(self.inner, tokens, use_reentrant=self.reentrant)
        answer: Tensor = self.head(hidden.tanh())
        return answer


def within_plain_modules(reentrant: bool | None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Surrounded(reentrant)
    mesh = init_device_mesh("cpu", (world_size(),))
    for layer in (model.inner.up, model.inner.norm, model.inner):
        fully_shard(layer, mesh=mesh)
    fisher = FisherAccumulator(model, exclude="*idle*")
    record(fisher, model, examples_per_backward=1)
    assert fisher.records == EXAMPLES
    return whole(fisher.sums)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_backward_is_one_record(ranks: Ranks, reentrant: bool | None) -> None:
    """fully_shard brings the last gradients after the engine's first callbacks, and in nodes of its own."""
    torch.manual_seed(0)
    [expected] = ranks.run(1, of_one_device, Surrounded())
    for sums in ranks.run(2, within_plain_modules, reentrant):
        assert_same_bits(sums, {label: expected[label] for label in sums})


def saved(folder: str, make: Callable[[], nn.Module]) -> None:
    model = make()
    fisher = FisherAccumulator(model, exclude="idle*")
    record(fisher, model, examples_per_backward=1)
    with pytest.MonkeyPatch.context() as patch:
        if torch.distributed.get_rank():
            patch.setattr(fisher_sums, "save_fisher", written_twice)
        fisher.save(f"{folder}/fisher.safetensors")
    assert Path(folder, "fisher.safetensors").exists()
    with pytest.raises(FileNotFoundError):
        fisher.save(f"{folder}/missing/fisher.safetensors")


def loaded(folder: str, make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    path, model = f"{folder}/fisher.safetensors", make()
    stored = FisherSums.load(path)
    fisher = FisherAccumulator.load(path, model)
    assert fisher.records_by_size == stored.records_by_size
    assert fisher.exclude == ("idle*",)
    assert_same_bits(whole(fisher.sums), dict(stored.sums))
    # Of other parts as of whole sums, and the other way round.
    stored += fisher
    fisher += fisher
    assert_same_bits(whole(fisher.sums), dict(stored.sums))
    assert fisher.records == stored.records == 2 * EXAMPLES
    return dict(stored.sums)


def test_files_are_whole_and_fit_other_ranks(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, saved, str(tmp_path), fsdp)
    expected = {label: 2 * total for label, total in ranks.run(1, of_one_device)[0].items()}
    for world, make in ((3, fsdp), (2, tensor_parallel), (4, both)):
        if make is both:  # it has no norm
            ranks.run(2, saved, str(tmp_path), two_layers_sharded)
            expected = dict(FisherSums.load(tmp_path / "fisher.safetensors").sums)
            expected = {label: 2 * total for label, total in expected.items()}
        for sums in ranks.run(world, loaded, str(tmp_path), make):
            assert_same_bits(sums, {label: expected[label] for label in sums})


def replicas_of_parts() -> tuple[dict[str, Tensor], ChildMask]:
    """Two models of two parts each, with examples of their own: meshes differ between the ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "part"))
    model = of_two_layers()
    parallelize_module(model, mesh["part"], PLAN)
    fisher = FisherAccumulator(model, exclude="idle*")
    record(fisher, model, rank=mesh.get_local_rank("replica"))
    with pytest.raises(
        ValueError, match=r"ranks of the group hold parts of one parameter up\.weight"
    ):
        fisher.reduce()
    fisher.reduce(mesh["replica"].get_group())
    child = fisher.child_mask(reserve_p=0.3)
    return whole(fisher.sums), child.gather()


def test_replicas_of_parts_are_added_up(ranks: Ranks) -> None:
    of_replicas = [of_one_device(of_two_layers(), rank) for rank in range(2)]
    results = ranks.run(4, replicas_of_parts)
    for sums, child in results:
        assert_same_bits(sums, results[0][0])
        assert child == select_child(sums, reserve_p=0.3, dense=["idle.weight", "idle.bias"])
        for label, total in sums.items():
            both_replicas = of_replicas[0][label] + of_replicas[1][label]
            torch.testing.assert_close(total, both_replicas, rtol=1e-5, atol=1e-6)


def after_a_forward() -> None:
    """fully_shard leaves the root's parameters whole after a forward without backward."""
    model = fsdp()
    with torch.no_grad():
        model(tokens_of(0))
    assert not all(map(sharding.is_sharded, model.parameters()))
    fisher = FisherAccumulator(model, exclude="idle*")
    assert all(map(sharding.is_sharded, fisher.sums.values()))
    record(fisher, model, examples_per_backward=1)
    assert fisher.records == EXAMPLES


def test_a_forward_before_changes_nothing(ranks: Ranks) -> None:
    ranks.run(2, after_a_forward)


def loss_of(model: nn.Module, number: int) -> Tensor:
    loss: Tensor = model(tokens_of(number, torch.distributed.get_rank())).square().sum()
    return loss


def micro_batches(model: nn.Module) -> None:
    """One that is averaged over the ranks, and one that is not."""
    loss_of(model, 2).backward()
    model.set_requires_gradient_sync(False)  # type: ignore[operator]
    loss_of(model, 3).backward()


def held_back() -> None:
    """Gradients that wait for a later backward stay out of records, and those of a recording in none."""
    model, other = fsdp(), fsdp()
    fisher = FisherAccumulator(model, exclude="idle*")
    model.set_requires_gradient_sync(False)  # type: ignore[operator]
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="are waiting"), fisher.recording(1):
        pytest.fail("a micro-batch of the training would be squared")
    assert fisher.records == 0
    model.set_requires_gradient_sync(True)  # type: ignore[operator]
    loss_of(model, 1).backward()
    model.zero_grad()

    with pytest.raises(RuntimeError, match="are waiting"), fisher.recording(1):
        micro_batches(model)
    with pytest.raises(RuntimeError, match="stopped half-way"):
        _ = fisher.sums
    model.set_requires_gradient_sync(True)  # type: ignore[operator]
    for each in (model, other):
        loss_of(each, 4).backward()
    gradients = [
        {
            name: sharding.local_of(parameter.grad)
            for name, parameter in each.named_parameters()
            if parameter.grad is not None
        }
        for each in (model, other)
    ]
    assert_same_bits(*gradients)
    fisher.reset()
    model.zero_grad()
    record(fisher, model, examples_per_backward=1)
    assert fisher.records == EXAMPLES


def held_back_in_part() -> None:
    """The plain head's gradient arrives; that of the sharded module waits."""
    torch.manual_seed(0)
    model = Surrounded()
    fully_shard(model.inner, mesh=init_device_mesh("cpu", (world_size(),)))
    fisher = FisherAccumulator(model, exclude="*idle*")
    model.inner.set_requires_gradient_sync(False)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="are waiting"):
        record(fisher, model, examples_per_backward=1)


def test_gradients_that_wait_are_in_no_record(ranks: Ranks) -> None:
    ranks.run(2, held_back)
    ranks.run(2, held_back_in_part)


class Raising(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        raise ZeroDivisionError("half-way")


def one_raises(model: nn.Module) -> None:
    loss_of(model, 0).backward()
    handle = model.down.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _, arguments: (Raising.apply(arguments[0]),)
    )
    with pytest.raises(ZeroDivisionError):
        loss_of(model, 1).backward()
    handle.remove()


def left_half_way() -> None:
    model = fsdp()
    fisher = FisherAccumulator(model, exclude="idle*")
    with pytest.raises(RuntimeError, match="make the model anew"), fisher.recording(1):
        one_raises(model)
    fisher.reset()
    with pytest.raises(RuntimeError, match="make the model anew"), fisher.recording(1):
        pytest.fail("fully_shard gives no whole gradients any more")


def test_a_model_whose_backward_raised_is_refused(ranks: Ranks) -> None:
    ranks.run(2, left_half_way)


def made_before() -> None:
    model = Model()
    fisher = FisherAccumulator(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size(),)))
    with pytest.warns(UserWarning, match="reached a parameter.*Make it afterwards"):
        record(fisher, model, examples_per_backward=1)


def test_an_accumulator_made_too_early_says_so(ranks: Ranks) -> None:
    ranks.run(2, made_before)


def merged_over_meshes() -> None:
    fishers = []
    for make in (two_layers_sharded, both):
        model = make()
        fishers.append(FisherAccumulator(model, exclude="idle*"))
        record(fishers[-1], model, examples_per_backward=1)
    one, other = (whole(fisher.sums) for fisher in fishers)
    expected = {label: one[label] + other[label] for label in one}
    fishers[0].merge(fishers[1])
    assert_same_bits(whole(fishers[0].sums), expected)


def test_sums_on_other_meshes_are_merged(ranks: Ranks) -> None:
    ranks.run(4, merged_over_meshes)


def single_examples() -> None:
    fisher = FisherAccumulator(fsdp())
    with pytest.raises(
        RuntimeError, match=r"cannot run up\.weight, which is a DTensor; run a batch of one"
    ):
        fisher.record_examples(lambda model, tokens: model(tokens).sum(), tokens_of(0))
    assert fisher.records == 0


def test_single_examples_of_parts_are_refused(ranks: Ranks) -> None:
    ranks.run(2, single_examples)


def of_some_ranks(folder: str) -> str:
    """Ranks that hold no part of a model say so before anybody waits for them."""
    mesh = DeviceMesh("cpu", [0, 1], mesh_dim_names=("some",))
    part = DTensor.from_local(torch.ones(2, 3), mesh, run_check=False)
    sums = FisherSums({"weight": part}, {1: 1})
    with pytest.raises(RuntimeError, match="rank 2 has no part of it") as caught:
        sums.save(f"{folder}/fisher.safetensors")
    return str(caught.value)


def test_ranks_without_a_part_say_so(ranks: Ranks, tmp_path: Path) -> None:
    said = ranks.run(3, of_some_ranks, str(tmp_path))
    assert len(set(said)) == 1
    assert not list(tmp_path.iterdir())
