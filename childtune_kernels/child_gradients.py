"""The gradients of children, summed from one step to the next (SPEC.md, "Gradient release")."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import child_layout, ops


@dataclass(eq=False)
class _Sum:
    """The sum of one parameter, and the tensors of the child that it is of."""

    label: str
    values: Tensor
    layout: list[Tensor | None]


class ChildGradients:
    """For each parameter one value a child element, in element order; fp64 for fp64 parameters, else fp32."""

    def __init__(self) -> None:
        self._sums: dict[Tensor, _Sum] = {}

    @property
    def labels(self) -> dict[Tensor, str]:
        """The parameters of which there is a sum, and their labels."""
        return {parameter: kept.label for parameter, kept in self._sums.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all sums."""
        return sum(kept.values.nbytes for kept in self._sums.values())

    def add(self, label: str, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
        """Add the child's elements of ``parameter.grad``, which is only read.

        Args:
            label: of the parameter.
            parameter: has a gradient.
            state: of the parameter, with a fixed mask.

        Raises:
            ValueError: a gradient that does not fit; nothing was added.
            RuntimeError: the sum is of another child; nothing was added.
        """
        gradient = parameter.grad
        assert gradient is not None
        ops.check_gradient(label, parameter, gradient)
        kept, words = self._sums.get(parameter), child_layout.mask_words(state, parameter.numel())
        assert words is not None
        if kept is not None:
            _check_child(kept, state)
        if gradient.is_neg() or gradient.data_ptr() == 0:
            plain = torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)
            gradient = plain.copy_(gradient)
        child = child_layout.gather_child(gradient, words)
        if kept is None:
            values = child.to(ops.compute_dtype(parameter.dtype))
            self._sums[parameter] = _Sum(label, values, _layout(state))
        else:
            kept.values.add_(child)

    def check(self, states: Mapping[Tensor, Any]) -> None:
        """Refuse sums of children that have been exchanged since.

        Raises:
            RuntimeError: names the parameter.
        """
        for parameter, kept in self._sums.items():
            _check_child(kept, states.get(parameter, {}))

    @contextmanager
    def as_gradient(self, parameter: Tensor, words: Tensor) -> Iterator[None]:
        """Inside the block ``parameter.grad`` is the sum, with +0 outside the child; afterwards None.

        Args:
            parameter: has a sum, and no gradient.
            words: of its fixed mask.
        """
        values, dtype = self._sums[parameter].values, parameter.grad_dtype
        gradient = torch.zeros(parameter.shape, dtype=values.dtype, device=parameter.device)
        parameter.grad_dtype = gradient.dtype
        try:
            parameter.grad = child_layout.scatter_child_(gradient, values, words)
            yield
        finally:
            parameter.grad = None
            parameter.grad_dtype = dtype

    def drop(self, parameter: Tensor) -> None:
        """Forget the sum of a parameter."""
        del self._sums[parameter]

    def clear(self) -> None:
        """Forget all sums."""
        self._sums.clear()


def _layout(state: Mapping[str, Tensor]) -> list[Tensor | None]:
    return [state.get(name) for name in child_layout.LAYOUT_KEYS]


def _check_child(kept: _Sum, state: Mapping[str, Tensor]) -> None:
    if any(now is not then for now, then in zip(_layout(state), kept.layout, strict=True)):
        raise RuntimeError(
            f"the child of {kept.label} changed while its gradients were kept for a step; call "
            "optimizer.step() before, or optimizer.zero_grad() to drop them"
        )
