"""Parameters, gradients and masks that do not fit: the message says what and what to do (SPEC.md, 7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from childtune_kernels import ChildMask, FusedChildAdamW
from tests.snapshots import assert_identical, untouched, weights_and_state
from tests.toy_parameters import give_gradients, random_tensor, toy_mask, toy_parameters, train

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def five_levels() -> Tensor:
    """Nothing of it can be joined: every dimension is cut short."""
    return torch.zeros(3, 3, 3, 3, 4)[:2, :2, :2, :2, :3]


BAD_PARAMETERS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "integer": (lambda: torch.ones(3).int(), "dtype torch.int32 .* use float32, float64"),
    "bool": (lambda: torch.ones(3).bool(), "dtype torch.bool .* use float32"),
    "complex": (
        lambda: torch.ones(3, dtype=torch.complex64),
        "dtype torch.complex64 .* use float32",
    ),
    "float8": (lambda: torch.ones(3).to(torch.float8_e4m3fn), "dtype torch.float8_e4m3fn .* use"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo; only dense"),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), "layout torch.sparse_csr; only dense"),
    "expanded": (lambda: torch.ones(3, 1).expand(3, 4), "share memory; call .contiguous()"),
    "overlapping": (
        lambda: torch.zeros(4).as_strided((3, 2), (1, 1)),
        "share memory; call .contiguous()",
    ),
    "five levels": (five_levels, "needs 5 levels .* at most 4 .*; call .contiguous()"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("kind", BAD_PARAMETERS)
def test_parameters_that_no_kernel_can_update(kind: str) -> None:
    make, message = BAD_PARAMETERS[kind]
    bad = Parameter(make(), requires_grad=False)
    with pytest.raises(ValueError, match=rf"parameter head\.weight: .*{message}"):
        FusedChildAdamW([("head.weight", bad)])
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.items(), lr=0.1)
    train(optimizer, parameters, range(1))
    with untouched(optimizer), pytest.raises(ValueError, match=r"parameter head\.weight"):
        optimizer.add_param_group({"params": [("head.weight", bad)]})
    train(optimizer, parameters, range(1, 2))
    assert int(optimizer.state[parameters["scale"]]["step"]) == 2


def one(value: float = 1.0) -> Parameter:
    return Parameter(torch.tensor([value]))


SAME = one()
BAD_LISTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "tensor": (lambda: one(), TypeError, "iterable"),
    "nothing": (list, ValueError, "empty parameter list"),
    "a set": (lambda: [{"params": {one()}}], TypeError, "is a set, .* pass a list"),
    "no tensor": (lambda: [1.0], TypeError, "holds a float; only tensors train"),
    "no tensor, named": (lambda: [("a", 1.0)], TypeError, "holds a float"),
    "same label": (lambda: [("a", one()), ("a", one())], ValueError, "label 'a' .* rename one"),
    "same label once unwrapped": (
        lambda: [("a", one()), ("module.a", one())],
        ValueError,
        "label 'a' .* rename one",
    ),
    "same label in two groups": (
        lambda: [{"params": [("a", one())]}, {"params": [("a", one())]}],
        ValueError,
        "label 'a' .group 1. .* rename one",
    ),
    "same tensor": (
        lambda: [("a", SAME), ("b", SAME)],
        ValueError,
        "b .group 0. is the same tensor as a.*; pass each (weight|tensor) once",
    ),
    "same tensor unnamed": (
        lambda: [SAME, one(), SAME],
        ValueError,
        "#2 .group 0. is the same tensor as #0",
    ),
    "same tensor in two groups": (
        lambda: [{"params": [SAME]}, {"params": [one(), SAME]}],
        ValueError,
        "#2 .group 1. is the same tensor as #0",
    ),
    "some names": (lambda: [("a", one()), one()], ValueError, "name them all"),
    "names in one group": (
        lambda: [{"params": [("a", one())]}, {"params": [one()]}],
        ValueError,
        "name them all",
    ),
    "no name left": (lambda: [("_orig_mod", one())], ValueError, "give the parameter a name"),
    "no leaf": (lambda: [one() * 2], ValueError, "non-leaf"),
}


@pytest.mark.parametrize("kind", BAD_LISTS)
def test_lists_of_parameters_that_are_refused(kind: str) -> None:
    make, error, message = BAD_LISTS[kind]
    with pytest.raises(error, match=message):
        FusedChildAdamW(make())


def test_a_tied_weight_listed_twice_is_named() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    twice = model.named_parameters(remove_duplicate=False)
    with pytest.raises(ValueError, match=r"b\.weight .* is the same tensor as a\.weight"):
        FusedChildAdamW(twice)


BAD_GRADIENTS: dict[str, tuple[torch.dtype, Callable[[], Tensor], str]] = {
    "sparse": (
        torch.float32,
        lambda: torch.ones(3, 4).to_sparse(),
        "layout torch.sparse_coo; .* use sparse=False",
    ),
    "complex": (
        torch.float32,
        lambda: torch.ones(3, 4, dtype=torch.complex64),
        "dtype torch.complex64 for a parameter of torch.float32; it must be",
    ),
    "double for float": (
        torch.float32,
        lambda: torch.ones(3, 4).double(),
        "dtype torch.float64 for a parameter of torch.float32; it must be",
    ),
    "float for double": (
        torch.float64,
        lambda: torch.ones(3, 4),
        "dtype torch.float32 for a parameter of torch.float64; it must be",
    ),
    "half for bfloat16": (
        torch.bfloat16,
        lambda: torch.ones(3, 4).half(),
        "dtype torch.float16 for a parameter of torch.bfloat16; it must be",
    ),
    "integer": (torch.float32, lambda: torch.ones(3, 4).int(), "dtype torch.int32"),
    "other shape": (torch.float32, lambda: torch.ones(4, 3), r"\(4, 3\) .* for a parameter of .*\(3, 4\)"),
    "too short": (torch.float32, lambda: torch.ones(3), r"\(3,\) .* run backward again"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_GRADIENTS)
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize(
    ("mended_by", "backend"),
    [
        ("another gradient", None),
        ("another gradient", "reference"),
        ("none", "reference"),  # test_null_pointers_are_errors_and_no_crash tries it on the best
    ],
)
def test_gradients_that_do_not_fit(
    kind: str, steps_before: int, mended_by: str, backend: str | None
) -> None:
    dtype, make, message = BAD_GRADIENTS[kind]
    runs = []
    for disturbed in (True, False):
        first, bad, last = (Parameter(random_tensor((3, 4), seed, dtype)) for seed in range(3))
        named = {"first": first, "bad": bad, "last": last}
        optimizer = FusedChildAdamW(named.items(), lr=0.1, reserve_p=0.5, seed=1, backend=backend)
        train(optimizer, {"first": first, "last": last}, range(steps_before))
        give_gradients(named, 8)
        if disturbed:
            put_bad_gradient(bad, make())
            with untouched(optimizer), pytest.raises(ValueError, match=f"of bad: .*{message}"):
                optimizer.step()
            bad.grad = None
            bad.grad_dtype = dtype
            give_gradients({"bad": bad}, 8)
        if mended_by == "none":
            bad.grad = None
        optimizer.step()
        train(optimizer, named, [9])
        runs.append(weights_and_state(optimizer))
    assert_identical(*runs)


def put_bad_gradient(parameter: Parameter, gradient: Tensor) -> None:
    """Past torch's own checks, as mixed precision and sharding libraries do it."""
    parameter.grad = None
    if gradient.shape == parameter.shape:
        parameter.grad_dtype = None
        parameter.grad = gradient
    else:
        parameter.grad = torch.ones_like(parameter)
        parameter.grad.data = gradient


