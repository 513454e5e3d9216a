"""One step of every optimizer beside the others, on made-up tensors in the shapes of a model.

All step one set of weights and gradients and share moments of equal kind, so that a model fits into
memory once, and nobody has luckier pages than another; only a fixed child's state is its optimizer's own.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from . import registry
from .contenders import Entrant, NamedParameters, bytes_needed
from .machine import available_bytes, synchronize
from .model_shapes import LEAST_PARAMETERS, ModelShapes, transformer_of
from .progress import progress_of, progress_of_amount
from .rounds import Contender, Seconds, interleave, quartiles, ratio

Quartiles = tuple[float, float, float]

#: Rounds below which a ratio near 1 says nothing.
LEAST_ROUNDS = 5
_SHARE_OF_MEMORY = 0.9  # the rest is for torch, Python and everybody else
_BLOCK = 1 << 20  # random numbers; repeated, for no step is faster or slower for it
_SHARED = ("exp_avg", "exp_avg_sq", "master_remainder")
_LONG = 0.5  # seconds; a first step that takes them is followed by one only to warm up
_SLOW = 4.0  # times the median of everybody: who takes more takes part in some rounds only
_SLOW_SHARE = 1.0  # of the time of all others, that the slow ones may take
_MOST_ROUNDS = 10_000


@dataclass(frozen=True)
class Measured:
    """What was found for one entrant.

    Attributes:
        name, title, ours: as the entrant's.
        failure: why there is nothing else; None where it was measured.
        seconds: quartiles of a step's time.
        of_base: quartiles, over the rounds, of its time in relation to the base's in the same round.
        rounds: how many it took part in.
        state_bytes: of all tensors in the optimizer's state.
    """

    name: str
    title: str
    ours: bool
    failure: str | None = None
    seconds: Quartiles = (math.nan,) * 3
    of_base: Quartiles = (math.nan,) * 3
    rounds: int = 0
    state_bytes: int = 0


@dataclass(frozen=True)
class SideBySide:
    """The outcome: who was measured, on what.

    Attributes:
        model: whose shapes.
        device: where.
        dtype: of weights and gradients.
        backend: what serves FusedChildAdamW's steps there.
        absent: where the reference serves, why no kernel does; else empty.
        measured: everybody, the base first.
    """

    model: ModelShapes
    device: torch.device
    dtype: torch.dtype
    backend: str
    absent: str
    measured: tuple[Measured, ...]

    @property
    def base(self) -> Measured:
        """The one that all others are measured against."""
        return self.measured[0]

    @property
    def sound(self) -> bool:
        """Whether everybody was measured."""
        return all(each.failure is None for each in self.measured)


def transformer_that_fits(
    parameters: int, entrants: Sequence[Entrant], device: torch.device, dtype: torch.dtype
) -> ModelShapes:
    """A made-up transformer of so many parameters, or of as many as memory allows, if that is fewer.

    Not of fewer than ``LEAST_PARAMETERS``: ``check_memory`` refuses it where even they are too many.
    """
    model, room = transformer_of(parameters), _room(device)
    while room is not None and (needed := bytes_needed(model, entrants, dtype)) > room:
        fewer = int(0.95 * model.parameters * room / needed)
        if fewer < LEAST_PARAMETERS:
            return transformer_of(LEAST_PARAMETERS)
        model = transformer_of(fewer)
    return model


def _room(device: torch.device) -> int | None:
    """Bytes that measuring may take on a device; None where nobody knows."""
    available = available_bytes(device)
    return None if available is None else int(_SHARE_OF_MEMORY * available)


def check_memory(
    model: ModelShapes, entrants: Sequence[Entrant], device: torch.device, dtype: torch.dtype
) -> None:
    """Refuse, before anything is allocated, what does not fit into memory.

    Raises:
        ValueError: names the bytes that are needed, those that are free, and the remedy.
    """
    needed, room = bytes_needed(model, entrants, dtype), _room(device)
    if room is not None and needed > room:
        most = max(LEAST_PARAMETERS, model.parameters)
        fitting = transformer_that_fits(most, entrants, device, dtype).parameters
        raise ValueError(
            f"{model.parameters:,} parameters need about {needed / 1e9:,.2f} GB on {device}, and "
            f"{room / 1e9:,.2f} GB are free for them; say --parameters {fitting} or fewer, or free memory"
        )


def measure(
    model: ModelShapes,
    entrants: Sequence[Entrant],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
) -> SideBySide:
    """Time a step of everybody in interleaved rounds; memory is free again afterwards.

    Args:
        model: the shapes of the tensors to be stepped.
        entrants: who steps, the base of all comparisons first.
        device: where.
        dtype: of weights and gradients.
        seconds: for the rounds, of which ``LEAST_ROUNDS`` are run in any case; making optimizers and their
            first steps come before.

    Raises:
        ValueError: what memory does not hold.
        RuntimeError: the base cannot step; of the others a failure is reported with the outcome.
    """
    check_memory(model, entrants, device, dtype)
    chosen = registry.choose("child_adamw", device)
    named = _named_parameters(model, device, dtype)
    moments: dict[tuple[str, str, torch.dtype], Tensor] = {}
    steps: dict[str, Callable[[], object]] = {}
    first_seconds: dict[str, float] = {}
    state_bytes: dict[str, int] = {}
    failures: dict[str, str] = {}
    for entrant in progress_of(entrants, "making optimizers", len(entrants)):
        try:
            optimizer = entrant.build(named)
            taken = _timed(optimizer.step, device)  # torch's optimizers make their state in it
            _share_moments(optimizer, named, moments)
            for _ in range(1 if taken > _LONG else 2):
                taken = _timed(optimizer.step, device)
            first_seconds[entrant.name] = taken
        except Exception as error:  # a compiler's, a driver's, a full memory's: the others go on
            failures[entrant.name] = _first_line(error)
            if entrant is entrants[0]:
                raise RuntimeError(f"{entrant.title}: {_first_line(error)}") from error
            continue
        steps[entrant.name] = optimizer.step
        state_bytes[entrant.name] = _state_bytes(optimizer)
    times = _rounds(steps, first_seconds, entrants[0].name, device, seconds)
    measured = tuple(
        _measured(each, times, entrants[0].name, state_bytes, failures) for each in entrants
    )
    return SideBySide(model, device, dtype, chosen.backend, _absent(chosen, device), measured)


def _rounds(
    steps: dict[str, Callable[[], object]],
    first_seconds: dict[str, float],
    base: str,
    device: torch.device,
    seconds: float,
) -> dict[str, Seconds]:
    """Times of everybody; those far slower than most leave most rounds to the others."""
    usual = statistics.median_low(
        first_seconds.values()
    )  # one step on a busy machine may take long
    slow = {name for name, each in first_seconds.items() if each > _SLOW * usual} - {base}
    of_slow = sum(first_seconds[name] for name in slow)
    of_others = sum(first_seconds[name] for name in steps.keys() - slow)
    contenders = {name: Contender(step, name in slow) for name, step in steps.items()}
    begun = time.monotonic()
    shown = 0
    with progress_of_amount("measuring", math.ceil(seconds), "s") as advance:

        def after_round(done: int) -> None:
            nonlocal shown
            gone = min(math.ceil(seconds), int(time.monotonic() - begun))
            advance(gone - shown)
            shown = gone

        return interleave(
            contenders,
            _MOST_ROUNDS,
            device,
            after_round,
            deadline=begun + seconds,
            least=LEAST_ROUNDS,
            slow_every=max(1, math.ceil(of_slow / (_SLOW_SHARE * of_others))),
            warm=True,
        )


def _named_parameters(
    model: ModelShapes, device: torch.device, dtype: torch.dtype
) -> NamedParameters:
    generator = torch.Generator(device).manual_seed(0)
    block = torch.randn(_BLOCK, generator=generator, device=device).to(dtype)

    def filled(shape: Sequence[int]) -> Tensor:
        tensor = torch.empty(tuple(shape), device=device, dtype=dtype)
        for part in tensor.view(-1).split(_BLOCK):
            part.copy_(block[: part.numel()])
        return tensor

    named = [(name, Parameter(filled(shape))) for name, shape in model.shapes.items()]
    for _, parameter in named:
        parameter.grad = filled(parameter.shape)
    return named


def _share_moments(
    optimizer: Optimizer,
    named: NamedParameters,
    moments: dict[tuple[str, str, torch.dtype], Tensor],
) -> None:
    """Let an optimizer use the moments of those before it, and give up its own."""
    for name, parameter in named:
        state = optimizer.state[parameter]
        for key in _SHARED:
            if key in state:  # compact moments have other names
                state[key] = moments.setdefault((name, key, state[key].dtype), state[key])


def _timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of a step, roughly: to tell the slow ones."""
    synchronize(device)
    begun = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - begun


def _state_bytes(optimizer: Optimizer) -> int:
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def _measured(
    entrant: Entrant,
    times: dict[str, Seconds],
    base: str,
    state_bytes: dict[str, int],
    failures: dict[str, str],
) -> Measured:
    who = (entrant.name, entrant.title, entrant.ours)
    if entrant.name in failures:
        return Measured(*who, failure=failures[entrant.name])
    own = times[entrant.name]
    return Measured(
        *who,
        seconds=quartiles([*own.values()]),
        of_base=ratio(own, times[base]),
        rounds=len(own),
        state_bytes=state_bytes[entrant.name],
    )


def _absent(chosen: registry.Choice, device: torch.device) -> str:
    """Why the reference serves, where it does; empty where kernels do."""
    if chosen.backend != "reference":
        return ""
    return "; ".join(
        f"{cell.backend}: {cell.reason}"
        for cell in registry.survey(device)
        if cell.op == chosen.op and not cell.available and not cell.on_request
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
