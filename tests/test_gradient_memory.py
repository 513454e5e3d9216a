"""What gradient release is for: the bytes of gradients that are not there, counted (no clock, no noise)."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gradient_memory import RESERVE_P, WAYS, iteration_of
from benchmarks.peak_memory import tensor_peak
from tests.columns import CPU

# Wide enough that gradients outweigh what forward keeps for backward.
WIDTH, TOKENS = 64, 4

pytestmark = pytest.mark.usefixtures("one_thread")


def measured(way: str) -> tuple[int, int, int]:
    """Bytes of all gradients, held before the step, and the peak of an iteration beside what stays."""
    model, _, iteration = iteration_of(WAYS[way], WIDTH, TOKENS)
    iteration()
    held = iteration()
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    return gradients, held, tensor_peak(iteration, CPU)


def test_the_peak_of_an_iteration_falls_by_most_of_the_gradients() -> None:
    gradients, held, ordinary = measured("ordinary")
    assert held == gradients
    assert ordinary >= gradients
    _, held, released = measured("released")
    assert held == 0
    assert ordinary - released >= 0.8 * gradients


def test_between_micro_batches_the_child_is_held_alone() -> None:
    gradients, held, ordinary = measured("accumulated")
    assert held == gradients
    model, optimizer, iteration = iteration_of(WAYS["accumulated, compact"], WIDTH, TOKENS)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    child = sum(optimizer.state[parameter]["child_exp_avg"].nbytes for parameter in matrices)
    rest = sum(parameter.nbytes for parameter in model.parameters() if parameter.dim() != 2)
    assert child == 4 * round(RESERVE_P * sum(map(torch.Tensor.numel, matrices)))
    assert iteration() == child + rest
    assert ordinary - tensor_peak(iteration, CPU) >= 0.8 * (gradients - child - rest)
