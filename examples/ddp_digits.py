"""Trains a small network on scikit-learn's digits in several processes, with few samples in each.

    torchrun --nproc-per-node 4 examples/ddp_digits.py

Every rank reads a shard of its own. With --shards classes, the default, a shard holds neighbouring
classes only, as where the files of a data set are sorted; with mixed it is a random part of it. A
step takes --batch-size samples of each shard. From the same initial weights, in the same order of
the same samples, three networks are trained:

    one process     the batches of all ranks together, torch's batch norms, no other rank
    synchronised    DistributedDataParallel, after normcore.convert_sync_batchnorm(network)
    local           DistributedDataParallel, every rank with the statistics of its own samples

The first two are the same training up to rounding. The statistics of the third are those of a few
samples of a few classes; its running statistics differ between ranks, and its accuracy is given
with those of the first rank, which a checkpoint would hold, and with their mean over ranks.

Prints the accuracies on held-out digits, how far the losses are from those of one process, and the
training times; writes to --output:

    ddp_losses.png  training loss of each network
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from train_digits import HELD_OUT, Digits, count_correct, read_digits

import normcore

SMOOTHED = 20  # steps of a curve in the picture that are averaged
SYNCHRONISED, LOCAL, ALONE = "synchronised", "local", "one process"


def make_network() -> nn.Sequential:
    """Without activations of normcore: any model of torch.nn can be converted."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64, bias=False),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def make_shards(labels: Tensor, kind: str, ranks: int) -> Tensor:
    """Indices of the samples of each rank: [ranks, samples]."""
    order = labels.argsort(stable=True) if kind == "classes" else torch.arange(len(labels))
    return order[: len(order) // ranks * ranks].view(ranks, -1)


def make_batches(shards: Tensor, batch_size: int, epochs: int) -> Iterator[Tensor]:
    """Indices of the samples of a step: [ranks, batch_size]."""
    generator = torch.Generator().manual_seed(1)
    steps = shards.shape[1] // batch_size
    for _ in range(epochs):
        orders = [torch.randperm(shards.shape[1], generator=generator) for _ in shards]
        shuffled = shards.gather(1, torch.stack(orders))
        yield from shuffled[:, : steps * batch_size].split(batch_size, dim=1)


@dataclass
class Run:
    """What came out of one training: losses are those of all ranks together."""

    losses: Tensor
    seconds: float


def train(network: nn.Module, digits: Digits, batches: list[Tensor]) -> Run:
    """`batches`: the samples of each step that this process takes."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=len(batches))
    loss_function = nn.CrossEntropyLoss()
    losses = []
    start = time.perf_counter()
    network.train()
    for chosen in batches:
        optimizer.zero_grad()
        loss = loss_function(network(digits.train_images[chosen]), digits.train_labels[chosen])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return Run(torch.stack(losses), time.perf_counter() - start)


def mean_over_ranks(t: Tensor) -> Tensor:
    dist.all_reduce(t)
    return t.div_(dist.get_world_size())


def train_parallel(network: nn.Module, digits: Digits, batches: list[Tensor]) -> Run:
    """Every rank keeps the running statistics that it comes to, instead of those of the first."""
    with warnings.catch_warnings():  # newer releases of torch have another name for the option
        warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
        parallel = DistributedDataParallel(network, broadcast_buffers=False)
    run = train(parallel, digits, batches)
    return Run(mean_over_ranks(run.losses), run.seconds)


def is_equal_everywhere(network: nn.Module) -> bool:
    """Whether parameters and running statistics have the same bits on all ranks."""
    equal = torch.tensor(1)
    for t in network.state_dict().values():
        first = t.clone()
        dist.broadcast(first, 0)
        equal *= torch.equal(first, t)
    dist.all_reduce(equal, dist.ReduceOp.MIN)
    return bool(equal)


def average_statistics(network: nn.Module) -> None:
    for name, t in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            mean_over_ranks(t)


def plot_losses(runs: dict[str, Run], path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.subplots()
    for (name, run), style in zip(runs.items(), ("-", "--", "-"), strict=True):
        window = min(SMOOTHED, len(run.losses))
        axes.semilogy(run.losses.unfold(0, window, 1).mean(1), style, label=name, linewidth=1.5)
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss, mean of {SMOOTHED} steps")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4, help="of each rank")
    parser.add_argument("--shards", choices=("classes", "mixed"), default="classes")
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="output directory")
    parser.add_argument(
        "--at-least",
        type=float,
        default=0.0,
        help="fail if the accuracy of one process, or synchronised, is lower than this",
    )
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node 4 examples/ddp_digits.py")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    digits = read_digits()
    shards = make_shards(digits.train_labels, arguments.shards, ranks)
    batches = list(make_batches(shards, arguments.batch_size, arguments.epochs))
    mine = [batch[rank] for batch in batches]
    runs, correct = {}, {}

    network = normcore.convert_sync_batchnorm(make_network())
    runs[SYNCHRONISED] = train_parallel(network, digits, mine)
    correct[SYNCHRONISED] = count_correct(network, digits)
    equal = is_equal_everywhere(network)

    network = make_network()
    runs[LOCAL] = train_parallel(network, digits, mine)
    correct[LOCAL] = count_correct(network, digits)
    average_statistics(network)
    correct[f"{LOCAL}, mean statistics"] = count_correct(network, digits)

    if rank == 0:
        network = make_network()
        runs[ALONE] = train(network, digits, [batch.flatten() for batch in batches])
        correct[ALONE] = count_correct(network, digits)
        report(runs, correct, equal, arguments.output)
    dist.destroy_process_group()
    if rank == 0 and min(correct[ALONE], correct[SYNCHRONISED]) < arguments.at_least * HELD_OUT:
        raise SystemExit(f"error: an accuracy is below {arguments.at_least}")


def report(runs: dict[str, Run], correct: dict[str, int], equal: bool, output: Path) -> None:
    table = Table("batch norm", "accuracy", "last losses", "training time")
    for name, n in correct.items():
        run = runs.get(name)
        cells = (f"{run.losses[-SMOOTHED:].mean():.4f}", f"{run.seconds:.2f} s") if run else ()
        table.add_row(name, f"{n / HELD_OUT:.4f}", *cells)
    Console().print(table)
    output.mkdir(parents=True, exist_ok=True)
    plot_losses(
        {name: runs[name] for name in (ALONE, SYNCHRONISED, LOCAL)}, output / "ddp_losses.png"
    )
    for name, n in correct.items():
        print(f"{name} accuracy: {n / HELD_OUT:.4f} ({n}/{HELD_OUT})")
    for name in (SYNCHRONISED, LOCAL):
        difference = (runs[name].losses - runs[ALONE].losses).abs().max()
        print(f"{name}: losses within {difference:.1e} of those of one process")
    print(f"synchronised: the same bits on all ranks: {equal}")


if __name__ == "__main__":
    main()
