"""ChildTuningAdamW: the released code's update to 1e-12, its traps as errors, and runs that go on."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from childtune_kernels import ChildMask, ChildTuningAdamW, FusedChildAdamW, OptionScheduler
from tests.child_states import state_in_full
from tests.ops.transcription import keep_bits, key_of
from tests.snapshots import assert_identical, identical, untouched, weights_and_state
from tests.toy_parameters import give_gradients, random_tensor, toy_mask, toy_parameters, train

F, D = "ChildTuning-F", "ChildTuning-D"
SEED, STEPS, SHARE = 11, 100, 0.3

pytestmark = pytest.mark.usefixtures("one_thread")

Masks = dict[Tensor, Tensor]


def dense_masks(
    parameters: Mapping[str, Parameter], seed: int = 7, without: tuple[str, ...] = ()
) -> Masks:
    """Zeros and ones by parameter, in its type, as the released code keys and makes masks."""
    mask = toy_mask(parameters, seed)
    return {p: mask.dense(n).to(p.dtype) for n, p in parameters.items() if n not in without}


# --- the update -------------------------------------------------------------------------------------


@dataclass
class Restated:
    """One parameter of the released code's optimizer, written down in plain torch."""

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int = 0

    def update(self, gradient: Tensor, factor: Tensor | float, options: Mapping[str, Any]) -> None:
        """The gradient times ``factor``, Adam with eps beside the raw root, then decay of all weights."""
        beta1, beta2 = options["betas"]
        self.step += 1
        gradient = gradient * factor
        self.exp_avg = beta1 * self.exp_avg + (1 - beta1) * gradient
        self.exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * gradient**2
        size = options["lr"]
        if options["correct_bias"]:
            size *= (1 - beta2**self.step) ** 0.5 / (1 - beta1**self.step)
        self.weight = self.weight - size * self.exp_avg / (self.exp_avg_sq.sqrt() + options["eps"])
        self.weight = self.weight - options["lr"] * options["weight_decay"] * self.weight


def restated(parameters: Mapping[str, Parameter]) -> dict[str, Restated]:
    return {
        n: Restated(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p))
        for n, p in parameters.items()
    }


OPTIONS: list[dict[str, Any]] = [
    {"lr": 0.02, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.3, "correct_bias": True},
    {"lr": 0.05, "betas": (0.8, 0.999), "eps": 1e-3, "weight_decay": 0.1, "correct_bias": False},
    {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "correct_bias": True},
]
MEMBERS = (("embedding.weight", "nothing"), ("layer.weight",), ("layer.bias", "scale"))
POSITIONS = {name: f"#{index}" for index, name in enumerate(sum(MEMBERS, ()))}
CASES: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "None": (None, ()),
    "D": (D, ()),
    "D of some": (D, ("layer.bias", "embedding.weight")),
    "F": (F, ()),
}


def gradients_with_gaps(parameters: Mapping[str, Parameter], step: int) -> None:
    """As ever, but that now and then a parameter has none."""
    give_gradients(parameters, step)
    for place, parameter in enumerate(parameters.values()):
        if (step + place) % 7 == 3:
            parameter.grad = None


def kept(name: str, parameter: Tensor, step: int) -> Tensor:
    """The bits of SPEC.md's mask function, divided by p."""
    key, threshold = key_of(SEED, POSITIONS[name]), round(SHARE * 2**32)
    bits = keep_bits(range(parameter.numel()), key, step, threshold)
    return torch.tensor(bits, dtype=parameter.dtype).view(parameter.shape) / SHARE


def members_of(parameters: Mapping[str, Parameter]) -> list[dict[str, Any]]:
    """Three groups without names and with options of their own."""
    return [
        {"params": [parameters[name] for name in names], **options}
        for names, options in zip(MEMBERS, OPTIONS, strict=True)
    ]


