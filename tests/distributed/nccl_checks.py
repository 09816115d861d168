"""A step of training over NCCL. What runs on the ranks, a device each."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

import normcore.functional as NF


def check_step() -> None:
    """Uneven ranks against one process, in a group beside that of gloo."""
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    group = dist.new_group(backend="nccl", device_id=device)
    sizes = [1 + 2 * r for r in range(size)]
    whole, grad = (torch.randn(sum(sizes), 4, 5, 5, dtype=torch.float64) for _ in range(2))
    whole.requires_grad_()
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    running = [t.to(device) for t in (mean, var)]
    want = F.batch_norm(whole, mean, var, training=True)
    want.backward(grad)
    x = whole.detach().split(sizes)[rank].to(device).requires_grad_()
    y = NF.batch_norm(x, *running, training=True, group=group)
    y.backward(grad.split(sizes)[rank].to(device))
    close = torch.testing.assert_close
    close(y.cpu(), want.split(sizes)[rank], rtol=1e-11, atol=1e-11)
    close(x.grad.cpu(), whole.grad.split(sizes)[rank], rtol=1e-11, atol=1e-11)
    for got, wanted in zip(running, (mean, var), strict=True):
        close(got.cpu(), wanted, rtol=1e-12, atol=1e-12)
    dist.destroy_process_group(group)
