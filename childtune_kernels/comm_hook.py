"""register_child_comm_hook: under DistributedDataParallel only the child's gradients travel."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from . import ops, rank_values, sharding
from .bucket_masks import Bucket, BucketMasks, MaskSource, same_masks
from .optimizer import FusedChildAdamW

_FACTS = ("seed", "reserve_p", "steps done", "child mask")


def register_child_comm_hook(ddp_model: nn.Module, optimizer: FusedChildAdamW) -> ChildCommHook:
    """Have ``DistributedDataParallel`` send only the gradient elements that the next step will use.

    Of every bucket the elements that the masks keep (CT_F: in the coming step, which all ranks know; CT_D;
    both) are packed, averaged over the ranks in the gradients' type, and put back; all others become +0. Kept
    elements are what torch's ``allreduce_hook`` makes of them, up to the order of the sum: the same bits on
    two ranks. Parameters without a mask, and those that the optimizer does not hold, are sent whole.

    So ``max_grad_norm`` with ``clip="before_mask"``, ``clip_grad_norm_``, ``skip_nonfinite`` and a GradScaler
    see the gradients of the child alone: a NaN outside it is not sent, and skips no step. Gradients are
    for one step: clear them after each (``zero_grad()``), and change masks, ``reserve_p`` or seeds between a
    step and the next backward.

    At the first bucket of every backward the ranks compare a digest of their masks (16 bytes a rank, from
    host to host). On GPUs the masks are drawn and counted before the forward pass, so that the host need
    not wait for the count. Without a backend for CPU tensors, a gloo group is made for the digests.

    Args:
        ddp_model: ``DistributedDataParallel``, without another hook; all ranks call this, before the first
            backward.
        optimizer: holds the model's parameters, with the same masks, seed and steps on all ranks.

    Returns:
        A ``ChildCommHook``, which counts bytes. It stays as long as the model, since DDP cannot drop a hook.

    Changes in place: in every backward, the gradients; nothing now.

    Raises:
        TypeError: another kind of model or optimizer.
        ValueError: sharded or sparse parameters, none of the model's parameters in the optimizer,
            ``capturable=True``, ``skip_all_reduce_unused_params=True``.
        RuntimeError: ``release_gradients()`` is active, the model has a hook already, or the ranks' masks
            differ (from backward too: on all ranks, before anything is sent).

    Source: SPEC.md, eq. 2 and "Gradients that travel".
    """
    _check_kinds(ddp_model, optimizer)
    model: Any = ddp_model
    hook = ChildCommHook(model, optimizer)
    try:
        model.register_comm_hook(hook, _reduce_child)
    except RuntimeError as error:
        raise RuntimeError(
            f"{error} This model has a hook already (its own, or that of mixed_precision=): make the "
            "DistributedDataParallel anew, and register this hook alone"
        ) from error
    hook.watch()
    return hook


class ChildCommHook:
    """What ``register_child_comm_hook`` returns: what it has sent.

    Attributes:
        sent_bytes: of the tensors that were reduced since the registration, on this rank.
        whole_bytes: of the buckets that they were taken from.
    """

    def __init__(self, ddp_model: Any, optimizer: FusedChildAdamW) -> None:
        self.sent_bytes = 0
        self.whole_bytes = 0
        self._model = ddp_model
        self._optimizer = optimizer
        self._group: ProcessGroup = ddp_model.process_group
        self._hosts = rank_values.group_of_hosts(self._group)
        trained = [parameter for parameter in ddp_model.parameters() if parameter.requires_grad]
        self._masks = BucketMasks(optimizer, trained)
        # Of the reductions since the last step: more than one where masks changed in between.
        self._sent: list[dict[Tensor, MaskSource]] = []
        # The first masks are drawn before the first step: the seed must be known by then.
        if isinstance(optimizer, FusedChildAdamW):
            optimizer._agree()
        self._agree(registering=True)
        if not self._masks.has_masks():
            warnings.warn(
                "register_child_comm_hook: no parameter of the model has a mask (reserve_p=1 and no "
                "child_mask), so that all gradients are sent whole",
                stacklevel=3,
            )

    def watch(self) -> None:
        """Draw masks before each forward pass, and look at each step of the optimizer."""
        self._model.register_forward_pre_hook(self._before_forward)
        self._optimizer.register_step_pre_hook(self._before_step)
        self._optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def reduce(self, bucket: Bucket) -> torch.futures.Future[Tensor]:
        """Average the kept elements of a bucket over the ranks; +0 elsewhere."""
        if bucket.index() == 0:
            sources = self._agree(registering=False)
            if not (self._sent and same_masks(self._sent[-1], sources)):
                self._sent.append(sources)
        buffer = bucket.buffer()
        packing = self._masks.packing(bucket)
        sent = buffer
        if packing is not None:
            sent = ops.gather_masked(buffer, packing.words, count=packing.kept)
            buffer.zero_()
        self.sent_bytes += sent.nbytes
        self.whole_bytes += buffer.nbytes
        # Before the sum, as torch's allreduce_hook does: a sum of fp16 gradients may overflow.
        sent.div_(self._group.size())

        def unpacked(future: torch.futures.Future[Any]) -> Tensor:
            averages = future.value()[0]
            if packing is not None:
                with torch.no_grad():
                    ops.scatter_masked_(buffer, averages, packing.words, count=packing.kept)
            return buffer

        return rank_values.start_sum_(sent, self._group).then(unpacked)

    def _agree(self, registering: bool) -> dict[Tensor, MaskSource]:
        """Look at the masks anew; raise on every rank where one cannot, or where they differ."""
        failure: Exception | None = None
        described: list[tuple[Any, ...]] = []
        sources: dict[Tensor, MaskSource] = {}
        try:
            _check_optimizer(self._optimizer)
            if registering:
                _check_model(self._model, self._optimizer)
            sources = self._masks.look()
            described = self._masks.described()
        except (ValueError, RuntimeError) as error:
            failure = error
        if rank_values.is_distributed(self._hosts):
            digest = hashlib.sha256(repr(described).encode()).digest()
            mine = torch.tensor(
                [int.from_bytes(digest[:8], "little", signed=True), failure is not None],
                dtype=torch.int64,
                device="cpu",
            )
            ranks = rank_values.gathered(mine, self._hosts)
            if any(bool(each[1]) or not torch.equal(each, ranks[0]) for each in ranks):
                message = None if failure is None else f"{type(failure).__name__}: {failure}"
                told = rank_values.gathered_objects((message, described), self._hosts)
                if failure is None:
                    raise RuntimeError(_difference(told))
        if failure is not None:
            raise failure
        return sources

    # A compiled model breaks its graph here: a mask is drawn by kernels that take addresses.
    @torch._disable_dynamo
    @torch.no_grad()
    def _before_forward(self, model: Any, _: Any) -> None:
        if not (model.training and model.require_backward_grad_sync):
            return
        if all(parameter.grad is None for parameter in self._masks.parameters):
            self._sent.clear()
        try:
            self._masks.draw_ahead()
        except ValueError:
            # The first bucket tells it to all ranks; raised here it would leave the others waiting.
            return

    def _before_step(
        self, _: Any, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Look at what was sent right before the update: a closure may change masks, too."""
        optimizer, *others = arguments
        closure = others[0] if others else options.get("closure")
        if closure is None:
            self._require_sent()
            return None

        def evaluated() -> Any:
            loss = closure()
            self._require_sent()
            return loss

        return (optimizer,), {**options, "closure": evaluated}

    def _require_sent(self) -> None:
        """Refuse a step that uses elements which were not sent.

        Raises:
            RuntimeError: names the first such parameter; nothing was written.
        """
        if not self._sent:
            return
        for parameter, now in self._masks.look().items():
            sent = [sources.get(parameter) for sources in self._sent]
            # What the optimizer did not hold then was sent whole.
            covered = all(source is None or source.covers(now) for source in sent)
            if parameter.grad is not None and not covered:
                raise RuntimeError(
                    f"the mask of {now.label} was changed after its gradient had been reduced, so that this "
                    "step would use elements that were not sent; change masks, reserve_p, seed and state "
                    "after optimizer.step() and before the next backward"
                )

    def _after_step(self, *_: Any) -> None:
        self._sent.clear()
        self._masks.step_taken()


