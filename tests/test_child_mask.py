"""ChildMask: the layout of its words, its numbers, its set algebra and its errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from childtune_kernels import ChildMask

NUMELS = (1, 2, 31, 32, 33, 63, 64, 65, 100)


def bools(number: int, numel: int) -> Tensor:
    """The lowest bits of a number as a bool tensor, bit 0 first."""
    return torch.tensor([number >> element & 1 == 1 for element in range(numel)], dtype=torch.bool)


def signed(word: int) -> int:
    return word - (word >> 31 << 32)


def small_mask() -> ChildMask:
    return ChildMask.from_dense(
        {"a.weight": bools(0b101101, 6).view(2, 3), "a.bias": bools(0b10, 2)}, dense=["head"]
    )


@pytest.mark.parametrize("numel", NUMELS)
def test_every_single_bit_has_its_place(numel: int) -> None:
    for element in range(numel):
        mask = ChildMask.from_dense({"w": bools(1 << element, numel)})
        expected = [0] * ((numel + 31) // 32)
        expected[element // 32] = signed(1 << element % 32)
        assert mask.words["w"].tolist() == expected
        assert mask.words["w"].dtype == torch.int32


@pytest.mark.parametrize("numel", NUMELS)
def test_bits_past_the_end_are_zero(numel: int) -> None:
    words = ChildMask.from_dense({"w": torch.ones(numel, dtype=torch.bool)}).words["w"]
    full, tail = divmod(numel, 32)
    assert words.tolist() == [-1] * full + [signed((1 << tail) - 1)] * (tail > 0)


def test_elements_are_counted_row_major_whatever_the_strides() -> None:
    bits = bools(0b110010, 6).view(2, 3)
    transposed = bits.t().contiguous().t()
    assert not transposed.is_contiguous()
    every_second = torch.stack([bits, ~bits], dim=-1)[..., 0]
    for same in (bits, transposed, every_second):
        mask = ChildMask.from_dense({"w": same})
        assert mask.words["w"].tolist() == [0b110010]
        assert torch.equal(mask.dense("w"), bits)


def test_numbers_of_a_mask() -> None:
    mask = small_mask()
    assert mask.names == ["a.weight", "a.bias", "head"]
    assert (mask.count(), mask.count("a.weight"), mask.count("a.bias")) == (5, 4, 1)
    assert (mask.numel(), mask.numel("a.weight")) == (8, 6)
    assert (mask.density(), mask.density("a.bias")) == (5 / 8, 1 / 2)
    assert mask.shapes["a.weight"] == (2, 3)
    assert mask.dense_names == {"head"}
    assert [name in mask for name in ("a.weight", "head", "module.head", "tail")] == [
        True,
        True,
        True,
        False,
    ]
    assert "5 of 8" in repr(mask)
    assert "1 train densely" in repr(mask)


def test_empty_and_scalar_parameters() -> None:
    mask = ChildMask.from_dense({"scalar": torch.tensor(True), "empty": torch.ones(0, 3) > 0})
    assert mask.words["scalar"].tolist() == [1]
    assert mask.words["empty"].shape == (0,)
    assert mask.dense("scalar").shape == ()
    assert mask.dense("empty").shape == (0, 3)
    assert (mask.count(), mask.count("empty"), mask.density()) == (1, 0, 1.0)
    assert (~mask).count() == 0
    with pytest.raises(ValueError, match="without elements"):
        mask.density("empty")


def test_a_mask_of_dense_parameters_only() -> None:
    mask = ChildMask.from_dense({}, dense=["b", "a"])
    assert mask.names == ["a", "b"]
    assert mask.count() == 0
    assert "2 dense" in repr(mask)
    with pytest.raises(ValueError, match="without elements"):
        mask.density()


def test_wrapper_prefixes_do_not_count() -> None:
    bits = bools(0b1011, 4)
    plain = ChildMask.from_dense({"layer.weight": bits}, dense=["head.bias"])
    wrapped = ChildMask.from_dense(
        {"module._orig_mod.layer._fsdp_wrapped_module.weight": bits}, dense=["module.head.bias"]
    )
    assert plain == wrapped
    assert torch.equal(wrapped.dense("_orig_mod.layer.weight"), bits)


def test_a_mask_does_not_follow_what_it_was_made_of() -> None:
    bits = bools(0b1, 40)
    mask = ChildMask.from_dense({"w": bits})
    bits.fill_(True)
    assert mask.count() == 1
    mask.dense("w").fill_(True)
    assert mask.count() == 1
    with pytest.raises(TypeError):
        mask.words["w"] = torch.zeros(2, dtype=torch.int32)  # type: ignore[index]


def test_copies_and_pickles_are_equal_masks() -> None:
    mask = small_mask()
    assert copy.deepcopy(mask) == mask
    assert pickle.loads(pickle.dumps(mask)) == mask


def test_a_mask_moves_between_devices() -> None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = accelerator or torch.device("cpu")
    moved = small_mask().to(device)
    assert moved.words["a.weight"].device.type == device.type
    assert moved == small_mask()
    assert moved.to("cpu").count("a.weight") == 4


@pytest.mark.parametrize(
    ("masks", "dense", "message"),
    [
        ({"w": torch.ones(3)}, (), r"w: torch.float32; a bool tensor is needed, compare first"),
        ({"w": [True, False]}, (), r"w: list; a bool tensor is needed"),
        ({"w": bools(1, 3), "module.w": bools(1, 3)}, (), "label 'w' stands for two .* rename one"),
        ({"w": bools(1, 3)}, ["a", "module.a"], "label 'a' stands for two parameters"),
        ({"w": bools(1, 3)}, ["w"], "w cannot be dense and have a mask; name them once"),
        ({}, (), "needs at least one parameter"),
        ({"_orig_mod": bools(1, 3)}, (), "'_orig_mod' has no label"),
        ({"w": bools(1, 3)}, "head", "dense"),
    ],
)
def test_from_dense_refuses(masks: dict[str, Tensor], dense: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChildMask.from_dense(masks, dense)


def int32(*words: int) -> Tensor:
    return torch.tensor(words, dtype=torch.int32)


@pytest.mark.parametrize(
    ("words", "shapes", "message"),
    [
        ({"w": int32(1)}, {"v": (3,)}, "different parameters: v, w"),
        (
            {"w": int32(1, 1)},
            {"w": (32,)},
            r"w: words .* for 32 elements; expected int32 and \(1,\)",
        ),
        ({"w": int32(1).long()}, {"w": (3,)}, "w: words of torch.int64"),
        ({"w": int32(1).view(1, 1)}, {"w": (3,)}, r"w: words .* shape \(1, 1\)"),
        ({"w": int32(0b1000)}, {"w": (3,)}, "w: bits are set past its 3 elements"),
        ({"w": int32(-1, -1)}, {"w": (3, 11)}, "w: bits are set past its 33 elements"),
        ({"w": int32(1)}, {"w": (-4, -8)}, "w"),
    ],
)
def test_words_that_do_not_fit_are_refused(
    words: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ChildMask(words, shapes)


@pytest.mark.parametrize("number", [signed(0x80000000), -1])
def test_the_highest_bit_of_a_full_word_is_no_error(number: int) -> None:
    assert ChildMask({"w": int32(number)}, {"w": (32,)}).dense("w")[31]


def test_looking_up_a_name_without_words() -> None:
    mask = small_mask()
    for ask in (mask.dense, mask.count, mask.numel, mask.density):
        with pytest.raises(KeyError, match=r"head trains densely; .*a\.weight, a\.bias"):
            ask("head")
        with pytest.raises(KeyError, match="tail is not in this mask"):
            ask("tail")


SHAPES = st.dictionaries(
    st.sampled_from(["a", "b.weight", "b.bias", "c"]),
    st.lists(st.integers(0, 6), max_size=3).map(tuple) | st.integers(0, 70).map(lambda n: (n,)),
    min_size=1,
)


@st.composite
def two_masks(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    shapes = draw(SHAPES)
    first, second = (
        {
            name: bools(draw(st.integers(0, 2**numel - 1)), numel).view(shape)
            for name, shape in shapes.items()
            for numel in [torch.Size(shape).numel()]
        }
        for _ in range(2)
    )
    return first, second


@settings(max_examples=60, deadline=None)
@given(two_masks())
def test_set_algebra_is_that_of_bool_tensors(
    both: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> None:
    first, second = both
    a, b = (ChildMask.from_dense(bits, dense=["head"]) for bits in both)
    for name, bits in first.items():
        assert torch.equal(a.dense(name), bits)
        assert torch.equal((a & b).dense(name), bits & second[name])
        assert torch.equal((a | b).dense(name), bits | second[name])
        assert torch.equal((~a).dense(name), ~bits)
        assert a.count(name) == int(bits.sum())
    assert (a == b) == all(torch.equal(first[name], second[name]) for name in first)
    assert (a & b).dense_names == (~a).dense_names == {"head"}
    shared = sum(int((first[name] & second[name]).sum()) for name in first)
    union = sum(int((first[name] | second[name]).sum()) for name in first)
    assert a.count() + (~a).count() == a.numel()
    if a.count():
        assert a.overlap(b) == shared / a.count()
    if union:
        assert a.jaccard(b) == b.jaccard(a) == shared / union


def test_order_of_names_does_not_matter_for_equality() -> None:
    one, two = {"a": bools(1, 3), "b": bools(2, 3)}, {"b": bools(2, 3), "a": bools(1, 3)}
    assert ChildMask.from_dense(one) == ChildMask.from_dense(two)
    assert (ChildMask.from_dense(one) & ChildMask.from_dense(two)).count() == 2


@pytest.mark.parametrize(
    ("other", "culprit"),
    [
        (ChildMask.from_dense({"a": bools(1, 4), "c": bools(1, 4)}, ["head"]), "c"),
        (ChildMask.from_dense({"a": bools(1, 4).view(2, 2)}, ["head"]), "a"),
        (ChildMask.from_dense({"a": bools(1, 4)}), "head"),
        (ChildMask.from_dense({"a": bools(1, 4)}, ["head", "tail"]), "tail"),
        (ChildMask.from_dense({"head": bools(1, 4)}, ["a"]), "a, head"),
    ],
)
def test_other_scopes_do_not_combine(other: ChildMask, culprit: str) -> None:
    mask = ChildMask.from_dense({"a": bools(1, 4)}, ["head"])
    assert mask != other
    for combine in (mask.__and__, mask.__or__, mask.overlap, mask.jaccard):
        with pytest.raises(ValueError, match=f"parameters: {culprit}; compare equal scopes"):
            combine(other)


def test_empty_children_have_no_overlap() -> None:
    empty, full = (ChildMask.from_dense({"a": bools(bits, 4)}) for bits in (0, 15))
    assert full.overlap(empty) == 0.0
    assert empty.jaccard(full) == 0.0
    with pytest.raises(ValueError, match="overlap of an empty child"):
        empty.overlap(full)
    with pytest.raises(ValueError, match="jaccard of two empty children"):
        empty.jaccard(empty)


def test_masks_combine_with_masks_only() -> None:
    mask = small_mask()
    assert mask != {"a.weight": mask.dense("a.weight")}
    with pytest.raises(TypeError):
        mask & {"a.weight": mask.dense("a.weight")}  # type: ignore[operator]
    with pytest.raises(TypeError):
        hash(mask)
