"""Processes of a gloo group, started once for many tests.

They are forked from a server that has imported torch, which takes seconds, and nothing else has
run in: a process of a group starts in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 120  # seconds, of one job
PATIENCE = 10  # seconds, with ranks that wait for one that failed
PRELOADED = ["torch.distributed.fsdp", "torch._dynamo"]  # with what they import


def _serve(
    connection: Connection,
    rank: int,
    size: int,
    store: str,
    environment: Mapping[str, str],
) -> None:
    """Runs jobs until there is none; sends back what each has to say: a traceback, or nothing."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            task = connection.recv()
        except EOFError:  # the tests have ended
            return
        except BaseException:  # a module that cannot be imported
            connection.send(traceback.format_exc())
            continue
        if task is None:
            break
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

    Args:
        size: number of processes.
        environment: environment variables of the processes, besides those of this one.
    """

    def __init__(self, size: int, environment: Mapping[str, str] | None = None) -> None:
        self._size = size
        self._environment = environment or {}
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, job: Callable[..., None], *arguments: Any) -> None:
        answers = self.answers(job, *arguments)
        failures = [f"rank {rank}:\n{answer}" for rank, answer in enumerate(answers) if answer]
        assert not failures, "\n".join(failures)

    def answers(self, job: Callable[..., None], *arguments: Any) -> list[str]:
        """The traceback of every rank, or what else it died of; nothing of one that succeeds."""
        if not self._ranks:
            self._start()
        for _, connection in self._ranks:
            connection.send((job, arguments))
        answers = ["did not answer"] * self._size
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._ranks)}
        end = time.monotonic() + TIMEOUT
        while waiting and (ready := wait(list(waiting), max(0.0, end - time.monotonic()))):
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    answers[rank] = connection.recv()
                except (EOFError, ConnectionResetError):
                    answers[rank] = "ended"
                if answers[rank]:
                    end = min(end, time.monotonic() + PATIENCE)
        if any(answers):
            self.close()
        return answers

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        for rank in range(self._size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(there, rank, self._size, store, self._environment),
                daemon=True,
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
        if self._ranks:
            self._folder.cleanup()
        self._ranks = []