@pytest.mark.parametrize("case", CASES)
def test_a_hundred_steps_are_those_of_the_released_code(case: str) -> None:
    """In fp64, |difference| <= 1e-12 |value| + 1e-14, weights and moments."""
    mode, without = CASES[case]
    parameters = toy_parameters(torch.float64)
    optimizer = ChildTuningAdamW(members_of(parameters), reserve_p=SHARE if mode else 1.0, mode=mode,
                                 seed=SEED)  # fmt: skip
    masks = dense_masks(parameters, without=without) if mode == D else {}
    if mode == D:
        optimizer.set_gradient_mask(masks)
    expected = restated(parameters)
    for step in range(STEPS):
        gradients_with_gaps(parameters, step)
        for names, options in zip(MEMBERS, OPTIONS, strict=True):
            for name in names:
                parameter, own = parameters[name], expected[name]
                if parameter.grad is not None:
                    factor = masks.get(parameter, 1.0)
                    if mode == F:
                        factor = kept(name, parameter, own.step + 1)
                    own.update(parameter.grad, factor, options)
        optimizer.step()
    for name, parameter in parameters.items():
        state, own = state_in_full(parameter, optimizer.state[parameter]), expected[name]
        assert own.step == int(state["step"]) < STEPS
        found = (parameter.detach(), state["exp_avg"], state["exp_avg_sq"])
        wanted = (own.weight, own.exp_avg, own.exp_avg_sq)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


# --- the signature ----------------------------------------------------------------------------------


def test_the_signature_is_that_of_the_released_code() -> None:
    signature = inspect.signature(ChildTuningAdamW)
    released = {
        name: each.default
        for name, each in signature.parameters.items()
        if each.kind == each.POSITIONAL_OR_KEYWORD
    }
    assert released.pop("params") is inspect.Parameter.empty
    assert list(released.items()) == [
        ("lr", 1e-3), ("betas", (0.9, 0.999)), ("eps", 1e-6), ("weight_decay", 0.0),
        ("correct_bias", True), ("reserve_p", 1.0), ("mode", None),
    ]  # fmt: skip
    parameters = toy_parameters()
    optimizer = ChildTuningAdamW(parameters.values(), 0.1, (0.8, 0.9), 1e-4, 0.2, False, 0.3, D)
    group = optimizer.param_groups[0]
    assert [group[name] for name in ("lr", "betas", "eps", "weight_decay", "correct_bias")] == [
        0.1, (0.8, 0.9), 1e-4, 0.2, False,
    ]  # fmt: skip
    assert (optimizer.mode, optimizer.reserve_p, group["reserve_p"]) == (D, 0.3, 1.0)
    for attribute in ("mode", "reserve_p"):
        with pytest.raises(AttributeError, match=attribute):
            setattr(optimizer, attribute, getattr(optimizer, attribute))


def test_it_is_fused_child_adamw_with_the_conventions_of_the_released_code() -> None:
    """By name too: pairs keep their names."""
    ours, theirs = toy_parameters(), toy_parameters()
    optimizer = ChildTuningAdamW(ours.items(), 0.1, weight_decay=0.2, mode=D, backend="reference")
    optimizer.set_gradient_mask(dense_masks(ours))
    twin = FusedChildAdamW(
        theirs.items(), lr=0.1, eps=1e-6, weight_decay=0.2, child_mask=toy_mask(theirs),
        convention="original", freeze_non_child=False,
    )  # fmt: skip
    halves = [Parameter(torch.ones(3, dtype=torch.bfloat16))]
    kept = ChildTuningAdamW(halves, master_weight="stochastic", state_dtype=torch.bfloat16)
    assert kept.param_groups[0]["master_weight"] == "stochastic"
    assert kept.state[halves[0]]["exp_avg"].dtype == torch.bfloat16
    train(optimizer, ours, range(3))
    train(twin, theirs, range(3))
    assert all(identical(ours[name].detach(), theirs[name].detach()) for name in ours)
    assert optimizer.param_groups[0]["param_names"] == list(ours)
    assert "reference" in optimizer.summary()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16, torch.int64], ids=str)
