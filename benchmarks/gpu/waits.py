"""Does a warm step make the host wait for the GPU? torch's debug mode for synchronization says so."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..cases import Shapes, Workload
from ..variants import CT_D, CT_F, PLAIN, SPLIT, STOCHASTIC_MOMENTS, Variant, in_bf16
from .setting import Setting, say

Record = dict[str, Any]
Guard = Callable[[torch.device], AbstractContextManager[None]]

_SHAPES: Shapes = {"matrix": (67, 64), "bias": (10,), "empty": (0,)}
_WARM_UP_STEPS, _STEPS = 3, 4
_ALL = (("max_grad_norm", 1.0), ("skip_nonfinite", True))
_ALL_AFTER_MASK = (*_ALL, ("clip", "after_mask"))


class _Way(NamedTuple):
    """A step; ``scaled``: a GradScaler has handed over its scale and its verdict."""

    variant: Variant
    scaled: bool


def _with(variant: Variant, *options: tuple[str, Any]) -> Variant:
    title = ", ".join([variant.title, *(f"{name}={value}" for name, value in options)])
    return replace(variant, title=title, options=(*variant.options, *options))


# The last one has a part in everything.
_CHECKED = (
    _Way(PLAIN, False),
    _Way(CT_F, False),
    _Way(CT_D, False),
    _Way(CT_F, True),
    _Way(_with(CT_F, _ALL[0]), False),
    _Way(_with(CT_F, _ALL[1]), False),
    _Way(_with(CT_D, *_ALL_AFTER_MASK), True),
    _Way(in_bf16(_with(PLAIN, *_ALL), SPLIT), True),
    _Way(in_bf16(_with(CT_F, *_ALL_AFTER_MASK), STOCHASTIC_MOMENTS), True),
    _Way(in_bf16(_with(CT_F, *_ALL), SPLIT), True),
)


@contextlib.contextmanager
def refuse_waits(device: torch.device) -> Iterator[None]:
    """Until the end of the block torch raises a RuntimeError where the host would wait for a GPU."""
    if device.type != "cuda":  # a CPU has nothing to wait for
        yield
        return
    torch.cuda.synchronize(device)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def find_waits(setting: Setting, guard: Guard = refuse_waits) -> list[Record]:
    """Take warm steps in all ways, with the guard around them.

    Args:
        guard: raises RuntimeError where something waits.

    Returns:
        A record a way: ``setting``, ``waits``, and the ``reason`` where it does; the first is of the guard.
    """
    found = [_record("a wait is seen", _guard_is_blind(setting.device, guard))]
    for each in _CHECKED[-1:] if setting.tiny else _CHECKED:
        title = each.variant.title + ", scaled" * each.scaled
        found.append(_record(title, _wait_of(each, setting, guard)))
    return found


def _record(title: str, reason: str | None) -> Record:
    if reason is None:
        return {"setting": title, "waits": False}
    say(f"  {title}: {reason}")
    return {"setting": title, "waits": True, "reason": reason}


def _guard_is_blind(device: torch.device, guard: Guard) -> str | None:
    """Why the guard proves nothing, or None."""
    if device.type != "cuda":
        return None
    value = torch.ones((), device=device)
    try:
        with guard(device):
            float(value)
    except RuntimeError:
        return None
    return "torch reads a number of the device under the debug mode, and does not refuse it"


def _wait_of(each: _Way, setting: Setting, guard: Guard) -> str | None:
    """What waits in a warm step, or None. Each has other gradients, elsewhere, and another learning rate."""
    device = setting.device
    workload = Workload(_SHAPES, device, dtype=each.variant.dtype)
    optimizer: Any = each.variant.build(workload.named, setting.backend("child_adamw"))
    if each.scaled:
        optimizer.grad_scale = torch.ones((), device=device)
        optimizer.found_inf = torch.zeros((), device=device)
    warm_up, steps = (1, 1) if setting.tiny else (_WARM_UP_STEPS, _STEPS)
    gradients = []
    for _ in range(warm_up + steps):
        workload.set_gradients()
        gradients.append([weight.grad for _, weight in workload.named])

    def step(number: int) -> None:
        for (_, weight), gradient in zip(workload.named, gradients[number], strict=True):
            weight.grad = gradient
        optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.step()

    try:
        for number in range(warm_up):
            step(number)
        with guard(device):
            for number in range(warm_up, warm_up + steps):
                step(number)
                # Nor do these: whoever reads their values waits.
                _ = optimizer.last_grad_norm, optimizer.step_was_skipped
    except Exception as error:  # also of a step that fails: the test table says more about it
        return f"{type(error).__name__}: {error}"[:500]
    return None
