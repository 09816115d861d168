"""Group and batch norm in Triton, as one would write them by hand: peers of benchmarks/gpu.py.

Two ways, for tensors [N, C, S] whose channels are either planes (contiguous) or neighbours
(channels_last); both compute in float32 and add floats in a fixed order:

* resident: one program holds a whole group [C / G, S] in registers and reads the tensor once,
  forward (x) and backward (x and dy);
* split: many programs reduce parts of a slice to records, a small launch merges the records, a
  third one reads the tensor again and applies. Forward merges (count, mean, M2), never sums of
  squares; backward sums dy and dy * xhat. Batch norm is the case of one group per channel, whose
  slices span the samples.

Kernels are autotuned over a few tiles and warp counts for each problem.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

RESIDENT_FORWARD, RESIDENT_BACKWARD = 65536, 32768  # elements of a padded group
PROGRAMS = 2048  # that the split kernels aim at
MAX_SPLITS = 128


def tile_configs(*tiles: tuple[int, int]) -> list[triton.Config]:
    return [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in tiles]


def tuned(configs: list[triton.Config], key: list[str]) -> Callable[[Any], Any]:
    """triton.autotune in a few milliseconds for each config."""

    def quick(call: Callable[[], Any], quantiles: tuple[float, ...]) -> Any:
        if os.environ.get("TRITON_INTERPRET") == "1":  # no device whose time it would be
            call()
            return [1.0] * len(quantiles)
        return triton.testing.do_bench(call, warmup=3, rep=12, quantiles=quantiles)

    return triton.autotune(configs, key, do_bench=quick)


TILES = tile_configs((1024, 4), (2048, 4), (2048, 8), (4096, 8))
WARPS = [triton.Config({}, num_warps=warps) for warps in (4, 8, 16, 32)]


@triton.jit
def _activate(z, SILU: tl.constexpr):
    if SILU:
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def _activation_gradient(z, dy, SILU: tl.constexpr):
    if SILU:
        s = tl.sigmoid(z)
        dy = dy * s * (1.0 + z * (1.0 - s))
    return dy


@tuned(WARPS, ["C", "S", "D", "stride_c"])
@triton.jit
def _resident_forward(
    x_ptr, y_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, C, S, D, stride_c, stride_s, eps,
    SILU: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    groups = C // D
    n = group // groups
    c = (group % groups) * D + tl.arange(0, BLOCK_D)[:, None]
    d, s = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_S)[None, :]
    inside = (d < D) & (s < S)
    at = n * C * S + c * stride_c + s * stride_s
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    count = (D * S).to(tl.float32)
    mean = tl.sum(tl.sum(x, 1), 0) / count
    centered = tl.where(inside, x - mean, 0.0)
    var = tl.sum(tl.sum(centered * centered, 1), 0) / count
    rstd = 1.0 / tl.sqrt(var + eps)
    w = tl.load(w_ptr + c, mask=d < D, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + c, mask=d < D, other=0.0).to(tl.float32)
    y = _activate(centered * (rstd * w) + b, SILU)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + group, mean)
    tl.store(rstd_ptr + group, rstd)


@tuned(WARPS, ["C", "S", "D", "stride_c"])
@triton.jit
def _resident_backward(
    x_ptr, dy_ptr, dx_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, sums_ptr, C, S, D, stride_c,
    stride_s, sums_stride,
    SILU: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    groups = C // D
    n = group // groups
    c = (group % groups) * D + tl.arange(0, BLOCK_D)[:, None]
    d, s = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_S)[None, :]
    inside = (d < D) & (s < S)
    at = n * C * S + c * stride_c + s * stride_s
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    mean, rstd = tl.load(mean_ptr + group), tl.load(rstd_ptr + group)
    w = tl.load(w_ptr + c, mask=d < D, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + c, mask=d < D, other=0.0).to(tl.float32)
    xhat = tl.where(inside, (x - mean) * rstd, 0.0)
    dz = _activation_gradient(xhat * w + b, dy, SILU)
    sum_dz = tl.sum(dz, 1)[:, None]
    sum_dz_xhat = tl.sum(dz * xhat, 1)[:, None]
    channel = n * C + c
    tl.store(sums_ptr + channel, sum_dz_xhat, mask=d < D)
    tl.store(sums_ptr + sums_stride + channel, sum_dz, mask=d < D)
    count = (D * S).to(tl.float32)
    offset = tl.sum(tl.sum(w * sum_dz, 1), 0) / count
    slope = tl.sum(tl.sum(w * sum_dz_xhat, 1), 0) / count
    dx = rstd * (w * dz - offset - slope * xhat)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@tuned(TILES, ["N", "C", "S", "stride_c", "BLOCK_C"])
@triton.jit
def _moments(
    x_ptr, count_ptr, mean_ptr, m2_ptr, N, C, S, stride_c, stride_s, splits,
    BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Records [outer, C, splits]; the samples of an outer index, N of them, are one slice."""
    BLOCK_S: tl.constexpr = BLOCK // BLOCK_C
    blocks = tl.cdiv(C, BLOCK_C)
    outer, split = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = tl.zeros([BLOCK_C], tl.float32)
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    tiles = tl.cdiv(S, BLOCK_S)
    for step in range(split, N * tiles, splits):
        n = outer * N + step // tiles
        s = (step % tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = (c < C)[:, None] & (s < S)[None, :]
        at = n * C * S + c[:, None] * stride_c + s[None, :] * stride_s
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        new = tl.minimum(S - (step % tiles) * BLOCK_S, BLOCK_S).to(tl.float32)
        new_mean = tl.sum(x, 1) / new
        centered = tl.where(inside, x - new_mean[:, None], 0.0)
        delta = new_mean - mean
        total = count + new
        mean += delta * (new / total)
        m2 += tl.sum(centered * centered, 1) + delta * delta * (count * new / total)
        count = total
    record = (outer * C + c) * splits + split
    tl.store(count_ptr + record, count, mask=c < C)
    tl.store(mean_ptr + record, mean, mask=c < C)
    tl.store(m2_ptr + record, m2, mask=c < C)


@triton.jit
def _merge_moments(
    count_ptr, records_mean_ptr, m2_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
    records, eps, momentum,
    RUNNING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One slice per program, from its neighbouring records."""
    index = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    at = index * records + i
    count = tl.load(count_ptr + at, mask=i < records, other=0.0)
    record_mean = tl.load(records_mean_ptr + at, mask=i < records, other=0.0)
    m2 = tl.load(m2_ptr + at, mask=i < records, other=0.0)
    total = tl.sum(count, 0)
    mean = tl.sum(count * record_mean, 0) / total
    away = record_mean - mean
    m2_total = tl.sum(m2 + count * away * away, 0)
    tl.store(mean_ptr + index, mean)
    tl.store(rstd_ptr + index, 1.0 / tl.sqrt(m2_total / total + eps))
    if RUNNING:
        old_mean = tl.load(running_mean_ptr + index)
        old_var = tl.load(running_var_ptr + index)
        tl.store(running_mean_ptr + index, old_mean + momentum * (mean - old_mean))
        var = m2_total / (total - 1.0)
        tl.store(running_var_ptr + index, old_var + momentum * (var - old_var))


@tuned(TILES, ["N", "C", "S", "stride_c", "BLOCK_C"])
@triton.jit
def _apply_forward(
    x_ptr, y_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, N, C, S, D, stride_c, stride_s,
    statistics_stride, splits,
    SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of channel c of sample n: number n * statistics_stride + c // D."""
    BLOCK_S: tl.constexpr = BLOCK // BLOCK_C
    blocks = tl.cdiv(C, BLOCK_C)
    n, split = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    w = tl.load(w_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    slice_of = n * statistics_stride + c // D
    mean = tl.load(mean_ptr + slice_of, mask=c < C, other=0.0)
    scale = tl.load(rstd_ptr + slice_of, mask=c < C, other=0.0) * w
    for tile in range(split, tl.cdiv(S, BLOCK_S), splits):
        s = tile * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = (c < C)[:, None] & (s < S)[None, :]
        at = n * C * S + c[:, None] * stride_c + s[None, :] * stride_s
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = _activate((x - mean[:, None]) * scale[:, None] + b[:, None], SILU)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@tuned(TILES, ["N", "C", "S", "stride_c", "BLOCK_C"])
@triton.jit
def _gradient_sums(
    x_ptr, dy_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, sums_ptr, sums_stride, N, C, S, D,
    stride_c, stride_s, statistics_stride, splits,
    SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of dz * xhat and of dz: records [2, outer, C, splits], outer as in _moments."""
    BLOCK_S: tl.constexpr = BLOCK // BLOCK_C
    blocks = tl.cdiv(C, BLOCK_C)
    outer, split = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    w = tl.load(w_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    slice_of = outer * statistics_stride + c // D
    mean = tl.load(mean_ptr + slice_of, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + slice_of, mask=c < C, other=0.0)
    sum_dz = tl.zeros([BLOCK_C], tl.float32)
    sum_dz_xhat = tl.zeros([BLOCK_C], tl.float32)
    tiles = tl.cdiv(S, BLOCK_S)
    for step in range(split, N * tiles, splits):
        n = outer * N + step // tiles
        s = (step % tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = (c < C)[:, None] & (s < S)[None, :]
        at = n * C * S + c[:, None] * stride_c + s[None, :] * stride_s
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        xhat = (x - mean[:, None]) * rstd[:, None]
        dz = _activation_gradient(xhat * w[:, None] + b[:, None], dy, SILU)
        sum_dz += tl.sum(dz, 1)
        sum_dz_xhat += tl.sum(dz * xhat, 1)
    record = (outer * C + c) * splits + split
    tl.store(sums_ptr + record, sum_dz_xhat, mask=c < C)
    tl.store(sums_ptr + sums_stride + record, sum_dz, mask=c < C)


@triton.jit
def _merge_sums(
    sums_ptr, w_ptr, slope_ptr, offset_ptr, sums_stride, C, D, splits, count,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One slice per program: the means over it of w * dz * xhat and of w * dz."""
    index = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    records = D * splits
    c = (index * D) % C + i // splits
    w = tl.load(w_ptr + c, mask=i < records, other=0.0).to(tl.float32)
    at = index * records + i
    dz_xhat = tl.load(sums_ptr + at, mask=i < records, other=0.0)
    dz = tl.load(sums_ptr + sums_stride + at, mask=i < records, other=0.0)
    tl.store(slope_ptr + index, tl.sum(w * dz_xhat, 0) / count)
    tl.store(offset_ptr + index, tl.sum(w * dz, 0) / count)


@tuned(TILES, ["N", "C", "S", "stride_c", "BLOCK_C"])
@triton.jit
def _apply_backward(
    x_ptr, dy_ptr, dx_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, slope_ptr, offset_ptr, N, C, S, D,
    stride_c, stride_s, statistics_stride, splits,
    SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    BLOCK_S: tl.constexpr = BLOCK // BLOCK_C
    blocks = tl.cdiv(C, BLOCK_C)
    n, split = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    w = tl.load(w_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    slice_of = n * statistics_stride + c // D
    mean = tl.load(mean_ptr + slice_of, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + slice_of, mask=c < C, other=0.0)
    slope = tl.load(slope_ptr + slice_of, mask=c < C, other=0.0)
    offset = tl.load(offset_ptr + slice_of, mask=c < C, other=0.0)
    for tile in range(split, tl.cdiv(S, BLOCK_S), splits):
        s = tile * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = (c < C)[:, None] & (s < S)[None, :]
        at = n * C * S + c[:, None] * stride_c + s[None, :] * stride_s
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        xhat = (x - mean[:, None]) * rstd[:, None]
        dz = _activation_gradient(xhat * w[:, None] + b[:, None], dy, SILU)
        dx = rstd[:, None] * (w[:, None] * dz - offset[:, None] - slope[:, None] * xhat)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Geometry:
    """A tensor as [N, C, S] with strides of channel and position, and its slices."""

    samples: int
    channels: int
    positions: int
    stride_c: int
    stride_s: int
    groups: int | None  # None: batch norm

    @staticmethod
    def of(x: Tensor, groups: int | None) -> Geometry:
        """`x` is contiguous or channels_last (_3d), with the channels on axis 1."""
        n, c = x.shape[:2]
        s = x.numel() // (n * c)
        planes = x.is_contiguous()
        return Geometry(n, c, s, s if planes else 1, 1 if planes else c, groups)

    @property
    def per_slice(self) -> int:
        return 1 if self.groups is None else self.channels // self.groups

    @property
    def slices(self) -> int:
        return self.channels if self.groups is None else self.samples * self.groups

    @property
    def outer(self) -> int:
        """Samples that have statistics of their own, and how many each slice spans."""
        return 1 if self.groups is None else self.samples

    @property
    def statistics_stride(self) -> int:
        return 0 if self.groups is None else self.groups

    @property
    def block_c(self) -> int:
        """Channels of a tile: neighbours in memory, at least 128 bytes of them."""
        if self.stride_c == 1:
            return min(64, triton.next_power_of_2(self.channels))
        return min(64, max(1, 512 // triton.next_power_of_2(self.positions)))

    def splits(self, outer: int) -> int:
        programs = outer * triton.cdiv(self.channels, self.block_c)
        tiles = triton.cdiv(self.positions * self.samples // outer * self.block_c, 1024)
        return max(1, min(MAX_SPLITS, tiles, PROGRAMS // programs))

    def padded(self) -> tuple[int, int]:
        """Tile of a resident group."""
        return triton.next_power_of_2(self.per_slice), triton.next_power_of_2(self.positions)

    def fits(self, limit: int) -> bool:
        block_d, block_s = self.padded()
        return self.groups is not None and block_d * block_s <= limit


@dataclass
class Norm:
    """A norm of `x`: group norm, or with `groups` None batch norm with batch statistics."""

    geometry: Geometry
    weight: Tensor
    bias: Tensor
    eps: float = 1e-5
    silu: bool = False
    running: tuple[Tensor, Tensor] | None = None
    momentum: float = 0.1

    def forward_resident(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y, mean and rstd; one read of x."""
        g = self.geometry
        y = torch.empty_like(x)
        mean, rstd = x.new_empty((2, g.slices), dtype=torch.float32)
        block_d, block_s = g.padded()
        _resident_forward[(g.slices,)](
            x, y, self.weight, self.bias, mean, rstd, g.channels, g.positions, g.per_slice,
            g.stride_c, g.stride_s, self.eps, SILU=self.silu, BLOCK_D=block_d, BLOCK_S=block_s,
        )  # fmt: skip
        return y, mean, rstd

    def backward_resident(
        self, x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, weight and bias; one read of x and dy."""
        g = self.geometry
        dx = torch.empty_like(x)
        sums = x.new_empty((2, g.samples, g.channels), dtype=torch.float32)
        block_d, block_s = g.padded()
        _resident_backward[(g.slices,)](
            x, dy, dx, self.weight, self.bias, mean, rstd, sums, g.channels, g.positions,
            g.per_slice, g.stride_c, g.stride_s, sums.stride(0), SILU=self.silu, BLOCK_D=block_d,
            BLOCK_S=block_s,
        )  # fmt: skip
        dweight, dbias = sums.sum(1)
        return dx, dweight, dbias

    def forward_split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y, mean and rstd; two reads of x. Updates the running statistics if there are any."""
        g = self.geometry
        inner, splits = g.samples // g.outer, g.splits(g.outer)
        records = x.new_empty((3, g.outer, g.channels, splits), dtype=torch.float32)
        mean, rstd = x.new_empty((2, g.slices), dtype=torch.float32)
        y = torch.empty_like(x)
        blocks = triton.cdiv(g.channels, g.block_c)
        _moments[(g.outer * blocks, splits)](
            x, *records, inner, g.channels, g.positions, g.stride_c, g.stride_s, splits,
            BLOCK_C=g.block_c,
        )  # fmt: skip
        running = self.running or (mean, mean)
        per_slice = g.per_slice * splits
        _merge_moments[(g.slices,)](
            *records, mean, rstd, *running, per_slice, self.eps, self.momentum,
            RUNNING=self.running is not None, BLOCK=triton.next_power_of_2(per_slice),
        )  # fmt: skip
        splits = g.splits(g.samples)
        _apply_forward[(g.samples * blocks, splits)](
            x, y, self.weight, self.bias, mean, rstd, g.samples, g.channels, g.positions,
            g.per_slice, g.stride_c, g.stride_s, g.statistics_stride, splits, SILU=self.silu,
            BLOCK_C=g.block_c,
        )  # fmt: skip
        return y, mean, rstd

    def backward_split(
        self, x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, weight and bias; two reads of x and dy."""
        g = self.geometry
        inner, splits = g.samples // g.outer, g.splits(g.outer)
        sums = x.new_empty((2, g.outer, g.channels, splits), dtype=torch.float32)
        slope, offset = x.new_empty((2, g.slices), dtype=torch.float32)
        dx = torch.empty_like(x)
        blocks = triton.cdiv(g.channels, g.block_c)
        shared = (self.weight, self.bias, mean, rstd)
        _gradient_sums[(g.outer * blocks, splits)](
            x, dy, *shared, sums, sums.stride(0), inner, g.channels, g.positions, g.per_slice,
            g.stride_c, g.stride_s, g.statistics_stride, splits, SILU=self.silu,
            BLOCK_C=g.block_c,
        )  # fmt: skip
        _merge_sums[(g.slices,)](
            sums, self.weight, slope, offset, sums.stride(0), g.channels, g.per_slice, splits,
            float(x.numel() // g.slices), BLOCK=triton.next_power_of_2(g.per_slice * splits),
        )  # fmt: skip
        splits = g.splits(g.samples)
        _apply_backward[(g.samples * blocks, splits)](
            x, dy, dx, *shared, slope, offset, g.samples, g.channels, g.positions, g.per_slice,
            g.stride_c, g.stride_s, g.statistics_stride, splits, SILU=self.silu,
            BLOCK_C=g.block_c,
        )  # fmt: skip
        dweight, dbias = sums.sum((1, 3))
        return dx, dweight, dbias

    def forwards(self) -> dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
        """The ways that exist for this problem, by name."""
        ways: dict[str, Any] = {"split": self.forward_split}
        if self.geometry.fits(RESIDENT_FORWARD):
            ways["resident"] = self.forward_resident
        return ways

    def backwards(self) -> dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]]:
        ways: dict[str, Any] = {"split": self.backward_split}
        if self.geometry.fits(RESIDENT_BACKWARD):
            ways["resident"] = self.backward_resident
        return ways
