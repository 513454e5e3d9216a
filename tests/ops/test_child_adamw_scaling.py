"""GradScaler, clipping by global norm and skipped steps, all in one factor (SPEC.md, eq. 19 and 20)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from childtune_kernels import ChildMask, FusedChildAdamW

from ..cases import SEED, assert_same_bits, generator_of, kept_places, raw_bits
from ..cases import Case as Setting
from ..columns import placed

OPS = ("child_adamw", "gradient_norm")
SIZES = {"layer.weight": (37, 131), "layer.bias": (131,), "head.weight": (4099,), "nothing": (0,)}
CHILD = {
    name: torch.rand(sizes, generator=generator_of("clip", name)) < 0.4
    for name, sizes in SIZES.items()
    if name != "layer.bias"
}
MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "CT_F": {"reserve_p": 0.3},
    "CT_D compact": {"masked": True},
    "CT_D dense": {"masked": True, "child_state": "dense"},
    "both": {"masked": True, "reserve_p": 0.3},
}
FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "fp64": (torch.float64, {}),
    "bf16": (torch.bfloat16, {}),
    "rounded": (torch.bfloat16, {"master_weight": "stochastic", "state_dtype": torch.bfloat16}),
    "fp16": (torch.float16, {}),
}
STEPS = 4

pytestmark = pytest.mark.usefixtures("one_thread")

Prepare = Callable[[int, FusedChildAdamW, dict[str, Tensor]], None]


def made(
    backend: str, dtype: torch.dtype, masked: bool = False, **options: Any
) -> tuple[dict[str, Tensor], FusedChildAdamW]:
    parameters: dict[str, Tensor] = {}
    for name, sizes in SIZES.items():
        values = torch.randn(sizes, generator=generator_of("weight", name), dtype=torch.float64)
        parameters[name] = torch.nn.Parameter(placed(values.to(dtype), backend))
    mask = ChildMask.from_dense(CHILD, dense=["layer.bias"]) if masked else None
    optimizer = FusedChildAdamW(
        parameters.items(),
        **{"lr": 1e-2, "weight_decay": 0.1, "child_mask": mask, "seed": SEED, **options},
        backend=backend,
    )
    return parameters, optimizer


def gradients(step: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: torch.randn(sizes, generator=generator_of("gradient", name, step)).to(dtype)
        for name, sizes in SIZES.items()
    }


def outcome_of(parameters: dict[str, Tensor], optimizer: FusedChildAdamW) -> dict[str, Tensor]:
    found = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, tensor in optimizer.state[parameter].items():
            found[f"{name} {key}"] = tensor.cpu().clone()
    return found


def run(
    backend: str, format_name: str, mask: str, prepare: Prepare | None = None, **options: Any
) -> dict[str, Tensor]:
    """Steps on the gradients as ``prepare`` leaves them; weights, state and norms."""
    dtype, formats = FORMATS[format_name]
    parameters, optimizer = made(backend, dtype, **MASKS[mask], **formats, **options)
    norms = []
    for step in range(1, STEPS + 1):
        for name, gradient in gradients(step, dtype).items():
            parameters[name].grad = placed(gradient, backend)
        if prepare is not None:
            prepare(step, optimizer, parameters)
        optimizer.step()
        if optimizer.last_grad_norm is not None:
            norms.append(optimizer.last_grad_norm.cpu())
    return outcome_of(parameters, optimizer) | {f"norm {at}": norm for at, norm in enumerate(norms)}


def exact_norm(step: int, dtype: torch.dtype, kept: dict[str, Tensor] | None = None) -> float:
    """The 2-norm of all gradients, exact sums; ``kept``: of these places alone."""
    squares = []
    for name, gradient in gradients(step, dtype).items():
        counted = gradient if kept is None else gradient[kept[name]]
        squares += (counted.double() ** 2).view(-1).tolist()
    return math.sqrt(math.fsum(squares))


def scaled_by(factor: float, found_inf: float = 0.0) -> Prepare:
    """What torch.amp.GradScaler does before it calls step()."""

    def prepare(step: int, optimizer: FusedChildAdamW, parameters: dict[str, Tensor]) -> None:
        device = parameters["layer.bias"].device
        for parameter in parameters.values():
            assert parameter.grad is not None
            parameter.grad.mul_(factor)
        optimizer.grad_scale = torch.tensor(factor, device=device)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(found_inf, device=device)  # type: ignore[attr-defined]

    return prepare


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("clip", ["before_mask", "after_mask"])
def test_every_column_clips_scales_and_skips_alike(
    clip: str, format_name: str, mask: str, column: str
) -> None:
    """With a scale, a norm that clips, and a step that is skipped."""
    scaled = scaled_by(4.0)

    def prepare(step: int, optimizer: FusedChildAdamW, parameters: dict[str, Tensor]) -> None:
        scaled(step, optimizer, parameters)
        if step == 2:
            grad = parameters["head.weight"].grad
            assert grad is not None
            grad[7] = torch.nan

    options = {"max_grad_norm": 2.0, "clip": clip, "skip_nonfinite": True}
    found = run(column, format_name, mask, prepare, **options)
    assert_same_bits(found, run("reference", format_name, mask, prepare, **options))
    assert int(found["layer.bias step"]) == STEPS - 1
    assert found["norm 1"].isnan() or clip == "after_mask"


def check_scaling_changes_nothing(backend: str) -> None:
    """A power of two goes in and out of the gradients without a trace."""
    for mask in MASKS.keys() - {"CT_D compact", "both"}:
        plain = run(backend, "fp32", mask)
        assert_same_bits(run(backend, "fp32", mask, scaled_by(1024.0)), plain)


def test_scaling_changes_nothing(backend: str) -> None:
    check_scaling_changes_nothing(backend)


def test_one_factor_is_rounded_once(backend: str) -> None:
    """In the first step exp_avg is c1 * g * r: of one product, rounded to fp32 once."""
    parameters, optimizer = made(backend, torch.float32, reserve_p=0.3, max_grad_norm=1.7)
    first = gradients(1, torch.float32)
    for name, gradient in first.items():
        parameters[name].grad = placed(gradient * 8, backend)
    optimizer.grad_scale = torch.tensor(8.0, device=parameters["layer.bias"].device)  # type: ignore[attr-defined]
    optimizer.step()
    norm = optimizer.last_grad_norm
    assert norm is not None
    assert float(norm) == pytest.approx(exact_norm(1, torch.float32), rel=1e-12)
    factor = torch.tensor((1 / 8.0) * (1.7 / (float(norm) + 1e-6)) * (1 / 0.3), dtype=torch.float32)
    c1 = torch.tensor(1 - 0.9, dtype=torch.float32)
    for name, gradient in first.items():
        kept = kept_places(Setting("kept", reserve_p=0.3), name, SIZES[name], 1)
        expected = torch.where(kept, c1 * ((gradient * 8) * factor), torch.zeros(()))
        found = optimizer.state[parameters[name]]["exp_avg"].cpu()
        assert torch.equal(raw_bits(found), raw_bits(expected)), name


@pytest.mark.parametrize("mask", MASKS)
def test_clipping_before_the_mask_is_that_of_torch(mask: str, backend: str) -> None:
    """torch.nn.utils.clip_grad_norm_ on the gradients first, and then the step, in fp64."""

    def clipped(step: int, optimizer: FusedChildAdamW, parameters: dict[str, Tensor]) -> None:
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5 * step)
        assert float(norm) == pytest.approx(exact_norm(step, torch.float64), rel=1e-12)

    def given(step: int, optimizer: FusedChildAdamW, parameters: dict[str, Tensor]) -> None:
        optimizer.param_groups[0]["max_grad_norm"] = 0.5 * step

    theirs = run(backend, "fp64", mask, clipped)
    found = run(backend, "fp64", mask, given, max_grad_norm=9.0)
    plain = run(backend, "fp64", mask)
    for name in SIZES:
        if name == "nothing":
            continue
        assert (found[name] - theirs[name]).abs().max() < 1e-13, name
        # eps and the changing norms show: Adam does not forget the factor.
        assert (plain[name] - theirs[name]).abs().max() > 1e-5, name


def test_clipping_after_the_mask_takes_the_norm_of_what_is_kept(backend: str) -> None:
    parameters, optimizer = made(
        backend, torch.float32, masked=True, reserve_p=0.3, max_grad_norm=1.0, clip="after_mask"
    )
    for step in (1, 2):
        for name, gradient in gradients(step, torch.float32).items():
            parameters[name].grad = placed(gradient, backend)
        optimizer.step()
        setting = Setting("kept", reserve_p=0.3)
        kept = {name: kept_places(setting, name, sizes, step) for name, sizes in SIZES.items()}
        kept |= {name: kept[name] & child for name, child in CHILD.items()}
        assert optimizer.last_grad_norm is not None
        expected = exact_norm(step, torch.float32, kept) / 0.3
        assert float(optimizer.last_grad_norm) == pytest.approx(expected, rel=1e-12)


def test_a_norm_below_the_limit_leaves_everything_as_it_is(backend: str) -> None:
    found = run(backend, "fp32", "CT_F", max_grad_norm=1e6)
    assert_same_bits(
        {name: tensor for name, tensor in found.items() if not name.startswith("norm")},
        run(backend, "fp32", "CT_F"),
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("mask", MASKS)
def test_a_gradient_that_is_not_finite_skips_the_step(
    mask: str, value: float, backend: str
) -> None:
    """Also in a place that would be dropped: weights, moments and steps are as they were."""
    for format_name, (dtype, formats) in FORMATS.items():
        parameters, optimizer = made(
            backend, dtype, **MASKS[mask], **formats, skip_nonfinite=True, clip="after_mask"
        )
        for step in range(1, 4):
            for name, gradient in gradients(step, dtype).items():
                parameters[name].grad = placed(gradient, backend)
            if step != 1:
                # An element outside the child, and one that no mask drops from 131 on.
                at = int((~CHILD["head.weight"]).nonzero()[0]) if step == 2 else 0
                name = "head.weight" if step == 2 else "layer.bias"
                grad = parameters[name].grad
                assert grad is not None
                grad[at] = value
            before = outcome_of(parameters, optimizer)
            optimizer.step()
            skipped = optimizer.step_was_skipped
            assert (skipped.dtype, skipped.shape) == (torch.bool, ())
            assert bool(skipped) == (step != 1), format_name
            if step != 1:
                assert_same_bits(outcome_of(parameters, optimizer), before)
        assert int(optimizer.state[parameters["head.weight"]]["step"]) == 1


def test_masks_wait_for_a_skipped_step(backend: str) -> None:
    """After a skipped step the run goes on as if it had not been there."""

    def stumbled(step: int, optimizer: FusedChildAdamW, parameters: dict[str, Tensor]) -> None:
        kept = {name: parameter.grad for name, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.grad = torch.full_like(parameter, torch.inf)
        optimizer.step()
        assert bool(optimizer.step_was_skipped)
        for name, gradient in kept.items():
            parameters[name].grad = gradient

    found = run(backend, "bf16", "both", stumbled, skip_nonfinite=True)
    expected = run(backend, "bf16", "both")
    assert_same_bits(
        {name: tensor for name, tensor in found.items() if not name.startswith("norm")}, expected
    )


def test_without_skipping_a_nan_goes_where_torch_lets_it_go(backend: str) -> None:
    """Clipping before the mask: the norm is NaN, and so is everything that is kept."""
    parameters, optimizer = made(backend, torch.float32, max_grad_norm=1.0)
    for name, gradient in gradients(1, torch.float32).items():
        parameters[name].grad = placed(gradient, backend)
    assert parameters["layer.bias"].grad is not None
    parameters["layer.bias"].grad[3] = torch.nan
    optimizer.step()
    assert all(parameter.isnan().all() for parameter in parameters.values())
    assert not bool(optimizer.step_was_skipped)


# torch.amp.GradScaler itself.


def test_a_grad_scaler_drives_the_step(backend: str) -> None:
    """Its steps, also those that it skips, equal those of scaled losses with nothing scaled."""
    parameters, optimizer = made(backend, torch.float32, reserve_p=0.5)
    twins, twin_optimizer = made(backend, torch.float32, reserve_p=0.5)
    device = parameters["layer.bias"].device.type
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=2)
    skipped = []
    for step in range(1, 7):
        for one, scale in ((parameters, scaler), (twins, None)):
            loss = torch.zeros((), device=device)
            for name, gradient in gradients(step, torch.float32).items():
                loss = loss + (one[name] * placed(gradient, backend)).sum()
                one[name].grad = None
            if step == 3:
                loss = loss * torch.inf
            (loss if scale is None else scale.scale(loss)).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped.append(bool(optimizer.step_was_skipped))
        assert not hasattr(optimizer, "grad_scale")
        if step != 3:
            twin_optimizer.step()
    assert skipped == [False, False, True, False, False, False]
    assert scaler.get_scale() == 2.0**11  # grown, halved, grown
    assert_same_bits(outcome_of(parameters, optimizer), outcome_of(twins, twin_optimizer))


def test_a_grad_scaler_may_unscale_first(backend: str) -> None:
    """As a Trainer does, which clips the gradients itself; then there is no scale, but there is found_inf."""
    parameters, optimizer = made(backend, torch.float32)
    device = parameters["layer.bias"].device.type
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    before = outcome_of(parameters, optimizer)
    for value, steps in ((torch.inf, 0), (1.0, 1)):
        for parameter in parameters.values():
            parameter.grad = None
        loss = torch.stack([parameter.sum() for parameter in parameters.values()]).sum() * value
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        assert int(optimizer.state[parameters["layer.bias"]]["step"]) == steps
        if not steps:
            assert_same_bits(outcome_of(parameters, optimizer), before)
    norm = math.sqrt(sum(p.numel() for p in parameters.values()))
    expected = torch.full((131,), 0.1 / (norm + 1e-6))
    exp_avg = optimizer.state[parameters["layer.bias"]]["exp_avg"].cpu()
    assert torch.allclose(exp_avg, expected, rtol=1e-5)


@pytest.mark.parametrize("where", ["step", "hook"])
def test_an_error_leaves_no_scale_behind(where: str, backend: str) -> None:
    """torch takes scale and verdict back only after a step that succeeds; the next one is another's."""
    parameters, optimizer = made(backend, torch.float32)
    twins, twin_optimizer = made(backend, torch.float32)
    scaler = torch.amp.GradScaler(parameters["layer.bias"].device.type, init_scale=2.0**10)
    for one, scale in ((parameters, scaler), (twins, None)):
        loss = torch.stack([parameter.square().sum() for parameter in one.values()]).sum()
        (loss if scale is None else scale.scale(loss)).backward()

    def refusing(*_: Any) -> None:
        raise ValueError("lr, says a hook")

    if where == "step":
        optimizer.param_groups[0]["lr"] = -1.0
    else:
        hook = optimizer.register_step_pre_hook(refusing)
    with pytest.raises(ValueError, match="lr"):
        scaler.step(optimizer)
    if where == "hook":
        hook.remove()
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
    optimizer.param_groups[0]["lr"] = 1e-2
    scaler.step(optimizer)
    twin_optimizer.step()
    assert_same_bits(outcome_of(parameters, optimizer), outcome_of(twins, twin_optimizer))


