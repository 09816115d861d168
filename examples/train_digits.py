"""Trains a small convolutional network on scikit-learn's handwritten digits, twice.

Once with the norms of normcore and once with those of torch.nn, from the same initial weights.
Prints both accuracies on held-out digits and both training times, and writes to --output:

    losses.png        training loss of both networks
    accuracy.txt      accuracy of the network with normcore's norms, to be met in C++
    digits_model.pt   the network with normcore's norms in evaluation mode, as TorchScript
    digits_test.pt    the held-out digits as a TorchScript module with the buffers `images`
                      (float32 [N, 1, 8, 8]) and `labels` (int64 [N]), for the C++ application
"""

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import normcore

BATCH_SIZE = 64
HELD_OUT = 360
GROUPS = 8


def normcore_batch_norm(channels: int) -> nn.Module:
    return normcore.BatchNorm(num_features=channels, axis=1, momentum=0.9, activation="relu")


def normcore_group_norm(channels: int) -> nn.Module:
    return normcore.GroupNorm(num_features=channels, num_groups=GROUPS, axis=1, activation="silu")


def torch_batch_norm(channels: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


def torch_group_norm(channels: int) -> nn.Module:
    return nn.Sequential(nn.GroupNorm(GROUPS, channels), nn.SiLU())


def make_network(
    batch_norm: Callable[[int], nn.Module], group_norm: Callable[[int], nn.Module]
) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        batch_norm(16),
        nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False),
        group_norm(32),
        nn.Conv2d(32, 64, 3, padding=1, stride=2, bias=False),
        batch_norm(64),
        nn.Flatten(),
        nn.Linear(64 * 2 * 2, 10),
    )


class HeldOut(nn.Module):
    """Digits that no network was trained on."""

    images: Tensor
    labels: Tensor

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.register_buffer("images", images)
        self.register_buffer("labels", labels)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.images, self.labels


@dataclass
class Digits:
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def read_digits() -> Digits:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float()[order].unsqueeze(1) / 16
    labels = torch.from_numpy(data.target).long()[order]
    return Digits(images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT])


@dataclass
class Run:
    """What came out of one training."""

    losses: list[float]
    seconds: float


def train(network: nn.Module, digits: Digits, epochs: int, advance: Callable[[], None]) -> Run:
    """Trains with the same order of the same batches for every network."""
    generator = torch.Generator().manual_seed(1)
    batches = len(digits.train_labels) // BATCH_SIZE
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * batches)
    loss_function = nn.CrossEntropyLoss()
    losses = []
    start = time.perf_counter()
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(digits.train_labels), generator=generator)
        for chosen in order[: batches * BATCH_SIZE].split(BATCH_SIZE):
            optimizer.zero_grad()
            loss = loss_function(network(digits.train_images[chosen]), digits.train_labels[chosen])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        advance()
    return Run(losses, time.perf_counter() - start)


def count_correct(network: nn.Module, digits: Digits) -> int:
    network.eval()
    with torch.inference_mode():
        predicted = network(digits.test_images).argmax(1)
    return int((predicted == digits.test_labels).sum())


def plot_losses(runs: dict[str, Run], path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.subplots()
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=True):
        axes.semilogy(run.losses, style, label=name, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.legend()
    figure.savefig(path, dpi=120)


def write_torchscript(network: nn.Module, digits: Digits, out: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
        torch.jit.script(network.eval()).save(out / "digits_model.pt")
        held_out = HeldOut(digits.test_images, digits.test_labels)
        torch.jit.script(held_out).save(out / "digits_test.pt")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="output directory")
    parser.add_argument(
        "--threads", type=int, default=1, help="more do not pay for a network this small"
    )
    parser.add_argument(
        "--at-least", type=float, default=0.0, help="fail if an accuracy is lower than this"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)

    digits = read_digits()
    networks = {
        "normcore": make_network(normcore_batch_norm, normcore_group_norm),
        "torch.nn": make_network(torch_batch_norm, torch_group_norm),
    }
    console = Console()
    runs = {}
    with Progress(console=console) as progress:
        for name, network in networks.items():
            task = progress.add_task(f"training with {name}", total=arguments.epochs)
            advance = partial(progress.advance, task)
            runs[name] = train(network, digits, arguments.epochs, advance)

    table = Table("norms", "accuracy", "training time", "last loss")
    correct = {name: count_correct(network, digits) for name, network in networks.items()}
    for name, run in runs.items():
        accuracy = f"{correct[name] / HELD_OUT:.4f}"
        table.add_row(name, accuracy, f"{run.seconds:.2f} s", f"{run.losses[-1]:.4f}")
    console.print(table)
    plot_losses(runs, arguments.output / "losses.png")
    write_torchscript(networks["normcore"], digits, arguments.output)
    print(f"wrote losses.png, digits_model.pt and digits_test.pt to {arguments.output}")
    accuracies = {name: f"{n / HELD_OUT:.4f} ({n}/{HELD_OUT})" for name, n in correct.items()}
    (arguments.output / "accuracy.txt").write_text(accuracies["normcore"] + "\n")
    for name, accuracy in accuracies.items():
        print(f"{name} accuracy: {accuracy}")
    if min(correct.values()) < arguments.at_least * HELD_OUT:
        raise SystemExit(f"error: an accuracy is below {arguments.at_least}")


if __name__ == "__main__":
    main()
