"""A rank on one of two hosts: ``python two_hosts.py RANK ADDRESS``.

Four ranks, of which the first two are on the host of that address.
"""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

import normcore
import normcore.functional as NF

PORT = 29477
RANKS = 4
SIZES = [1, 4, 0, 3]
GROUPS = {"of all": [[0, 1, 2, 3]], "of a host": [[0, 1], [2, 3]], "across": [[0, 2], [1, 3]]}


def check(name: str, rank: int) -> None:
    """A step of batch norm against one process with the batch of the group."""
    torch.manual_seed(0)
    whole, grad = (torch.randn(sum(SIZES), 6, 5, dtype=torch.float64) for _ in range(2))
    groups = [(ranks, dist.new_group(ranks)) for ranks in GROUPS[name]]
    ranks, group = next((ranks, group) for ranks, group in groups if rank in ranks)
    parts = [[t.split(SIZES)[r] for r in ranks] for t in (whole, grad)]
    batch = torch.cat(parts[0]).requires_grad_()
    want = F.batch_norm(batch, None, None, training=True)
    want.backward(torch.cat(parts[1]))
    own = ranks.index(rank)
    x = parts[0][own].clone().requires_grad_()
    y = NF.batch_norm(x, None, None, training=True, group=group)
    y.backward(parts[1][own])
    sizes = [SIZES[r] for r in ranks]
    for got, all_of_it in ((y, want), (x.grad, batch.grad)):
        torch.testing.assert_close(got, all_of_it.split(sizes)[own], rtol=1e-12, atol=1e-12)


def main(rank: int, address: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{address}:{PORT}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    for name in GROUPS:
        check(name, rank)
    module = normcore.BatchNorm(axis_name="world", axis_index_groups=[[0, 3], [1, 2]])
    module(torch.randn(2, 5))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
