"""Speed and accuracy of normcore beside its peers: run it in the root of the source tree.

    python -m benchmarks run --peers torch,compile --output build/speed.json
    python -m benchmarks report build/speed.json --output build/report
    python -m benchmarks accuracy --output build/accuracy.json

benchmarks/README.md says what each command measures and how to read it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import pages
from .cases import DEFAULT_DTYPES, DTYPES, LAYOUTS, OPERATIONS, PEERS, SHAPES, shape_of

ACCURACY_PEERS = ("torch", "compile", "flax")


def one_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Parses words that are separated by commas."""

    def words(text: str) -> list[str]:
        found = [word for word in text.split(",") if word]
        unknown = [word for word in found if word not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
        return found

    return words


def shapes(text: str) -> list[object]:
    try:
        return [shape_of(word) for word in text.split(",") if word]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="speed beside peers and a copy")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    run.add_argument("--ops", type=one_of(OPERATIONS), default=OPERATIONS, metavar="A,B")
    run.add_argument(
        "--shapes",
        type=shapes,
        default=SHAPES,
        metavar="A,B",
        help=f"of {', '.join(s.name for s in SHAPES)}, or sizes such as 2x64x14x14",
    )
    run.add_argument("--layouts", type=one_of(LAYOUTS), default=LAYOUTS, metavar="A,B")
    run.add_argument(
        "--dtypes",
        type=one_of(DTYPES),
        default=DEFAULT_DTYPES,
        metavar="A,B",
        help=f"of {', '.join(DTYPES)}; default {','.join(DEFAULT_DTYPES)}",
    )
    run.add_argument(
        "--peers",
        type=one_of(PEERS),
        default=("torch",),
        metavar="A,B",
        help=f"of {', '.join(PEERS)}; default torch. compile takes some seconds per case",
    )
    run.add_argument("--threads", type=int, default=1)
    run.add_argument("--repeats", type=int, default=30, help="rounds per case; the best one counts")
    run.add_argument("--pages", choices=pages.REGIMES, default="kept", help="freed memory")
    run.add_argument("--output", type=Path, help="JSON file")

    report = commands.add_parser("report", help="files of results as Markdown and pictures")
    report.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    report.add_argument("--output", type=Path, help="folder for report.md and the pictures")

    accuracy = commands.add_parser("accuracy", help="errors against float64 beside peers")
    accuracy.add_argument(
        "--peers",
        type=one_of(ACCURACY_PEERS),
        default=ACCURACY_PEERS,
        metavar="A,B",
        help=f"default {','.join(ACCURACY_PEERS)}",
    )
    accuracy.add_argument("--quick", action="store_true", help="a few small cases beside torch")
    accuracy.add_argument("--threads", type=int, default=1)
    accuracy.add_argument("--output", type=Path, help="JSON file")
    return parser


def main() -> int:
    arguments = make_parser().parse_args()
    # The commands import torch, which a process that starts again need not have done.
    if arguments.command == "run":
        pages.enter(arguments.pages)
        from . import speed

        return speed.run(arguments)
    if arguments.command == "report":
        from . import report

        return report.run(arguments)
    from . import accuracy

    return accuracy.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
