"""What stands around a step: default devices, inference mode, torch.compile, shared memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from childtune_kernels import FusedChildAdamW, registry
from tests.snapshots import identical
from tests.toy_parameters import give_gradients, toy_mask, toy_parameters, train

BACKENDS = pytest.mark.parametrize("backend", [None, "reference"])


def run(backend: str | None, around: Callable[[Callable[[], object]], object]) -> list[Tensor]:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(
        parameters.items(),
        lr=0.1,
        reserve_p=0.5,
        child_mask=toy_mask(parameters),
        seed=1,
        backend=backend,
    )
    for step in range(3):
        give_gradients(parameters, step)
        around(optimizer.step)
    return [parameter.detach() for parameter in parameters.values()]


def plainly(step: Callable[[], object]) -> object:
    return step()


def under_another_default_device(step: Callable[[], object]) -> object:
    with torch.device("meta"):
        return step()


def in_inference_mode(step: Callable[[], object]) -> object:
    with torch.inference_mode():
        return step()


def compiled(step: Callable[[], object]) -> object:
    return torch.compile(lambda: step(), backend="eager")()


@BACKENDS
@pytest.mark.parametrize("around", [under_another_default_device, in_inference_mode, compiled])
def test_surroundings_change_nothing(
    around: Callable[[Callable[[], object]], object], backend: str | None
) -> None:
    expected = run(backend, plainly)
    for found, wanted in zip(run(backend, around), expected, strict=True):
        assert identical(found, wanted)


def test_a_first_step_in_inference_mode_does_not_bind_the_later_ones() -> None:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.items(), lr=0.1)
    give_gradients(parameters, 0)
    with torch.inference_mode():
        optimizer.step()
    train(optimizer, parameters, range(1, 3))
    assert int(optimizer.state[parameters["scale"]]["step"]) == 3


def test_strides_of_dimensions_of_one_element_need_no_copy() -> None:
    """A 1x1 convolution's gradient names other strides for the same order in memory."""
    convolution = nn.Conv2d(64, 64, 1, bias=False)
    images = torch.randn(2, 64, 4, 4).to(memory_format=torch.channels_last)
    convolution(images).sum().backward()
    gradient = torch.randn(64, 64).as_strided((64, 64, 1, 1), (64, 1, 64, 64))
    convolution.weight.grad = gradient
    optimizer = FusedChildAdamW(convolution.named_parameters())
    optimizer.step()
    assert optimizer._planner.plans is not None
    assert optimizer._planner.plans[0]._copied_rows == []


def test_parameters_that_overlap_are_refused() -> None:
    memory = torch.randn(8000)
    first, second = Parameter(memory[:5000]), Parameter(memory[2500:])
    with pytest.raises(ValueError, match=r"b .* shares its memory"):
        FusedChildAdamW([("a", first), ("b", second)])
    FusedChildAdamW([("a", Parameter(memory[0::2])), ("b", Parameter(memory[1::2]))])
    FusedChildAdamW([("a", Parameter(memory[:4000])), ("b", Parameter(memory[4000:]))])


def test_a_mask_taken_out_of_the_state_is_refused() -> None:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.items(), child_mask=toy_mask(parameters))
    train(optimizer, parameters, range(1))
    state = optimizer.state[parameters["layer.weight"]]
    assert state.keys() >= {"mask_words", "child_ranks"}
    ranks = state.pop("child_ranks")
    words = state.pop("mask_words")
    before = parameters["layer.weight"].detach().clone()
    with pytest.raises(ValueError, match=r"mask in the state of layer\.weight came or went"):
        optimizer.step()
    assert identical(parameters["layer.weight"].detach(), before)
    state["mask_words"] = words
    with pytest.raises(ValueError, match=r"child of layer\.weight is not written as layout words"):
        optimizer.step()
    state["child_ranks"] = ranks
    optimizer.step()


@pytest.mark.parametrize(("key", "value"), [("child_mask", None), ("reserve_P", 0.3)])
def test_keys_put_into_a_live_group_are_not_ignored(key: str, value: object) -> None:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.items())
    train(optimizer, parameters, range(1))
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=key):
        optimizer.step()
    del optimizer.param_groups[0][key]
    optimizer.step()


def test_a_forced_instruction_set_that_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHILDTUNE_CPU_CAPABILITY", "sse9")
    assert "sse9" in registry.explain()
    with pytest.raises(RuntimeError, match="sse9"):
        registry.choose("child_adamw", "cpu")