def test_masks_of_any_type_are_the_same_child(dtype: torch.dtype) -> None:
    runs: list[dict[str, Any]] = []
    for mask_dtype in (torch.float64, dtype):
        parameters = toy_parameters()
        optimizer = ChildTuningAdamW(parameters.values(), 0.1, mode=D)
        assert optimizer.gradient_mask is None
        masks = {p: mask.to(mask_dtype) for p, mask in dense_masks(parameters).items()}
        # As the released code's set_gradient_mask does, and its users by hand.
        optimizer.gradient_mask = masks
        assert optimizer.gradient_mask is not None
        assert all(torch.equal(mask, masks[p] == 1) for p, mask in optimizer.gradient_mask.items())
        give_gradients(parameters, 0)
        before = [p.grad.clone() for p in parameters.values() if p.grad is not None]
        optimizer.step()
        assert all(identical(p.grad, g) for p, g in zip(parameters.values(), before, strict=True))
        runs.append(weights_and_state(optimizer))
    assert_identical(*runs)


def test_a_mask_of_strides_of_its_own_goes_by_place() -> None:
    weight = Parameter(random_tensor((4, 6), 0).t())
    mask = random_tensor((6, 4), 1) > 0
    optimizer = ChildTuningAdamW([weight], 0.1, mode=D)
    optimizer.set_gradient_mask({weight: mask})
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(weight != before, mask)


# --- traps ------------------------------------------------------------------------------------------

BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "letter": ({"mode": "F"}, r"mode='F' is unknown; did you mean 'ChildTuning-F'\? use 'Chi"),
    "other letter": ({"mode": "D"}, r"mode='D' .* mean 'ChildTuning-D'\?"),
    "small": ({"mode": "childtuning-f"}, r"'childtuning-f' .* mean 'ChildTuning-F'\?"),
    "misspelt": ({"mode": "ChildTunning-D"}, r"'ChildTunning-D' .* mean 'ChildTuning-D'\?"),
    "short": ({"mode": "CT_D"}, r"'CT_D' .* mean 'ChildTuning-D'\?"),
    "of an argument parser": ({"mode": "None"}, r"'None' is unknown; did you mean None\?"),
    "either": ({"mode": "ChildTuning"}, r"'ChildTuning' is unknown; use .* or None \(the rel"),
    "no text": ({"mode": 1}, r"mode=1 is unknown; use"),
    "share without mode": ({"reserve_p": 0.3}, r"reserve_p=0.3 has no effect .* mode='ChildTuning-F'"),
    "nothing kept": ({"reserve_p": 0.0, "mode": F}, r"reserve_p=0.0 .* keeps no gradient element"),
    "nothing kept in D": ({"reserve_p": 0.0, "mode": D}, r"reserve_p=0.0 .* keeps no gradient"),
    "above 1": ({"reserve_p": 30.0, "mode": D}, r"reserve_p=30.0 .* must lie in \(0, 1\]"),
    "eps": ({"eps": 0.0, "mode": F, "reserve_p": 0.3}, r"eps=0.0 .* use eps=1e-8"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_CALLS)
def test_what_the_constructor_refuses(kind: str) -> None:
    options, message = BAD_CALLS[kind]
    with pytest.raises(ValueError, match=message):
        ChildTuningAdamW([Parameter(torch.ones(3))], **options)


BAD_GROUPS: dict[str, tuple[str | None, dict[str, Any], str]] = {
    "mode": (F, {"mode": D}, r"mode='ChildTuning-D' \(group 1\) cannot differ by group"),
    "child_mask": (D, {"child_mask": object()}, r"child_mask \(group 1\) .* set_gradient_mask"),
    "share in D": (D, {"reserve_p": 0.3}, r"reserve_p=0.3 \(group 1\) has no effect .*-D'; leave it"),
    "share": (None, {"reserve_p": 0.3}, r"reserve_p=0.3 \(group 1\) has no effect with mode=None"),
    "convention": (F, {"convention": "torch"}, r"convention='torch' \(group 1\) is not the released"),
    "freezing": (D, {"freeze_non_child": True}, r"freeze_non_child=True \(group 1\) is not the rel"),
    "misspelt": (F, {"weight_decy": 0.3}, r"did you mean 'weight_decay'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_GROUPS)
def test_what_a_group_cannot_have(kind: str) -> None:
    mode, options, message = BAD_GROUPS[kind]
    parameters = toy_parameters()
    optimizer = ChildTuningAdamW(parameters.values(), reserve_p=0.5 if mode else 1.0, mode=mode)
    with untouched(optimizer), pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [Parameter(torch.ones(3))], **options})
    with pytest.raises(TypeError, match="a parameter group must be a dict, not list"):
        optimizer.add_param_group([])  # type: ignore[arg-type]


