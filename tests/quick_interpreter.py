"""Triton's interpreter in a fraction of the time, for tests.

Nearly all of it is bookkeeping that Python does around NumPy's operations: what is told again and again is
kept. No value becomes another; runs of tests/test_interpreted.py that are ``plain`` do without, as does the
whole of `make test-slow`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

_ROUND_A, _ROUND_B = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_A, _KEY_B = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_HALF = np.uint64(32)


def quicken_interpreter() -> None:
    """Replace what takes the time, for the rest of the process."""
    _keep_patches()
    _keep_types()
    _pass_operands_that_agree()
    _philox_by_numpy()


def _keep_patches() -> None:
    """Let every device function replace the functions of triton.language at its first call alone.

    What a kernel's start replaces is put back at its end, and replaced again by the next one's; what
    the functions of triton.language's own library need stays.
    """
    from triton.runtime.interpreter import InterpretedFunction

    replaces_first = InterpretedFunction.__call__
    called = set()

    def call(function: Any, *arguments: Any, **options: Any) -> Any:
        if function.fn in called:
            return function.rewrite()(*arguments, **options)
        called.add(function.fn)
        return replaces_first(function, *arguments, **options)

    InterpretedFunction.__call__ = call


def _keep_types() -> None:
    """Make each type of blocks once, and what a tensor tells of its type once a type."""
    from triton.language import core
    from triton.runtime import interpreter

    blocks: dict[tuple[str, str], Any] = {}

    def with_element_ty(block: Any, scalar: Any) -> Any:
        key = block.name, scalar.name
        if key not in blocks:
            blocks[key] = core.block_type(scalar, block.shape)
        return blocks[key]

    of_blocks = core.block_type.__eq__
    core.block_type.__eq__ = lambda block, other: block is other or of_blocks(block, other)
    core.block_type.with_element_ty = with_element_ty
    core.block_type.to_ir = lambda block, builder: (
        block
    )  # types of triton.language are the builder's

    make_tensor = core.tensor.__init__
    shapes: dict[str, tuple[Any, Any]] = {}

    def initialize(tensor: Any, handle: Any, type: Any) -> None:
        if type.name not in shapes:
            make_tensor(tensor, handle, type)
            shapes[type.name] = tensor.shape, tensor.numel
            return
        tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
        tensor.shape, tensor.numel = shapes[type.name]

    core.tensor.__init__ = initialize

    of_numpy = interpreter._get_np_dtype
    numpy_types: dict[str, Any] = {}

    def get_numpy_type(type: Any) -> Any:
        if type.name not in numpy_types:
            numpy_types[type.name] = of_numpy(type)
        return numpy_types[type.name]

    interpreter._get_np_dtype = get_numpy_type


def _pass_operands_that_agree() -> None:
    """Let two tensors of one type through as they are, and ask for no overflow that nobody would hear of.

    The question costs eight operations for every sum of integers; its answer is an assertion of debugging.
    """
    from triton.language import core, semantic
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    check = semantic.TritonSemantic.binary_op_type_checking_impl

    def checked(
        meaning: Any, left: Any, right: Any, allow_left_pointer: bool = False,
        allow_right_pointer: bool = False, arithmetic: bool = True, divides: bool = False,
    ) -> Any:  # fmt: skip
        both = type(left) is type(right) is core.tensor
        if both and left.type is right.type and not divides and not left.dtype.is_ptr():
            return left, right
        return check(
            meaning, left, right, allow_left_pointer, allow_right_pointer, arithmetic, divides
        )

    semantic.TritonSemantic.binary_op_type_checking_impl = checked
    broadcast = semantic.TritonSemantic.broadcast_impl_value

    def broadcast_together(meaning: Any, left: Any, right: Any) -> Any:
        one, other = left.type, right.type
        if one.is_block() and other.is_block() and [*one.shape] == [*other.shape]:
            return left, right
        return broadcast(meaning, left, right)

    semantic.TritonSemantic.broadcast_impl_value = broadcast_together


def _philox_by_numpy() -> None:
    """Compute the words of 32-bit Philox blocks without an object for every step of every round."""
    from triton.language import core, random
    from triton.runtime.interpreter import TensorHandle

    by_triton = random.philox_impl

    def philox_impl(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any, n_rounds: Any) -> Any:
        counter = (c0, c1, c2, c3)
        if any(part.type is not c0.type for part in counter) or c0.dtype != core.uint32:
            return by_triton(c0, c1, c2, c3, k0, k1, n_rounds)
        x0, x1, x2, x3 = (part.handle.data for part in counter)
        key0, key1 = k0.handle.data, k1.handle.data
        for _ in range(getattr(n_rounds, "value", n_rounds)):
            a, b = x0.astype(np.uint64) * _ROUND_A, x2.astype(np.uint64) * _ROUND_B
            x0, x1 = (b >> _HALF).astype(np.uint32) ^ x1 ^ key0, b.astype(np.uint32)
            x2, x3 = (a >> _HALF).astype(np.uint32) ^ x3 ^ key1, a.astype(np.uint32)
            key0, key1 = key0 + _KEY_A, key1 + _KEY_B
        return tuple(
            core.tensor(TensorHandle(words, core.uint32), c0.type) for words in (x0, x1, x2, x3)
        )

    random.philox_impl = philox_impl
