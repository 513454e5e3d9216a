"""The database of optimizer inputs: a table of records, and the runner that steps through them.

Values are drawn on the CPU, whatever the device they are for.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from childtune_kernels import ChildMask, FusedChildAdamW, ops
from childtune_kernels.labels import philox_key
from childtune_kernels.plan_row import contiguous_map

from .child_states import LAYOUTS, lay_out_children, state_in_full
from .columns import CPU, device_of, in_memory_of, placed, storage_of

SEED = 1234
STEPS = 4
GUARD = 77.0  # stands in the gaps of strided tensors, where nobody may write
DENSE_NAME = "odd_offset"  # trains densely in every fixed mask


@dataclass(frozen=True)
class Case:
    """One setting of the optimizer: a record of the table."""

    name: str
    dtype: torch.dtype = torch.float32
    grad_dtype: torch.dtype | None = None
    reserve_p: float = 1.0
    fixed_mask: bool = False
    freeze_non_child: bool = True
    convention: str = "torch"
    correct_bias: bool = True
    maximize: bool = False
    master_weight: str = "auto"
    state_dtype: torch.dtype | None = None
    child_state: str = "dense"
    layout: str | None = None  # of compact state; None: what the optimizer chooses
    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.1
    first_step: int = 1

    def __str__(self) -> str:
        return self.name

    @property
    def masked(self) -> bool:
        return self.fixed_mask or self.reserve_p < 1

    @property
    def in_dense_state(self) -> Case:
        """The same setting with moments for every weight, one for all layouts."""
        name = self.name.removesuffix(f"-{self.layout or 'chosen'}")
        return dataclasses.replace(self, name=name, child_state="dense", layout=None)

    def options(self) -> dict[str, Any]:
        """The keyword arguments of FusedChildAdamW."""
        foreign = ("name", "dtype", "grad_dtype", "fixed_mask", "layout", "first_step")
        return {key: value for key, value in vars(self).items() if key not in foreign}


_TYPES: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "fp64": {"dtype": torch.float64},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "bf16_fp32_gradient": {"dtype": torch.bfloat16, "grad_dtype": torch.float32},
    "fp16_fp32_gradient": {"dtype": torch.float16, "grad_dtype": torch.float32},
    "bf16_fp32_master": {"dtype": torch.bfloat16, "master_weight": "fp32"},
    "bf16_no_master": {"dtype": torch.bfloat16, "master_weight": "none"},
    "fp16_no_master": {"dtype": torch.float16, "master_weight": "none"},
    "bf16_fp32_gradient_no_master": {
        "dtype": torch.bfloat16,
        "grad_dtype": torch.float32,
        "master_weight": "none",
    },
    "fp16_fp32_gradient_no_master": {
        "dtype": torch.float16,
        "grad_dtype": torch.float32,
        "master_weight": "none",
    },
}
# What is rounded by random words (SPEC.md, eq. 18).
_ROUNDED: dict[str, dict[str, Any]] = {
    "fp32_bf16_state": {"dtype": torch.float32},
    "bf16_bf16_state": {"dtype": torch.bfloat16},
    "bf16_fp32_gradient_bf16_state": {"dtype": torch.bfloat16, "grad_dtype": torch.float32},
    "bf16_fp32_master_bf16_state": {"dtype": torch.bfloat16, "master_weight": "fp32"},
    "bf16_stochastic_bf16_state": {"dtype": torch.bfloat16, "master_weight": "stochastic"},
    "fp16_bf16_state": {"dtype": torch.float16},
}
_ROUNDED = {
    "bf16_stochastic": {"dtype": torch.bfloat16, "master_weight": "stochastic"},
    "bf16_fp32_gradient_stochastic": {
        "dtype": torch.bfloat16,
        "grad_dtype": torch.float32,
        "master_weight": "stochastic",
    },
    **{kind: {**types, "state_dtype": torch.bfloat16} for kind, types in _ROUNDED.items()},
}
_MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bernoulli": {"reserve_p": 0.3},
    "fixed": {"fixed_mask": True},
    "fixed_decaying": {"fixed_mask": True, "freeze_non_child": False},
    "both": {"reserve_p": 0.3, "fixed_mask": True},
    "both_decaying": {"reserve_p": 0.3, "fixed_mask": True, "freeze_non_child": False},
}
PRODUCT = [
    Case(f"{kind}-{mask}-{convention}", **_TYPES[kind], **_MASKS[mask], convention=convention)
    for kind, mask, convention in itertools.product(_TYPES, _MASKS, ("torch", "original"))
]
# To what is rounded by words a convention is a number: a type and mask meet one of the two.
PRODUCT += [
    Case(f"{kind}-{mask}", **types, **options, convention=("torch", "original")[index % 2])
    for index, ((kind, types), (mask, options)) in enumerate(
        itertools.product(_ROUNDED.items(), _MASKS.items())
    )
]
# What the product leaves at its defaults, and the ends of ranges.
SINGLES = [
    Case("no_bias_correction", correct_bias=False, reserve_p=0.3),
    Case("original_no_bias_correction", correct_bias=False, convention="original", reserve_p=0.3),
    Case("maximize", maximize=True, reserve_p=0.3),
    Case("maximize_bf16", maximize=True, dtype=torch.bfloat16, fixed_mask=True),
    Case("no_decay", weight_decay=0.0, fixed_mask=True, freeze_non_child=False),
    Case(
        "no_decay_bf16", torch.bfloat16, weight_decay=0.0, fixed_mask=True, freeze_non_child=False
    ),
    Case("decay_below_fp32", weight_decay=1e-44, fixed_mask=True, freeze_non_child=False),
    Case("no_lr", lr=0.0, reserve_p=0.5),
    Case("no_betas", betas=(0.0, 0.0), reserve_p=0.5),
    Case("slow_betas", betas=(0.9999, 0.99999), reserve_p=0.5),
    Case("eps_0", eps=0.0),
    Case("eps_subnormal", eps=1e-40, reserve_p=0.5),
    Case("eps_large", eps=1e8, lr=1e6, reserve_p=0.5, weight_decay=1e-9),
    Case("lr_large_fp16", torch.float16, lr=1e3, reserve_p=0.5, weight_decay=1e-4),
    Case("keeps_almost_none", reserve_p=2.0**-32),
    Case("keeps_almost_all", reserve_p=1 - 2.0**-32, fixed_mask=True),
    Case("keeps_all_but_rescales", reserve_p=1 - 2.0**-40),
    Case("fp64_half", torch.float64, reserve_p=0.5, maximize=True, correct_bias=False),
    Case("step_wraps", reserve_p=0.3, first_step=2**32 - 2),
    Case("step_wraps_original", reserve_p=0.3, convention="original", first_step=2**32 - 2),
    Case("step_large_fp64", torch.float64, reserve_p=0.3, first_step=2**40 + 3),
]


def _compact_product() -> Iterator[Case]:
    """Compact state: every type and mask, by every layout and by the optimizer's own choice."""
    masks = {name: mask for name, mask in _MASKS.items() if mask.get("fixed_mask")}
    for (kind, types), (name, mask) in itertools.product(
        (_TYPES | _ROUNDED).items(), masks.items()
    ):
        has_master = types.get("master_weight") != "none" and types["dtype"].itemsize == 2
        if has_master and not mask.get("freeze_non_child", True):
            continue  # refused
        # The kernels' code differs by type, layout and mask; conventions meet in the layouts' turn.
        for index, layout in enumerate((*LAYOUTS, None)):
            convention = ("torch", "original")[(index + len(name)) % 2]
            yield Case(
                f"compact-{kind}-{name}-{layout or 'chosen'}", **types, **mask,
                convention=convention, child_state="compact", layout=layout,
            )  # fmt: skip


