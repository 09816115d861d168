"""The peer oneDNN: a process of its own, which is built on demand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

from ..cases import Case, text_of

SOURCE = Path(__file__).parent
BUILD = SOURCE.parents[1] / "build" / "onednn"
SPIN_SECONDS = 5e-3  # how long idle threads of OpenMP may stay busy, at most


class UnavailableError(Exception):
    """A peer that is not here, or has not what a case needs; the text says why."""


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1].strip()


@cache
def _build() -> Path | UnavailableError:
    """The runner, or why there is none."""
    if shutil.which("cmake") is None:
        return UnavailableError("cmake is not installed")
    for arguments in (("-S", str(SOURCE), "-B", str(BUILD)), ("--build", str(BUILD))):
        answer = subprocess.run(["cmake", *arguments], capture_output=True, text=True, check=False)
        if answer.returncode:
            (reason, *_) = [
                line.strip() for line in answer.stderr.splitlines() if line.startswith("  ")
            ] or [_last_line(answer.stderr)]
            return UnavailableError(f"not built: {reason}")
    return BUILD / "onednn_runner"


def runner() -> Path:
    """Raises UnavailableError, without oneDNN or a compiler."""
    found = _build()
    if isinstance(found, UnavailableError):
        raise found
    return found


def version() -> str:
    answer = subprocess.run([runner()], capture_output=True, text=True, check=True)
    return str(json.loads(answer.stdout)["version"])


class OneDnn:
    """A contender of timing.py."""

    def __init__(self, case: Case, threads: int) -> None:
        size, groups = text_of(case.shape.size), str(case.shape.groups)
        self._spins = threads > 1
        self._process = subprocess.Popen(
            [runner(), case.operation, case.layout, case.dtype, size, groups],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the runner has ended"}
        if "error" in answer:
            self.close()
            raise UnavailableError(answer["error"])
        return dict(answer)

    def measure(self) -> float:
        assert self._process.stdin is not None
        self._let_threads_sleep()
        self._process.stdin.write("\n")
        microseconds = float(self._read()["microseconds"])
        self._let_threads_sleep()
        return microseconds

    def _let_threads_sleep(self) -> None:
        """The idle threads of the other process would take the cores of those that are timed."""
        if self._spins:
            time.sleep(SPIN_SECONDS)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()
