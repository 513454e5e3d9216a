"""Op fisher_accumulate: every column equals the reference, and the reference SPEC.md, eq. 13."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from childtune_kernels import ops, registry

from ..cases import GUARD, SHAPES, assert_same_bits, generator_of, random_values
from ..columns import device_of, placed, storage_of

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SCALES = [1.0, 2.0**-16, 0.3]


def accumulate(
    sums: Sequence[Tensor], gradients: Sequence[Tensor], backend: str, scale: float = 1.0
) -> None:
    choice = registry.choose("fisher_accumulate", device_of(backend), backend)
    ops.fisher_accumulate_(sums, gradients, choice, scale)


def gradients_of(dtype: torch.dtype, rows: int = 1) -> list[Tensor]:
    """One gradient for each shape of the table, laid out as the table says, with special values."""
    gradients = []
    for row in range(rows):
        for name, shape in SHAPES.items():
            values = random_values(shape.sizes, dtype, "fisher", name, row)
            specials = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e-23, 6e4, 3e38])
            flat = values.view(-1)
            flat[60:66] = specials.to(dtype)[: flat[60:66].numel()]
            gradients.append(shape.lay_out(values))
    return gradients


def sums_of(gradients: Sequence[Tensor]) -> list[Tensor]:
    return [
        random_values(gradient.shape, torch.float32, "sums", index).abs_()
        for index, gradient in enumerate(gradients)
    ]


def result(
    gradients: Sequence[Tensor], backend: str, scale: float = 1.0, times: int = 2
) -> dict[str, Tensor]:
    """The sums after gradients were added to them, both where the backend is tested."""
    sums = [placed(total, backend) for total in sums_of(gradients)]
    gradients = [placed(gradient, backend) for gradient in gradients]
    for _ in range(times):
        accumulate(sums, gradients, backend, scale)
    return {str(index): total for index, total in enumerate(sums)}


@functools.cache
def reference_result(dtype: torch.dtype, scale: float) -> dict[str, Tensor]:
    return result(gradients_of(dtype), "reference", scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_every_column_equals_the_reference(column: str, dtype: torch.dtype, scale: float) -> None:
    gradients = [placed(gradient, column) for gradient in gradients_of(dtype)]
    before = [storage_of(gradient).clone() for gradient in gradients]
    assert_same_bits(result(gradients, column, scale), reference_result(dtype, scale))
    for gradient, stored in zip(gradients, before, strict=True):
        assert torch.equal(storage_of(gradient).nan_to_num(3.0), stored.nan_to_num(3.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_operation_rounds_once(backend: str, dtype: torch.dtype) -> None:
    """NumPy computes eq. 13 operation by operation."""
    gradient = random_values((1003,), dtype, "transcription")
    total = random_values((1003,), torch.float32, "total").abs_()
    wide = gradient.double().numpy() if dtype == torch.float64 else gradient.float().numpy()
    single, scale = wide.astype(np.float32), np.float32(0.3)
    squared = (single * single).astype(np.float32)
    expected = total.numpy() + (scale * squared).astype(np.float32)
    contracted = (total.double().numpy() + 0.3 * wide.astype(np.float64) ** 2).astype(np.float32)
    assert (expected != contracted).any()
    total = placed(total, backend)
    accumulate([total], [placed(gradient, backend)], backend, 0.3)
    assert total.cpu().numpy().tobytes() == expected.tobytes()


@pytest.mark.threads
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_leave_the_same_bits(column: str, threads: int) -> None:
    gradients = [
        random_values((rows, 1031), torch.float32, "threads", rows) for rows in (1, 40, 0, 97, 2)
    ] + [random_values((), torch.float32, "scalar"), random_values((0,), torch.float32)]
    expected = result(gradients, "reference")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_same_bits(result(gradients, column), expected)
    finally:
        torch.set_num_threads(before)


def test_many_tensors_of_all_types_in_one_call(column: str) -> None:
    gradients = [gradient for dtype in DTYPES for gradient in gradients_of(dtype, rows=3)]
    found = result(gradients, column, times=1)
    one_by_one = sums_of(gradients)
    for total, gradient in zip(one_by_one, gradients, strict=True):
        accumulate([total], [gradient], "reference")
    assert_same_bits(found, {str(index): total for index, total in enumerate(one_by_one)})


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_strides(column: str, data: st.DataObject) -> None:
    """Permuted, sliced, reversed-in-order and expanded gradients of up to six dimensions."""
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=6))
    values = random_values(sizes, torch.float32, *sizes)
    view = values.permute(data.draw(st.permutations(range(len(sizes)))))
    for dim in range(view.dim()):
        view = view.unflatten(dim, (1, -1)).squeeze(dim)
        start = data.draw(st.integers(0, view.shape[dim] - 1))
        step = data.draw(st.integers(1, 3))
        view = view[(slice(None),) * dim + (slice(start, None, step),)]
    if data.draw(st.booleans()):
        view = view.unsqueeze(1).expand(view.shape[0], 5, *view.shape[1:])
    assert_same_bits(result([view], column), result([view.contiguous()], "reference"))


def test_more_dimensions_than_registers_count(column: str) -> None:
    many = random_values((2,) * 14, torch.float32).permute(*range(13, -1, -1))
    assert_same_bits(result([many], column), result([many.contiguous()], "reference"))
    ones = random_values((3, 70), torch.float32).t().reshape(70, *(1,) * 80, 3)
    assert_same_bits(result([ones], column), result([ones.contiguous()], "reference"))


def test_nothing_beside_the_sums_is_written(column: str) -> None:
    whole = placed(torch.full((4096 + 37 + 6,), GUARD), column)
    inside = whole[3:-3]
    accumulate([inside], [torch.ones_like(inside)], column)
    assert (inside == GUARD + 1).all()
    assert (whole[:3] == GUARD).all()
    assert (whole[-3:] == GUARD).all()


def test_nothing_to_do(backend: str) -> None:
    accumulate([], [], backend)
    empty = placed(torch.empty(0, 3), backend)
    accumulate([empty], [empty], backend)


def test_a_negative_view_and_a_gradient_with_history(backend: str) -> None:
    drawn = torch.randn(70, dtype=torch.complex64, generator=generator_of(1))
    negative = torch.imag(placed(drawn, backend).conj())
    assert negative.is_neg()
    total = torch.zeros_like(negative)
    accumulate([total], [negative], backend)
    assert torch.equal(total, negative * negative)
    weight = torch.ones_like(total, requires_grad=True)
    accumulate([total], [weight * 2], backend)
    assert not total.requires_grad


def refused(message: str, sums: list[Tensor], gradients: list[Tensor], **options: float) -> None:
    before = [total.clone() for total in sums]
    with pytest.raises(ValueError, match=message):
        accumulate(sums, gradients, "reference", **options)
    assert all(torch.equal(a, b) for a, b in zip(sums, before, strict=True))


def test_what_cannot_be_added_is_refused_before_anything_is_written() -> None:
    good, ones = torch.zeros(4), torch.ones(4)
    refused("layout torch.sparse_coo.*sparse=False", [good, ones], [ones, ones.to_sparse()])
    refused("#1: dtype torch.complex64", [good, ones], [ones, ones + 1j])
    refused("#1: dtype torch.int64", [good, ones], [ones, ones.long()])
    refused(r"\(5,\) on cpu for sums of \(4,\)", [good, ones], [ones, torch.ones(5)])
    refused("on meta for sums", [good, ones], [ones, torch.ones(4, device="meta")])
    refused("contiguous float32", [good, ones.double()], [ones, ones])
    refused("contiguous float32", [good, torch.ones(8)[::2]], [ones, ones])
    refused("same tensor", [good, good], [ones, ones])
    refused("1 gradients for 2 sums", [good, ones.clone()], [ones])
    for scale in (0.0, -1.0, float("nan"), float("inf"), 1e-60, 1e60):
        refused("positive and finite", [good], [ones], scale=scale)


def test_messages_name_the_parameter() -> None:
    choice = registry.choose("fisher_accumulate", "cpu", "reference")
    with pytest.raises(ValueError, match=r"gradient of encoder\.weight: dtype"):
        ops.fisher_accumulate_(
            [torch.zeros(4)], [torch.ones(4).long()], choice, labels=["encoder.weight"]
        )