def with_value(value: float, element: int = 7) -> Callable[[dict[str, Parameter]], Any]:
    def make(parameters: dict[str, Parameter]) -> Masks:
        masks = dense_masks(parameters)
        masks[parameters["layer.weight"]].view(-1)[element] = value
        return masks

    return make


def replaced(mask: Any) -> Callable[[dict[str, Parameter]], Any]:
    return lambda parameters: {**dense_masks(parameters), parameters["layer.weight"]: mask}


BAD_MASKS: dict[str, tuple[Callable[[dict[str, Parameter]], Any], type[Exception], str]] = {
    "empty": (lambda p: {}, ValueError, r"gradient_mask is empty.*filter on names.*mode=None"),
    "None": (lambda p: None, TypeError, r"must be a dict of parameter → tensor, not NoneType"),
    "ChildMask": (toy_mask, TypeError, r"not ChildMask; give it to set_child_mask\(\)"),
    "names": (
        lambda p: {name: torch.ones(q.shape) for name, q in p.items()},
        TypeError,
        r"keyed by names \(embedding.weight, layer.weight, layer.bias and 2 more\).*"
        r"p: mask\[n\] for n, p in model.named_parameters\(\).*FusedChildAdamW with child_mask=ChildMask",
    ),
    "a copy's parameters": (
        lambda p: dense_masks(copy.deepcopy(p)),
        ValueError,
        r"5 of 5 keys are no parameters of this optimizer \(shapes \(7, 5\), \(5, 33\), \(33,\) and 2 more\)",
    ),
    "one of another": (
        lambda p: {**dense_masks(p), Parameter(torch.ones(2, 9)): torch.ones(2, 9)},
        ValueError,
        r"1 of 6 keys are no parameters .*\(shapes \(2, 9\)\); key it by the parameters themselves",
    ),
    "numbers": (lambda p: {0: torch.ones(7, 5)}, ValueError, r"1 of 1 keys .* \(shapes 0\)"),
    "shape": (
        replaced(torch.ones(33, 5)),
        ValueError,
        r"mask of parameter #1, shape \(5, 33\): it has shape \(33, 5\)",
    ),
    "would broadcast": (replaced(torch.ones(33)), ValueError, r"#1, .* it has shape \(33,\)"),
    "no tensor": (replaced([1.0]), TypeError, r"#1, shape \(5, 33\): it is a list; give a tensor"),
    "sparse": (replaced(torch.ones(5, 33).to_sparse()), ValueError, r"#1.*call \.to_dense\(\)"),
    "a half": (with_value(0.5), ValueError, r"#1, .*1 values are neither 0 nor 1, the first 0.5 at el"),
    "rescaled": (with_value(2.0, 164), ValueError, r"the first 2.0 at element 164; compare first"),
    "NaN": (with_value(torch.nan, 0), ValueError, r"neither 0 nor 1, the first nan at element 0"),
    "infinite": (with_value(torch.inf), ValueError, r"the first inf at element 7"),
}  # fmt: skip


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("kind", BAD_MASKS)
def test_masks_that_do_not_fit(kind: str, steps_before: int) -> None:
    make, error, message = BAD_MASKS[kind]
    parameters = toy_parameters()
    optimizer = ChildTuningAdamW(parameters.values(), 0.1, mode=D)
    if steps_before:
        optimizer.set_gradient_mask(dense_masks(parameters))
        train(optimizer, parameters, range(steps_before))
    with untouched(optimizer), pytest.raises(error, match=message):
        optimizer.set_gradient_mask(make(parameters))