COMPACT = [*_compact_product()]
CASES = [*PRODUCT, *SINGLES, *COMPACT]
# Kinds whose rounding by words meets every line of the kernels; the others wait for the long tests.
_USUALLY_ROUNDED = ("fp32_bf16_state", "bf16_stochastic", "bf16_stochastic_bf16_state")


def as_parameters(cases: Iterable[Case]) -> list[Any]:
    """The cases as pytest takes them, most kinds of rounding by words marked slow."""
    seldom = _ROUNDED.keys() - {*_USUALLY_ROUNDED}
    return [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] if kind in seldom else [])
        for case in cases
        for kind in [case.name.removeprefix("compact-").split("-")[0]]
    ]


def _plain(values: Tensor) -> Tensor:
    return values.clone()


def _transposed(values: Tensor) -> Tensor:
    return values.t().contiguous().t()


def _channels_last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last)


def _column_slice(values: Tensor) -> Tensor:
    rows, columns = values.shape
    whole = values.new_full((rows, columns + 9), GUARD)
    whole[:, 4 : 4 + columns] = values
    return whole[:, 4 : 4 + columns]


def _odd_offset(values: Tensor) -> Tensor:
    whole = values.new_full((values.numel() + 6,), GUARD)
    return whole[3:-3].view(values.shape).copy_(values)


