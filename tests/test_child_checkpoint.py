"""Base + child checkpoint = tuned model, bit for bit, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from childtune_kernels import (
    ChildMask,
    apply_child,
    child_diff,
    load_child,
    save_child,
    weight_bits,
)

from .tuned_models import Model, Run, base_model, child_of, different, flip_bit_, tuned_run


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight of these small models is worked on in several parts."""
    monkeypatch.setattr(weight_bits, "PART", 96)


@pytest.fixture(scope="module")
def run() -> Run:
    """A tuned run in fp32, which tests must not change."""
    return tuned_run()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "child.safetensors"


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_base_and_child_make_the_tuned_model(path: Path, dtype: torch.dtype) -> None:
    run = tuned_run(dtype)
    changed = different(run.base, run.tuned)
    assert {"embedding.weight", "output.weight", "head.weight", "norm.running_mean"} <= set(changed)
    save_child(path, run.tuned, run.mask, optimizer=run.optimizer)
    model = copy.deepcopy(run.base)
    apply_child(model, path)
    assert different(model, run.tuned) == []
    assert model.output.weight is model.embedding.weight
    apply_child(model, path)
    assert different(model, run.tuned) == []


def test_the_file_says_what_it_holds(run: Run, path: Path) -> None:
    save_child(path, run.tuned, run.mask)
    checkpoint = load_child(path)
    assert checkpoint.mask == run.mask
    assert checkpoint.ties == {"embedding.weight": ["output.weight"]}
    assert checkpoint.role("frozen.weight") == "base"
    assert checkpoint.buffers == [
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    ]
    assert "scratch" not in checkpoint.shapes
    assert checkpoint.dtypes["norm.num_batches_tracked"] == torch.int64
    expected = run.tuned.inner.weight[run.mask.dense("inner.weight")]
    assert torch.equal(checkpoint.values["inner.weight"], expected)


