"""CUDA graphs where there is none: what is refused on CPUs, and whose affair ``capturable`` is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from childtune_kernels import FusedChildAdamW, graph_capture
from childtune_kernels.group_options import group_numbers
from tests.snapshots import assert_identical, weights_and_state
from tests.toy_parameters import give_gradients, toy_parameters

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", [None, "reference"])
def test_only_triton_is_capturable(backend: str | None) -> None:
    parameters = toy_parameters()
    with pytest.raises(ValueError, match=r"capturable=True .group 0. is for backend 'triton'"):
        FusedChildAdamW(parameters.items(), capturable=True, backend=backend)
    optimizer = FusedChildAdamW(list(parameters.items())[:1])
    rest = {"params": list(parameters.items())[1:], "capturable": True}
    with pytest.raises(ValueError, match=r"capturable=True .group 1."):
        optimizer.add_param_group(rest)
    assert len(optimizer.param_groups) == 1


def test_capturable_is_refused_in_a_group_too() -> None:
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.items())
    give_gradients(parameters, 0)
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(ValueError, match=r"capturable=True .* is for backend 'triton'"):
        optimizer.step()


def test_capturable_is_true_or_false() -> None:
    with pytest.raises(ValueError, match=r"capturable=1 .* must be True or False"):
        FusedChildAdamW(toy_parameters().items(), capturable=1)  # type: ignore[arg-type]


def test_a_capture_of_other_backends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would hold nothing of a step on the host."""
    parameters = toy_parameters()
    optimizer = FusedChildAdamW(parameters.items())
    give_gradients(parameters, 0)
    optimizer.step()
    before = weights_and_state(optimizer)
    monkeypatch.setattr(graph_capture, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"capturable is False; build .*capturable=True"):
        optimizer.step()
    assert_identical(weights_and_state(optimizer), before)


def test_nothing_is_captured_on_cpus() -> None:
    assert not graph_capture.is_capturing(CPU)


def test_a_state_dict_does_not_bring_capturable() -> None:
    """It says how this machine steps, which changes no result."""
    optimizer = FusedChildAdamW(toy_parameters().items())
    state: dict[str, Any] = optimizer.state_dict()
    assert state["param_groups"][0]["capturable"] is False
    state["param_groups"][0]["capturable"] = True
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["capturable"] is False


def test_numbers_name_the_tensors_that_kernels_read() -> None:
    """On the given device and with capturable alone; elsewhere a tensor is read as a number."""
    lr, decay = torch.tensor(0.5), torch.tensor(0.25, dtype=torch.float64)
    group = FusedChildAdamW(toy_parameters().items()).param_groups[0]
    group |= {"lr": lr, "weight_decay": decay, "capturable": True}
    numbers = group_numbers(group, False, "here", CPU)
    assert (numbers.lr_address, numbers.lr_is_double) == (lr.data_ptr(), False)
    assert (numbers.weight_decay_address, numbers.weight_decay_is_double) == (
        decay.data_ptr(),
        True,
    )
    assert numbers.may_decay
    assert float(numbers.lr_address) == numbers.lr_address
    with pytest.raises(ValueError, match=r"betas=.* must be numbers with capturable=True"):
        group_numbers({**group, "betas": (torch.tensor(0.9), 0.99)}, False, "here", CPU)
    elsewhere = {**group, "lr": torch.empty((), device="meta")}
    with pytest.raises(ValueError, match=r"lr .here. lies on meta, the parameters on cpu"):
        group_numbers(elsewhere, False, "here", CPU)
    for other, device in ((group, torch.device("meta")), ({**group, "capturable": False}, CPU)):
        numbers = group_numbers(other, False, "here", device)
        assert (numbers.lr, numbers.weight_decay, numbers.lr_address) == (0.5, 0.25, 0)
