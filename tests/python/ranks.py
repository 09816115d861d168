"""Processes of a gloo group, started once for many tests."""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 120  # seconds, of one job


def _serve(connection: Connection, rank: int, size: int, store: str) -> None:
    """Runs jobs until there is none; sends back what each has to say: a traceback, or nothing."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while (task := connection.recv()) is not None:
        job, arguments = task
        try:
            torch.manual_seed(0)  # the same values on every rank
            job(*arguments)
            connection.send("")
        except BaseException:
            connection.send(traceback.format_exc())
    dist.destroy_process_group()


class Ranks:
    """``run(job, *arguments)`` calls ``job(*arguments)`` on every rank; what it raises is raised.

    Jobs are functions of a module, and all ranks run the same one. A rank that fails while others
    wait for it ends the group; the next job starts another.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, job: Callable[..., None], *arguments: Any) -> None:
        if not self._ranks:
            self._start()
        for _, connection in self._ranks:
            connection.send((job, arguments))
        failures = []
        for rank, (_, connection) in enumerate(self._ranks):
            if not connection.poll(5 if failures else TIMEOUT):
                failures.append(f"rank {rank} did not answer")
            elif answer := connection.recv():
                failures.append(f"rank {rank}:\n{answer}")
        if failures:
            self.close()
        assert not failures, "\n".join(failures)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = str(Path(tempfile.mkdtemp()) / "store")
        for rank in range(self._size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, rank, self._size, store), daemon=True
            )
            process.start()
            there.close()
            self._ranks.append((process, here))

    def close(self) -> None:
        for _, connection in self._ranks:
            with contextlib.suppress(OSError):
                connection.send(None)
        for process, _ in self._ranks:
            process.join(timeout=2)
            process.kill()
        self._ranks = []