def test_a_checkpoint_of_a_tenth_in_bf16_is_small(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    model = nn.Linear(1000, 1000, bias=False).bfloat16()
    mask = ChildMask.from_dense({"weight": torch.rand(1000, 1000) < 0.1})
    save_child(path, model, mask)
    assert path.stat().st_size <= 0.17 * 2_000_000


class Doubled(nn.Module):
    """A wrapper that puts a prefix before every name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "as DistributedDataParallel": Doubled,
    "compiled": torch.compile,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_do_not_matter(run: Run, path: Path, wrap: Callable[[nn.Module], Any]) -> None:
    save_child(path, wrap(run.tuned), run.mask, optimizer=run.optimizer)
    plain = copy.deepcopy(run.base)
    apply_child(plain, path)
    assert different(plain, run.tuned) == []
    model = copy.deepcopy(run.base)
    apply_child(wrap(model), path)
    assert different(model, run.tuned) == []


def test_weights_of_any_strides(path: Path) -> None:
    tuned = nn.ModuleDict({"a": nn.Linear(64, 48), "b": nn.Conv2d(8, 8, 3), "c": nn.Linear(7, 6)})
    base = copy.deepcopy(tuned)
    mask = child_of(tuned)  # type: ignore[arg-type]
    mask = ChildMask(mask.words, mask.shapes)
    for name, parameter in tuned.named_parameters():
        with torch.no_grad():
            parameter[mask.dense(name)] += 1
    save_child(path, tuned, mask)
    weights = {name: base.get_parameter(f"{name}.weight") for name in "abc"}
    wide = torch.zeros(6, 14)
    wide[:, ::2] = weights["c"].detach()
    weights["a"].data = weights["a"].data.t().contiguous().t()
    weights["b"].data = weights["b"].data.contiguous(memory_format=torch.channels_last)
    weights["c"].data = wide[:, ::2]
    assert not any(weight.is_contiguous() for weight in weights.values())
    assert child_diff(base, tuned) == mask
    apply_child(base, path)
    assert different(base, tuned) == []
    assert not wide[:, 1::2].any()


def test_tensors_stay_and_autograd_is_told(run: Run, path: Path) -> None:
    save_child(path, run.tuned, run.mask)
    model = copy.deepcopy(run.base)
    before = {name: (p, p._version, p.requires_grad) for name, p in model.named_parameters()}
    with torch.inference_mode():
        apply_child(model, path)
    for name, parameter in model.named_parameters():
        tensor, version, requires_grad = before[name]
        assert parameter is tensor
        assert parameter.requires_grad == requires_grad
        assert (parameter._version > version) == (not name.startswith("frozen."))


def test_models_made_in_inference_mode(run: Run, path: Path) -> None:
    save_child(path, run.tuned, run.mask)
    with torch.inference_mode():
        model = base_model()
    apply_child(model, path)
    assert different(model, run.tuned) == []


def test_with_the_base_at_hand_unchanged_buffers_are_not_stored(run: Run, path: Path) -> None:
    tuned = copy.deepcopy(run.tuned)
    tuned.norm.running_var = run.base.norm.running_var
    for base in (run.base, run.base.state_dict()):
        save_child(path, tuned, run.mask, base=base)
        checkpoint = load_child(path)
        assert checkpoint.buffers == ["norm.running_mean", "norm.num_batches_tracked"]
        model = copy.deepcopy(run.base)
        apply_child(model, path)
        assert different(model, tuned) == []
    model.norm.running_var = torch.ones(16) * 2
    with pytest.raises(ValueError, match="not the base this child was tuned from"):
        apply_child(model, path)


def test_with_the_base_at_hand_changes_outside_the_child_are_found(run: Run, path: Path) -> None:
    for name in ("inner.weight", "frozen.bias"):
        tuned = copy.deepcopy(run.tuned)
        outside = ~run.mask.dense(name) if name in run.mask else torch.ones(16, dtype=torch.bool)
        flip_bit_(tuned.get_parameter(name), int(outside.reshape(-1).nonzero()[-1]))
        with pytest.raises(ValueError, match=f"base: {name} differs .* outside the child"):
            save_child(path, tuned, run.mask, base=run.base)
        assert not path.exists()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["embedding.weight", "inner.weight", "frozen.bias"])
def test_one_bit_outside_the_child_is_another_base(
    path: Path, name: str, dtype: torch.dtype
) -> None:
    run = tuned_run(dtype, steps=1)
    save_child(path, run.tuned, run.mask)
    model = copy.deepcopy(run.base)
    inside = run.mask.dense(name) if name in run.mask else torch.zeros(16, dtype=torch.bool)
    weight = model.get_parameter(name)
    if inside.any():
        flip_bit_(weight, int(inside.reshape(-1).nonzero()[-1]))
        apply_child(copy.deepcopy(model), path)
    flip_bit_(weight, int((~inside).reshape(-1).nonzero()[-1]))
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="not the base this child was tuned from"):
        apply_child(model, path)
    assert different(model, before) == []
    apply_child(model, path, strict=False)
    other = ["embedding.weight", "output.weight"] if name == "embedding.weight" else [name]
    assert different(model, run.tuned) == other


def _another_class(model: Model) -> nn.Module:
    return nn.Linear(3, 3)


def _untied(model: Model) -> nn.Module:
    model.output.weight = nn.Parameter(model.output.weight.detach().clone())
    return model


def _tied_more(model: Model) -> nn.Module:
    model.frozen.weight = model.inner.weight
    return model


def _other_shape(model: Model) -> nn.Module:
    model.head = nn.Linear(40, 4)
    return model


def _one_buffer_more(model: Model) -> nn.Module:
    model.register_buffer("scratch", torch.zeros(5), persistent=True)
    return model


def _overlapping(model: Model) -> nn.Module:
    model.norm.running_mean = torch.zeros(1).expand(16)
    return model


def _sparse(model: Model) -> nn.Module:
    model.norm.running_mean = torch.ones(16).to_sparse()
    return model


def _conjugate(model: Model) -> nn.Module:
    model.norm.running_mean = torch.ones(16, dtype=torch.complex64).conj()
    return model


def _one_type_apart(model: Model) -> nn.Module:
    model.head.bfloat16()
    return model


WRONG_MODELS: dict[str, tuple[Callable[[Model], nn.Module], str]] = {
    "another class": (_another_class, "other weights than expected|other weights are tied"),
    "untied": (_untied, "other weights are tied: embedding.weight, output.weight"),
    "tied more": (_tied_more, "other weights are tied: frozen.weight, inner.weight"),
    "another shape": (_other_shape, r"head.weight has shape \(4, 40\), not \(3, 40\)"),
    "a buffer more": (_one_buffer_more, "not expected: scratch"),
    "another type": (_one_type_apart, r"head.weight is of torch.bfloat16, not torch.float32"),
    "on meta": (lambda model: model.to("meta"), "no memory of its own"),
    "sparse": (_sparse, "norm.running_mean is not a dense tensor"),
    "conjugate": (_conjugate, "norm.running_mean is a lazy conjugate"),
    "overlapping": (_overlapping, "elements of norm.running_mean share memory"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("wrong", WRONG_MODELS)
def test_models_that_do_not_fit_are_refused_and_left_alone(
    run: Run, path: Path, wrong: str, strict: bool
) -> None:
    save_child(path, run.tuned, run.mask)
    change, message = WRONG_MODELS[wrong]
    model = change(copy.deepcopy(run.base))
    before = {name: (tensor, tensor._version) for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        apply_child(model, path, strict=strict)
    for name, tensor in model.state_dict().items():
        assert tensor._version == before[name][1]


def test_decay_outside_the_child_is_refused(path: Path) -> None:
    loose = tuned_run(freeze_non_child=False, weight_decay=0.1)
    with pytest.raises(
        ValueError, match=r"group 0 has freeze_non_child=False and weight_decay=0.1"
    ):
        save_child(path, loose.tuned, loose.mask, optimizer=loose.optimizer)
    assert not path.exists()
    still = tuned_run(freeze_non_child=False, weight_decay=0.0)
    save_child(path, still.tuned, still.mask, optimizer=still.optimizer)
    apply_child(still.base, path)
    assert different(still.base, still.tuned) == []


def test_optimizers_of_other_runs_are_refused(run: Run, path: Path) -> None:
    def refused(optimizer: torch.optim.Optimizer, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            save_child(path, run.tuned, run.mask, optimizer=optimizer)

    refused(torch.optim.AdamW(run.tuned.parameters()), "is a AdamW, which knows no child")
    refused(tuned_run(steps=1).optimizer, r"embedding.weight \(group 0\) is not of this model")
    words = dict(run.mask.words)
    words["inner.weight"] = words["inner.weight"] ^ 1
    other = ChildMask(words, run.mask.shapes, run.mask.dense_names)
    with pytest.raises(ValueError, match=r"inner.weight .* by another mask than the given one"):
        save_child(path, run.tuned, other, optimizer=run.optimizer)
    masks = {name: run.mask.dense(name) for name in run.mask.words}
    bias = masks.pop("inner.bias")
    for changed, dense, message in (
        (masks, ["inner.bias", *run.mask.dense_names], "inner.bias .* trained by a mask"),
        ({**masks, "inner.bias": bias, "head.bias": torch.ones(3) > 0}, ["head.weight"],
         "head.bias .* trained densely"),
    ):  # fmt: skip
        mask = ChildMask.from_dense(changed, dense)
        with pytest.raises(ValueError, match=message):
            save_child(path, run.tuned, mask, optimizer=run.optimizer)
    assert not path.exists()


def _without(mask: ChildMask, name: str) -> ChildMask:
    shapes = {label: shape for label, shape in mask.shapes.items() if label != name}
    dense = mask.dense_names - {name}
    return ChildMask({label: mask.words[label] for label in shapes}, shapes, dense)


def _with(mask: ChildMask, name: str, shape: tuple[int, ...]) -> ChildMask:
    masks = {label: mask.dense(label) for label in mask.words} | {name: torch.ones(shape) > 0}
    return ChildMask.from_dense(masks, mask.dense_names)


WRONG_MASKS: dict[str, tuple[Callable[[ChildMask], ChildMask], str]] = {
    "a weight too few": (lambda m: _without(m, "inner.bias"), "inner.bias requires gradients and is not"),
    "a head too few": (lambda m: _without(m, "head.bias"), "head.bias requires gradients and is not in"),
    "an unknown weight": (lambda m: _with(m, "more", (3,)), "mask: more is no parameter"),
    "a buffer": (lambda m: _with(m, "norm.running_mean", (16,)), "norm.running_mean is no parameter"),
    "another shape": (lambda m: _with(m, "inner.bias", (4, 4)), r"inner.bias has shape \(4, 4\) in"),
    "a tied weight twice": (lambda m: _with(m, "output.weight", (40, 16)), "under two names"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_MASKS)
def test_masks_that_do_not_fit_are_refused(run: Run, path: Path, wrong: str) -> None:
    change, message = WRONG_MASKS[wrong]
    with pytest.raises(ValueError, match=message):
        save_child(path, run.tuned, change(run.mask))
    assert not path.exists()


def test_a_mask_may_name_a_tied_weight_by_its_other_name(run: Run, path: Path) -> None:
    mask = _with(_without(run.mask, "embedding.weight"), "output.weight", (40, 16))
    save_child(path, run.tuned, mask)
    assert "embedding.weight" in load_child(path).mask.words


def test_weights_that_share_their_memory_are_tied(run: Run, path: Path) -> None:
    models = [copy.deepcopy(run.base), copy.deepcopy(run.tuned)]
    for model in models:
        model.output.weight = nn.Parameter(model.embedding.weight.detach())
    save_child(path, models[1], run.mask)
    assert load_child(path).ties == {"embedding.weight": ["output.weight"]}
    apply_child(models[0], path)
    assert different(models[0], models[1]) == []


def test_other_kinds_of_arguments_are_refused(run: Run, path: Path) -> None:
    save_child(path, run.tuned, run.mask)
    with pytest.raises(TypeError, match="model is a OrderedDict"):
        apply_child(run.base.state_dict(), path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model is a OrderedDict"):
        save_child(path, run.tuned.state_dict(), run.mask)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mask is a dict; a ChildMask is needed"):
        save_child(path, run.tuned, {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="base is a list"):
        child_diff([], run.tuned)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tuned: more is a str; only tensors"):
        child_diff(run.base, {"more": "text"})  # type: ignore[dict-item]
