"""Only the child travels: a run with the communication hook is, bit for bit, the run without it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks import wire_bytes
from benchmarks.gradient_memory import Transformer
from childtune_kernels import ChildMask, FusedChildAdamW, register_child_comm_hook
from childtune_kernels.comm_hook import ChildCommHook

from .cases import assert_same_bits
from .ranks import Ranks

STEPS = 4
OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "seed": 7}
# A few hundred bytes a bucket: parameters share buckets at odd places, and there are several.
BUCKET_MB = 0.0004


class Model(nn.Module):
    """Parameters of odd sizes, one not row-major, one without a dimension, and one frozen."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Conv2d(3, 5, 2, bias=False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.up = nn.Linear(20, 7)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.norm = nn.LayerNorm(7)
        self.down = nn.Linear(7, 33)
        self.idle = nn.Linear(3, 2)
        self.norm.bias.requires_grad_(False)
        self.to(dtype)

    def forward(self, pixels: Tensor, idle: bool = False) -> Tensor:
        hidden = self.norm(torch.relu(self.up(self.image(pixels).flatten(1)))) * self.gain
        found: Tensor = self.down(hidden)
        return found if idle else found + self.idle(hidden[:, :3]).sum()


def child_of(model: nn.Module, seed: int = 1, p: float = 0.3) -> ChildMask:
    """A random fixed mask of most parameters; biases train densely."""
    generator = torch.Generator().manual_seed(seed)
    names = {name: value for name, value in model.named_parameters() if not name.endswith("bias")}
    dense = {name for name, _ in model.named_parameters()} - names.keys()
    masks = {
        name: torch.rand(value.shape, generator=generator) < p for name, value in names.items()
    }
    return ChildMask.from_dense(masks, dense=dense)


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    seed = 100 * torch.distributed.get_rank() + step
    return torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)


def optimizer_of(model: nn.Module, kind: str) -> FusedChildAdamW:
    named: list[tuple[str, Any]] = list(model.named_parameters())
    if kind == "groups":
        groups: list[dict[str, Any]] = [
            {"params": named[:2], "reserve_p": 0.3},
            {"params": named[2:4], "reserve_p": 0.7, "child_mask": child_of(model)},
            {"params": named[4:]},
        ]
        return FusedChildAdamW(groups, **OPTIONS)
    options: dict[str, dict[str, Any]] = {
        "ct_f": {"reserve_p": 0.3},
        "ct_d": {"child_mask": child_of(model)},
        "ct_d dense": {"child_mask": child_of(model), "child_state": "dense"},
        "both": {"child_mask": child_of(model, p=0.6), "reserve_p": 0.5},
        "decays outside": {"child_mask": child_of(model), "freeze_non_child": False, "child_state": "dense"},
    }  # fmt: skip
    return FusedChildAdamW(named, **OPTIONS, **options[kind])


Between = Callable[[int, nn.Module, FusedChildAdamW], None]


def unchanged(step: int, model: nn.Module, optimizer: FusedChildAdamW) -> None:
    """Nothing happens between steps."""


