"""What is stepped on a GPU: tensors of large models, many small ones, and which of them fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .. import cases
from ..cases import BertSizes, Case, Shapes

_ROUNDS = 25

# Weights, gradients and moments take 16 bytes a parameter. As much again is left for what variants
# have of their own (compact moments, one dense state while it is made) and for the unfused step.
_SHARE_OF_MEMORY = 0.4
_MOST_LAYERS = 32


@dataclass(frozen=True)
class LlamaSizes:
    """The sizes in a Llama config from which its parameter shapes follow; tied embeddings."""

    hidden: int
    intermediate: int
    key_values: int
    layers: int
    vocabulary: int | None = None  # None: the layers alone

    def shapes(self) -> Shapes:
        """Parameter name → shape, as ``transformers.LlamaForCausalLM`` has them."""
        hidden, intermediate = self.hidden, self.intermediate
        shapes: Shapes = {}
        if self.vocabulary is not None:
            shapes["model.embed_tokens.weight"] = (self.vocabulary, hidden)
        for layer in range(self.layers):
            modules: Shapes = {
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (self.key_values, hidden),
                "self_attn.v_proj": (self.key_values, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (intermediate, hidden),
                "mlp.up_proj": (intermediate, hidden),
                "mlp.down_proj": (hidden, intermediate),
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
            }
            shapes |= {f"model.layers.{layer}.{name}.weight": s for name, s in modules.items()}
        if self.vocabulary is not None:
            shapes["model.norm.weight"] = (hidden,)
        return shapes


_8B = LlamaSizes(hidden=4096, intermediate=14_336, key_values=1024, layers=1)
_8B_LAYER_TENSORS, _8B_LAYER_PARAMETERS = 9, 218_112_000

BERT_LARGE = replace(cases.BERT_LARGE, option=None, rounds=_ROUNDS)
ROBERTA_LARGE = Case(
    name="roberta_large",
    title="RoBERTa-large, 391 tensors",
    make_shapes=BertSizes(hidden=1024, layers=24, vocabulary=50_265, positions=514, types=1).shapes,
    tensors=391,
    parameters=355_359_744,
    rounds=_ROUNDS,
    limit="bytes",
)
LLAMA_1B = Case(
    name="llama_1b",
    title="Llama-3.2-1B, 146 tensors",
    make_shapes=LlamaSizes(
        hidden=2048, intermediate=8192, key_values=512, layers=16, vocabulary=128_256
    ).shapes,
    tensors=146,
    parameters=1_235_814_400,
    rounds=_ROUNDS,
    limit="bytes",
)
SMALL_TENSORS = replace(cases.SMALL_TENSORS, grouped=False, rounds=101)
GROUPS = Case(
    name="groups_465",
    title="465 tensors of 4,000 elements, in one group and in 465",
    make_shapes=lambda: {f"layers.{index}.weight": (4_000,) for index in range(465)},
    tensors=465,
    parameters=1_860_000,
    rounds=101,
    limit="tensors",
    grouped=True,
)


def layers_of_8b(memory: int) -> Case:
    """As many layers of an 8B model as can be stepped in so many bytes of memory."""
    fit = int(memory * _SHARE_OF_MEMORY) // (16 * _8B_LAYER_PARAMETERS)
    layers = min(_MOST_LAYERS, max(1, fit))
    return Case(
        name="llama_8b_layers",
        title=f"{layers} layers of Llama-3.1-8B, {layers * _8B_LAYER_TENSORS} tensors",
        make_shapes=replace(_8B, layers=layers).shapes,
        tensors=layers * _8B_LAYER_TENSORS,
        parameters=layers * _8B_LAYER_PARAMETERS,
        rounds=_ROUNDS,
        limit="bytes",
    )


def cases_for(device: torch.device, tiny: bool) -> dict[str, Case]:
    """The cases by name, the ones with targets first."""
    memory = 0
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    found = (
        BERT_LARGE,
        LLAMA_1B,
        layers_of_8b(memory),
        SMALL_TENSORS,
        GROUPS,
        ROBERTA_LARGE,
    )
    return {case.name: tiny_of(case) if tiny else case for case in found}


def tiny_of(case: Case) -> Case:
    """A case of the same name with some hundred elements; two of them have a whole tile and a tail."""
    shapes: Shapes = {"vector": (190,), "bias": (10,)}
    if case.name == BERT_LARGE.name:
        shapes = {"matrix": (67, 64), "bias": (10,)}
    if case.name == LLAMA_1B.name:
        shapes = {"matrix": (67, 64)}
    return replace(
        case,
        title=f"{case.title} (in little)",
        make_shapes=lambda: shapes,
        tensors=len(shapes),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        rounds=2,
    )
