"""Runs torch's own tests of norms on our kernels: `python tests/torch_suite [--output FILE]`.

Targets and entries can be named to run some of them. Writes every outcome as JSON, prints counts,
reasons of skips and failures, and exits with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch
from entries import ENTRIES, MODULES, OPS
from module_checks import ModuleChecks
from op_checks import OpChecks
from outcomes import Outcomes, Skip, summary
from targets import BY_NAME


def run_entry(entry: str, outcomes: Outcomes) -> None:
    checks = OpChecks if entry in OPS else ModuleChecks
    torch.manual_seed(0)
    try:
        checks(entry, BY_NAME[outcomes.target], outcomes).run()
    except Skip as reason:
        outcomes.skip(entry, reason)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", choices=ENTRIES, help="default: all")
    parser.add_argument("--entry", action="append", choices=[*OPS, *MODULES], help="default: all")
    parser.add_argument("--output", type=Path, help="JSON file of all outcomes")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch")
    found = []
    for target in arguments.target or ENTRIES:
        outcomes = Outcomes(target)
        for entry in ENTRIES[target]:
            if arguments.entry is None or entry in arguments.entry:
                run_entry(entry, outcomes)
        found += outcomes.all
    if arguments.output:
        arguments.output.write_text(json.dumps([vars(o) for o in found], indent=1))
    print(summary(found))
    return 1 if any(o.status == "failed" for o in found) else 0


if __name__ == "__main__":
    sys.exit(main())
