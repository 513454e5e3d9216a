"""How long does it take to find the child, beside other ways to find its threshold?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from childtune_kernels import ChildMask, ops, select_child, selection

from ..cases import BertSizes, Shapes
from .contest import Comparison, Competitor, Contest, Prepared

Fisher = dict[str, Tensor]

_SHARE = 0.3
_NON_ZERO = 0.2
#: Share and granularity by the competitor's name.
_CHILDREN = {
    "select_0.3": (_SHARE, 1),
    "select_0.1": (0.1, 1),
    "select_0.3_runs": (_SHARE, 256),
}
_ZEROS = "select_0.3_zeros"

SELECT = Competitor("select_0.3", "select_child, p = 0.3")
KTHVALUE = Competitor("kthvalue", "torch.kthvalue of the concatenation")
PERCENTILE = Competitor("percentile", "concatenation, numpy.percentile, >=", slow=True)


def random_fisher(shapes: Shapes, device: torch.device) -> Fisher:
    """Squares of normal numbers, of another size in every tensor, as Fisher information is."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    return {
        name: normal(shape).square_().mul_(torch.exp(2 * normal(()) - 12))
        for name, shape in shapes.items()
    }


def _mostly_zeros(fisher: Fisher) -> Fisher:
    """The same with four elements in five zero, as after few examples: a child of 30 % then needs ties."""
    generator = torch.Generator(next(iter(fisher.values())).device).manual_seed(1)
    return {
        name: value
        * (torch.rand(value.shape, generator=generator, device=value.device) < _NON_ZERO)
        for name, value in fisher.items()
    }


def _select(
    fisher: Fisher, share: float, granularity: int, backend: str | None = None
) -> Callable[[], ChildMask]:
    def select() -> ChildMask:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the zeros in the child
            return select_child(fisher, reserve_p=share, granularity=granularity, backend=backend)

    return select


def _percentile(fisher: Fisher) -> Callable[[], Fisher]:
    """The rule of the original code: everything at or above the percentile of all values in NumPy."""
    import numpy

    def select() -> Fisher:
        values = numpy.concatenate([value.view(-1).cpu().numpy() for value in fisher.values()])
        threshold = float(numpy.percentile(values, 100 * (1 - _SHARE)))
        return {name: value >= threshold for name, value in fisher.items()}

    return select


def prepare_all_sizes(shapes: Shapes, device: torch.device, backend: str | None = None) -> Prepared:
    """A selection by ``select_child`` for each of ``ALL_SIZES``."""
    fisher = random_fisher(shapes, device)
    steps: dict[str, Callable[[], object]] = {
        name: _select(fisher, *child, backend) for name, child in _CHILDREN.items()
    }
    return Prepared({**steps, _ZEROS: _select(_mostly_zeros(fisher), _SHARE, 1, backend)})


def _prepare_others(shapes: Shapes, device: torch.device) -> Prepared:
    fisher = random_fisher(shapes, device)
    values = torch.cat([value.view(-1) for value in fisher.values()])
    place = values.numel() - selection.child_size(_SHARE, values.numel()) + 1
    return Prepared(
        {
            SELECT.name: _select(fisher, _SHARE, 1),
            KTHVALUE.name: lambda: values.kthvalue(place).values,
            PERCENTILE.name: _percentile(fisher),
        }
    )


def _sorted_child(fisher: Fisher, share: float, granularity: int) -> Tensor:
    """The child by a stable sort, as booleans over all elements."""
    values, scores = list(fisher.values()), list(fisher.values())
    if granularity > 1:
        scores, _ = ops.run_scores(values, granularity, backend="reference")
    joined = torch.cat([score.view(-1) for score in scores])
    first = joined.argsort(descending=True, stable=True)
    chosen = torch.zeros_like(joined, dtype=torch.bool)
    chosen[first[: selection.child_size(share, joined.numel())]] = True
    parts = chosen.split([score.numel() for score in scores])
    return torch.cat(
        [
            part.repeat_interleave(granularity)[: value.numel()]
            for part, value in zip(parts, values, strict=True)
        ]
    )


