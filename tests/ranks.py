"""Processes of torch.distributed that live as long as a test session: ranks that run functions together."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

MOST = 4
PATIENCE_S = 120


class Ranks:
    """Starts the processes at the first use; ``run`` has some of them do the same."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._connections: list[Connection] = []
        self._jobs = 0
        self._processes: Any = None

    def run(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(*arguments)`` returns on each of ``world`` ranks, which gloo connects.

        Args:
            world: at most MOST.
            function: of a module's top level, since other processes look it up.
        """
        if self._processes is None:
            self._start()
        store = str(Path(self._folder.name) / f"job-{self._jobs}")
        self._jobs += 1
        chosen = self._connections[:world]
        for rank, connection in enumerate(chosen):
            connection.send((store, rank, world, function, arguments))
        results, failures = [], []
        for rank, connection in enumerate(chosen):
            if not connection.poll(PATIENCE_S):
                self.stop()
                raise TimeoutError(f"rank {rank} of {world} has not answered in {PATIENCE_S} s")
            done, result = connection.recv()
            results.append(result)
            if not done:
                failures.append(f"rank {rank} of {world}:\n{result}")
        assert not failures, "\n".join(failures)
        return results

    def stop(self) -> None:
        """End the processes."""
        if self._processes is not None:
            for process in self._processes.processes:
                process.kill()
        self._processes, self._connections = None, []

    def _start(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(MOST)]
        self._connections = [ours for ours, _ in pipes]
        theirs = [connection for _, connection in pipes]
        self._processes = torch.multiprocessing.start_processes(
            _serve, (theirs,), nprocs=MOST, join=False, daemon=True, start_method="spawn"
        )


def _serve(index: int, connections: list[Connection]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    while True:
        try:
            store, rank, world, function, arguments = connections[index].recv()
        except EOFError:
            return
        torch.distributed.init_process_group(
            "gloo",
            store=torch.distributed.FileStore(store, world),
            rank=rank,
            world_size=world,
        )
        try:
            answer = True, function(*arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        connections[index].send(answer)
        torch.distributed.destroy_process_group()