def test_the_gradient_of_a_sparse_embedding_names_the_remedy() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = FusedChildAdamW(model.named_parameters())
    model(torch.tensor([1, 2])).sum().backward()
    with (
        untouched(optimizer),
        pytest.raises(ValueError, match=r"gradient of weight: .*sparse=False"),
    ):
        optimizer.step()
    optimizer.zero_grad()
    model.sparse = False
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert int(optimizer.state[model.weight]["step"]) == 1


def mask_of(**shapes: tuple[int, ...]) -> ChildMask:
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    return ChildMask.from_dense(masks)


BAD_MASKS: dict[str, tuple[Any, str]] = {
    "a parameter unknown": (
        mask_of(weight=(2, 3)),
        r"does not know bias; it knows weight; give .* dense=\[",
    ),
    "no name matches": (mask_of(w=(2, 3), b=(2,)), "no name of it matches weight, bias; it knows w, b"),
    "another shape": (
        mask_of(weight=(3, 2), bias=(2,)),
        r"weight has shape \(3, 2\) in the mask and \(2, 3\) in the optimizer; make the mask from this",
    ),
    "a shape flattened": (mask_of(weight=(6,), bias=(2,)), r"weight has shape \(6,\) in the mask"),
    "a dict": ({"weight": torch.ones(2, 3) > 0}, "must be a ChildMask, not dict; use ChildMask.from"),
    "True": (True, "must be a ChildMask, not bool"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_MASKS)
@pytest.mark.parametrize("place", ["constructor", "group", "later group"])
def test_masks_that_do_not_fit(kind: str, place: str) -> None:
    mask, message = BAD_MASKS[kind]
    linear = nn.Linear(3, 2)
    pairs = list(linear.named_parameters())
    optimizer = FusedChildAdamW([("other", one())])
    group = {"params": pairs, "child_mask": mask}
    give: Callable[[], Any] = {
        "constructor": lambda: FusedChildAdamW(pairs, child_mask=mask),
        "group": lambda: FusedChildAdamW([group]),
        "later group": lambda: optimizer.add_param_group(group),
    }[place]
    with untouched(optimizer), pytest.raises(ValueError, match=f"child_mask.*{message}"):
        give()
    optimizer.add_param_group({"params": pairs, "child_mask": mask_of(weight=(2, 3), bias=(2,))})
    assert len(optimizer.state) == 3


def test_a_mask_needs_names() -> None:
    parameters = toy_parameters()
    with pytest.raises(
        ValueError, match=r"child_mask needs names; pass model.named_parameters\(\)"
    ):
        FusedChildAdamW(parameters.values(), child_mask=toy_mask(parameters))


def test_frozen_parameters_that_the_mask_does_not_know_have_a_remedy_of_their_own() -> None:
    linear = nn.Linear(3, 2)
    linear.bias.requires_grad_(False)
    mask = mask_of(weight=(2, 3))
    with pytest.raises(
        ValueError, match=r"bias, which require no gradient; .* if p\.requires_grad\]"
    ):
        FusedChildAdamW(linear.named_parameters(), child_mask=mask)
    trained = [(name, p) for name, p in linear.named_parameters() if p.requires_grad]
    assert len(FusedChildAdamW(trained, child_mask=mask).state) == 1


def test_a_mask_may_know_names_the_optimizer_does_not_hold() -> None:
    parameters, alone = toy_parameters(), toy_parameters()
    mask = toy_mask(parameters)
    stage = {name: alone[name] for name in ("layer.weight", "layer.bias")}
    whole = FusedChildAdamW(parameters.items(), lr=0.1, child_mask=mask)
    part = FusedChildAdamW(stage.items(), lr=0.1, child_mask=mask)
    train(whole, parameters, range(2))
    train(part, stage, range(2))
    for name, parameter in stage.items():
        assert torch.equal(parameter, parameters[name])
        assert torch.equal(part.state[parameter]["mask_words"], mask.words[name])


def spoil_shape(state: dict[str, Tensor]) -> None:
    state["exp_avg"] = state["exp_avg"][:2].clone()


def spoil_dtype(state: dict[str, Tensor]) -> None:
    state["exp_avg_sq"] = state["exp_avg_sq"].bfloat16()


def spoil_step(state: dict[str, Tensor]) -> None:
    state["step"] = torch.tensor(2.0)


def spoil_step_by_number(state: dict[str, Any]) -> None:
    state["step"] = 2


def spoil_words(state: dict[str, Tensor]) -> None:
    state["mask_words"] = torch.tensor([-1], dtype=torch.int32)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_shape, "state exp_avg of layer.bias must be a contiguous .* load_state_dict"),
        (spoil_dtype, "state exp_avg_sq of layer.bias must be"),
        (spoil_step, "state step of layer.bias must be an int64 tensor"),
        (spoil_step_by_number, "state step of layer.bias must be a tensor, not 2"),
        (spoil_words, "mask in the state of layer.bias came or went"),
    ],
)
def test_state_written_by_hand(spoil: Callable[[Any], None], message: str) -> None:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.items(), lr=0.1)
    train(optimizer, parameters, range(2))
    state = optimizer.state[parameters["layer.bias"]]
    good = dict(state)
    spoil(state)
    with untouched(optimizer), pytest.raises(ValueError, match=message):
        optimizer.step()
    state.clear()
    state.update(good)
    optimizer.step()
    assert int(state["step"]) == 3


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_float_type_is_served(dtype: torch.dtype) -> None:
    parameters = toy_parameters(dtype)
    start = parameters["layer.bias"].detach().clone()
    train(FusedChildAdamW(parameters.items(), lr=0.1), parameters, range(1))
    assert bool((parameters["layer.bias"] != start).all())