# Options and errors.

BAD = [
    ({"max_grad_norm": 0.0}, "use None to leave gradients as they are"),
    ({"max_grad_norm": -1.0}, "finite and not negative"),
    ({"max_grad_norm": math.inf}, "finite and not negative"),
    ({"max_grad_norm": "1"}, "must be a number"),
    ({"clip": "after"}, "one of .*'before_mask', 'after_mask'"),
    ({"skip_nonfinite": 1}, "must be True or False"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=str)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made("reference", torch.float32, **options)


@pytest.mark.parametrize(
    "options", [{"max_grad_norm": 1.0}, {"clip": "after_mask"}, {"skip_nonfinite": True}], ids=str
)
def test_what_is_of_all_groups_cannot_differ_by_group(options: dict[str, Any]) -> None:
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    remedy = "cannot differ from that of group 0"
    with pytest.raises(ValueError, match=remedy):
        FusedChildAdamW([{"params": weights[:1]}, {"params": weights[1:], **options}])
    optimizer = FusedChildAdamW([{"params": weights[:1]}, {"params": weights[1:]}])
    for weight in weights:
        weight.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[1].update(options)
    with pytest.raises(ValueError, match=remedy):
        optimizer.step()
    assert [int(optimizer.state[weight]["step"]) for weight in weights] == [1, 1]
    optimizer.param_groups[0].update(options)
    optimizer.step()
    assert [int(optimizer.state[weight]["step"]) for weight in weights] == [2, 2]


def test_a_group_that_is_added_takes_what_is_of_all_groups() -> None:
    """As it stands by then: set by hand, or brought by a state dict."""
    _, saved = made("reference", torch.float32, max_grad_norm=2.0, clip="after_mask")
    _, optimizer = made("reference", torch.float32)
    optimizer.load_state_dict(saved.state_dict())
    for group in optimizer.param_groups:
        group["skip_nonfinite"] = True
    optimizer.add_param_group({"params": [("late", torch.nn.Parameter(torch.ones(3)))]})
    added = optimizer.param_groups[-1]
    assert (added["max_grad_norm"], added["clip"], added["skip_nonfinite"]) == (
        2.0,
        "after_mask",
        True,
    )


def test_a_step_without_norm_has_none() -> None:
    parameters, optimizer = made("reference", torch.float32)
    assert optimizer.last_grad_norm is None
    assert not bool(optimizer.step_was_skipped)
    scaled_by(2.0)(1, optimizer, {}) if not parameters else None
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.last_grad_norm is None
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    optimizer.step()
    norm = optimizer.last_grad_norm
    assert norm is not None
    optimizer.step()
    assert optimizer.last_grad_norm is not norm
    assert (norm.dtype, norm.shape) == (torch.float64, ())
