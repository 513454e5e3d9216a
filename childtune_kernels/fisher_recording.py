"""Hooks that square each gradient as backward produces it, and count the outermost backwards."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .fisher_scope import Member

# The engine calls a Python node through one of these; a hook that finds such a frame below itself runs in
# a backward that the node has started, or, as fully_shard calls hooks, in the node itself.
_NODE_CALLS = frozenset(
    method.__code__
    for name in ("apply", "apply_boxed")
    if (method := getattr(BackwardCFunction, name, None)) is not None
)


class _Record:
    """What is known of one outermost backward while it runs."""

    def __init__(self) -> None:
        self.outermost: int | None = None
        self.tasks: set[int] = set()
        self.arrived: set[str] = set()
        self.added = False
        self.handles: list[Any] = []

    def was_idle_before(self, task: int) -> bool:
        """Whether this record has added nothing and another outermost task begins: it raised early."""
        return not self.added and self.outermost is not None and self.outermost != task


class Recording:
    """Takes the gradients of parameters from autograd, one at a time, for as long as it runs.

    A post-accumulate-grad hook squares each gradient and frees it. The engine's final callback closes a
    record; it is queued in the outermost graph task, which a hook inside a nested one cannot reach:
    there a pre-hook of the nodes that follow in the outer graph does it.

    Args:
        members: the parameters to square.
        others: trainable parameters whose gradients are dropped.
        add: called with label and gradient, possibly from several of autograd's threads.
        count: called with the labels that arrived, once a record is whole.
    """

    def __init__(
        self,
        members: Sequence[Member],
        others: Sequence[Member],
        add: Callable[[str, Tensor], None],
        count: Callable[[set[str]], None],
    ) -> None:
        self._members, self._others = members, others
        self._add, self._count = add, count
        self._lock = threading.RLock()
        self._open: _Record | None = None
        self._handles: list[Any] = []
        self._gradients_before: list[tuple[Tensor, Tensor | None]] = []

    def start(self) -> None:
        """Set the gradients that stand aside and register the hooks."""
        for member in (*self._members, *self._others):
            self._gradients_before.append((member.parameter, member.parameter.grad))
            member.parameter.grad = None
        hooks: list[tuple[Member, Callable[[Tensor], None]]]
        hooks = [(member, partial(self._arrive, member.label)) for member in self._members]
        hooks += [(member, self._drop) for member in self._others]
        for member, hook in hooks:
            # A parameter that was frozen since gets no gradient, and takes no hook.
            if member.parameter.requires_grad:
                self._handles.append(member.parameter.register_post_accumulate_grad_hook(hook))

    def stop(self) -> bool:
        """Remove the hooks and put the gradients back; whether sums hold a part of a record."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for parameter, gradient in self._gradients_before:
            parameter.grad = gradient
        self._gradients_before.clear()
        record, self._open = self._open, None
        if record is None:
            return False
        for handle in record.handles:
            handle.remove()
        return record.added

    def holds_a_part(self) -> bool:
        """Whether a backward that this thread is no longer in has been left half-way."""
        record = self._open
        return record is not None and record.added and torch._C._current_graph_task_id() == -1

    def _drop(self, parameter: Tensor) -> None:
        parameter.grad = None
        self._current_record()

    def _arrive(self, label: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            raise RuntimeError(
                f"another hook has taken the gradient of {label} away: a second accumulator that records, or "
                "an optimizer's release_gradients(), which has then stepped; end that one first"
            )
        with self._lock:
            record = self._current_record()
            if label in record.arrived:
                raise RuntimeError(
                    f"the gradient of {label} arrived twice within one backward, so its square would be "
                    "taken in parts: a weight that is shared between checkpointed segments does that; use "
                    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False). It also happens after "
                    "a backward that raised"
                )
            record.arrived.add(label)
        self._add(label, gradient)
        record.added = True

    def _current_record(self) -> _Record:
        """The record of the outermost backward in which the calling hook runs, opened if need be."""
        task = torch._C._current_graph_task_id()
        with self._lock:
            record = self._open
            if record is not None and task in record.tasks:
                return record
            node = _outermost_node()
            if record is None or (node is None and record.was_idle_before(task)):
                record = self._open = _Record()
            if node is None:
                self._close_with_this_task(record)
            else:
                self._close_with_the_task_of(node, record)
            record.tasks.add(task)
            return record

    def _close_with_this_task(self, record: _Record) -> None:
        """Let the final callback of the running graph task, the outermost one, close the record."""
        task = torch._C._current_graph_task_id()
        with self._lock:
            if record.outermost is None:
                record.outermost = task
                _after_this_task(partial(_after_this_task, partial(self._close, record)))
            elif record.outermost != task:
                raise RuntimeError(
                    "a backward began while the one before it had not come to its end: it raised, or "
                    "runs in another thread; the sums may hold a part of it. Use a new FisherAccumulator"
                )

    def _close_with_the_task_of(self, node: Any, record: _Record) -> None:
        """The same for the graph task that a node belongs to, as soon as it goes on to the next node."""
        handles: list[Any] = []

        def on_next_node(_: object) -> None:
            while handles:
                handles.pop().remove()
            if record is self._open:
                self._close_with_this_task(record)

        following = {following for following, _ in node.next_functions if following is not None}
        handles.extend(
            following_node.register_prehook(on_next_node) for following_node in following
        )
        record.handles.extend(handles)

    def _close(self, record: _Record) -> None:
        with self._lock:
            if record is not self._open:
                return
            self._open = None
        for handle in record.handles:
            handle.remove()
        self._count(record.arrived)


def _after_this_task(callback: Callable[[], None]) -> None:
    """Have the engine call back at the end of the running graph task, after what is queued already.

    Callbacks of others bring gradients too: fully_shard's brings those of the first layers, and may be
    queued after ours. Ours closes a record only after it has queued itself a second time.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def _outermost_node() -> Any:
    """The outermost Python node on the stack, whose backward has started this one; None without one."""
    outermost = None
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code in _NODE_CALLS:
            outermost = frame
        frame = frame.f_back  # type: ignore[assignment]
    return None if outermost is None else outermost.f_locals["self"]
