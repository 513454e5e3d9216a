"""FusedChildAdamW: parameter groups, state, and the step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from . import graph_capture, parameters, registry, state_dicts, state_tensors
from .child_mask import ChildMask
from .gradient_release import GradientRelease
from .group_options import WROTE_OUTSIDE, check_spelling, group_numbers
from .step_planner import StepPlanner, state_of
from .summary import summary_table


class FusedChildAdamW(Optimizer):
    """AdamW that updates a child network of the weights, in one pass over memory.

    Replaces ``torch.optim.AdamW``. With ``reserve_p < 1`` (CT_F) every step keeps each gradient
    element with that probability and scales it by ``1 / reserve_p``; with a ``child_mask`` (CT_D) only
    the weights of a fixed child network train. Without either it is plain AdamW.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups (dicts) of either; fp32, fp64, bf16 or
            fp16, dense, any strides. Names make masks independent of the order of parameters and
            are required with a ``child_mask``. Every option but ``seed`` and ``backend`` may differ by
            group, the mask too.
        lr: learning rate, a float or a tensor of one element. CT_F needs a larger one than AdamW: see
            ``lr_for``.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator; must not be 0 with a mask.
        weight_decay: decoupled decay; a step moves a weight by ``-lr * weight_decay * weight``.
        reserve_p: CT_F, the probability in (0, 1] that a gradient element is kept.
        child_mask: CT_D, a ``ChildMask`` that names every parameter of the group.
        freeze_non_child: weights outside the child are never written; False lets decay reach them.
        convention: ``"torch"`` (decay first, eps after bias correction) or ``"original"`` (the paper's
            released code: eps before bias correction, decay last).
        correct_bias: False leaves out the bias correction of the moments.
        maximize: follow the gradient upwards.
        seed: of the Bernoulli masks; None takes ``torch.initial_seed()``.
        backend: ``"triton"``, ``"cpp"`` or ``"reference"``; None takes the best that serves the device.
        child_state: with a ``child_mask``, ``"compact"`` keeps moments (and master weights) of the child's
            elements alone, ``"dense"`` of every weight; results are the same bits. ``"auto"`` is compact,
            but for 16-bit parameters that decay outside the child (``freeze_non_child=False``).
        master_weight: of bf16 and fp16 parameters: ``"fp32"`` (``"auto"``) keeps an fp32 copy in the
            state, ``"none"`` updates the rounded weights themselves.
        capturable: on GPUs, lets ``step()`` be captured into a CUDA graph. An ``lr`` or ``weight_decay`` that
            is a tensor there is then read by every step and replay, unchecked; other options are those of
            the capture.
        amsgrad, fused, foreach: accepted for drop-in use; ``amsgrad=True`` is refused, the others have
            no effect.

    Changes in place: the parameters and its own state, never a gradient.

    Raises:
        ValueError: an option out of range, a parameter or mask that does not fit (SPEC.md, "Errors").
        RuntimeError: the requested backend cannot serve.

    Source: Xu et al., EMNLP 2021; SPEC.md, eq. 1 to 12.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        reserve_p: float = 1.0,
        child_mask: ChildMask | None = None,
        freeze_non_child: bool = True,
        convention: str = "torch",
        correct_bias: bool = True,
        maximize: bool = False,
        seed: int | None = None,
        backend: str | None = None,
        child_state: str = "auto",
        master_weight: str = "auto",
        capturable: bool = False,
        amsgrad: bool = False,
        fused: bool | None = None,
        foreach: bool | None = None,
    ) -> None:
        seed = torch.initial_seed() if seed is None else seed
        if backend is not None and backend not in registry.BACKENDS:
            raise ValueError(
                f"backend={backend!r} is unknown; use one of {registry.BACKENDS} or None"
            )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "reserve_p": reserve_p,
            "freeze_non_child": freeze_non_child,
            "convention": convention,
            "correct_bias": correct_bias,
            "maximize": maximize,
            "child_state": child_state,
            "master_weight": master_weight,
            "capturable": capturable,
            "amsgrad": amsgrad,
            "fused": fused,
            "foreach": foreach,
            WROTE_OUTSIDE: False,
            "seed": seed,
        }
        self._backend = backend
        self._planner = StepPlanner(backend)
        self._gradient_release: GradientRelease | None = None
        self._default_mask = child_mask
        group_numbers(defaults, child_mask is not None, "the constructor")
        super().__init__(params, defaults)
        self._default_mask = None

    @torch.inference_mode(False)
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own, to those that are optimized.

        Args:
            param_group: ``"params"`` and any options of the constructor but ``seed`` and ``backend``. A
                ``child_mask`` is the group's own: one given to the constructor covers only its groups.

        Raises:
            ValueError, RuntimeError: as the constructor; the optimizer is left as it was.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"a parameter group must be a dict, not {type(param_group).__name__}")
        self._planner.captures.refuse("add_param_group")
        where = f"group {len(self.param_groups)}"
        self._refuse_other_seed(param_group, where)
        group = {**self.defaults, **param_group}
        group.pop("backend", None)
        mask = group.pop("child_mask", self._default_mask)
        known = [
            (label, parameter)
            for present in self.param_groups
            for label, parameter in zip(present["param_names"], present["params"], strict=True)
        ]
        labels, tensors = parameters.labelled(group, known, where)
        check_spelling(group, where)
        group_numbers(group, mask is not None, where)
        words = parameters.mask_words(mask, labels, tensors)
        for device in {tensor.device for tensor in tensors}:
            graph_capture.check_backend(device, self._backend, bool(group["capturable"]), where)
        group["params"], group["param_names"] = tensors, labels
        states = [
            state_tensors.initial_state(label, tensor, words.get(label), group)
            for label, tensor in zip(labels, tensors, strict=True)
        ]
        super().add_param_group(group)
        for parameter, state in zip(tensors, states, strict=True):
            self.state[parameter] = state
        self._plan_anew()

    def _plan_anew(self) -> None:
        """Groups or state have been replaced."""
        self._planner.forget()
        if self._gradient_release is not None:
            self._gradient_release.renew()

    def _check_exchange(self, what: str) -> None:
        """Refuse to replace state that somebody goes on using."""
        self._planner.captures.refuse(what)
        if self._gradient_release is not None:
            self._gradient_release.check_between_iterations(what)

    def _refuse_other_seed(self, param_group: dict[str, Any], where: str) -> None:
        own = {"seed": self.defaults["seed"], "backend": self._backend}
        for name, value in own.items():
            if param_group.get(name, value) != value:
                raise ValueError(
                    f"{name}={param_group[name]!r} ({where}) cannot differ by group; give it to the "
                    "constructor"
                )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the loss anew and returns it.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: an option or gradient that does not fit; weights and state are as before.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    # A compiled training step breaks its graph here: a plan reads addresses, which a trace has not.
    @torch._disable_dynamo
    def _update(self) -> None:
        if self._gradient_release is None:
            self._planner.step(self.param_groups, self.state)
        else:
            self._gradient_release.step()

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, those that a release keeps too; as ``torch.optim.Optimizer.zero_grad``."""
        super().zero_grad(set_to_none)
        if self._gradient_release is not None:
            self._gradient_release.begin_iteration()

    def release_gradients(self, compact_gradients: bool = False) -> GradientRelease:
        """Update each parameter as soon as backward has accumulated its gradient, then free the gradient.

        The loop stays as it is, results too, bit for bit; ``step()`` ends an iteration. With
        ``compact_gradients`` the child's gradients are summed over any number of backwards instead, in
        fp32, and ``step()`` updates from them. What it promises and refuses: ``GradientRelease``. Do not
        use it with ``clip_grad_norm_``, which finds nothing to clip, or ``DistributedDataParallel``.

        Returns:
            A handle, also a context manager; ``remove()`` ends the release.

        Changes in place: during backward, parameters and state; ``.grad`` becomes None.

        Raises:
            RuntimeError, ValueError: see ``GradientRelease``; nothing has changed.
        """
        if self._gradient_release is not None:
            raise RuntimeError(
                "release_gradients() is active already; remove() the handle that it returned first"
            )
        self._gradient_release = GradientRelease(self, compact_gradients)
        return self._gradient_release

    def load_state_dict(self, state_dict: dict[str, Any], *, relabel: bool = False) -> None:
        """Continue from a saved state, of FusedChildAdamW or of ``torch.optim.AdamW``.

        A FusedChildAdamW state brings its seed, options and mask: the run continues bit for bit. An
        AdamW state brings moments, steps and AdamW's options; seed, mask and the others stay.

        Args:
            state_dict: what ``state_dict()`` gave; it is not changed and not kept.
            relabel: accept saved labels that differ from this optimizer's, by position. Bernoulli masks
                then follow the labels of this optimizer.

        Raises:
            ValueError: groups, labels, shapes or options that do not fit; nothing has changed.
        """
        self._check_exchange("load_state_dict")
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            if result is not None:
                state_dict = result
        with torch.inference_mode(False), torch.no_grad():
            groups, state = state_dicts.restored(
                self.param_groups, self.state, state_dict, relabel=relabel
            )
        self.__setstate__({"param_groups": groups, "state": state})
        # What is added later belongs to the same run.
        self.defaults["seed"] = groups[0]["seed"]
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def state_dict(self) -> dict[str, Any]:
        """The state of the run, the child as mask words (SPEC.md, section 5); tensors are not copied."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = state_dicts.packed(self.param_groups, self.state)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, state_dict)
            if result is not None:
                state_dict = result
        return state_dict

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_child_mask(self, mask: ChildMask | None, new_state: str = "keep") -> None:
        """Change the child network during a run.

        Weights that leave the child keep what they have learnt, so that ``save_child`` refuses the run from
        its first step on: make a mask of what changed with ``child_diff(base, model)``.

        Args:
            mask: names every parameter of every group, to train sparsely or densely; None: all of them
                train densely from now on.
            new_state: ``"keep"``: elements of both children keep their moments (and masters), new ones
                start with zero moments; steps go on. ``"reset"``: all parameters start with zero moments
                at step 0, as in a new optimizer.

        Changes in place: the optimizer's state; no weight.

        Raises:
            ValueError: a mask that does not fit, or an unknown ``new_state``; nothing has changed.
        """
        self._check_exchange("set_child_mask")
        if new_state not in ("keep", "reset"):
            raise ValueError(f"new_state={new_state!r} must be 'keep' or 'reset'")
        states = []
        for number, group in enumerate(self.param_groups):
            words = parameters.mask_words(mask, group["param_names"], group["params"])
            group_numbers(group, bool(words), f"group {number}")
            for label, parameter in zip(group["param_names"], group["params"], strict=True):
                own = words.get(label)
                if new_state == "keep":
                    current = state_of(label, parameter, self.state)
                    state = state_tensors.moved_state(label, parameter, current, own, group)
                else:
                    state = state_tensors.initial_state(label, parameter, own, group)
                states.append((parameter, state))
        if any(int(self.state[parameter].get("step", 0)) > 0 for parameter, _ in states):
            for group in self.param_groups:
                group[WROTE_OUTSIDE] = True
        for parameter, state in states:
            self.state[parameter] = state
        self._plan_anew()

    def to_adamw_state_dict(self) -> dict[str, Any]:
        """The state as ``torch.optim.AdamW.load_state_dict`` takes it.

        Masks, seed and master weights have no place in it and are left out. Dense moments are shared, not
        copied; compact ones are spread out, with zeros outside the child.
        """
        members = list(chain.from_iterable(group["params"] for group in self.param_groups))
        return state_dicts.adamw_state_dict(self.state_dict(), members)

    def state_bytes(self) -> int:
        """Bytes of all state tensors: moments, master weights, mask words and steps."""
        return sum(
            tensor.numel() * tensor.element_size()
            for state in self.state.values()
            for tensor in state.values()
        )

    def summary(self) -> str:
        """A table with a row a parameter: label, shape, p, child density, decay, backend, state bytes."""
        backends = {
            parameter.device: registry.choose(
                "child_adamw", parameter.device, self._backend
            ).backend
            for group in self.param_groups
            for parameter in group["params"]
        }
        return summary_table(self.param_groups, self.state, backends)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_backend", None)
        self.__dict__.setdefault("_gradient_release", None)
        self._default_mask = None
        captures = self.__dict__.get("_planner", StepPlanner(None)).captures
        self._planner = StepPlanner(self._backend)
        self._planner.captures = captures
        self._plan_anew()