@torch._disable_dynamo
def _reduce_child(state: ChildCommHook, bucket: Any) -> torch.futures.Future[Tensor]:
    return state.reduce(bucket)


# DDP compares annotations with types, and these are strings.
_reduce_child.__annotations__.clear()


def _check_kinds(model: Any, optimizer: Any) -> None:
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(
            f"ddp_model is a {type(model).__name__}, not a DistributedDataParallel; wrap the model first "
            "(shards of fully_shard and FSDP are reduced without hooks)"
        )
    if not isinstance(optimizer, FusedChildAdamW):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}, not a FusedChildAdamW; hand over the optimizer "
            "itself instead of what wraps it (ZeroRedundancyOptimizer keeps each rank's masks to itself)"
        )


def _check_optimizer(optimizer: FusedChildAdamW) -> None:
    if optimizer._gradient_release is not None:
        raise RuntimeError(
            "release_gradients() is active: it uses each gradient before DistributedDataParallel has "
            "averaged it; remove() its handle"
        )
    for number, group in enumerate(optimizer.param_groups):
        if group["capturable"]:
            raise ValueError(
                f"capturable=True (group {number}): replays of a CUDA graph advance steps that this hook "
                "does not see; use capturable=False, or no hook"
            )


def _check_model(model: Any, optimizer: FusedChildAdamW) -> None:
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if not any(parameter in held for parameter in model.parameters()):
        raise ValueError(
            "optimizer holds no parameter of ddp_model; build it from the same model's named_parameters()"
        )
    for name, parameter in model.named_parameters():
        if sharding.is_sharded(parameter):
            raise ValueError(
                f"parameter {name} is a DTensor: its gradient is reduced shard by shard; this hook is for "
                "whole parameters"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ValueError(f"{name} makes sparse gradients; use sparse=False")
    if model.skip_all_reduce_unused_params:
        raise ValueError(
            "skip_all_reduce_unused_params=True: a bucket that is left out cannot tell the ranks' masks; use "
            "find_unused_parameters=True alone"
        )


def _difference(told: list[tuple[str | None, list[tuple[Any, ...]]]]) -> str:
    """Which rank failed, or which parameter's mask differs in what."""
    for rank, (message, _) in enumerate(told):
        if message is not None:
            return f"rank {rank} cannot say what its next step will use: {message}"
    remedy = (
        "give the optimizer the same seed=, reserve_p and child_mask on every rank, and load the same state "
        "dict everywhere"
    )
    first = told[0][1]
    for rank, (_, others) in enumerate(told):
        for mine, other in zip(first, others, strict=False):
            if mine != other:
                facts = [
                    f"{name} {ours} and {theirs}"
                    for name, ours, theirs in zip(_FACTS, mine[1:], other[1:], strict=True)
                    if ours != theirs
                ]
                known = ", ".join(facts) or f"it is {other[0]} on the other"
                return (
                    f"ranks 0 and {rank} would send other elements of {mine[0]}: {known}; {remedy}"
                )
    return f"the ranks hold other parameters; {remedy}"
