"""FusedChildAdamW in the place of torch.optim.AdamW, and what its own options do."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from childtune_kernels import ChildMask, FusedChildAdamW
from tests.snapshots import assert_identical, identical, weights_and_state
from tests.toy_parameters import give_gradients, random_tensor, toy_mask, toy_parameters, train

MASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "CT_F": {"reserve_p": 0.3},
    "CT_D": {"child_mask": toy_mask(toy_parameters())},
    "both": {"reserve_p": 0.3, "child_mask": toy_mask(toy_parameters())},
}
every_kind = pytest.mark.parametrize("kind", MASKED)


def trained(parameters: dict[str, Parameter], steps: int = 3, **options: Any) -> FusedChildAdamW:
    """An optimizer of the parameters after some steps."""
    optimizer = FusedChildAdamW(parameters.items(), **{"lr": 0.1, "seed": 1, **options})
    train(optimizer, parameters, range(steps))
    return optimizer


def copies(parameters: dict[str, Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def test_the_signature_begins_like_that_of_adamw() -> None:
    ours, theirs = (
        list(inspect.signature(kind.__init__).parameters.values())[1:]
        for kind in (FusedChildAdamW, torch.optim.AdamW)
    )
    shared = ["params", "lr", "betas", "eps", "weight_decay"]
    assert [p.name for p in ours[:5]] == [p.name for p in theirs[:5]] == shared
    assert [p.default for p in ours[:5]] == [p.default for p in theirs[:5]]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[5:])


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"fused": True}, {"foreach": True}])
def test_the_same_arguments_give_the_same_run_as_adamw(options: dict[str, Any]) -> None:
    ours, theirs = toy_parameters(), toy_parameters()
    start = copies(ours)
    arguments = (0.01, (0.8, 0.95), 1e-6, 0.3)
    train(FusedChildAdamW(ours.values(), *arguments, **options), ours, range(10))
    train(torch.optim.AdamW(theirs.values(), *arguments, **options), theirs, range(10))
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-6)
        assert parameter.numel() == 0 or not torch.equal(parameter, start[name])


@every_kind
def test_the_reference_gives_the_same_bits(kind: str) -> None:
    runs = [
        weights_and_state(trained(toy_parameters(), backend=backend, **MASKED[kind]))
        for backend in (None, "reference")
    ]
    assert_identical(*runs)


def test_a_seed_of_none_is_that_of_torch() -> None:
    torch.manual_seed(4321)
    drawn = trained(toy_parameters(), reserve_p=0.5, seed=None)
    given = trained(toy_parameters(), reserve_p=0.5, seed=4321)
    other = trained(toy_parameters(), reserve_p=0.5, seed=4322)
    assert drawn.param_groups[0]["seed"] == 4321
    assert_identical(weights_and_state(drawn), weights_and_state(given))
    assert not identical(drawn.param_groups[0]["params"][1], other.param_groups[0]["params"][1])


def test_masks_follow_names_and_not_the_order_of_parameters() -> None:
    first, second, unnamed = toy_parameters(), toy_parameters(), toy_parameters()
    backwards = dict(reversed(second.items()))
    trained(first, reserve_p=0.5)
    pairs = list(backwards.items())
    regrouped = FusedChildAdamW(
        [{"params": pairs[:2]}, {"params": pairs[2:]}], lr=0.1, reserve_p=0.5, seed=1
    )
    train(regrouped, second, range(3))
    assert all(identical(first[name], second[name]) for name in first)
    train(FusedChildAdamW(unnamed.values(), lr=0.1, reserve_p=0.5, seed=1), unnamed, range(3))
    assert not identical(first["layer.weight"], unnamed["layer.weight"])


def test_names_of_a_compiled_and_a_wrapped_model_give_the_same_masks() -> None:
    runs = []
    wrappers: list[Any] = [lambda model: model, torch.compile, nn.DataParallel]
    for wrap in wrappers:
        torch.manual_seed(0)
        model = wrap(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2)))
        optimizer = FusedChildAdamW(model.named_parameters(), lr=0.1, reserve_p=0.5, seed=3)
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = random_tensor(parameter.shape, index)
        optimizer.step()
        runs.append(weights_and_state(optimizer))
        assert optimizer.param_groups[0]["param_names"][0] == "0.weight"
    assert_identical(runs[0], runs[1])
    assert_identical(runs[0], runs[2])


def test_tied_weights_are_one_parameter() -> None:
    model: Any = nn.ModuleDict(
        {"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)}
    )
    model["head"].weight = model["embedding"].weight
    optimizer = FusedChildAdamW(model.named_parameters(), lr=0.1, reserve_p=0.5)
    before = model["head"].weight.detach().clone()
    model["head"](model["embedding"](torch.arange(6))).square().sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["param_names"] == ["embedding.weight"]
    assert not torch.equal(model["head"].weight, before)


def test_both_masks_keep_the_bernoulli_bits_inside_the_child() -> None:
    mask = MASKED["both"]["child_mask"]
    both, bernoulli = toy_parameters(), toy_parameters()
    start = copies(both)
    trained(both, reserve_p=0.3, child_mask=mask)
    trained(bernoulli, reserve_p=0.3)
    for name, parameter in both.items():
        child = mask.dense(name)
        assert identical(parameter[child], bernoulli[name][child])
        assert identical(parameter[~child], start[name][~child])
    assert not torch.equal(both["layer.weight"], start["layer.weight"])


@pytest.mark.parametrize("freeze", [True, False])
def test_freezing_decides_whether_decay_leaves_the_child(freeze: bool) -> None:
    mask = MASKED["CT_D"]["child_mask"]
    parameters = toy_parameters()
    start = copies(parameters)
    trained(parameters, 4, child_mask=mask, freeze_non_child=freeze, weight_decay=0.5)
    for name, parameter in parameters.items():
        outside = ~mask.dense(name)
        expected = start[name][outside] * (1.0 if freeze else (1 - 0.1 * 0.5) ** 4)
        torch.testing.assert_close(parameter[outside], expected, rtol=1e-5, atol=0)


def test_a_parameter_without_a_gradient_is_skipped() -> None:
    parameters, alone = toy_parameters(), toy_parameters()
    optimizer = trained(parameters, steps=1, reserve_p=0.5)
    skipped = parameters["layer.bias"]
    before = weights_and_state(optimizer)
    for step in (1, 2):
        give_gradients(parameters, step)
        skipped.grad = None
        optimizer.step()
    after = weights_and_state(optimizer)
    place = list(parameters).index("layer.bias")
    for name in before:
        if f"parameter {place} " in name:
            assert identical(before[name], after[name]), name
    assert int(optimizer.state[skipped]["step"]) == 1
    assert int(optimizer.state[parameters["scale"]]["step"]) == 3
    # Its own second step follows, whatever the others have done meanwhile.
    train(optimizer, {"layer.bias": skipped}, [9])
    lonely = FusedChildAdamW([("layer.bias", alone["layer.bias"])], lr=0.1, seed=1, reserve_p=0.5)
    train(lonely, {"layer.bias": alone["layer.bias"]}, [0, 9])
    assert identical(skipped, alone["layer.bias"])


def test_a_step_without_any_gradient_changes_nothing() -> None:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.items(), lr=0.1)
    before = weights_and_state(optimizer)
    with pytest.warns(UserWarning, match="finds no gradient at any of 5 parameters"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert_identical(before, weights_and_state(optimizer))


@every_kind
@pytest.mark.parametrize("copied_by", ["deepcopy", "pickle"])
def test_a_copy_of_model_and_optimizer_runs_on_alone(kind: str, copied_by: str) -> None:
    parameters = toy_parameters()
    optimizer = trained(parameters, **MASKED[kind])
    before = weights_and_state(optimizer)
    pair = (parameters, optimizer)
    if copied_by == "deepcopy":
        other_parameters, other = copy.deepcopy(pair)
    else:
        other_parameters, other = pickle.loads(pickle.dumps(pair))
    assert_identical(before, weights_and_state(other))
    train(other, other_parameters, range(3, 6))
    assert_identical(before, weights_and_state(optimizer))
    train(optimizer, parameters, range(3, 6))
    assert_identical(weights_and_state(optimizer), weights_and_state(other))


def test_a_copy_keeps_the_backend() -> None:
    optimizer = trained(toy_parameters(), backend="reference")
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert "reference" in other.summary()
        assert "cpp" not in other.summary()


def summary_rows(optimizer: FusedChildAdamW) -> dict[str, list[str]]:
    lines = optimizer.summary().splitlines()
    return {line.split()[0]: line.split() for line in lines if not line.startswith("-")}


def test_summary_has_a_row_a_parameter() -> None:
    parameters = toy_parameters()
    mask = toy_mask(parameters, dense=["scale"])
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) for n, p in parameters.items() if n != "layer.bias"]},
        {"params": [("layer.bias", parameters["layer.bias"])], "child_mask": None,
         "reserve_p": 0.25, "weight_decay": 0.0},
    ]  # fmt: skip
    optimizer = FusedChildAdamW(groups, child_mask=mask, backend="reference")
    rows = summary_rows(optimizer)
    assert list(rows) == ["parameter", *(n for n in parameters if n != "layer.bias"), "layer.bias",
                          "total"]  # fmt: skip
    density = f"{mask.density('layer.weight'):.4f}"
    words_ranks_and_shape = 4 * 6 + 8 * 2 + 8 * 2
    state_bytes = f"{8 + 2 * 4 * mask.count('layer.weight') + words_ranks_and_shape:,}"
    assert rows["layer.weight"][1:] == ["5x33", "1", density, "0.01", "reference", state_bytes]
    assert rows["layer.bias"][1:] == ["33", "0.25", "dense", "0", "reference", str(8 + 8 * 33)]
    assert rows["scale"][1:] == ["scalar", "1", "dense", "0.01", "reference", "16"]
    assert rows["nothing"][1:4] == ["0x3", "1", "0.0000"]
    child = mask.count("layer.weight") + mask.count("embedding.weight") + 33 + 1
    assert rows["total"][1:3] == ["234", f"{child / 234:.4f}"]
    assert rows["total"][-1] == f"{optimizer.state_bytes():,}"


@pytest.mark.parametrize(
    ("dtype", "master_weight", "per_element"),
    [
        (torch.float32, "auto", 8),
        (torch.float32, "fp32", 8),
        (torch.float64, "auto", 16),
        (torch.bfloat16, "auto", 10),
        (torch.bfloat16, "fp32", 12),
        (torch.float16, "auto", 12),
        (torch.bfloat16, "none", 8),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_state_bytes_are_those_of_the_tensors(
    dtype: torch.dtype, master_weight: str, per_element: int, masked: bool
) -> None:
    parameters = toy_parameters(dtype)
    mask = toy_mask(parameters) if masked else None
    optimizer = FusedChildAdamW(
        parameters.items(), child_mask=mask, master_weight=master_weight, child_state="dense"
    )
    words = sum((p.numel() + 31) // 32 for p in parameters.values()) if masked else 0
    elements = sum(p.numel() for p in parameters.values())
    expected = per_element * elements + 4 * words + 8 * len(parameters)
    assert optimizer.state_bytes() == expected
    train(optimizer, parameters, range(2))
    assert optimizer.state_bytes() == expected
    held = {
        tensor.data_ptr(): tensor.nbytes
        for state in optimizer.state.values()
        for tensor in state.values()
    }
    assert sum(held.values()) == expected


def test_a_mask_of_every_element_trains_like_no_mask() -> None:
    parameters, unmasked = toy_parameters(), toy_parameters()
    everything = ChildMask.from_dense(
        {name: torch.ones(p.shape, dtype=torch.bool) for name, p in parameters.items()}
    )
    trained(parameters, child_mask=everything)
    trained(unmasked)
    assert all(identical(parameters[name], unmasked[name]) for name in parameters)
