"""Which tensors a model has: read off its files, or those of a transformer of so many parameters."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from .labels import label_of
from .weight_files import INDEX, SINGLE, read_weights

Shapes = dict[str, tuple[int, ...]]

CONFIG = "config.json"
LEAST_PARAMETERS = 100_000  # below it not even a layer of the smallest width fits
_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_WIDTH, _VOCABULARY = 64, 32_000


@dataclass(frozen=True)
class ModelShapes:
    """The tensors of a model without what is in them.

    Attributes:
        source: where the shapes come from, in words.
        shapes: parameter name → shape.
    """

    source: str
    shapes: Shapes

    @property
    def parameters(self) -> int:
        """The number of elements of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def largest(self) -> int:
        """The number of elements of the largest tensor."""
        return max((math.prod(shape) for shape in self.shapes.values()), default=0)


def parameter_count(text: str) -> int:
    """The number that a text such as ``110M``, ``1.5B``, ``350k`` or ``2000000`` says.

    Raises:
        ValueError: it says none, or one below ``LEAST_PARAMETERS``.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip().upper())
    if found is None:
        raise ValueError(
            f"{text!r} is no number of parameters; write one such as 110M, 1.5B or 350K"
        )
    count = round(float(found[1]) * _SUFFIXES[found[2]])
    if count < LEAST_PARAMETERS:
        raise ValueError(f"{text!r} is too few for a transformer; give 100K or more")
    return count


def transformer_of(parameters: int) -> ModelShapes:
    """A transformer of about so many parameters: embedding, layers with biases and norms, a final norm.

    Its width is a multiple of 64, with a layer for every 64; the embedding has about 32,000 rows and takes
    at most half. What rounding leaves over becomes rows of the embedding: the count is met to a row.

    Args:
        parameters: how many, ``LEAST_PARAMETERS`` or more.
    """
    width = _WIDTH
    while _taken(width + _WIDTH, parameters) <= parameters:
        width += _WIDTH
    embedding = min(_VOCABULARY * width, parameters // 2)
    a_layer = sum(math.prod(shape) for shape in _layer(width).values())
    layers = max(1, (parameters - embedding) // a_layer)
    rows = (parameters - layers * a_layer - 2 * width) // width
    shapes: Shapes = {"embedding.weight": (rows, width)}
    for index in range(layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in _layer(width).items()}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    source = (
        f"a made-up transformer: {layers} layers of width {width}, an embedding of {rows:,} rows"
    )
    return ModelShapes(source, shapes)


def _taken(width: int, parameters: int) -> int:
    a_layer = sum(math.prod(shape) for shape in _layer(width).values())
    return min(_VOCABULARY * width, parameters // 2) + width // _WIDTH * a_layer


def _layer(width: int) -> Shapes:
    matrices: Shapes = {
        "attention.query": (width, width),
        "attention.key": (width, width),
        "attention.value": (width, width),
        "attention.output": (width, width),
        "intermediate": (4 * width, width),
        "output": (width, 4 * width),
        "attention.norm": (width,),
        "norm": (width,),
    }
    shapes: Shapes = {}
    for name, shape in matrices.items():
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]
    return shapes


def model_at(path: str | os.PathLike[str]) -> ModelShapes:
    """The tensors of the model at a path; what is in them is not read.

    Args:
        path: a safetensors file, a folder of them as ``save_pretrained`` writes it, or one with a
            ``config.json`` alone, from which ``transformers`` builds the model without weights.

    Raises:
        FileNotFoundError: there is nothing of the kind.
        ValueError: a damaged file, one without floating point tensors, or a config that gives no model.
        RuntimeError: a config alone, and ``transformers`` is not installed.
    """
    path = Path(path)
    if not path.is_dir() or (path / SINGLE).exists() or (path / INDEX).exists():
        tensors = read_weights(path).tensors
        # Integers are buffers, which no optimizer steps.
        shapes = {
            label_of(name): tuple(tensor.shape)
            for name, tensor in tensors.items()
            if tensor.is_floating_point()
        }
        source = f"the floating point tensors of {path}"
    elif (path / CONFIG).exists():
        source, shapes = _from_config(path)
    else:
        raise FileNotFoundError(
            f"{path} has neither {SINGLE}, {INDEX} nor {CONFIG}; name a folder that save_pretrained "
            "wrote, or a safetensors file"
        )
    found = ModelShapes(source, shapes)
    if not found.parameters:
        raise ValueError(f"{path} holds no floating point weights; name a model")
    return found


def _from_config(path: Path) -> tuple[str, Shapes]:
    try:
        import transformers
    except ImportError as error:
        raise RuntimeError(
            f"{path} has a {CONFIG} and no weights, which takes transformers: pip install transformers"
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        architecture = next(iter(config.architectures or ()), None)
        model_class = getattr(transformers, architecture, None) if architecture else None
        with torch.device("meta"):
            if model_class is None:
                model = transformers.AutoModel.from_config(config)
            else:
                model = model_class(config)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, ImportError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"transformers makes no model of {path / CONFIG}: {first}") from error
    shapes = {label_of(name): tuple(each.shape) for name, each in model.named_parameters()}
    return f"{type(model).__name__} by {path / CONFIG}", shapes
