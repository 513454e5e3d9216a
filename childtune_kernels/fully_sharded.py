"""What fully_shard (FSDP2) knows of a model between its passes.

Where torch has no public name for it, it is read from the engine's own state.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch


def modules_of(model: torch.nn.Module) -> list[Any]:
    """The modules of a model that fully_shard was called on."""
    # Nobody has called fully_shard whose module was never imported.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def reshard_(model: torch.nn.Module) -> None:
    """Put the sharded parameters back where a forward without backward has left whole ones."""
    for module in modules_of(model):
        module.reshard()


def fault_of(modules: Sequence[Any]) -> str | None:
    """Why gradients that come next would not be those of the next backward alone; None where they are.

    ``modules``: of a model, as ``modules_of`` finds them.
    """
    for module in modules:
        context = getattr(module._get_fsdp_state(), "_state_ctx", None)
        # Set while a backward runs, and taken back at its end, which one that raises never reaches.
        if getattr(context, "post_backward_final_callback_queued", False):
            return (
                "a backward of this model has raised, and fully_shard brings no whole set of gradients after "
                "that; make the model anew"
            )
    if next(_waiting(modules), None) is not None:
        return (
            "gradients of a backward under set_requires_gradient_sync(False) are waiting in this model and "
            "would be taken for part of the next ones; switch it on for what is recorded, and finish or drop "
            "an accumulation before"
        )
    return None


def require_settled(modules: Sequence[Any]) -> None:
    """Raise RuntimeError with what ``fault_of`` says."""
    if (fault := fault_of(modules)) is not None:
        raise RuntimeError(fault)


def drop_waiting_gradients_(modules: Sequence[Any]) -> None:
    """Forget gradients that have not been averaged over the ranks yet."""
    for parameter in list(_waiting(modules)):
        parameter.unsharded_accumulated_grad = None
        parameter._unsharded_param.grad = None


def _waiting(modules: Sequence[Any]) -> Iterator[Any]:
    for module in modules:
        for group in getattr(module._get_fsdp_state(), "_fsdp_param_groups", ()):
            for parameter in group.fsdp_params:
                whole = getattr(parameter, "_unsharded_param", None)
                if parameter.unsharded_accumulated_grad is not None or (
                    whole is not None and whole.grad is not None
                ):
                    yield parameter
