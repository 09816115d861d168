"""Runs the suite in child processes, once per session, and prints its counts at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from entries import ENTRIES
from outcomes import Outcome, summary

FOUND = pytest.StashKey[list[Outcome]]()


@pytest.fixture(scope="session")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Outcome]:
    """Outcomes of all targets, which run beside each other."""
    folder = tmp_path_factory.mktemp("torch_suite")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    children = {
        target: subprocess.Popen(
            [
                *(sys.executable, Path(__file__).parent),
                *("--target", target, "--output", folder / f"{target}.json"),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for target in ENTRIES
    }
    found: list[Outcome] = []
    for target, child in children.items():
        output, _ = child.communicate()
        file = folder / f"{target}.json"
        assert file.exists(), output
        found += [Outcome(**record) for record in json.loads(file.read_text())]
    request.config.stash[FOUND] = found
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = terminalreporter.config.stash.get(FOUND, None)
    if found is not None:
        terminalreporter.section("torch's own tests: checks of samples")
        terminalreporter.write_line(summary(found))