@pytest.mark.parametrize("mode", [F, None])
def test_a_mask_in_another_mode_is_refused(mode: str | None) -> None:
    parameters = toy_parameters()
    optimizer = ChildTuningAdamW(parameters.items(), 0.1, mode=mode)
    with untouched(optimizer):
        with pytest.raises(
            ValueError, match=rf"set_gradient_mask\(\) has no .* mode={mode!r}; give"
        ):
            optimizer.set_gradient_mask(dense_masks(parameters))
        with pytest.raises(
            ValueError, match=rf"set_child_mask\(\) has no effect with mode={mode!r}"
        ):
            optimizer.set_child_mask(toy_mask(parameters))


def test_no_step_is_taken_before_there_is_a_mask() -> None:
    parameters = toy_parameters()
    optimizer = ChildTuningAdamW(parameters.items(), 0.1, mode=D)
    give_gradients(parameters, 0)
    missing = pytest.raises(
        ValueError, match=r"mode='ChildTuning-D' .* set_gradient_mask\(\) before"
    )
    with untouched(optimizer), missing:
        optimizer.step()
    with untouched(optimizer), missing:
        optimizer.release_gradients()
    optimizer.set_child_mask(toy_mask(parameters))
    optimizer.step()
    optimizer.set_child_mask(None)
    with untouched(optimizer), missing:
        optimizer.step()


def test_a_mask_of_everything_is_pointed_at() -> None:
    """What `>= percentile` gives where most Fisher values are 0."""
    parameters = toy_parameters()
    masks = {p: torch.zeros_like(p) >= 0.0 for p in parameters.values()}
    for reserve_p in (0.3, 1.0):
        optimizer = ChildTuningAdamW(parameters.values(), reserve_p=reserve_p, mode=D)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.set_gradient_mask(masks)
        assert [
            "keeps all 234 elements, where reserve_p=0.3" in str(w.message) for w in caught
        ] == ([True] if reserve_p < 1 else [])


# --- a mask set again, groups added -----------------------------------------------------------------


def test_a_mask_set_again_keeps_the_moments_of_both_children() -> None:
    weight = Parameter(torch.ones(4))
    optimizer = ChildTuningAdamW([weight], 0.1, mode=D)
    optimizer.set_gradient_mask({weight: torch.tensor([1, 1, 0, 0])})
    weight.grad = torch.ones(4)
    optimizer.step()
    first = weight.detach().clone()
    optimizer.set_gradient_mask({weight: torch.tensor([1, 0, 1, 0])})
    state = state_in_full(weight, optimizer.state[weight])
    torch.testing.assert_close(state["exp_avg"], torch.tensor([0.1, 0.0, 0.0, 0.0]))
    weight.grad = torch.ones(4)
    optimizer.step()
    assert int(optimizer.state[weight]["step"]) == 2
    assert (weight != first).tolist() == [True, False, True, False]


def test_a_group_that_is_added_trains_densely_until_a_mask_has_it() -> None:
    parameters = toy_parameters()
    weight, head = parameters["layer.weight"], parameters["layer.bias"]
    optimizer = ChildTuningAdamW([weight], 0.1, mode=D)
    masks = {p: dense_masks(parameters)[p] for p in (weight, head)}
    optimizer.set_gradient_mask({weight: masks[weight]})
    optimizer.add_param_group({"params": [head], "lr": 0.05, "correct_bias": False})
    labels = [group["param_names"] for group in optimizer.param_groups]
    assert labels == [["#0"], ["#1"]]
    for expected in (torch.ones(33), masks[head]):
        before = head.detach().clone()
        train(optimizer, {"layer.weight": weight, "layer.bias": head}, range(1))
        assert torch.equal(head != before, expected == 1)
        optimizer.set_gradient_mask(masks)


def test_a_mask_of_positions_is_for_parameters_without_names() -> None:
    parameters = toy_parameters()
    mask = ChildMask.from_dense({"#0": torch.ones(7, 5) > 0}, ["#1", "#2", "#3", "#4"])
    FusedChildAdamW(parameters.values(), child_mask=mask)
    with pytest.raises(ValueError, match="no name of it matches embedding"):
        FusedChildAdamW(parameters.items(), child_mask=mask)


