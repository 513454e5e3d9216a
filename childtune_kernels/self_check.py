"""A quick proof that every available backend of this machine equals the reference, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import registry
from .child_mask import ChildMask
from .optimizer import FusedChildAdamW

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SHAPES = {"matrix": (67, 129), "vector": (4099,), "scalar": (), "empty": (0, 3)}
_STEPS = 3


@dataclass(frozen=True)
class Finding:
    """One comparison: a backend against the reference in one setting."""

    backend: str
    setting: str
    equal: bool


def self_check(device: torch.device | str = "cpu") -> Iterator[Finding]:
    """Run every available backend of op child_adamw against the reference.

    Yields:
        A finding for each backend, dtype and kind of mask; equal means every bit of weights, moments
        and steps.
    """
    backends = [
        cell.backend
        for cell in registry.survey(device)
        if cell.op == "child_adamw" and cell.available and cell.backend != "reference"
    ]
    for dtype, reserve_p, masked in itertools.product(_DTYPES, (1.0, 0.3), (False, True)):
        expected = _run("reference", device, dtype, reserve_p, masked)
        kind = {(1.0, False): "plain", (1.0, True): "CT_D", (0.3, False): "CT_F"}.get(
            (reserve_p, masked), "CT_F and CT_D"
        )
        for backend in backends:
            found = _run(backend, device, dtype, reserve_p, masked)
            equal = all(
                torch.equal(_bits(a), _bits(b)) for a, b in zip(expected, found, strict=True)
            )
            yield Finding(backend, f"{str(dtype).removeprefix('torch.')} {kind}", equal)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _run(
    backend: str, device: torch.device | str, dtype: torch.dtype, reserve_p: float, masked: bool
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    parameters = {name: torch.nn.Parameter(random(shape)) for name, shape in _SHAPES.items()}
    mask = None
    if masked:
        mask = ChildMask.from_dense({name: random(p.shape) > 0.5 for name, p in parameters.items()})
    optimizer = FusedChildAdamW(
        parameters.items(), lr=1e-2, reserve_p=reserve_p, child_mask=mask, seed=7, backend=backend
    )
    for _ in range(_STEPS):
        for parameter in parameters.values():
            parameter.grad = random(parameter.shape)
        optimizer.step()
    return [
        tensor.detach().cpu()
        for parameter in parameters.values()
        for tensor in (parameter, *optimizer.state[parameter].values())
    ]
