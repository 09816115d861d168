"""The algorithm of torch.nn.SyncBatchNorm on the CPU, for which torch has no kernels.

Forward: mean, 1 / std and count of every rank to all ranks (all_gather). Backward: the two sums of
every channel over all ranks (all_reduce). The passes over the tensors are torch's own CPU kernels
where there is one; grad_input takes two elementwise ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def _of_channels(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.dim() - 2))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: TorchSyncBatchNorm
    ) -> Tensor:
        channels, dims = x.shape[1], [d for d in range(x.dim()) if d != 1]
        var, mean = torch.var_mean(x, dims, correction=0)
        count = torch.full((1,), x.numel() // channels, dtype=mean.dtype)
        own = torch.cat([mean, (var + norm.eps).rsqrt(), count])
        found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(found, own)
        means, rstds, counts = torch.stack(found).split(channels, dim=1)
        total = counts.sum()
        shares = counts / total
        mean = (shares * means).sum(0)
        var = (shares * (rstds.pow(-2) - norm.eps + (means - mean).square())).sum(0)
        norm.update(mean, var * (total / (total - 1)))
        ctx.save_for_backward(x, weight, mean, (var + norm.eps).rsqrt(), total)
        ctx.eps = norm.eps
        return nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, norm.eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,) = grads
        x, weight, mean, rstd, total = ctx.saved_tensors
        mask = [False, True, True]
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, None, None, mean, rstd, True, ctx.eps, mask
        )
        grad_x = None
        if ctx.needs_input_grad[0]:
            sums = torch.cat([grad_bias, grad_weight / rstd])
            dist.all_reduce(sums)
            sum_dy, sum_dy_xmu = (sums / total).split(len(mean))
            of_dy = rstd * weight
            of_x = -of_dy * rstd.square() * sum_dy_xmu
            constant = -of_dy * sum_dy - of_x * mean
            of_dy, of_x, constant = (_of_channels(t, x) for t in (of_dy, of_x, constant))
            grad_x = torch.addcmul(constant, dy, of_dy).addcmul_(x, of_x)
        return grad_x, grad_weight, grad_bias, None


class TorchSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Training of the default group only. One rank alone has torch's own batch norm, as there."""

    def update(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.dim() >= 2

    def forward(self, input: Tensor) -> Tensor:
        if dist.get_world_size() == 1:
            return super().forward(input)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        y: Tensor = _Norm.apply(input, self.weight, self.bias, self)
        return y