def trained(
    hooked: bool,
    kind: str,
    ddp: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    micro_batches: int = 1,
    between: Between = unchanged,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[dict[str, Any], ChildCommHook | None]:
    """Weights and state after some steps, with the hook or without one."""
    plain = Model(dtype)
    model = DistributedDataParallel(plain, bucket_cap_mb=BUCKET_MB, **ddp)
    optimizer = optimizer_of(plain, kind)
    hook = register_child_comm_hook(model, optimizer) if hooked else None
    scale = scaler.scale if scaler else lambda loss: loss
    for step in range(STEPS):
        for micro in range(micro_batches):
            last = micro == micro_batches - 1
            with contextlib.nullcontext() if last else model.no_sync():
                pixels = batch(10 * step + micro, dtype)
                if scaler and step == 1 and torch.distributed.get_rank() == 0:
                    pixels[0, 0, 0, 0] = float("inf")
                found = model(pixels, idle="find_unused_parameters" in ddp)
                scale(found.square().sum()).backward()
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()
        between(step, plain, optimizer)
    weights = {name: value.detach() for name, value in plain.named_parameters()}
    state = {
        f"{name}.{key}": value
        for name, parameter in plain.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    return {**weights, **state}, hook


def replaced(step: int, model: nn.Module, optimizer: FusedChildAdamW) -> None:
    """Another child, other probabilities, and state that was saved, between steps."""
    if step == 0:
        optimizer.set_child_mask(child_of(model, seed=2))
    elif step == 1:
        for group in optimizer.param_groups:
            group["reserve_p"] = 0.4
    else:
        other = optimizer_of(model, "both")
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        for _ in range(step):
            other.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(other.state_dict())


def exchanged(step: int, model: nn.Module, optimizer: FusedChildAdamW) -> None:
    """Another child after every step; DDP rebuilds its buckets after the first."""
    optimizer.set_child_mask(child_of(model, seed=2 + step))


def same_with_and_without(
    kind: str, ddp: dict[str, Any], options: dict[str, Any], scaled: bool = False
) -> tuple[int, int]:
    """Train twice and compare every bit; the bytes that the hook sent, and those of the buckets."""
    results = []
    for hooked in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
        results.append(trained(hooked, kind, ddp, scaler=scaler, **options))
    (expected, _), (found, hook) = results
    assert_same_bits(found, expected)
    assert hook is not None
    assert int(found["up.weight.step"]) == STEPS - scaled or "between" in options
    return hook.sent_bytes, hook.whole_bytes


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ct_f": ("ct_f", {}, {}),
    "ct_d": ("ct_d", {}, {}),
    "ct_d, dense state": ("ct_d dense", {}, {}),
    "both masks": ("both", {}, {}),
    "three groups": ("groups", {}, {}),
    "decay outside": ("decays outside", {}, {}),
    "bf16": ("both", {}, {"dtype": torch.bfloat16}),
    "views": ("both", {"gradient_as_bucket_view": True}, {}),
    "static graph": ("both", {"static_graph": True}, {}),
    "accumulated": ("both", {}, {"micro_batches": 3}),
    "accumulated views": ("ct_f", {"gradient_as_bucket_view": True}, {"micro_batches": 2}),
    "unused": ("both", {"find_unused_parameters": True}, {}),
    "replaced": ("both", {}, {"between": replaced}),
    "exchanged": ("ct_d", {}, {"between": exchanged}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_same_bits_with_and_without_the_hook(ranks: Ranks, case: str) -> None:
    kind, ddp, options = CASES[case]
    for sent, whole in ranks.run(2, same_with_and_without, kind, ddp, options):
        assert 0 < sent < 0.8 * whole


@pytest.mark.parametrize("kind", ["ct_f", "ct_d"])
def test_a_skipped_step_sends_the_same_mask_again(ranks: Ranks, kind: str) -> None:
    ranks.run(2, same_with_and_without, kind, {}, {}, True)


def integers_of(step: int, shape: torch.Size) -> Tensor:
    seed = 100 * torch.distributed.get_rank() + step
    return torch.randint(-64, 64, shape, generator=torch.Generator().manual_seed(seed)).float()


class Values(nn.Module):
    """A weight whose gradient is what the input says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(700))
        self.bias = nn.Parameter(torch.zeros(33))

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight * gradient[:700]).sum() + (self.bias * gradient[700:]).sum()


def gradients(kind: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For some steps: the hook's gradients, those of torch's own hook, and a sum of absolute ones."""
    models = [DistributedDataParallel(Values()) for _ in range(2)]
    optimizer = FusedChildAdamW(models[0].named_parameters(), **OPTIONS, reserve_p=0.3)
    register_child_comm_hook(models[0], optimizer)
    models[1].register_comm_hook(None, allreduce_hook)
    found = []
    for step in range(3):
        values = integers_of(step, torch.Size([733]))
        if kind != "integers":
            values = values / 7
        if kind == "of one rank" and torch.distributed.get_rank() != 1:
            values.zero_()
        for model in models:
            model(values).backward()
        child, whole = (torch.cat([p.grad.clone() for p in model.parameters()]) for model in models)  # type: ignore[union-attr]
        total = values.abs()
        torch.distributed.all_reduce(total)
        found.append((child, whole, total))
        optimizer.step()
        for model in models:
            model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("world", "kind"), [(2, "any"), (3, "any"), (3, "of one rank"), (4, "integers")]
)
def test_kept_gradients_are_those_of_torchs_own_hook(ranks: Ranks, world: int, kind: str) -> None:
    """In every bit, unless more than two values are added up: gloo's ring then does so in an order that goes
    by their place in the buffer, and only sums without rounding are sure to be the same.
    """
    found = ranks.run(world, gradients, kind)
    for steps in zip(*found, strict=True):
        for child, whole, total in steps:
            kept = child.view(torch.int32) != 0
            assert 0.2 < kept.float().mean() < 0.4
            assert torch.equal(child, steps[0][0])
            difference = (child - whole)[kept].abs()
            if (world, kind) == (3, "any"):
                bound = 4 * torch.finfo(torch.float32).eps * total[kept] / world
                assert (difference <= bound).all()
            else:
                assert not difference.any()
    masks = [child != 0 for child, _, _ in found[0]]
    assert not torch.equal(masks[0], masks[1])


def poisoned() -> tuple[bool, bool]:
    """NaN in a dropped and in a kept place of rank 1: what comes to this rank."""
    dense = torch.arange(733) % 2 == 0
    model = DistributedDataParallel(Values())
    mask = ChildMask.from_dense({"weight": dense[:700], "bias": dense[700:]})
    optimizer = FusedChildAdamW(model.named_parameters(), **OPTIONS, child_mask=mask)
    register_child_comm_hook(model, optimizer)
    found = []
    for place in (3, 4):
        values = torch.ones(733)
        if torch.distributed.get_rank() == 1:
            values[place] = float("nan")
        model(values).backward()
        weight: Any = model.module.weight.grad
        found.append(bool(weight.isnan().any()))
        assert weight[1::2].view(torch.int32).count_nonzero() == 0
        model.zero_grad()
    return found[0], found[1]


def test_a_nan_outside_the_child_does_not_travel(ranks: Ranks) -> None:
    assert ranks.run(2, poisoned) == [(False, True)] * 2


def without_a_seed() -> tuple[int, dict[str, Tensor]]:
    """Ranks draw seeds of their own; the hook needs one before the first step."""
    model = DistributedDataParallel(Model())
    torch.manual_seed(40 + torch.distributed.get_rank())
    optimizer = FusedChildAdamW(model.named_parameters(), lr=1e-2, reserve_p=0.3)
    register_child_comm_hook(model, optimizer)
    for step in range(2):
        model(batch(step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    return optimizer.param_groups[0]["seed"], weights


def test_without_a_seed_the_first_ranks_is_known_before_the_first_step(ranks: Ranks) -> None:
    (seed, weights), (same_seed, same_weights) = ranks.run(2, without_a_seed)
    assert seed == same_seed == 40
    assert_same_bits(weights, same_weights)


def held_in_part() -> tuple[bool, bool, int]:
    """The optimizer holds the weight alone: whether its gradient is masked and the bias's whole."""
    model = DistributedDataParallel(Values())
    optimizer = FusedChildAdamW([("weight", model.module.weight)], **OPTIONS, reserve_p=0.3)
    hook = register_child_comm_hook(model, optimizer)
    model(torch.ones(733)).backward()
    weight, bias = model.module.weight.grad, model.module.bias.grad
    return bool((weight == 0).any()), bool((bias == 1).all()), hook.sent_bytes


def test_parameters_outside_the_optimizer_are_sent_whole(ranks: Ranks) -> None:
    for masked, whole, sent in ranks.run(2, held_in_part):
        assert masked
        assert whole
        assert 4 * 33 < sent < 4 * 733 / 2


def test_the_bytes_on_the_wire_are_those_of_the_child(ranks: Ranks) -> None:
    """The benchmark in little: what it reports is what the masks and the interface say."""
    matrices = {
        name: value for name, value in Transformer(16).named_parameters() if value.dim() == 2
    }
    everything = sum(value.numel() for value in Transformer(16).parameters())
    in_matrices = sum(value.numel() for value in matrices.values())
    child = 4 * (round(0.1 * in_matrices) + everything - in_matrices)
    for way, expected in (("whole", 4 * everything), ("CT_D 0.1", child)):
        for found in ranks.run(2, wire_bytes.measure, wire_bytes.WAYS[way], 16, 1, "lo"):
            assert found["gradients"] == found["buckets"] == 4 * everything
            assert found["reduced"] == expected
            assert found["interface"] > expected
