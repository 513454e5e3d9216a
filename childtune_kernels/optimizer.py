"""FusedChildAdamW: parameter groups, state, and the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from . import adamw_export, child_exchange, new_group, registry, state_dicts
from .child_mask import ChildMask
from .gradient_release import GradientRelease
from .group_options import WROTE_OUTSIDE, check_drop_in, group_numbers
from .labels import Aliases
from .rank_agreement import RankAgreement
from .step_factor import SET_BY_SCALER, without_scale_after_error
from .step_planner import StepPlanner
from .summary import summary_table

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FusedChildAdamW(Optimizer):
    """AdamW that updates a child network of the weights, in one pass over memory.

    Replaces ``torch.optim.AdamW``. With ``reserve_p < 1`` (CT_F) every step keeps each gradient
    element with that probability and scales it by ``1 / reserve_p``; with a ``child_mask`` (CT_D) only
    the weights of a fixed child network train. Without either it is plain AdamW.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups (dicts) of either; fp32, fp64, bf16 or
            fp16, dense, any strides. Names make masks independent of the order of parameters and
            are required with a ``child_mask``. Options but ``seed``, ``backend``, ``process_group``
            and ``aliases`` may differ by group, the mask too.
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
        seed: of the Bernoulli masks; None takes ``torch.initial_seed()``, of many ranks rank 0's.
        backend: ``"triton"``, ``"cpp"`` or ``"reference"``; None takes the best that serves the device.
        process_group: the ranks that train together; None: all of ``torch.distributed``, where there are
            any. They take their first step together, and the first one after a change of groups, mask or
            state: what differs between them is found there, and the seed given out.
        aliases: name → name; of a weight that two stages of a pipeline hold under different names, the one
            that both shall train it by.
        child_state: with a ``child_mask``, ``"compact"`` keeps moments (and master weights) of the child's
            elements alone, ``"dense"`` of every weight; results are the same bits. ``"auto"`` is compact,
            but for 16-bit parameters that decay outside the child (``freeze_non_child=False``).
        master_weight: of bf16 and fp16 parameters. ``"split"`` (``"auto"`` for bf16): weight and an int16 in
            the state together are an fp32 master. ``"fp32"`` (``"auto"`` for fp16): an fp32 copy in the
            state. ``"stochastic"`` (bf16): no master, weights are rounded at random, without bias.
            ``"none"``: no master, weights are rounded to nearest, and small updates are lost.
        state_dtype: of both moments. ``torch.bfloat16`` halves them, rounded at random, without bias; None is
            the type that computes, fp32 (fp64 for fp64 parameters).
        max_grad_norm: every step first scales all gradients by ``max_grad_norm / (norm + 1e-6)`` where their
            global 2-norm is greater; nothing is written to the gradients. The same for all groups.
        clip: whose norm: of the gradients as they are (``"before_mask"``), or of what the masks leave, with
            1/p (``"after_mask"``).
        skip_nonfinite: a step with a NaN or infinite gradient, also where it would be dropped, changes
            nothing.
        capturable: on GPUs, lets ``step()`` be captured into a CUDA graph. An ``lr`` or ``weight_decay`` that
            is a tensor there is then read by every step and replay, unchecked; other options are those of
            the capture.
        amsgrad, differentiable, fused, foreach: accepted for drop-in use; ``amsgrad=True`` and
            ``differentiable=True`` are refused, the others have no effect.

    Changes in place: the parameters and its own state, never a gradient.

    Raises:
        ValueError: an option out of range, a parameter or mask that does not fit (SPEC.md, "Errors").
        RuntimeError: the requested backend cannot serve.

    Source: Xu et al., EMNLP 2021; SPEC.md, eq. 1 to 12 and 17 to 20.
    """

    # torch.amp.GradScaler then hands over grad_scale and found_inf instead of waiting for them.
    _step_supports_amp_scaling = True

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
        process_group: ProcessGroup | None = None,
        aliases: Mapping[str, str] | None = None,
        child_state: str = "auto",
        master_weight: str = "auto",
        state_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = None,
        clip: str = "before_mask",
        skip_nonfinite: bool = False,
        capturable: bool = False,
        amsgrad: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        foreach: bool | None = None,
    ) -> None:
        self._agreement = RankAgreement(process_group, Aliases(aliases), seed is not None)
        seed = torch.initial_seed() if seed is None else seed
        registry.check_requested(backend)
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "reserve_p": reserve_p,
            "freeze_non_child": freeze_non_child, "convention": convention, "correct_bias": correct_bias,
            "maximize": maximize, "child_state": child_state, "master_weight": master_weight,
            "state_dtype": state_dtype, "max_grad_norm": max_grad_norm, "clip": clip,
            "skip_nonfinite": skip_nonfinite, "capturable": capturable, "amsgrad": amsgrad,
            "differentiable": differentiable, "fused": fused, "foreach": foreach, WROTE_OUTSIDE: False,
            "seed": seed,
        }  # fmt: skip
        self._backend = backend
        self._planner = StepPlanner(backend, self._agreement)
        self._gradient_release: GradientRelease | None = None
        self._default_mask = child_mask
        group_numbers(defaults, child_mask is not None, "the constructor")
        check_drop_in(defaults, "the constructor")
        super().__init__(params, defaults)
        self._default_mask = None

    @torch.inference_mode(False)
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own, to those that are optimized.

        Args:
            param_group: ``"params"`` and any options of the constructor that may differ by group. A
                ``child_mask`` is the group's own: one given to the constructor covers only its groups.

        Raises:
            ValueError, RuntimeError: as the constructor; the optimizer is left as it was.
        """
        self._planner.captures.refuse("add_param_group")
        self._planner.follow(self.param_groups, self.state)
        added = new_group.checked_group(
            param_group, self.param_groups, self.defaults, self._backend, self._default_mask,
            self._agreement.aliases,
        )  # fmt: skip
        super().add_param_group(added.group)
        self.state.update(added.states)
        self._agreement.open(added.mask)
        self._plan_anew()

    def _plan_anew(self) -> None:
        """Groups or state have been replaced."""
        self._planner.forget(self.param_groups)
        if self._gradient_release is not None:
            self._gradient_release.renew()

    def _check_exchange(self, what: str) -> None:
        """Refuse to replace state that somebody goes on using."""
        self._planner.captures.refuse(what)
        self._planner.follow(self.param_groups, self.state)
        if self._gradient_release is not None:
            self._gradient_release.check_between_iterations(what)

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
        self._agree()
        scaling = (getattr(self, name, None) for name in SET_BY_SCALER)
        if self._gradient_release is not None:
            self._gradient_release.step()
        else:
            self._planner.step(self.param_groups, self.state, *scaling)

    def _agree(self) -> None:
        """Before the first step: ranks that train together do so with one seed, and one child."""
        seed = self._planner.seed_of_all(self.param_groups, self.state)
        if seed is None:
            return
        for options in (self.defaults, *self.param_groups):
            options["seed"] = seed
        self._plan_anew()

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """As in ``torch.optim.Optimizer``; what a GradScaler has set goes with a step that raises."""
        return without_scale_after_error(Optimizer.profile_hook_step(func))

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
            raise RuntimeError("release_gradients() is active already; remove() its handle first")
        self._agree()
        self._gradient_release = GradientRelease(self, compact_gradients)
        return self._gradient_release

    @property
    def last_grad_norm(self) -> Tensor | None:
        """The global norm of the last step's gradients, without a scaler's factor, before clipping.

        A tensor of no dimension (float64) on their device, which nothing has waited for; None where no norm
        was taken (no ``max_grad_norm``, no ``skip_nonfinite``). Source: SPEC.md, eq. 19 and 20.
        """
        return self._planner.norm

    @property
    def step_was_skipped(self) -> Tensor:
        """Whether the last step changed nothing, for ``found_inf`` of a GradScaler or ``skip_nonfinite``.

        A bool tensor of no dimension, which nothing has waited for; on the CPU where no step can be skipped.
        """
        return self._planner.skipped

    def load_state_dict(self, state_dict: dict[str, Any], *, relabel: bool = False) -> None:
        """Continue from a saved state, of FusedChildAdamW or of ``torch.optim.AdamW``.

        A FusedChildAdamW state brings its seed, options and mask: the run continues bit for bit. An
        AdamW state brings moments, steps and AdamW's options. State goes by name, whatever the groups.

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
                self.param_groups, self.state, state_dict, self.defaults, relabel=relabel
            )
        self.__setstate__({"param_groups": groups, "state": state})
        # What is added later belongs to the same run.
        self.defaults["seed"] = groups[0]["seed"]
        self._agreement.seed_given = True
        self._agreement.open()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def state_dict(self) -> dict[str, Any]:
        """The state of the run, the child as mask words (SPEC.md, section 5 and 10).

        Tensors are not copied, but compact ones of sharded parameters, for which all ranks must call this.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._planner.follow(self.param_groups, self.state)
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
        states = child_exchange.states_of_child(
            self.param_groups, self.state, mask, keep=new_state == "keep"
        )
        if any(int(self.state[parameter].get("step", 0)) > 0 for parameter, _ in states):
            for group in self.param_groups:
                group[WROTE_OUTSIDE] = True
        self.state.update(states)
        self._agreement.open(mask)
        self._plan_anew()

    def to_adamw_state_dict(self, groups: adamw_export.Groups | None = None) -> dict[str, Any]:
        """The state as ``torch.optim.AdamW.load_state_dict`` takes it.

        Without masks, seed and masters. Dense moments are shared, not copied; compact ones are spread out.

        Args:
            groups: ``param_groups`` of the AdamW that loads it, if others; parameters match by identity,
                else by name.

        Raises:
            ValueError: other parameters, or options that differ within one of ``groups``.
        """
        return adamw_export.adamw_state_dict(self.state_dict(), self.param_groups, groups)

    def master_state_dict(self) -> dict[str, Tensor]:
        """The parameters with all the precision that training has given them, by label.

        Returns:
            New fp32 tensors for 16-bit parameters, the masters or the weights; others are the parameters.

        Source: SPEC.md, eq. 12 and 17.
        """
        return state_dicts.master_weights(self.param_groups, self.state)

    def state_bytes(self) -> int:
        """Bytes of all state tensors: moments, master weights, mask words and steps."""
        return sum(tensor.nbytes for state in self.state.values() for tensor in state.values())

    def summary(self) -> str:
        """A table with a row a parameter: label, shape, p, child density, decay, backend, state bytes."""
        devices = {each.device for group in self.param_groups for each in group["params"]}
        backends = {d: registry.choose("child_adamw", d, self._backend).backend for d in devices}
        return summary_table(self.param_groups, self.state, backends)

    def __getstate__(self) -> dict[str, Any]:
        own = {"_backend": self._backend, "_agreement": self._agreement}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        of_none = RankAgreement(None, Aliases(), True)
        others = {"_backend": None, "_gradient_release": None, "_agreement": of_none}
        self.__dict__ = {**others, **self.__dict__}
        self._default_mask = None
        before = self.__dict__.get("_planner")
        self._planner = StepPlanner(self._backend, self._agreement)
        if before is not None:
            self._planner.captures = before.captures
        self._plan_anew()
