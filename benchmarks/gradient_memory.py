"""How much memory gradient release saves: whole iterations of a transformer of twelve layers.

Each way is measured in a process of its own, twice: the peak of torch's allocator (exact), and the growth of
the resident set. What is held between micro-batches is counted tensor by tensor.

    python -m benchmarks.gradient_memory
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from childtune_kernels import FusedChildAdamW, random_child

from .environment import ROOT
from .peak_memory import resident_growth, tensor_peak

LAYERS, VOCABULARY, MICRO_BATCHES, RESERVE_P = 12, 1000, 4, 0.1
WIDTH, TOKENS = 512, 16
_MMAP_THRESHOLD = 64 * 1024


class Way(NamedTuple):
    """One way to train: the release, the micro-batches of an iteration, and whether there is a child."""

    released: bool
    micro_batches: int
    masked: bool


WAYS = {
    "ordinary": Way(False, 1, False),
    "released": Way(True, 1, False),
    "accumulated": Way(False, MICRO_BATCHES, True),
    "accumulated, compact": Way(True, MICRO_BATCHES, True),
}


class Transformer(nn.Module):
    """Twelve layers in the usual proportions, and an output tied to the embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
            for _ in range(LAYERS)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return nn.functional.linear(hidden, self.embedding.weight)


def iteration_of(
    way: Way, width: int, tokens: int
) -> tuple[Transformer, FusedChildAdamW, Callable[[], int]]:
    """A model, its optimizer, and one iteration, which returns the bytes held before its step."""
    torch.manual_seed(0)
    model = Transformer(width)
    child = None
    if way.masked:
        # Layer norms and biases train densely, as usual; the matrices have a child.
        matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
        named = dict(model.named_parameters())
        child = random_child(matrices, RESERVE_P, seed=0, dense=named.keys() - matrices.keys())
    optimizer = FusedChildAdamW(model.named_parameters(), child_mask=child)
    handle = optimizer.release_gradients(compact_gradients=way.masked) if way.released else None
    batches = torch.randint(0, VOCABULARY, (way.micro_batches, 1, tokens))

    def iteration() -> int:
        for batch in batches:
            logits = model(batch).view(-1, VOCABULARY)
            nn.functional.cross_entropy(logits, batch.view(-1)).backward()
        held = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        held += 0 if handle is None else handle.kept_bytes
        optimizer.step()
        optimizer.zero_grad()
        return held

    return model, optimizer, iteration


def measure(way: Way, width: int = WIDTH, tokens: int = TOKENS) -> dict[str, int]:
    """Bytes: of all gradients, of the child's, held before the step, and the peaks of an iteration."""
    model, optimizer, iteration = iteration_of(way, width, tokens)
    iteration()  # plans, and what torch and the allocator set up once
    child = sum(
        4 * state["child_exp_avg"].numel()
        for state in optimizer.state.values()
        if "child_exp_avg" in state
    )
    return {
        "gradients": sum(parameter.nbytes for parameter in model.parameters()),
        "child": child,
        "held": iteration(),
        "tensors": tensor_peak(iteration, torch.device("cpu")),
        "resident": min(resident_growth(iteration) for _ in range(3)),
    }


def main() -> None:
    """Print a table of all ways, or one way as a line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gradient_memory")
    parser.add_argument("--way", choices=WAYS, help="measure this way alone, in this process")
    way = parser.parse_args().way
    if way is not None:
        torch.set_num_threads(1)  # a busy machine then delays nobody; memory is the same
        print(json.dumps(measure(WAYS[way])))
        return
    # As in peak_memory: large blocks come from the system and go back to it.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(_MMAP_THRESHOLD)}
    print(f"{'MB':24}{'gradients':>12}{'held':>12}{'peak':>12}{'resident':>12}")
    for name in WAYS:
        command = [sys.executable, "-m", "benchmarks.gradient_memory", "--way", name]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"measuring {name} failed:\n{done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        columns = ("gradients", "held", "tensors", "resident")
        print(f"{name:24}" + "".join(f"{found[column] / 1e6:12.1f}" for column in columns))


if __name__ == "__main__":
    main()