def _joined(masks: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([mask.view(-1) for mask in masks.values()])


def _fault_of_child(mask: ChildMask, fisher: Fisher, share: float, granularity: int) -> str | None:
    expected = _sorted_child(fisher, share, granularity)
    found = _joined(
        {name: ops.unpack_mask(mask.words[name], value.shape) for name, value in fisher.items()}
    )
    if granularity == 1 and int(found.sum()) != selection.child_size(share, found.numel()):
        return f"the child has {int(found.sum())} elements, not {share} of {found.numel()}"
    return None if torch.equal(found, expected) else "the child is not the one of a stable sort"


def faults_all_sizes(
    shapes: Shapes, device: torch.device, backend: str | None = None
) -> dict[str, str]:
    """Which of ``ALL_SIZES`` select another child than a stable sort."""
    fisher = random_fisher(shapes, device)
    zeros = _mostly_zeros(fisher)
    checks = [(name, fisher, *child) for name, child in _CHILDREN.items()]
    checks.append((_ZEROS, zeros, _SHARE, 1))
    faults = {
        name: _fault_of_child(
            _select(values, share, granularity, backend)(), values, share, granularity
        )
        for name, values, share, granularity in checks
    }
    return {name: fault for name, fault in faults.items() if fault is not None}


def _faults_others(shapes: Shapes, device: torch.device) -> dict[str, str]:
    steps = _prepare_others(shapes, device).steps
    fisher = random_fisher(shapes, device)
    values = _joined(fisher)
    expected = _sorted_child(fisher, _SHARE, 1)
    faults = {}
    mask = steps[SELECT.name]()
    assert isinstance(mask, ChildMask)
    fault = _fault_of_child(mask, fisher, _SHARE, 1)
    if fault is not None:
        faults[SELECT.name] = fault
    if steps[KTHVALUE.name]() != values[expected].min():
        faults[KTHVALUE.name] = "the value is not the smallest of the child"
    masks = steps[PERCENTILE.name]()
    assert isinstance(masks, dict)
    # The percentile lies between two elements and has fp32's rounding.
    if int((_joined(masks) != expected).sum()) > 1:
        faults[PERCENTILE.name] = "the elements above the percentile are not the child"
    return faults


ALL_SIZES = (
    SELECT,
    Competitor("select_0.1", "select_child, p = 0.1"),
    Competitor("select_0.3_runs", "select_child, p = 0.3 in runs of 256"),
    Competitor(_ZEROS, "select_child, p = 0.3 of 80 % zeros"),
)
BERT_LARGE = Contest(
    name="select_bert_large",
    title="Selection over the encoder of BERT-large, 384 tensors of 302 M elements",
    family="selection",
    op="topk_select",
    competitors=ALL_SIZES,
    make_shapes=BertSizes(hidden=1024, layers=24).encoder_shapes,
    tensors=384,
    elements=302_309_376,
    prepare=prepare_all_sizes,
    faults=faults_all_sizes,
    memory=True,
)
OTHERS = Contest(
    name="select_bert_base",
    title="Selection of 30 % of the encoder of BERT-base, 192 tensors of 85 M elements, beside others",
    family="selection",
    op="topk_select",
    competitors=(SELECT, KTHVALUE, PERCENTILE),
    make_shapes=BertSizes(hidden=768, layers=12).encoder_shapes,
    tensors=192,
    elements=85_054_464,
    prepare=_prepare_others,
    faults=_faults_others,
    comparisons=(
        Comparison("ratio_to_kthvalue", "time / kthvalue", KTHVALUE.name),
        Comparison("speedup_over_percentile", "percentile / time", PERCENTILE.name, inverted=True),
    ),
    memory=True,
)
CONTESTS = (BERT_LARGE, OTHERS)
