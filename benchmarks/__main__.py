"""Speed and accuracy of normcore beside its peers: run it in the root of the source tree.

    python -m benchmarks run --peers torch,compile --output build/speed.json
    python -m benchmarks report build/speed.json --output build/report
    python -m benchmarks accuracy --output build/accuracy.json
    python -m benchmarks scaling --output build/scaling.json
    python -m benchmarks chain --output build/chain.json
    python -m benchmarks second --output build/second.json
    python -m benchmarks sync --output build/sync.json

benchmarks/README.md says what each command measures and how to read it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from . import pages
from .cases import (
    DEFAULT_DTYPES,
    DTYPES,
    LAYOUTS,
    MIN_VALUES,
    MODES,
    NORMS,
    OPERATIONS,
    PEERS,
    SECOND_NORMS,
    SECOND_SHAPES,
    SHAPES,
    VALUES_STEP,
    Shape,
    shape_of,
    text_of,
)
from .sync_model import NETWORKS, SYNC_SHAPES, Network

ACCURACY_PEERS = ("torch", "compile", "flax")
SCALING_OPERATIONS = ("bn_forward", "bn_backward", "gn_forward", "gn_backward")
MODULES = {
    "run": "speed",
    "scaling": "scaling",
    "chain": "chain",
    "second": "second",
    "sync": "sync",
    "report": "report",
    "accuracy": "accuracy",
}


def one_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Parses words that are separated by commas."""

    def words(text: str) -> list[str]:
        found = [word for word in text.split(",") if word]
        unknown = [word for word in found if word not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
        return found

    return words


def shapes(text: str) -> list[Shape]:
    try:
        return [shape_of(word) for word in text.split(",") if word]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def images(text: str) -> list[Shape]:
    """Shapes that a convolution of two dimensions takes."""
    found = shapes(text)
    for shape in found:
        if len(shape.size) != 4:
            raise argparse.ArgumentTypeError(f"{text_of(shape.size)} is no size of images")
    return found


def counts(text: str) -> list[int]:
    words = [word for word in text.split(",") if word]
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 1,2")
    return list(dict.fromkeys(map(int, words)))


def networks(text: str) -> list[Network]:
    found = []
    for word in text.split(","):
        name, _, values = word.partition("=")
        try:
            alpha, speed = map(float, values.split(":"))
        except ValueError:
            alpha = speed = 0.0
        if not (name and alpha > 0 and speed > 0):
            raise argparse.ArgumentTypeError(f"{word!r} is not like NAME=MICROSECONDS:GB/S")
        found.append(Network(name, alpha, speed))
    return found


def number_of_values(text: str) -> int:
    try:
        values = int(float(text))
    except (OverflowError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 1e8") from None
    if values < MIN_VALUES:
        raise argparse.ArgumentTypeError(f"{text} is less than {MIN_VALUES:g}, the first step")
    return values


def add_choice(
    parser: argparse.ArgumentParser,
    option: str,
    allowed: Sequence[str],
    default: Sequence[str],
    note: str = "",
) -> None:
    parser.add_argument(
        option,
        type=one_of(allowed),
        default=default,
        metavar="A,B",
        help=f"of {', '.join(allowed)}; default {','.join(default)}{note}",
    )


def add_timing(parser: argparse.ArgumentParser, repeats: int) -> None:
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="rounds per case; the best one counts"
    )
    parser.add_argument("--pages", choices=pages.REGIMES, default="kept", help="freed memory")
    parser.add_argument("--output", type=Path, help="JSON file")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="speed beside peers and a copy")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_choice(run, "--ops", OPERATIONS, OPERATIONS)
    run.add_argument(
        "--shapes",
        type=shapes,
        default=SHAPES,
        metavar="A,B",
        help=f"of {', '.join(s.name for s in SHAPES)}, or sizes such as 2x64x14x14",
    )
    add_choice(run, "--layouts", LAYOUTS, LAYOUTS)
    add_choice(run, "--dtypes", DTYPES, DEFAULT_DTYPES)
    add_choice(run, "--peers", PEERS, ("torch",), ". compile takes some seconds per case")
    run.add_argument("--threads", type=int, default=1)
    add_timing(run, repeats=30)

    scaling = commands.add_parser("scaling", help="time per value from small to large inputs")
    add_choice(scaling, "--ops", OPERATIONS, SCALING_OPERATIONS)
    add_choice(scaling, "--layouts", LAYOUTS, LAYOUTS)
    add_choice(scaling, "--dtypes", DTYPES, DEFAULT_DTYPES)
    scaling.add_argument(
        "--max-values",
        type=number_of_values,
        default=10**8,
        metavar="N",
        help=f"sizes grow from {MIN_VALUES:g} in steps of {VALUES_STEP}; default 1e8",
    )
    scaling.add_argument(
        "--threads", type=counts, default=[1, 2], metavar="A,B", help="default 1,2"
    )
    add_timing(scaling, repeats=10)

    chain = commands.add_parser("chain", help="a norm between two convolutions")
    add_choice(chain, "--norms", NORMS, NORMS)
    add_choice(chain, "--modes", MODES, MODES)
    chain.add_argument(
        "--sizes",
        type=images,
        metavar="A,B",
        help="such as 2x64x14x14; by default around the threshold of streaming stores",
    )
    add_choice(chain, "--layouts", LAYOUTS, LAYOUTS)
    add_choice(chain, "--dtypes", DTYPES, DEFAULT_DTYPES)
    chain.add_argument("--threads", type=int, default=1)
    add_timing(chain, repeats=10)

    second = commands.add_parser("second", help="a double backward pass beside the backward pass")
    add_choice(second, "--norms", SECOND_NORMS, SECOND_NORMS)
    second.add_argument(
        "--shapes",
        type=shapes,
        default=SECOND_SHAPES,
        metavar="A,B",
        help="as for run",
    )
    add_choice(second, "--layouts", LAYOUTS, LAYOUTS)
    add_choice(second, "--dtypes", DTYPES, DEFAULT_DTYPES)
    second.add_argument("--threads", type=int, default=1)
    add_timing(second, repeats=10)

    sync = commands.add_parser("sync", help="a batch norm over several ranks")
    sync.add_argument(
        "--shapes",
        type=shapes,
        default=SYNC_SHAPES,
        metavar="A,B",
        help="sizes of the part of one rank, such as 2x64x14x14",
    )
    sync.add_argument(
        "--ranks", type=counts, default=[1, 2, 4, 8], metavar="A,B", help="default 1,2,4,8"
    )
    sync.add_argument("--threads", type=int, default=1, help="of each rank")
    sync.add_argument(
        "--networks",
        type=networks,
        default=NETWORKS,
        metavar="NAME=US:GB/S,...",
        help="that the cost model is told of: microseconds of a message, and speed; "
        f"default {','.join(f'{n.name}={n.alpha:g}:{n.speed:g}' for n in NETWORKS)}",
    )
    add_timing(sync, repeats=20)

    report = commands.add_parser("report", help="files of results as Markdown and pictures")
    report.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    report.add_argument("--output", type=Path, help="folder for report.md and the pictures")

    accuracy = commands.add_parser("accuracy", help="errors against float64 beside peers")
    add_choice(accuracy, "--peers", ACCURACY_PEERS, ACCURACY_PEERS)
    accuracy.add_argument("--quick", action="store_true", help="a few small cases beside torch")
    accuracy.add_argument("--threads", type=int, default=1)
    accuracy.add_argument("--output", type=Path, help="JSON file")
    return parser


def main() -> int:
    arguments = make_parser().parse_args()
    if "pages" in arguments:
        pages.enter(arguments.pages)
    # The commands import torch, which a process that starts again need not have done.
    module = import_module(f".{MODULES[arguments.command]}", __package__)
    return int(module.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
