"""ChildTuningAdamW: the optimizer of the paper's released code, on the fused kernels."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import child_layout, ops, parameters, sharding
from .child_mask import ChildMask
from .group_options import MODE, keep_threshold
from .labels import shortened
from .optimizer import FusedChildAdamW

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CT_F, CT_D = "ChildTuning-F", "ChildTuning-D"
# The conventions of its step, which no group may leave.
_OF_RELEASED_CODE: dict[str, Any] = {"convention": "original", "freeze_non_child": False}
# What is written in their place, in small letters.
_SPELLINGS = {
    **dict.fromkeys(("childtuning-f", "f", "ct_f", "task-free", "bernoulli"), CT_F),
    **dict.fromkeys(("childtuning-d", "d", "ct_d", "task-driven", "fisher"), CT_D),
    **dict.fromkeys(("none", ""), None),
}
_MODES = f"{CT_F!r}, {CT_D!r} or None"


class ChildTuningAdamW(FusedChildAdamW):
    """AdamW of the paper's released code, on the fused kernels: one changed import in its scripts.

    What it computes is ``FusedChildAdamW(convention="original", freeze_non_child=False)``; where the
    released code goes on silently with something else than was meant, an error says so. Random masks are
    other draws than there: a function of seed, parameter and step.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups (dicts) of either, as FusedChildAdamW
            takes them. Without names a parameter's label is its position: resumed runs need the same groups.
        lr, betas, eps, weight_decay, correct_bias: as there; may differ by group.
        reserve_p: ``"ChildTuning-F"``: the probability in (0, 1] that a gradient element is kept; may differ
            by group. ``"ChildTuning-D"``: the share that the script selects its mask by; no effect on a step.
        mode: ``"ChildTuning-F"``, another random child every step; ``"ChildTuning-D"``, the child of
            ``set_gradient_mask``; None, AdamW.
        seed, backend, process_group, master_weight, state_dtype: as FusedChildAdamW.

    Changes in place: the parameters and its own state, never a gradient; the released code leaves masked
    gradients behind.

    Raises:
        ValueError: an unknown mode; ``reserve_p < 1`` without a mode; as FusedChildAdamW.
        RuntimeError: the requested backend cannot serve.

    Source: Xu et al., EMNLP 2021; SPEC.md, eq. 7 to 11.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        reserve_p: float = 1.0,
        mode: str | None = None,
        *,
        seed: int | None = None,
        backend: str | None = None,
        process_group: ProcessGroup | None = None,
        master_weight: str = "auto",
        state_dtype: torch.dtype | None = None,
    ) -> None:
        _check_mode(mode)
        share, _ = keep_threshold(reserve_p, "the constructor")
        if mode is None and share < 1:
            raise ValueError(
                f"reserve_p={reserve_p!r} has no effect with mode=None, which is AdamW; give mode={CT_F!r}, "
                f"or mode={CT_D!r} and a mask by set_gradient_mask(), or leave reserve_p out"
            )
        # Groups are added, and their options checked, while the base class constructs.
        self._mode, self._reserve_p = mode, share
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            reserve_p=share if mode == CT_F else 1.0,
            **_OF_RELEASED_CODE,
            correct_bias=correct_bias,
            seed=seed,
            backend=backend,
            process_group=process_group,
            master_weight=master_weight,
            state_dtype=state_dtype,
        )

    # Plain attributes in the released code. To assign them would change nothing here: it raises.
    @property
    def mode(self) -> str | None:
        """The mode that was given."""
        return self._mode

    @property
    def reserve_p(self) -> float:
        """The ``reserve_p`` that was given; steps go by that of each group."""
        return self._reserve_p

    @property
    def gradient_mask(self) -> dict[Tensor, Tensor] | None:
        """Parameter → new bool tensor of its shape, True in the child; None without a mask.

        Of a DTensor the mask of this rank's part. To assign one is to call ``set_gradient_mask``.
        """
        masks = {}
        for _, parameter in parameters.by_label(self.param_groups):
            part = sharding.local_of(parameter)
            words = child_layout.mask_words(self.state.get(parameter) or {}, part.numel())
            if words is not None:
                masks[parameter] = ops.unpack_mask(words, part.shape)
        return masks or None

    @gradient_mask.setter
    def gradient_mask(self, gradient_mask: Mapping[Any, Tensor]) -> None:
        self.set_gradient_mask(gradient_mask)

    def set_gradient_mask(self, gradient_mask: Mapping[Any, Tensor]) -> None:
        """Give the child of mode ``"ChildTuning-D"``: before the first step, and again whenever it changes.

        Set again during a run, elements of both children keep their moments, new ones start with zero
        moments, and those that leave stop at once, but for decay; in the released code their moments move
        them on for some steps. Step counts go on.

        Args:
            gradient_mask: parameter of this optimizer → tensor of its shape, bool or of zeros and ones, on
                any device. Parameters that are not in it train densely, as those that are added later do.

        Changes in place: the optimizer's state; no weight. The mask is copied.

        Raises:
            TypeError: no dict of tensors; one that is keyed by names.
            ValueError: another mode; no parameter; a tensor that is none of this optimizer's parameters; a
                mask of another shape or with other values than 0 and 1. Nothing has changed.
        """
        self._require_mode("set_gradient_mask")
        self._check_exchange("set_gradient_mask")
        members = [*parameters.by_label(self.param_groups)]
        masks = _checked_masks(
            gradient_mask, {id(parameter): label for label, parameter in members}
        )
        mask = ChildMask.from_dense(masks, [label for label, _ in members if label not in masks])
        super().set_child_mask(mask)
        if self._reserve_p < 1 and mask.count() == mask.numel() > 0:
            warnings.warn(
                f"the gradient mask keeps all {mask.numel():,} elements, where reserve_p={self._reserve_p} "
                "was given; `>= percentile` does so where most Fisher values are 0: select_child takes "
                "exactly the share",
                UserWarning,
                stacklevel=2,
            )

    def set_child_mask(self, mask: ChildMask | None, new_state: str = "keep") -> None:
        """As ``FusedChildAdamW.set_child_mask``, for parameters that were given with names.

        Raises:
            ValueError: as there; another mode than ``"ChildTuning-D"``.
        """
        self._require_mode("set_child_mask")
        super().set_child_mask(mask, new_state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; in mode ``"ChildTuning-D"`` they train densely until a mask has them.

        Args:
            param_group: ``"params"`` and any of lr, betas, eps, weight_decay, correct_bias;
                ``reserve_p`` in mode ``"ChildTuning-F"``.

        Raises:
            ValueError: a mode of its own, a mask, a ``reserve_p`` without effect; as FusedChildAdamW.
        """
        if isinstance(param_group, dict):
            _check_group(param_group, self._mode, f"group {len(self.param_groups)}")
            param_group = {**param_group, MODE: self._mode}
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any], *, relabel: bool = False) -> None:
        """Continue from a saved state, of this class, of the released code, or of ``torch.optim.AdamW``.

        A state of this class brings the mask: the run continues bit for bit, and nobody sets it again. The
        others have none: in mode ``"ChildTuning-D"`` the present one stays, or is to be set.

        Args:
            state_dict, relabel: as ``FusedChildAdamW.load_state_dict``.

        Raises:
            ValueError: a run of another mode, or of FusedChildAdamW; as there. Nothing has changed.
        """
        groups = _saved_groups(state_dict)
        _check_saved_mode(groups, self._mode)
        released = _of_released_code(groups)
        if released:
            # In all that is loaded it is an AdamW's, which has no amsgrad.
            groups_of_adamw = [{**group, "amsgrad": False} for group in groups]
            state_dict = {**state_dict, "param_groups": groups_of_adamw}
        super().load_state_dict(state_dict, relabel=relabel)
        if released:
            for group, saved in zip(self.param_groups, groups, strict=True):
                group["correct_bias"] = bool(saved["correct_bias"])

    def _require_mode(self, what: str) -> None:
        if self._mode != CT_D:
            raise ValueError(
                f"{what}() has no effect with mode={self._mode!r}; give mode={CT_D!r} to the constructor"
            )

    def _agree(self) -> None:
        # Only then can the mask be missing; an ordinary step does not look for it.
        if self._mode == CT_D and not self._agreement.settled:
            states = [
                self.state.get(parameter) or {}
                for _, parameter in parameters.by_label(self.param_groups)
            ]
            if not any(map(child_layout.has_child, states)):
                raise ValueError(
                    f"mode={CT_D!r} has no gradient mask, and the step would train all weights; call "
                    "set_gradient_mask() before step(), or load a state dict of a run that has one"
                )
        super()._agree()

    def __getstate__(self) -> dict[str, Any]:
        own = {"_mode": self._mode, "_reserve_p": self._reserve_p}
        return {**super().__getstate__(), **own}


def _check_mode(mode: Any) -> None:
    """Refuse a mode that the released code would run as ChildTuning-F without a word."""
    if mode is None or (isinstance(mode, str) and mode in (CT_F, CT_D)):
        return
    given = str(mode).strip().casefold()
    alike = {
        spelling: difflib.SequenceMatcher(None, given, spelling).ratio() for spelling in _SPELLINGS
    }
    best = max(alike.values())
    near = {_SPELLINGS[spelling] for spelling in alike if alike[spelling] == best}
    meant = f"; did you mean {near.pop()!r}?" if best >= 0.6 and len(near) == 1 else ";"
    raise ValueError(
        f"mode={mode!r} is unknown{meant} use {_MODES} (the released code runs all else as {CT_F!r})"
    )


def _check_group(group: Mapping[str, Any], mode: str | None, where: str) -> None:
    """Refuse what a group cannot have of its own, and the released code would leave unread."""
    if group.get(MODE, mode) != mode:
        raise ValueError(
            f"mode={group[MODE]!r} ({where}) cannot differ by group; give it to the constructor"
        )
    if group.get("child_mask") is not None:
        raise ValueError(f"child_mask ({where}) cannot be a group's; call set_gradient_mask()")
    for name, own in _OF_RELEASED_CODE.items():
        if group.get(name, own) != own:
            raise ValueError(
                f"{name}={group[name]!r} ({where}) is not the released code's step; FusedChildAdamW has it"
            )
    if mode != CT_F and group.get("reserve_p", 1.0) != 1.0:
        raise ValueError(
            f"reserve_p={group['reserve_p']!r} ({where}) has no effect with mode={mode!r}; leave it out, or "
            f"give mode={CT_F!r} to the constructor"
        )


def _checked_masks(gradient_mask: Any, labels: Mapping[int, str]) -> dict[str, Tensor]:
    """Label → bool tensor, of a mask by parameter.

    Args:
        labels: identity → label of the optimizer's parameters.
    """
    if not isinstance(gradient_mask, Mapping):
        also = "; give it to set_child_mask()" if isinstance(gradient_mask, ChildMask) else ""
        raise TypeError(
            f"gradient_mask must be a dict of parameter → tensor, not {type(gradient_mask).__name__}{also}"
        )
    if not gradient_mask:
        raise ValueError(
            "gradient_mask is empty, and all weights would train; was it made by a filter on names that "
            "matches none of this model's ('layer' and GPT-2)? For plain AdamW give mode=None"
        )
    names = [key for key in gradient_mask if isinstance(key, str)]
    if names:
        raise TypeError(
            f"gradient_mask is keyed by names ({shortened(names, 3)}), not by parameters; map them, "
            "{p: mask[n] for n, p in model.named_parameters() if n in mask}, or use FusedChildAdamW with "
            "child_mask=ChildMask.from_dense(mask)"
        )
    foreign = [key for key in gradient_mask if id(key) not in labels]
    if foreign:
        shapes = [str(tuple(key.shape) if isinstance(key, Tensor) else key) for key in foreign]
        raise ValueError(
            f"gradient_mask: {len(foreign)} of {len(gradient_mask)} keys are no parameters of this optimizer "
            f"(shapes {shortened(shapes, 3)}); key it by the parameters themselves, of the model as it is "
            "trained (not a copy, and after it was moved or wrapped), and leave out what the optimizer lacks"
        )
    return {
        labels[id(key)]: _bool_mask(labels[id(key)], key, mask)
        for key, mask in gradient_mask.items()
    }


def _bool_mask(label: str, parameter: Tensor, mask: Any) -> Tensor:
    """A mask of zeros and ones as bool tensor."""
    what = f"gradient mask of parameter {label}, shape {tuple(parameter.shape)}"
    if not isinstance(mask, Tensor):
        raise TypeError(f"{what}: it is a {type(mask).__name__}; give a tensor (torch.as_tensor)")
    if mask.shape != parameter.shape:
        raise ValueError(
            f"{what}: it has shape {tuple(mask.shape)}; a mask has an element for each weight"
        )
    if mask.layout != torch.strided:
        raise ValueError(f"{what}: it has layout {mask.layout}; call .to_dense() on it")
    if mask.dtype == torch.bool:
        return mask
    values = sharding.local_of(mask.detach())
    odd = ~((values == 0) | (values == 1))
    if odd.any():
        first = int(odd.flatten().nonzero()[0])
        value = values.flatten()[first].item()
        raise ValueError(
            f"{what}: {int(odd.sum())} values are neither 0 nor 1, the first {value} at element {first}; "
            "compare first (fisher >= threshold)"
        )
    return mask != 0


def _saved_groups(state_dict: Any) -> Sequence[Mapping[str, Any]]:
    """The groups of a state dict; none where it is no such thing, which loading refuses."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    return groups if isinstance(groups, Sequence) else ()


def _check_saved_mode(groups: Sequence[Mapping[str, Any]], mode: str | None) -> None:
    for saved in groups:
        if "reserve_p" in saved and MODE not in saved:
            raise ValueError(
                "the state dict is of FusedChildAdamW, whose convention and decay may be others; load it "
                "into FusedChildAdamW"
            )
        if saved.get(MODE, mode) != mode:
            raise ValueError(
                f"mode={saved[MODE]!r} in the state dict, mode={mode!r} here; build the optimizer with the "
                "mode of the saved run"
            )


def _of_released_code(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether groups were saved by the released optimizer, or by the AdamW that transformers had."""
    keys = [group.keys() for group in groups]
    return bool(keys) and all(
        "correct_bias" in each and not {"reserve_p", "amsgrad"} & each for each in keys
    )
