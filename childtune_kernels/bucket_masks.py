"""Which elements of the gradients the coming step will use, bucket by bucket, before they are reduced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import child_layout, ops
from .group_options import keep_threshold
from .labels import philox_key
from .plan_row import INDICES_UNIT, contiguous_map
from .state_tensors import state_of
from .weight_bits import BitDigest


class Bucket(Protocol):
    """What is needed of a ``torch.distributed.GradBucket``."""

    def index(self) -> int: ...
    def buffer(self) -> Tensor: ...
    def gradients(self) -> list[Tensor]: ...
    def parameters(self) -> list[Tensor]: ...


class MaskSource(NamedTuple):
    """All that decides which elements of one parameter's gradient its next step uses.

    ``threshold``: T of eq. 3; ``step``: the steps done (the tensor in the state), None without a Bernoulli
    mask; ``moment``: which step that is, as far as the host sees it; ``fixed``: the tensors of the child's
    layout, each with its name and version.
    """

    label: str
    seed: int
    reserve_p: float
    threshold: int
    step: Tensor | None
    moment: int
    fixed: tuple[tuple[str, Tensor, int], ...]

    def same_step(self, other: MaskSource) -> bool:
        """Whether both are of one step, for sure."""
        if self.step is None or other.step is None:
            return self.step is other.step
        on_host = self.step.device.type == "cpu"
        return self.moment == other.moment and (on_host or self.step is other.step)

    def same_child(self, other: MaskSource) -> bool:
        """Whether both have one fixed mask, or none."""
        return len(self.fixed) == len(other.fixed) and all(
            tensor is other_tensor and version == other_version
            for (_, tensor, version), (_, other_tensor, other_version) in zip(
                self.fixed, other.fixed, strict=True
            )
        )

    def same_mask(self, other: MaskSource | None) -> bool:
        """Whether both keep the same elements, for sure."""
        return (
            other is not None
            and (self.label, self.seed, self.threshold)
            == (other.label, other.seed, other.threshold)
            and self.same_step(other)
            and self.same_child(other)
        )

    def covers(self, other: MaskSource) -> bool:
        """Whether what the other keeps is kept here too: a smaller p draws a subset (SPEC.md, eq. 3)."""
        drawn_here = self.step is None or (
            other.step is not None
            and other.threshold <= self.threshold
            and (self.label, self.seed) == (other.label, other.seed)
            and self.same_step(other)
        )
        return drawn_here and (not self.fixed or self.same_child(other))


class Packing(NamedTuple):
    """What of a bucket is sent: mask words of its buffer, and how many bits are set."""

    words: Tensor
    kept: int


class _HostNumbers:
    """int64 numbers on their way to the host, which goes on meanwhile."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._arrived = numbers, None
        if numbers.device.type != "cpu":
            self._numbers = torch.empty(
                numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True
            )
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.Event(numbers.device)
            self._arrived.record()

    def read(self) -> list[int]:
        """The numbers; waits where they are not there yet."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [int(number) for number in self._numbers.tolist()]


@dataclass(eq=False)
class _Plan:
    """One bucket: its parameters, and the words last made for it."""

    parameters: list[Tensor]
    device: torch.device
    sources: list[MaskSource | None] | None = None
    words: Tensor | None = None
    count: _HostNumbers | None = None


class BucketMasks:
    """The masks of the coming step for the parameters of one model.

    Args:
        optimizer: a FusedChildAdamW; its groups and state are looked at anew each time.
        parameters: those whose gradients are reduced.
    """

    def __init__(self, optimizer: Any, parameters: Iterable[Tensor]) -> None:
        self._optimizer = optimizer
        self.parameters = list(parameters)
        self._members = set(self.parameters)
        self._steps_taken = 0
        self._sources: dict[Tensor, MaskSource] = {}
        self._plans: dict[int, _Plan] = {}
        self._fixed: dict[Tensor, tuple[MaskSource, Tensor, str]] = {}
        self._away: dict[Tensor, MaskSource] = {}
        self._away_steps: _HostNumbers | None = None

    def step_taken(self) -> None:
        """Say that the optimizer has stepped, or tried to."""
        self._steps_taken += 1

    def has_masks(self) -> bool:
        """Whether any parameter has a mask, as last looked at."""
        return any(source.step is not None or source.fixed for source in self._sources.values())

    def look(self) -> dict[Tensor, MaskSource]:
        """The mask sources, as they are now, of the parameters that the optimizer holds.

        Raises:
            ValueError: options or state that do not fit.
        """
        found: dict[Tensor, MaskSource] = {}
        for number, group in enumerate(self._optimizer.param_groups):
            reserve_p, threshold = keep_threshold(group["reserve_p"], f"group {number}")
            drawn = threshold < ops.KEEP_ALL
            for label, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter not in self._members:
                    continue
                state = state_of(label, parameter, self._optimizer.state)
                found[parameter] = MaskSource(
                    label=label,
                    seed=group["seed"],
                    reserve_p=reserve_p,
                    threshold=threshold,
                    step=state["step"] if drawn else None,
                    moment=self._moment(state["step"]) if drawn else 0,
                    fixed=tuple(
                        (name, state[name], _version(state[name]))
                        for name in child_layout.LAYOUT_KEYS
                        if name in state
                    ),
                )
        self._sources = found
        return found

    def _moment(self, step: Tensor) -> int:
        # A kernel that advances a step on a device leaves no trace that the host could see.
        return int(step) if step.device.type == "cpu" else self._steps_taken

    def draw_ahead(self) -> None:
        """Draw and count the coming masks of all known buckets; on a device, without a wait.

        What the host has to know later is on its way then, long before the first bucket is ready.

        Raises: ValueError, see ``look``.
        """
        self.look()
        self._send_steps()
        for plan in self._plans.values():
            self._renew(plan)

    def _send_steps(self) -> None:
        """Have the steps that lie on a device travel to the host, unless they have."""
        away = {
            parameter: source
            for parameter, source in self._sources.items()
            if source.step is not None and source.step.device.type != "cpu"
        }
        if not same_masks(self._away, away):
            steps = [source.step for source in away.values() if source.step is not None]
            self._away_steps = _HostNumbers(torch.stack(steps)) if steps else None
            self._away = away

    def described(self) -> list[tuple[Any, ...]]:
        """For every parameter: label, seed, p, steps done and digest of its fixed mask.

        Ranks on which these are equal keep the same elements. What a parameter's mask does not depend on is
        None. As last looked at.
        """
        self._send_steps()
        arrived = [] if self._away_steps is None else self._away_steps.read()
        steps = dict(zip(self._away, arrived, strict=True))
        found: list[tuple[Any, ...]] = []
        for parameter in self.parameters:
            source = self._sources.get(parameter)
            if source is None:
                found.append(("(not in the optimizer)", None, None, None, None))
                continue
            child = self._fixed_words(parameter, source)[1] if source.fixed else None
            if source.step is None:
                found.append((source.label, None, None, None, child))
                continue
            step = steps.get(parameter, source.moment)
            found.append((source.label, source.seed, source.reserve_p, step, child))
        return found

    def packing(self, bucket: Bucket) -> Packing | None:
        """What of a bucket is sent, by the masks as last looked at; None: all of it."""
        plan = self._plans.get(bucket.index())
        parameters = bucket.parameters()
        if plan is None or not _same_tensors(plan.parameters, parameters):
            _check_places(bucket)
            plan = _Plan(parameters, bucket.buffer().device)
            # DDP has rebuilt its buckets, of which there may be fewer now.
            self._plans = {at: old for at, old in self._plans.items() if at < bucket.index()}
            self._plans[bucket.index()] = plan
        self._renew(plan)
        if plan.words is None or plan.count is None:
            return None
        return Packing(plan.words, plan.count.read()[0])

    def _renew(self, plan: _Plan) -> None:
        """Make the words of a bucket anew, unless they stand."""
        sources = [self._sources.get(parameter) for parameter in plan.parameters]
        if plan.sources is not None and all(
            now is then if now is None else now.same_mask(then)
            for now, then in zip(sources, plan.sources, strict=True)
        ):
            return
        plan.sources, plan.words, plan.count = sources, None, None
        if not any(source and (source.step is not None or source.fixed) for source in sources):
            return
        parts = [
            self._words(parameter, source, plan.device)
            for parameter, source in zip(plan.parameters, sources, strict=True)
        ]
        plan.words = ops.join_words(parts, [each.numel() for each in plan.parameters])
        plan.count = _HostNumbers(ops.mask_ranks(plan.words, INDICES_UNIT)[-1:])

    def _words(self, parameter: Tensor, source: MaskSource | None, device: torch.device) -> Tensor:
        """The mask words of one parameter in its coming step, in the order of its place in a bucket."""
        numel = parameter.numel()
        words = None
        if source is not None and source.fixed:
            words = self._fixed_words(parameter, source)[0]
        if source is not None and source.step is not None:
            key = philox_key(source.seed, source.label)
            drawn = ops.keep_words(
                numel,
                contiguous_map(numel),
                key,
                source.step + 1,
                source.threshold,
                device=device,
            )
            words = drawn if words is None else words & drawn
        if words is None:
            return ops.pack_mask(torch.ones(numel, dtype=torch.bool, device=device))
        return _in_memory_order(words, parameter)

    def _fixed_words(self, parameter: Tensor, source: MaskSource) -> tuple[Tensor, str]:
        """The words of a fixed mask and their digest, which are made once."""
        known = self._fixed.get(parameter)
        if known is None or not source.same_child(known[0]):
            layout = {name: tensor for name, tensor, _ in source.fixed}
            words = child_layout.mask_words(layout, parameter.numel())
            assert words is not None
            digest = BitDigest()
            digest.add(source.label, words)
            known = source, words, digest.hexdigest()
            self._fixed[parameter] = known
        return known[1], known[2]


def same_masks(one: Mapping[Tensor, MaskSource], other: Mapping[Tensor, MaskSource]) -> bool:
    """Whether the same parameters have the same masks in both, for sure."""
    return one.keys() == other.keys() and all(
        source.same_mask(other[parameter]) for parameter, source in one.items()
    )


def _version(tensor: Tensor) -> int:
    """A number that torch changes with every write of its own."""
    return 0 if tensor.is_inference() else tensor._version


def _same_tensors(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _check_places(bucket: Bucket) -> None:
    """Refuse a bucket in which gradients do not lie one after the other, in the order of parameters."""
    at = bucket.buffer().storage_offset()
    for gradient, parameter in zip(bucket.gradients(), bucket.parameters(), strict=True):
        if gradient.storage_offset() != at or gradient.shape != parameter.shape:
            raise RuntimeError(
                f"a gradient of shape {tuple(gradient.shape)} lies at {gradient.storage_offset()} of its "
                f"bucket, not one of {tuple(parameter.shape)} at {at}; this torch lays out buckets that the "
                "hook cannot read: train without it"
            )
        at += gradient.numel()


def _in_memory_order(words: Tensor, parameter: Tensor) -> Tensor:
    """Row-major mask words as a bucket has the parameter's gradient: in the order of dense memory."""
    if parameter.is_contiguous() or not _is_dense(parameter):
        return words
    memory = torch.empty(parameter.numel(), dtype=torch.bool, device=words.device)
    laid = memory.as_strided(parameter.shape, parameter.stride())
    laid.copy_(ops.unpack_mask(words, parameter.shape, tail_is_zero=True))
    return ops.pack_mask(memory)


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill a piece of memory without gaps, in any order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
