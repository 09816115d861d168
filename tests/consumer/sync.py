"""Processes without Python that normalize together, and torch's norms of all that they have.

    python sync.py PROGRAM FOLDER

PROGRAM is that of sync.cpp; each rank's part of the batch and its results go through FOLDER.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLES = [5, 0, 3]  # of each rank, for batch norm
ROWS = [4, 1, 2]  # of the images, for group norm
RANKS = len(SAMPLES)
TIMEOUT = 120.0  # seconds; that of the ranks, when they wait for each other, is shorter

Tensors = dict[str, Tensor]


def make_batch() -> Tensors:
    """What sync.cpp takes, of all ranks."""
    torch.manual_seed(0)
    x, grad_y = torch.randn(2, 8, 4, 7, 2, dtype=torch.float64)
    x = 3 * x + 2
    weight, bias, mean = torch.randn(3, 4, dtype=torch.float64)
    batch = {"samples": x, "grad_samples": grad_y, "rows": x, "grad_rows": grad_y}
    return batch | {"weight": weight, "bias": bias, "mean": mean, "var": mean.exp()}


def cut(name: str, t: Tensor) -> list[Tensor]:
    """The parts of the ranks."""
    if name.endswith("samples"):
        return list(t.split(SAMPLES, dim=0))
    return list(t.split(ROWS, dim=2)) if name.endswith("rows") else [t] * RANKS


def join(name: str, parts: list[Tensor]) -> Tensor:
    """One result of sync.cpp, from those of the ranks."""
    norm, result = name.split(".")
    if result in ("y", "eval", "grad_x", "second_x"):
        return torch.cat(parts, dim=2 if norm == "group_norm" else 0)
    if result in ("mean", "var"):
        assert all(part.equal(parts[0]) for part in parts), f"{name}: the ranks have other bits"
        return parts[0]
    return torch.stack(parts).sum(dim=0)  # gradients of parameters


def run(program: str, folder: Path) -> None:
    """One process for each rank. The first one that fails is the end of all."""
    (folder / "store").unlink(missing_ok=True)  # that of ranks that were killed
    deadline = time.monotonic() + TIMEOUT
    ranks = [subprocess.Popen([program, folder, str(r), str(RANKS)]) for r in range(RANKS)]
    try:
        while None in (codes := [rank.poll() for rank in ranks]):
            assert not any(codes), f"exit codes of the ranks: {codes}"
            assert time.monotonic() < deadline, f"not done in {TIMEOUT:.0f} s: {codes}"
            time.sleep(0.02)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert not any(codes), f"exit codes of the ranks: {codes}"


def differentiate(batch: Tensors, part: str, name: str, norm: Callable[..., Tensor]) -> Tensors:
    inputs = [batch[key].clone().requires_grad_() for key in (part, "weight", "bias")]
    y = norm(*inputs)
    grad = torch.autograd.grad(y, inputs, batch[f"grad_{part}"], create_graph=True)
    second = torch.autograd.grad(grad[0].square().sum(), inputs[:2])
    names = ["y", "grad_x", "grad_weight", "grad_bias", "second_x", "second_weight"]
    return {f"{name}.{result}": t.detach() for result, t in zip(names, (y, *grad, *second))}


def batch_norm(batch: Tensors) -> Tensors:
    mean, var = batch["mean"].clone(), batch["var"].clone()

    def norm(x: Tensor, weight: Tensor, bias: Tensor, training: bool = True) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, training)

    results = differentiate(batch, "samples", "batch_norm", norm)
    y = norm(batch["samples"], batch["weight"], batch["bias"], training=False)
    return results | {"batch_norm.eval": y, "batch_norm.mean": mean, "batch_norm.var": var}


def module(batch: Tensors) -> Tensors:
    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.batch_norm(x, None, None, weight, bias, training=True))

    results = differentiate(batch, "samples", "module", norm)
    x, dims = batch["samples"], (0, 2, 3)
    mean, var = 0.1 * x.mean(dims), 0.9 + 0.1 * x.var(dims, correction=0)
    y = F.silu(F.batch_norm(x, mean, var, batch["weight"], batch["bias"]))
    return results | {"module.eval": y, "module.mean": mean, "module.var": var}


def group_norm(batch: Tensors) -> Tensors:
    return differentiate(
        batch, "rows", "group_norm", lambda x, weight, bias: F.group_norm(x, 2, weight, bias)
    )


def check(program: str, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    batch = make_batch()
    parts = {name: cut(name, t) for name, t in batch.items()}
    for rank in range(RANKS):
        given = {name: of_ranks[rank].contiguous() for name, of_ranks in parts.items()}
        torch.save(given, folder / f"given{rank}.pt")
        (folder / f"results{rank}.pt").unlink(missing_ok=True)
    run(program, folder)
    paths = [folder / f"results{rank}.pt" for rank in range(RANKS)]
    # A dictionary of C++ has a type, which is more than weights.
    of_ranks = [torch.load(path, weights_only=False) for path in paths]
    got = {name: join(name, [results[name] for results in of_ranks]) for name in of_ranks[0]}
    want = batch_norm(batch) | module(batch) | group_norm(batch)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    print(f"sync: {len(want)} results of {RANKS} ranks agree with torch")


if __name__ == "__main__":
    check(sys.argv[1], Path(sys.argv[2]))
