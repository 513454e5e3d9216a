"""How large is a child checkpoint beside the weights that it stands for?"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from childtune_kernels import ChildMask, apply_child, random_child, save_child

from ..cases import BertSizes, Shapes
from .contest import Competitor, Contest, Prepared

DTYPE = torch.bfloat16

TENTH = Competitor("child_0.1", "10 % child")
THIRD = Competitor("child_0.3", "30 % child")
_SHARES = {TENTH.name: 0.1, THIRD.name: 0.3}


def _model(shapes: Shapes, seed: int) -> nn.Module:
    """A module with parameters of these shapes; modules within it are named as the shapes are."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Module()
    for name, shape in shapes.items():
        *modules, last = name.split(".")
        here = model
        for module in modules:
            if not hasattr(here, module):
                here.add_module(module, nn.Module())
            here = getattr(here, module)
        values = torch.randn(shape, generator=generator, dtype=DTYPE)
        here.register_parameter(last, nn.Parameter(values))
    return model


def _child(model: nn.Module, share: float) -> ChildMask:
    """A child drawn at random from the encoder; everything else is frozen."""
    in_scope = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("encoder."))
        if parameter.requires_grad:
            in_scope[name] = parameter
    return random_child(in_scope, share, seed=0)


def _prepare(shapes: Shapes, device: torch.device) -> Prepared:
    """Sizes alone; a file has the same bytes wherever its weights lie, here on the CPU."""
    model = _model(shapes, seed=0)
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, share in _SHARES.items():
            mask = _child(model, share)
            path = Path(folder) / f"{name}.safetensors"
            save_child(path, model, mask)
            weights = sum(p.nbytes for p in model.parameters() if p.requires_grad)
            size = path.stat().st_size
            figures[name] = {
                "dtype": str(DTYPE).removeprefix("torch."),
                "file_bytes": size,
                "weight_bytes": weights,
                "share_of_weights": size / weights,
            }
    return Prepared(figures=figures)


def _faults(shapes: Shapes, device: torch.device) -> dict[str, str]:
    """The base and the file give the tuned model again, bit for bit."""
    faults = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, share in _SHARES.items():
            tuned, base, other = (_model(shapes, seed) for seed in (0, 0, 1))
            mask = _child(tuned, share)
            with torch.no_grad():
                for label in mask.names:
                    weight = tuned.get_parameter(label)
                    trained = other.get_parameter(label)
                    weight.copy_(torch.where(mask.dense(label), trained, weight))
            path = Path(folder) / f"{name}.safetensors"
            save_child(path, tuned, mask)
            apply_child(base, path)
            if not all(map(torch.equal, base.parameters(), tuned.parameters())):
                faults[name] = "base and file do not give the tuned model"
    return faults


BASE = Contest(
    name="checkpoint_bert_base",
    title="Child checkpoint of BERT-base in bf16, the child in its encoder",
    family="checkpoint",
    op="bitmask",
    competitors=(TENTH, THIRD),
    make_shapes=BertSizes(hidden=768, layers=12).shapes,
    tensors=199,
    elements=109_482_240,
    prepare=_prepare,
    faults=_faults,
)
CONTESTS = (BASE,)
