"""SPEC.md in plain Python and NumPy, written apart from the package: what its kernels are held against."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

KEEP_ALL = 1 << 32
_WORD = 0xFFFFFFFF

Words = tuple[int, int, int, int]
Array = np.ndarray[Any, np.dtype[Any]]


def philox(counter: Sequence[int], key: tuple[int, int]) -> Words:
    """Eq. 1, as the paper of Salmon et al. defines the ten rounds."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (
            (product1 >> 32) ^ x1 ^ k0,
            product1 & _WORD,
            (product0 >> 32) ^ x3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return x0, x1, x2, x3


def key_of(seed: int, label: str) -> tuple[int, int]:
    """Eq. 4."""
    digest = hashlib.sha256((seed & (2**64 - 1)).to_bytes(8, "little") + label.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def counter_of(element: int, step: int, purpose: int = 0) -> Words:
    """Eq. 2: the counter of an element."""
    block = element // 4
    return block % 2**32, block // 2**32, step % 2**32, purpose


def word_of(element: int, key: tuple[int, int], step: int, purpose: int = 0) -> int:
    """Eq. 2: the word of an element."""
    return philox(counter_of(element, step, purpose), key)[element % 4]


def keep_bits(
    elements: Sequence[int], key: tuple[int, int], step: int, threshold: int, purpose: int = 0
) -> list[bool]:
    """Eq. 2 for each element."""
    if threshold == KEEP_ALL:
        return [True] * len(elements)
    outputs: dict[int, Words] = {}
    for element in elements:
        if element // 4 not in outputs:
            outputs[element // 4] = philox(counter_of(element, step, purpose), key)
    return [outputs[element // 4][element % 4] < threshold for element in elements]


def mapped(local: int, base: int, levels: Sequence[tuple[int, int]]) -> int:
    """Eq. 5 for one local index."""
    index = base
    for size, stride in reversed(levels):
        local, digit = divmod(local, size)
        index += digit * stride
    return index


def packed(bits: Sequence[bool]) -> list[int]:
    """The bit layout of section 2, as int32 values."""
    words = [0] * ((len(bits) + 31) // 32)
    for index, bit in enumerate(bits):
        words[index // 32] |= bit << (index % 32)
    return [word - 2**32 if word >= 2**31 else word for word in words]


@dataclass(frozen=True)
class Options:
    """The options of eq. 6 to 11."""

    lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    reserve_p: float = 1.0
    convention: str = "torch"
    correct_bias: bool = True
    maximize: bool = False


def power(base: float, exponent: int) -> float:
    """Eq. 6."""
    y, z = 1.0, base
    for bit in reversed(bin(exponent)[2:]):
        if bit == "1":
            y *= z
        z *= z
    return y


@dataclass
class Element:
    """Arrays of weights with their moments, all of one type."""

    weight: Array
    exp_avg: Array
    exp_avg_sq: Array


def adamw_step(
    before: Element, gradient: Array, step: int, options: Options, keep: Array | bool = True
) -> Element:
    """Eq. 7 to 11: every NumPy operation rounds once, as SPEC.md's fl(.)."""
    real = before.weight.dtype.type
    o = options
    bc1 = 1.0 - power(o.beta1, step) if o.correct_bias else 1.0
    bc2 = 1.0 - power(o.beta2, step) if o.correct_bias else 1.0
    a, r, eps = real(o.lr * o.weight_decay), real(1.0 / o.reserve_p), real(o.eps)
    with np.errstate(all="ignore"):
        g = -gradient if o.maximize else gradient
        g = g if o.reserve_p == 1.0 else g * r
        g = np.where(keep, g, real(0.0))
        m = real(o.beta1) * before.exp_avg + real(1.0 - o.beta1) * g
        v = real(o.beta2) * before.exp_avg_sq + real(1.0 - o.beta2) * (g * g)
        w = before.weight
        if o.convention == "torch":
            s, b = real(o.lr / bc1), real(1.0 / np.sqrt(bc2))
            w = w - a * w if a else w
            w = w - (s * m) / (np.sqrt(v) * b + eps)
        else:
            s = real(o.lr * float(np.sqrt(bc2)) / bc1)
            w = w - (s * m) / (np.sqrt(v) + eps)
            w = w - a * w if a else w
    return Element(w, m, v)


def run_scores(scores: Sequence[float], granularity: int) -> Array:
    """Eq. 16: fp32 sums of every run, the blocks' trees by recursion."""

    def tree(values: Sequence[np.float32]) -> np.float32:
        if len(values) == 1:
            return values[0]
        half = len(values) // 2
        return tree([np.float32(a + b) for a, b in zip(values[:half], values[half:], strict=True)])

    sums = []
    for start in range(0, len(scores), granularity):
        run = [np.float32(score + 0.0) for score in scores[start : start + granularity]]
        run += [np.float32(0.0)] * (-len(run) % 32)
        with np.errstate(over="ignore"):
            blocks = [tree(run[at : at + 32]) for at in range(0, len(run), 32)]
            total = blocks[0]
            for block in blocks[1:]:
                total = np.float32(total + block)
        sums.append(total)
    return np.array(sums, dtype=np.float32)


def gradient_norm(rows: Sequence[Array]) -> float:
    """Eq. 19 for the x of every row, in double precision."""
    sums = [_unit_sum(row[at : at + 4096]) for row in rows for at in range(0, len(row), 4096)]
    while len(sums) > 1:
        sums = [_unit_sum(np.array(sums[at : at + 4096])) for at in range(0, len(sums), 4096)]
    return sums[0] if sums else 0.0


def _unit_sum(unit: Array) -> float:
    padded = np.zeros(4096)
    padded[: len(unit)] = unit
    columns = np.zeros(128)
    with np.errstate(all="ignore"):
        for k in range(32):
            columns += padded[128 * k : 128 * (k + 1)]
        for h in (64, 32, 16, 8, 4, 2, 1):
            for j in range(h):
                columns[j] = columns[j] + columns[j + h]
    return float(columns[0])
