"""random_child: the k smallest words of the mask function, and what follows (SPEC.md, "Random child")."""

from __future__ import annotations

import builtins
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from childtune_kernels import ChildMask, ops, random_child
from childtune_kernels.labels import philox_key
from childtune_kernels.selection import child_size

from .ops import transcription

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"layer.1.weight": (17, 31), "layer.0.weight": (40,), "empty": (0, 3), "bias": ()}
PURPOSE, STEP = 4, 0


def words_of(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, list[int]]:
    """The word of every element, in plain Python."""
    return {
        name: [
            transcription.word_of(element, transcription.key_of(seed, name), STEP, PURPOSE)
            for element in range(torch.Size(shape).numel())
        ]
        for name, shape in shapes.items()
    }


def bits_of(mask: ChildMask) -> dict[str, list[bool]]:
    return {name: mask.dense(name).flatten().tolist() for name in mask.words}


@pytest.mark.parametrize("seed", [0, -7, 2**70 + 1])
@pytest.mark.parametrize("p", [1e-9, 0.01, 0.3, 0.5, 0.999, 1.0])
def test_the_child_is_the_smallest_words(p: float, seed: int) -> None:
    words = words_of(SHAPES, seed)
    order = sorted(
        (word, at, element)
        for at, name in enumerate(words)
        for element, word in enumerate(words[name])
    )
    k = child_size(p, len(order))
    first = {(at, element) for _, at, element in order[:k]}
    expected = {
        name: [(at, element) in first for element in range(len(words[name]))]
        for at, name in enumerate(words)
    }
    mask = random_child(SHAPES, p, seed)
    assert bits_of(mask) == expected
    assert mask.count() == k
    assert mask.shapes["layer.1.weight"] == (17, 31)


def reference_words(key: int, numel: int) -> Tensor:
    from childtune_kernels.backends.reference.philox import element_words

    return element_words(torch.arange(numel), key, STEP, PURPOSE)


def test_equal_words_follow_their_position() -> None:
    """A draw in which the same word comes twice, cut between the two."""
    names, numel = ["b", "a"], 150_000
    drawn = torch.cat([reference_words(philox_key(3, name), numel) for name in names])
    values, order = drawn.sort(stable=True)
    twice = (values[1:] == values[:-1]).nonzero().flatten().tolist()
    assert len(twice) >= 4
    for first in twice:
        k = first + 1
        mask = random_child(dict.fromkeys(names, (numel,)), k / (2 * numel), 3)
        expected = torch.zeros(2 * numel, dtype=torch.bool)
        expected[order[:k]] = True
        assert mask.count() == k
        assert torch.equal(torch.cat([mask.dense(name) for name in names]), expected)
        assert bool(expected[order[first]])
        assert not bool(expected[order[first + 1]])


def test_a_tie_is_cut_by_the_order_of_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """All words equal: the child is then the first k elements, across parameters, at either end."""
    for word in (0, 5, 2**32 - 1):

        def constant(
            numel: int, element_map: Any, key: int, step: int, threshold: int, purpose: int
        ) -> Tensor:
            return ops.pack_mask(torch.full((numel,), word < threshold))  # noqa: B023

        monkeypatch.setattr(ops, "keep_words", constant)
        mask = random_child({"b": (40,), "c": (0,), "a": (50,)}, 0.5, 0)
        assert bits_of(mask) == {"b": [True] * 40, "c": [], "a": [True] * 5 + [False] * 45}


def test_a_smaller_share_is_a_subset() -> None:
    shapes = {"w": (300, 301), "v": (1001,)}
    masks = [random_child(shapes, p, 11) for p in (0.001, 0.1, 0.3, 0.9, 1.0)]
    for small, large in itertools.pairwise(masks):
        assert small.overlap(large) == 1.0
        assert small.count() < large.count()


def test_the_seed_and_the_label_decide() -> None:
    shapes = {"a": (400,), "b": (400,)}
    one = random_child(shapes, 0.3, 1)
    assert one == random_child({"module.a": torch.zeros(400), "b": (400,)}, 0.3, 1)
    assert one != random_child(shapes, 0.3, 2)
    assert not torch.equal(one.words["a"], one.words["b"])
    turned = random_child({"b": (400,), "a": (400,)}, 0.3, 1)
    assert all(torch.equal(one.words[name], turned.words[name]) for name in shapes)
    # Others decide how many of a parameter's words are taken, never which come first.
    beside = random_child({"a": (400,), "c": (5000,)}, 0.3, 1)
    alone = {"one": one.dense("a"), "beside": beside.dense("a")}
    assert bool((alone["one"] & ~alone["beside"]).any()) != bool(
        (alone["beside"] & ~alone["one"]).any()
    )


def test_few_passes_find_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw over a big model is a handful of passes."""
    calls: list[int] = []
    keep_words = ops.keep_words

    def counting(numel: int, *arguments: Any) -> Tensor:
        calls.append(numel)
        return keep_words(numel, *arguments)

    monkeypatch.setattr(ops, "keep_words", counting)
    for p in (0.02, 0.3, 0.7):
        calls.clear()
        assert random_child({"w": (1 << 20,)}, p, 5).count() == child_size(p, 1 << 20)
        assert len(calls) <= 16


def test_dense_names_and_what_is_refused() -> None:
    assert random_child({"w": (40,)}, 0.5, 0, dense=["head"]).names == ["w", "head"]
    for p in (0, -0.5, 1.01, float("nan"), None):
        with pytest.raises(ValueError, match="reserve_p="):
            random_child({"w": (3,)}, p, 0)  # type: ignore[arg-type]
    for seed in (None, 1.0, True, "1"):
        with pytest.raises(ValueError, match="seed="):
            random_child({"w": (3,)}, 0.5, seed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stands for two parameters"):
        random_child({"w": (3,), "module.w": (3,)}, 0.5, 0)


def test_it_works_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = random_child(SHAPES, 0.3, 0)
    real_import = builtins.__import__

    def without_tqdm(name: str, *args: Any) -> Any:
        if name.startswith("tqdm"):
            raise ImportError(name)
        return real_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    assert random_child(SHAPES, 0.3, 0) == expected
