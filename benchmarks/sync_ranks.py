"""Processes of this machine as the ranks of a gloo group."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

MINIMUM_SECONDS = 2e-2  # of one timing: far above the time between the starts of two ranks


class OnRanks:
    """A contender (timing.py) that all ranks call as often; the slowest rank counts."""

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run
        self._calls = 1
        self._seconds()  # a first call may allocate
        while min(self._seconds(), self._seconds()) < MINIMUM_SECONDS:
            self._calls *= 2

    def _seconds(self) -> float:
        """The same on every rank."""
        dist.barrier()
        start = time.perf_counter()
        for _ in range(self._calls):
            self._run()
        seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return seconds.item()

    def measure(self) -> float:
        return 1e6 * self._seconds() / self._calls


def _serve(
    rank: int, ranks: int, threads: int, folder: str, job: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(threads)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    answer = job(*arguments)
    if rank == 0:
        (Path(folder) / "answer.json").write_text(json.dumps(answer))
    dist.barrier()  # nobody leaves while others still talk
    dist.destroy_process_group()


def on_ranks(ranks: int, threads: int, job: Callable[..., Any], *arguments: Any) -> Any:
    """Calls job(*arguments) on `ranks` new processes and returns what it returns on the first.

    They are forked from a server that imports torch, and the module of `job`, once.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([job.__module__])
    with tempfile.TemporaryDirectory() as folder:
        start_processes(
            _serve, (ranks, threads, folder, job, arguments), ranks, start_method="forkserver"
        )
        return json.loads((Path(folder) / "answer.json").read_text())
