"""Weights as bit patterns: the parts of any tensor, and what is said about them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from childtune_kernels import ops, weight_bits

from .snapshots import bits

KINDS = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
         torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool)  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn, kinds: tuple[torch.dtype, ...] = KINDS) -> Tensor:
    """Random bits of any type, in 0 to 4 dimensions, with permuted, widened or contiguous strides."""
    dtype = draw(st.sampled_from(kinds))
    sizes = draw(st.lists(st.integers(0, 4), max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    wide = [*sizes, 2]
    if dtype == torch.bool:
        values = torch.randint(0, 2, wide, generator=generator).bool()
    else:
        size = torch.empty(0, dtype=dtype).element_size()
        flat = torch.randint(0, 256, (torch.Size(wide).numel() * size,), generator=generator)
        values = flat.to(torch.uint8).view(dtype).view(wide)
    spread = values[..., 0]
    order = draw(st.permutations(range(len(sizes))))
    permuted = spread.permute(order)
    return permuted.contiguous() if draw(st.booleans()) else permuted


@pytest.fixture(autouse=True, params=[1, 7, 64], ids="parts of {}".format)
def part(request: pytest.FixtureRequest) -> object:
    """Small tensors are worked on in many parts."""
    whole, weight_bits.PART = weight_bits.PART, request.param
    yield
    weight_bits.PART = whole


def words_of(tensor: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return ops.pack_mask(torch.rand(tensor.shape, generator=generator) < 0.4)


@settings(max_examples=60, deadline=None)
@given(tensors())
def test_parts_are_the_tensor_in_row_major_order(tensor: Tensor) -> None:
    pattern = weight_bits.bit_pattern(tensor)
    expected = 0
    flat = [torch.empty(0, dtype=pattern.dtype)]
    for start, (one, other) in weight_bits.parts(pattern, pattern.contiguous()):
        assert start == expected
        assert 0 < one.numel() <= weight_bits.PART
        assert torch.equal(one, other)
        expected += one.numel()
        flat.append(one.reshape(-1))
    assert torch.equal(torch.cat(flat), pattern.reshape(-1))


@settings(max_examples=60, deadline=None)
@given(tensors(), st.integers(0, 9))
def test_values_taken_out_and_put_in(tensor: Tensor, seed: int) -> None:
    words = words_of(tensor, seed)
    child = ops.unpack_mask(words, tensor.shape)
    values = weight_bits.child_values(tensor, words)
    assert values.dtype == tensor.dtype
    assert torch.equal(bits(values), bits(weight_bits.bit_pattern(tensor)[child]))
    other = torch.zeros_like(tensor)
    weight_bits.set_child_values_(other, words, values)
    expected = weight_bits.bit_pattern(tensor).masked_fill(~child, 0)
    assert torch.equal(weight_bits.bit_pattern(other), expected)
    weight_bits.set_bits_(other, tensor)
    assert torch.equal(weight_bits.bit_pattern(other), weight_bits.bit_pattern(tensor))


@settings(max_examples=60, deadline=None)
@given(tensors(), st.integers(0, 9), st.data())
def test_one_bit_more_is_a_change(tensor: Tensor, seed: int, data: st.DataObject) -> None:
    words = words_of(tensor, seed)
    other = tensor.clone()
    assert weight_bits.same_bits(tensor, other)
    assert not weight_bits.changed_words(tensor, other).any()
    if not tensor.numel() or tensor.dtype == torch.bool:
        return
    index = data.draw(st.integers(0, tensor.numel() - 1))
    place = torch.unravel_index(torch.tensor(index), tensor.shape)
    weight_bits.bit_pattern(other)[place] ^= 1
    inside = bool(ops.unpack_mask(words, tensor.shape)[place])
    assert not weight_bits.same_bits(tensor, other)
    assert weight_bits.same_bits(tensor, other, words) == inside
    changed = ops.unpack_mask(weight_bits.changed_words(tensor, other), tensor.shape)
    assert changed.sum() == 1
    assert changed[place]
    digests = []
    for weight in (tensor, other):
        for given_words in (None, words):
            digest = weight_bits.BitDigest()
            digest.add("w", weight, given_words)
            digests.append(digest.hexdigest())
    assert digests[0] != digests[2]
    assert (digests[1] == digests[3]) == inside


def test_complex_numbers_have_bits_too() -> None:
    first = torch.tensor([1 + 2j, complex(0.0, -0.0)])
    assert weight_bits.same_bits(first, first.clone())
    assert not weight_bits.same_bits(first, torch.tensor([1 + 2j, 0j]))
    second = torch.zeros(2, dtype=torch.complex64)
    weight_bits.set_bits_(second, first)
    assert torch.equal(bits(first), bits(second))