# --- runs that go on --------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "None": {},
    "F": {"mode": F, "reserve_p": 0.4, "seed": SEED},
    "D": {"mode": D, "reserve_p": 0.4},
}
every_run = pytest.mark.parametrize("run", RUNS)


def started(run: str, named: bool = False, steps: int = 3) -> tuple[Any, ChildTuningAdamW]:
    """Parameters in groups with options of their own, and their optimizer after some steps."""
    parameters = toy_parameters()
    groups = members_of(parameters)
    if named:
        for names, group in zip(MEMBERS, groups, strict=True):
            group["params"] = [(name, parameters[name]) for name in names]
    optimizer = ChildTuningAdamW(groups, **RUNS[run])
    if steps and run == "D":
        optimizer.set_gradient_mask(dense_masks(parameters, without=("layer.bias",)))
    train(optimizer, parameters, range(steps))
    return parameters, optimizer


def copy_weights(source: Mapping[str, Parameter], target: Mapping[str, Parameter]) -> None:
    with torch.no_grad():
        for name, parameter in target.items():
            parameter.copy_(source[name])


@every_run
@pytest.mark.parametrize("named", [False, True], ids=["positions", "names"])
def test_a_resumed_run_goes_on_to_the_bit(run: str, named: bool) -> None:
    """The mask comes with the state, the seed too; nobody sets them again."""
    parameters, optimizer = started(run, named)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed, other = started(run, named, steps=0)
    copy_weights(parameters, resumed)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_identical(weights_and_state(optimizer), weights_and_state(other))
    train(optimizer, parameters, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_identical(weights_and_state(optimizer), weights_and_state(other))


@every_run
@pytest.mark.parametrize("copied_by", ["deepcopy", "pickle"])
def test_a_copy_runs_on_alone(run: str, copied_by: str) -> None:
    parameters, optimizer = pair = started(run)
    copies = copy.deepcopy(pair) if copied_by == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = weights_and_state(optimizer)
    other_parameters, other = copies
    assert (other.mode, other.reserve_p) == (optimizer.mode, optimizer.reserve_p)
    train(other, other_parameters, range(3, 5))
    assert_identical(before, weights_and_state(optimizer))
    train(optimizer, parameters, range(3, 5))
    assert_identical(weights_and_state(optimizer), weights_and_state(other))
    if run == "D":
        other.set_gradient_mask(dense_masks(other_parameters, seed=8))


@every_run
@pytest.mark.parametrize("other", RUNS)
def test_a_state_of_another_mode_is_refused(run: str, other: str) -> None:
    _, optimizer = started(run)
    saved = started(other)[1].state_dict()
    if run == other:
        optimizer.load_state_dict(saved)
        return
    message = (
        rf"mode={RUNS[other].get('mode')!r} in the state dict, mode={optimizer.mode!r} here; build"
    )
    with untouched(optimizer), pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)


@every_run
def test_a_state_of_fused_child_adamw_is_refused_and_ours_goes_on_there(run: str) -> None:
    """With names at last, by position, and in the released code's convention still."""
    parameters, optimizer = started(run)
    renamed = toy_parameters()
    fused = FusedChildAdamW([{"params": [(n, renamed[n]) for n in names]} for names in MEMBERS])
    with (
        untouched(optimizer),
        pytest.raises(ValueError, match=r"is of FusedChildAdamW.*load it in"),
    ):
        optimizer.load_state_dict(fused.state_dict())
    copy_weights(parameters, renamed)
    fused.load_state_dict(optimizer.state_dict(), relabel=True)
    if run != "F":  # whose masks follow the names from now on
        train(optimizer, parameters, range(3, 6))
        train(fused, renamed, range(3, 6))
        assert all(identical(parameters[n].detach(), renamed[n].detach()) for n in renamed)
    assert "mode" not in fused.to_adamw_state_dict()["param_groups"][0]
    for broken in ({}, {"state": {}, "param_groups": 3}):
        with untouched(optimizer), pytest.raises((ValueError, TypeError)):
            optimizer.load_state_dict(broken)


