"""Which check finds which fault: every check runs on the reference with one fault put into it.

A test that cannot fail proves nothing. In ``FOUND`` stand the checks, and for each the faults that it
must find; what it cannot see is stated by absence, and shown too, so that the table stays true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from childtune_kernels.backends.reference import child_adamw as reference

from . import test_low_precision as low_precision
from . import test_numerics as numerics
from . import test_theorem as theorem
from .cases import Case
from .columns import COLUMNS
from .ops import test_child_adamw as equality
from .ops import test_child_adamw_contract as contract
from .ops import test_child_adamw_scaling as scaling

Fault = Callable[[pytest.MonkeyPatch], None]
Check = Callable[[str], None]

pytestmark = pytest.mark.usefixtures("one_thread")


def _scalars_with(**replaced: float) -> Fault:
    def apply(patch: pytest.MonkeyPatch) -> None:
        original = reference.adamw_scalars

        def changed(numbers: Any, step: int, factor: float) -> reference.Scalars:
            return original(numbers, step, factor)._replace(**replaced)

        patch.setattr(reference, "adamw_scalars", changed)

    return apply


def _numbers_with(**replaced: bool) -> Fault:
    def apply(patch: pytest.MonkeyPatch) -> None:
        original = reference.adamw_scalars

        def changed(numbers: Any, step: int, factor: float) -> reference.Scalars:
            return original(numbers._replace(**replaced), step, factor)

        patch.setattr(reference, "adamw_scalars", changed)

    return apply


def _update_is_a_no_op(patch: pytest.MonkeyPatch) -> None:
    def only_count(rows: Iterable[Any], factor: Any) -> None:
        del factor
        for row in rows:
            if row.active:
                row.step.add_(1)

    patch.setattr(reference, "child_adamw_", only_count)


def _inverted(name: str) -> Fault:
    def apply(patch: pytest.MonkeyPatch) -> None:
        original = getattr(reference, name)
        patch.setattr(reference, name, lambda *arguments: ~original(*arguments))

    return apply


def _masks_are_inverted(patch: pytest.MonkeyPatch) -> None:
    _inverted("keep_mask")(patch)
    _inverted("unpack_mask")(patch)


def _decay_factor_is_rounded(patch: pytest.MonkeyPatch) -> None:
    def changed(weight: Tensor, scalars: reference.Scalars) -> Tensor:
        return weight * torch.tensor(1.0 - scalars.a, dtype=weight.dtype)

    patch.setattr(reference, "_decayed", changed)


def _roots_are_torchs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "square_root", torch.sqrt)


def _master_is_ignored(patch: pytest.MonkeyPatch) -> None:
    def changed(stored: Tensor, master: Tensor | None, compute: torch.dtype) -> Tensor:
        return stored.to(compute)

    patch.setattr(reference, "_current_weight", changed)


def _master_is_never_replaced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "current_master", lambda stored, master: master)


def _remainder_is_lost(patch: pytest.MonkeyPatch) -> None:
    original = reference.split_master

    def changed(master: Tensor) -> tuple[Tensor, Tensor]:
        weight, remainder = original(master)
        return weight, torch.zeros_like(remainder)

    patch.setattr(reference, "split_master", changed)


def _ties_go_to_even(patch: pytest.MonkeyPatch) -> None:
    def changed(master: Tensor) -> tuple[Tensor, Tensor]:
        weight = reference.narrow(master, torch.bfloat16)
        remainder = master.view(torch.int32) - (weight.view(torch.int16).int() << 16)
        return weight, remainder.to(torch.int16)

    patch.setattr(reference, "split_master", changed)


def _words_are_those_of_the_keep_bits(patch: pytest.MonkeyPatch) -> None:
    original = reference.element_words
    patch.setattr(
        reference,
        "element_words",
        lambda elements, key, step, purpose: original(elements, key, step, 0),
    )


def _values_are_rounded_down(patch: pytest.MonkeyPatch) -> None:
    original = reference.narrow_by_words
    patch.setattr(
        reference, "narrow_by_words", lambda value, words: original(value, torch.zeros_like(words))
    )


def _scale_is_ignored(patch: pytest.MonkeyPatch) -> None:
    original = reference.step_verdict
    patch.setattr(
        reference,
        "step_verdict",
        lambda factor, numbers: original(factor, numbers)._replace(factor=1.0),
    )


FAULTS: dict[str, Fault] = {
    "no_op": _update_is_a_no_op,
    "no_rescale": _scalars_with(r=1.0),
    "no_decay": _scalars_with(a=0.0),
    "inverted_masks": _masks_are_inverted,
    "inverted_bernoulli": _inverted("keep_mask"),
    "inverted_child": _inverted("unpack_mask"),
    "no_bias_correction": _numbers_with(correct_bias=False),
    "rounded_decay_factor": _decay_factor_is_rounded,
    "roots_of_torch": _roots_are_torchs,
    "master_ignored": _master_is_ignored,
    "master_never_replaced": _master_is_never_replaced,
    "remainder_lost": _remainder_is_lost,
    "ties_to_even": _ties_go_to_even,
    "words_of_keep_bits": _words_are_those_of_the_keep_bits,
    "rounded_down": _values_are_rounded_down,
    "scale_ignored": _scale_is_ignored,
}


def check_equality_with_a_column(backend: str) -> None:
    """The comparison of tests/ops/test_child_adamw.py, of which the reference is one side."""
    del backend
    present = [column for column in COLUMNS if column.absent(["child_adamw"]) is None]
    if not present:
        pytest.skip("no column but the reference runs here")
    equality.check_column(
        Case("everything", reserve_p=0.3, fixed_mask=True, freeze_non_child=False),
        present[-1].backend,
    )


# The faults that every check must find. Of those that it names not it must be free, so that what is
# seen by nobody is seen in the table. Two blind spots are in the nature of things: Adam's update does
# not change when all gradients are scaled (square root law), and the comparisons of 16-bit weights
# with an fp32 copy run both on the same backend.
FOUND: dict[Check, str] = {
    contract.check_transcription: "no_op no_rescale no_decay inverted_masks inverted_bernoulli "
    "inverted_child no_bias_correction rounded_decay_factor roots_of_torch",
    contract.check_dropped_gradients_leave_no_trace: "no_op inverted_masks inverted_bernoulli "
    "inverted_child",
    contract.check_frozen_weights: "no_op inverted_masks inverted_child",
    contract.check_decay_outside_the_child: "no_op no_decay inverted_masks inverted_child "
    "rounded_decay_factor",
    contract.check_skipped_parameters: "no_op remainder_lost",
    contract.check_master_is_an_fp32_copy: "no_op inverted_masks inverted_child master_ignored "
    "master_never_replaced",
    contract.check_without_master: "no_op",
    low_precision.check_split_is_an_fp32_copy: "no_op master_ignored remainder_lost ties_to_even",
    low_precision.check_rounding_by_words: "no_op words_of_keep_bits rounded_down",
    scaling.check_scaling_changes_nothing: "no_rescale scale_ignored",
    numerics.check_distance_from_fp64: "no_op no_rescale no_decay inverted_masks "
    "inverted_bernoulli no_bias_correction",
    numerics.check_fp64_equals_torch: "no_op no_rescale no_decay inverted_masks "
    "inverted_bernoulli no_bias_correction",
    numerics.check_original_convention: "no_op no_rescale no_decay inverted_masks "
    "inverted_bernoulli inverted_child no_bias_correction",
    numerics.check_small_decay: "no_op no_decay rounded_decay_factor",
    numerics.check_special_values: "no_op no_decay no_bias_correction rounded_decay_factor",
    theorem.check_theorem: "no_op no_rescale no_decay inverted_masks inverted_bernoulli",
    theorem.check_square_root_law: "no_op no_decay inverted_masks inverted_bernoulli "
    "no_bias_correction",
    check_equality_with_a_column: "no_op no_rescale no_decay inverted_masks inverted_bernoulli "
    "inverted_child no_bias_correction rounded_decay_factor roots_of_torch",
}
# Seconds each where nothing stops them early: what they do not see is shown by `make test-slow`.
_LONG = {
    contract.check_dropped_gradients_leave_no_trace,
    contract.check_frozen_weights,
    theorem.check_theorem,
    theorem.check_square_root_law,
}


def _pairs(found: bool) -> list[Any]:
    return [
        pytest.param(
            check,
            fault,
            id=f"{check.__name__.removeprefix('check_')}-{fault}",
            marks=[pytest.mark.slow] if check in _LONG and not found else [],
        )
        for check, faults in FOUND.items()
        for fault in FAULTS
        if (fault in faults.split()) == found
    ]


@pytest.mark.parametrize(("check", "fault"), _pairs(found=True))
def test_check_finds_fault(check: Check, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[fault](monkeypatch)
    with pytest.raises(AssertionError):
        check("reference")


@pytest.mark.parametrize(("check", "fault"), _pairs(found=False))
def test_check_is_blind_to_fault(check: Check, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[fault](monkeypatch)
    check("reference")


def test_every_fault_is_found() -> None:
    named = {fault for faults in FOUND.values() for fault in faults.split()}
    assert named == FAULTS.keys()
