"""What DistributedDataParallel sends with ``register_child_comm_hook`` and without it, and what a step takes.

Two ranks (gloo) in network namespaces of their own, joined by a virtual link that is limited to ``--rate`` in
each direction (``ip netns`` and ``tc tbf``, for which one must be root). Whatever an interface sends is
counted, headers too; nobody else uses it. ``--loopback`` needs no rights: no limit, and nothing but tensors
is counted.

    python -m benchmarks.wire_bytes
    python -m benchmarks.wire_bytes --rate 1gbit --width 768 --json wire.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from childtune_kernels import FusedChildAdamW, random_child, register_child_comm_hook

from .environment import ROOT, describe
from .gradient_memory import VOCABULARY, Transformer

WORLD, WIDTH, TOKENS, WARM_UP, STEPS, RATE = 2, 256, 16, 2, 5, "100mbit"
_ADDRESS = "10.199.0.{}"
_PORT = 29_611


class Way(NamedTuple):
    """One way to train: which masks, and whether the hook is there."""

    hooked: bool
    fixed_p: float | None = None
    reserve_p: float = 1.0


WAYS = {
    "whole": Way(hooked=False),
    "CT_D 0.3": Way(hooked=True, fixed_p=0.3),
    "CT_D 0.1": Way(hooked=True, fixed_p=0.1),
    "CT_F 0.3": Way(hooked=True, reserve_p=0.3),
    "CT_F 0.1": Way(hooked=True, reserve_p=0.1),
}


def optimizer_of(way: Way, model: nn.Module) -> FusedChildAdamW:
    """The optimizer of a way; with a fixed mask, layer norms and biases train densely, as usual."""
    named = dict(model.named_parameters())
    child = None
    if way.fixed_p is not None:
        matrices = {name: value for name, value in named.items() if value.dim() == 2}
        dense = named.keys() - matrices.keys()
        child = random_child(matrices, way.fixed_p, seed=0, dense=dense)
    return FusedChildAdamW(named.items(), reserve_p=way.reserve_p, child_mask=child, seed=0)


def measure(way: Way, width: int, steps: int, interface: str | None) -> dict[str, float]:
    """One rank's part: bytes of gradients, sent tensors and interface in a step, and its median seconds."""
    torch.manual_seed(0)
    plain = Transformer(width)
    model = DistributedDataParallel(plain)
    optimizer = optimizer_of(way, plain)
    hook = register_child_comm_hook(model, optimizer) if way.hooked else None
    batches = torch.randint(0, VOCABULARY, (WARM_UP + steps, 1, TOKENS))
    seconds, before = [], (0, 0, 0)
    for number, batch in enumerate(batches):
        if number == WARM_UP:  # DDP has rebuilt its buckets
            torch.distributed.barrier()
            before = _counters(hook, interface)
        start = time.perf_counter()
        logits = model(batch).view(-1, VOCABULARY)
        nn.functional.cross_entropy(logits, batch.view(-1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    torch.distributed.barrier()
    sent, whole, interfaces = (
        (now - then) / steps for now, then in zip(_counters(hook, interface), before, strict=True)
    )
    gradients = sum(parameter.nbytes for parameter in plain.parameters())
    return {
        "gradients": gradients,
        "reduced": sent if hook else gradients,
        "buckets": whole if hook else gradients,
        "interface": interfaces,
        "seconds": statistics.median(seconds),
    }


def _counters(hook: Any, interface: str | None) -> tuple[int, int, int]:
    """Bytes so far: reduced, of the buckets, and sent by the interface."""
    return (
        getattr(hook, "sent_bytes", 0),
        getattr(hook, "whole_bytes", 0),
        0 if interface is None else transmitted(interface),
    )


def transmitted(interface: str) -> int:
    """The bytes that an interface of this process's network namespace has sent."""
    for line in Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            return int(numbers.split()[8])
    raise RuntimeError(f"no interface {interface} in /proc/self/net/dev")


def serve(arguments: argparse.Namespace) -> None:
    """One rank: every way in turn; rank 0 prints a line of JSON for each."""
    torch.set_num_threads(1)
    linked = arguments.interface is not None
    address = _ADDRESS.format(1) if linked else "127.0.0.1"
    os.environ["GLOO_SOCKET_IFNAME"] = arguments.interface or "lo"
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://{address}:{_PORT}",
        rank=arguments.rank,
        world_size=WORLD,
    )
    for name in arguments.ways:
        found = measure(WAYS[name], arguments.width, arguments.steps, arguments.interface)
        if arguments.rank == 0:
            print(json.dumps({"way": name, **found}), flush=True)
    torch.distributed.destroy_process_group()


@contextlib.contextmanager
def linked_namespaces(rate: str) -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces, joined by a link of a rate in each direction: their names and interfaces."""
    ends = [(f"childtune{os.getpid()}n{end}", f"wire{os.getpid()}n{end}"[-15:]) for end in range(2)]
    names = [name for name, _ in ends]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", ends[0][1], "type", "veth", "peer", "name", ends[1][1])
        for end, (name, interface) in enumerate(ends):
            _ip("link", "set", interface, "netns", name)
            inside = ("-n", name)
            _ip(*inside, "address", "add", f"{_ADDRESS.format(end + 1)}/24", "dev", interface)
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "link", "set", interface, "up")
            if rate != "none":
                limit = ["rate", rate, "burst", "128kb", "latency", "200ms"]
                queue = ["tc", "-n", name, "qdisc", "add", "dev", interface, "root", "tbf", *limit]
                subprocess.run(queue, check=True)
        yield ends
    finally:
        for name in names:  # the link goes with them
            subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def measured(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What rank 0 finds of each way, as it comes."""
    base = [sys.executable, "-m", "benchmarks.wire_bytes", "--width", str(arguments.width)]
    base += ["--steps", str(arguments.steps), "--ways", *arguments.ways]
    with contextlib.ExitStack() as stack:
        commands = [[*base, "--rank", str(rank)] for rank in range(WORLD)]
        if not arguments.loopback:
            ends = stack.enter_context(linked_namespaces(arguments.rate))
            commands = [
                ["ip", "netns", "exec", name, *command, "--interface", interface]
                for (name, interface), command in zip(ends, commands, strict=True)
            ]
        errors = stack.enter_context(tempfile.TemporaryFile("w+"))
        processes = [
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
            for command in commands
        ]
        try:
            assert processes[0].stdout is not None
            yield from map(json.loads, processes[0].stdout)
            if any(process.wait(60) for process in processes):
                errors.seek(0)
                raise RuntimeError(f"a rank failed:\n{errors.read()[-3000:]}")
        finally:
            for process in processes:
                process.kill()
                process.wait()


def main() -> None:
    """Print a table with a line a way, or be one rank."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wire_bytes")
    parser.add_argument("--rate", default=RATE, help="of the link, as tc writes it, or none")
    parser.add_argument("--loopback", action="store_true", help="no namespaces and no limit")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the twelve layers")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--interface", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        serve(arguments)
        return
    print(
        f"{'MB a step and rank':20}{'gradients':>11}{'reduced':>11}{'interface':>11}{'seconds':>11}"
    )
    rows = []
    for row in measured(arguments):
        rows.append(row)
        sizes = "".join(f"{row[of] / 1e6:11.2f}" for of in ("gradients", "reduced", "interface"))
        print(f"{row['way']:20}{sizes}{row['seconds']:11.3f}", flush=True)
    if arguments.json is not None:
        chosen = {name: getattr(arguments, name) for name in ("rate", "loopback", "width", "steps")}
        content = {**chosen, "environment": describe(torch.device("cpu")), "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