@pytest.mark.parametrize("set_first", [True, False])
def test_a_state_of_the_released_code_goes_on(set_first: bool) -> None:
    """Its state dicts have neither names nor masks, steps are ints, and nothing says amsgrad."""
    source = toy_parameters(torch.float64)
    expected = restated(source)
    for step in range(6):
        give_gradients(source, step)
        for names, options in zip(MEMBERS, OPTIONS, strict=True):
            for name in names:
                gradient = source[name].grad
                assert gradient is not None
                expected[name].update(gradient, dense_masks(source)[source[name]], options)
        if step == 2:
            half_way = copy.deepcopy(expected)
    order = [name for names in MEMBERS for name in names]
    numbers = [[order.index(name) for name in names] for names in MEMBERS]
    state_dict = {
        "state": {
            order.index(name): {"step": e.step, "exp_avg": e.exp_avg, "exp_avg_sq": e.exp_avg_sq}
            for name, e in half_way.items()
        },
        "param_groups": [
            {**options, "initial_lr": 0.5, "params": of_group}
            for options, of_group in zip(OPTIONS, numbers, strict=True)
        ],
    }
    parameters = toy_parameters(torch.float64)
    groups = [{"params": group["params"]} for group in members_of(parameters)]
    optimizer = ChildTuningAdamW(groups, mode=D)
    if set_first:
        optimizer.set_gradient_mask(dense_masks(parameters))
    optimizer.load_state_dict(state_dict)
    if not set_first:
        with pytest.raises(ValueError, match="has no gradient mask"):
            optimizer.step()
        optimizer.set_gradient_mask(dense_masks(parameters))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(half_way[name].weight)
    train(optimizer, parameters, range(3, 6))
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, expected[name].weight, rtol=1e-12, atol=1e-14)
    assert optimizer.param_groups[0]["initial_lr"] == 0.5


# --- what stands around it --------------------------------------------------------------------------


def warmup_of_transformers(optimizer: torch.optim.Optimizer) -> Any:
    transformers = pytest.importorskip("transformers.optimization")
    return transformers.get_linear_schedule_with_warmup(optimizer, 2, 6)


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n)),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=6),
    "OptionScheduler": lambda o: OptionScheduler(o, "lr", lambda n: 0.1 / (1 + n)),
    "transformers": warmup_of_transformers,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_move_it_as_they_move_fused_child_adamw(schedule: str) -> None:
    runs = []
    for convention in (None, "original"):
        parameters = toy_parameters()
        optimizer: FusedChildAdamW
        if convention is None:
            optimizer = ChildTuningAdamW(parameters.values(), 0.1, reserve_p=0.4, mode=F, seed=1)
        else:
            optimizer = FusedChildAdamW(
                parameters.values(), 0.1, eps=1e-6, weight_decay=0.0, reserve_p=0.4, seed=1,
                convention=convention,
            )  # fmt: skip
        scheduler = SCHEDULES[schedule](optimizer)
        rates = []
        for step in range(5):
            train(optimizer, parameters, [step])
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        assert len(set(rates)) > 2
        runs.append([parameter.detach() for parameter in parameters.values()])
    assert all(identical(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("mode", [F, D])
def test_a_grad_scaler_changes_nothing_but_skips_what_overflows(mode: str) -> None:
    weights = []
    for scale in (1.0, 2.0**10):
        torch.manual_seed(0)
        model = nn.Linear(6, 5)
        optimizer = ChildTuningAdamW(model.parameters(), 0.1, reserve_p=0.5, mode=mode, seed=1)
        if mode == D:
            optimizer.set_gradient_mask({model.weight: random_tensor((5, 6), 3) > 0})
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(4):
            loss = model(random_tensor((3, 6), step)).square().mean()
            scaler.scale(loss * (torch.inf if step == 2 else 1.0)).backward()
            scaler.step(optimizer)
            assert bool(optimizer.step_was_skipped) == (step == 2)
            scaler.update()
            optimizer.zero_grad()
        weights.append(model.weight.detach())
    assert identical(*weights)