def _every_second(values: Tensor) -> Tensor:
    return values.new_full((2 * values.numel(),), GUARD)[1::2].copy_(values)


def _four_levels(values: Tensor) -> Tensor:
    sizes = [2 * size for size in values.permute(2, 0, 3, 1).shape]
    whole = values.new_full(sizes, GUARD)[::2, ::2, ::2, ::2]
    return whole.permute(1, 3, 0, 2).copy_(values)


class Shape(NamedTuple):
    """Sizes of a parameter and its place in memory."""

    sizes: tuple[int, ...]
    lay_out: Callable[[Tensor], Tensor] = _plain


SHAPES = {
    "matrix": Shape((67, 129)),  # three units of 4096 elements
    "empty": Shape((0, 3)),
    "scalar": Shape(()),
    "one": Shape((1,)),
    "block": Shape((64,)),
    "unit": Shape((4096,)),
    "transposed": Shape((33, 70), _transposed),
    "channels_last": Shape((3, 5, 4, 6), _channels_last),
    "column_slice": Shape((41, 13), _column_slice),
    DENSE_NAME: Shape((5, 27), _odd_offset),
    "every_second": Shape((131,), _every_second),
    "four_levels": Shape((2, 3, 4, 5), _four_levels),
    "trailing_empty": Shape((0,)),
}
# (parameter, step): no gradient there, so that parameters differ in their step counts.
WITHOUT_GRADIENT = {("transposed", 1), ("scalar", 2), ("column_slice", 0)}
# The child of these is everything, nothing and whole words; of the others two elements in five.
_CHILDREN: dict[str, Callable[[Tensor], Tensor]] = {
    "block": torch.ones_like,
    "one": torch.zeros_like,
    "unit": lambda random: (torch.arange(4096) // 96) % 2 == 0,
}


def generator_of(*what: object) -> torch.Generator:
    """Random numbers that depend on what they are for, and not on the order of asking."""
    return torch.Generator().manual_seed(zlib.crc32(repr(what).encode()))


def random_values(sizes: Iterable[int], dtype: torch.dtype, *what: object) -> Tensor:
    """Normal numbers over twelve binades, with zeros of both signs and subnormals among them."""
    generator = generator_of(*what)
    values = torch.randn(tuple(sizes), generator=generator, dtype=torch.float64)
    values *= torch.randint(-9, 3, values.shape, generator=generator).double().exp2()
    values = values.to(dtype)
    flat = values.view(-1)
    for start, special in enumerate((0.0, -0.0, torch.finfo(dtype).tiny / 8)):
        flat[5 + 7 * start :: 97] = special
    return values


def children(shapes: Mapping[str, Shape] = SHAPES) -> ChildMask:
    """A fixed mask of the parameters."""
    masks = {}
    for name, shape in shapes.items():
        if name != DENSE_NAME:
            random = torch.rand(shape.sizes, generator=generator_of("child", name)) < 0.4
            masks[name] = _CHILDREN.get(name, torch.clone)(random)
    return ChildMask.from_dense(masks, dense=[DENSE_NAME])


def kept_places(case: Case, name: str, sizes: tuple[int, ...], step: int) -> Tensor:
    """Where the gradient of a parameter's ``step`` counts, as bool."""
    kept = torch.ones(sizes, dtype=torch.bool)
    if case.reserve_p < 1:
        words = ops.keep_words(
            kept.numel(),
            contiguous_map(kept.numel()),
            philox_key(SEED, name),
            step,
            round(case.reserve_p * 2**32),
            backend="reference",
        )
        kept = ops.unpack_mask(words, sizes, backend="reference")
    if case.fixed_mask and name != DENSE_NAME:
        kept = kept & children().dense(name)
    return kept


@functools.cache
def gradients_of(
    case: Case, poisoned: bool = True, device: torch.device = CPU
) -> list[dict[str, Tensor | None]]:
    """Gradients by step and name; dropped places hold NaN and infinities, or else 0."""
    if device != CPU:
        return [
            {
                name: None if drawn is None else in_memory_of(drawn, device)
                for name, drawn in step.items()
            }
            for step in gradients_of(case, poisoned)
        ]
    counts = dict.fromkeys(SHAPES, case.first_step - 1)
    dtype = case.grad_dtype or case.dtype
    poison = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
    steps: list[dict[str, Tensor | None]] = []
    for step in range(STEPS):
        gradients: dict[str, Tensor | None] = {}
        for name, shape in SHAPES.items():
            if (name, step) in WITHOUT_GRADIENT:
                gradients[name] = None
                continue
            counts[name] += 1
            values = random_values(shape.sizes, dtype, "gradient", name, step)
            if case.masked:
                dropped = ~kept_places(case, name, shape.sizes, counts[name])
                filling = poison if poisoned else torch.zeros_like(poison)
                count = int(dropped.sum())
                values[dropped] = filling.repeat(count // 3 + 1)[:count]
            # Every second gradient has strides of its own where that can be.
            same = step % 2 == 0 or name in ("column_slice", "every_second", "four_levels")
            gradients[name] = shape.lay_out(values) if same else values
        steps.append(gradients)
    return steps


def make_parameters(case: Case, backend: str | None = None) -> dict[str, Tensor]:
    """The parameters of a case at their first values, where a backend is tested."""
    parameters: dict[str, Tensor] = {}
    for name, shape in SHAPES.items():
        values = random_values(shape.sizes, case.dtype, "weight", name)
        parameter = torch.nn.Parameter(placed(shape.lay_out(values), backend))
        if case.grad_dtype is not None:
            parameter.grad_dtype = case.grad_dtype
        parameters[name] = parameter
    return parameters


Arrangement = Callable[[dict[str, Tensor]], Any]


def one_group(parameters: dict[str, Tensor]) -> Any:
    """The usual arrangement: one group, in the order of the table."""
    return list(parameters.items())


def run(
    case: Case, backend: str | None, arrange: Arrangement = one_group, *, poisoned: bool = True
) -> dict[str, Tensor]:
    """Every step of a case: all weights, the memory around them, and all state, by name, on the CPU."""
    parameters = make_parameters(case, backend)
    mask = children() if case.fixed_mask else None
    optimizer = FusedChildAdamW(
        arrange(parameters), **case.options(), child_mask=mask, seed=SEED, backend=backend
    )
    for name in parameters:
        optimizer.state[parameters[name]]["step"].fill_(case.first_step - 1)
    if case.layout is not None:
        lay_out_children(optimizer, case.layout)
    for gradients in gradients_of(case, poisoned, device_of(backend)):
        for name, gradient in gradients.items():
            parameters[name].grad = gradient
        optimizer.step()
    outcome = {}
    for name, parameter in parameters.items():
        outcome[f"{name} weight"] = parameter.detach().cpu()
        outcome[f"{name} storage"] = storage_of(parameter).cpu()
        for key, tensor in state_in_full(parameter, optimizer.state[parameter]).items():
            outcome[f"{name} {key}"] = tensor
    return outcome


@functools.cache
def reference_outcome(case: Case) -> dict[str, Tensor]:
    """What the reference makes of a case."""
    return run(case, "reference")


_INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def bit_pattern(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers on the CPU; NaN payloads are excluded, but bf16 has one NaN (SPEC.md)."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype not in _INTEGERS:
        return tensor
    if tensor.dtype != torch.bfloat16:
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
    return tensor.view(_INTEGERS[tensor.dtype])


def raw_bits(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers on the CPU, NaN payloads included."""
    return tensor.detach().cpu().contiguous().view(_INTEGERS.get(tensor.dtype, tensor.dtype))


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Every tensor of the one equals its namesake in the other, bit for bit."""
    assert found.keys() == expected.keys()
    differing = {}
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert found[name].dtype == tensor.dtype, name
        count = int((bit_pattern(found[name]) != bit_pattern(tensor)).sum())
        if count:
            differing[name] = f"{count} of {tensor.numel()}"
    assert not differing, differing
