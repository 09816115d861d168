"""Modules that combine statistics, against modules of one process with the batch of a group."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from nn_cases import randomize
from rank_groups import assert_equal_bits, group_of, members, total
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

import normcore
import normcore.functional as NF
import normcore.nn as NN
from normcore.distributed import set_mesh, use_mesh

CLOSE: Any = {"rtol": 1e-11, "atol": 1e-11}


def close(name: str, got: Tensor | None, want: Tensor | None) -> None:
    assert (got is None) == (want is None), name
    if got is not None:
        torch.testing.assert_close(got, want, msg=lambda text: f"{name}: {text}", **CLOSE)


def sum_over(ranks: Sequence[int], t: Tensor) -> Tensor:
    """Of the tensors of some ranks, though all ranks of the world call it."""
    found = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(found, t.contiguous())
    return torch.stack([found[rank] for rank in ranks]).sum(0)


def compare(
    ours: nn.Module,
    theirs: nn.Module,
    ranks: Sequence[int],
    sizes: Sequence[int],
    shape: tuple[int, ...],
    split: int = 0,
    modes: Sequence[bool] = (True, True, False),
) -> None:
    """Calls in training and evaluation of `theirs` on the batch of `ranks`, and of `ours` on this
    rank's part of it: output, gradients and state."""
    torch.manual_seed(ranks[0])
    own = list(ranks).index(dist.get_rank())
    whole = list(shape)
    whole[split] = sum(sizes)
    for training in modes:
        ours.train(training), theirs.train(training)
        x = 2 * torch.randn(whole, dtype=torch.float64) + 1
        want_x = x.clone().requires_grad_()
        got_x = x.split(list(sizes), split)[own].clone().requires_grad_()
        want, got = theirs(want_x), ours(got_x)
        close("output", got, want.split(list(sizes), split)[own])
        cotangents = torch.randn_like(want).split(list(sizes), split)
        want.backward(torch.cat(cotangents, split))
        got.backward(cotangents[own])
        assert want_x.grad is not None
        close("gradient of input", got_x.grad, want_x.grad.split(list(sizes), split)[own])
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert p.grad is not None
            close(f"gradient of {name}", sum_over(ranks, p.grad), q.grad)
            p.grad = q.grad = None
        for (name, p), q in zip(ours.named_buffers(), theirs.buffers(), strict=True):
            close(name, p, q)
    assert list(ours.state_dict()) == list(theirs.state_dict())


# ---- SyncBatchNorm ----


def check_sync_batch_norm(
    shape: tuple[int, ...], sizes: tuple[int, ...], options: dict[str, Any], layout: str = "world"
) -> None:
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    theirs: Any = randomize(kind(shape[1], dtype=torch.float64, **options))
    group = None if layout == "world" else group_of(layout)
    ours: Any = NN.SyncBatchNorm(shape[1], dtype=torch.float64, process_group=group, **options)
    ours.load_state_dict(theirs.state_dict())
    # Without running statistics an evaluation has those of each rank, as in torch.
    modes = (True, True, False) if theirs.track_running_stats else (True, True)
    compare(ours, theirs, members(layout), sizes, shape, modes=modes)
    kind(shape[1], dtype=torch.float64, **options).load_state_dict(ours.state_dict())


def check_extras() -> None:
    """Activation, residual and mask, as in normcore.nn."""
    x, residual = torch.randn(2, 5, 4, 3, 2, dtype=torch.float64)
    mask = torch.rand(5, 1, 3, 2) < 0.7
    rows = slice(0, 2) if dist.get_rank() == 0 else slice(2, 5)
    ours = NN.SyncBatchNorm(4, activation="silu", dtype=torch.float64)
    theirs = NN.BatchNorm2d(4, activation="silu", dtype=torch.float64)
    got = ours(x[rows], residual=residual[rows], mask=mask[rows])
    close("output", got, theirs(x, residual=residual, mask=mask)[rows])
    close("running_var", ours.running_var, theirs.running_var)


def check_one_value_per_rank() -> None:
    """torch refuses one value per channel; here there are two."""
    x = torch.randn(2, 5, dtype=torch.float64)
    ours, theirs = NN.SyncBatchNorm(5).double(), nn.BatchNorm1d(5).double()
    close("output", ours(x[[dist.get_rank()]]), theirs(x)[[dist.get_rank()]])


def check_empty_everywhere() -> None:
    ours = NN.SyncBatchNorm(5)
    before = copy.deepcopy(ours.state_dict())
    x = torch.randn(0, 5, 3, requires_grad=True)
    y = ours(x)
    assert y.shape == x.shape
    y.sum().backward()
    for name, t in ours.state_dict().items():
        assert_equal_bits(t, before[name], name)
    assert ours.weight.grad is not None
    assert not ours.weight.grad.any()


def check_checkpoint() -> None:
    """The second call, in the backward pass, meets the other ranks too, and counts nothing."""
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    theirs, ours = nn.BatchNorm1d(4).double(), NN.SyncBatchNorm(4).double()
    rows = slice(0, 2) if dist.get_rank() == 0 else slice(2, 5)
    own = x[rows].clone().requires_grad_()
    checkpoint(ours, own, use_reentrant=False).pow(3).sum().backward()
    x.requires_grad_()
    theirs(x).pow(3).sum().backward()
    assert x.grad is not None
    close("gradient", own.grad, x.grad[rows])
    for name, t in ours.state_dict().items():
        close(name, t, theirs.state_dict()[name])


def check_copies() -> None:
    """Of a norm with a process group: both go on combining statistics."""
    ours = NN.SyncBatchNorm(4, process_group=group_of("world")).double()
    x = torch.randn(4, 4, dtype=torch.float64)
    rows = slice(0, 1) if dist.get_rank() == 0 else slice(1, 4)
    want = nn.BatchNorm1d(4).double()(x)[rows]
    for copied in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        close("output", copied(x[rows]), want)


# ---- conversion ----


def mixed_model() -> nn.Sequential:
    """Every kind that can be converted, with options; for inputs of 3 channels."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1),
        nn.BatchNorm2d(6, eps=1e-3, momentum=0.3),
        nn.Sequential(NN.BatchNorm2d(6, activation="relu"), nn.BatchNorm2d(6, affine=False)),
        nn.BatchNorm2d(6, track_running_stats=False),
        nn.Unflatten(1, (6, 1)),
        nn.BatchNorm3d(6, momentum=None),
        nn.Flatten(2),
        nn.BatchNorm1d(6),
    )
    return randomize(model).double()  # type: ignore[return-value]


def check_conversion(layout: str, sizes: tuple[int, ...]) -> None:
    """Results and state of a converted model, and of the model it is turned back into."""
    model = mixed_model()
    converted = copy.deepcopy(model)
    parameters = list(converted.parameters())
    group = None if layout == "world" else group_of(layout)
    assert normcore.convert_sync_batchnorm(converted, group) is converted
    assert all(p is q for p, q in zip(parameters, converted.parameters(), strict=True))
    kinds = [type(m) for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert kinds == [NN.SyncBatchNorm] * 6
    compare(converted, model, members(layout), sizes, (0, 3, 4, 2), modes=(True, True))

    other = mixed_model()
    other.load_state_dict(converted.state_dict())
    reverted = normcore.revert(copy.deepcopy(converted))
    assert [type(m) for m in reverted.modules()] == [type(m) for m in model.modules()]
    x = torch.randn(3, 3, 4, 2, dtype=torch.float64)
    for mode in (False, True):
        want = model.train(mode)(x)
        close("output", reverted.train(mode)(x), want)
        close("output of a loaded model", other.train(mode)(x), want)


# ---- axes of meshes ----


def modules(kind: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """With and without an axis."""
    common: dict[str, Any] = {"param_dtype": torch.float64, "dtype": None, "axis": 1}
    if kind == "BatchNorm":
        build: Any = normcore.BatchNorm
        common |= {"num_features": 6, "momentum": 0.8, "activation": "silu"}
    else:
        build = normcore.GroupNorm
        common |= {"num_features": 6, "num_groups": 2}
    ours, theirs = (randomize(build(**common, **more)).double() for more in (options, {}))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def check_axis(
    kind: str,
    shape: tuple[int, ...],
    axis_name: str,
    groups: list[list[int]] | None,
    ranks: list[list[int]],
    sizes: tuple[int, ...],
    **options: Any,
) -> None:
    """A module on a mesh of `shape` with axes "data" and "model"; `ranks`: those of each group."""
    names = ("data", "model")[: len(shape)]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    ours, theirs = modules(kind, axis_name=axis_name, axis_index_groups=groups, **options)
    (own,) = [group for group in ranks if dist.get_rank() in group]
    split = 0 if kind == "BatchNorm" else 2
    of_input = (0, 6, 3) if kind == "BatchNorm" else (2, 6, 0)
    with use_mesh(mesh):
        compare(ours, theirs, own, sizes, of_input, split)
        again = copy.deepcopy(ours)
        close("scale", again.scale, ours.scale)
        compare(
            pickle.loads(pickle.dumps(ours)), copy.deepcopy(theirs), own, sizes, of_input, split
        )


def check_meshes() -> None:
    """The active mesh decides: of a context within the one of the process."""
    whole = init_device_mesh("cpu", (4,), mesh_dim_names=("data",))
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("model", "data"))
    rank = dist.get_rank()
    x = torch.randn(8, 6, dtype=torch.float64)
    own = x[2 * rank : 2 * rank + 2]
    of_pair = x[4 * (rank // 2) :][:4]
    ours, theirs = modules("BatchNorm", axis_name="data")
    set_mesh(whole)
    try:
        for _ in range(2):
            close("of all", ours(own), theirs(x)[2 * rank : 2 * rank + 2])
            with use_mesh(pairs):
                lo = 2 * (rank % 2)
                close("of a pair", ours(own), theirs(of_pair)[lo : lo + 2])
    finally:
        set_mesh(None)


def check_lazy() -> None:
    """The first call makes the parameters, on ranks without samples too."""
    rank = dist.get_rank()
    x = torch.randn(3, 6)
    norm = normcore.BatchNorm(axis_name="world", momentum=0.5)
    y = norm(x[:0] if rank == 0 else x)
    want = normcore.BatchNorm(momentum=0.5)
    expected = want(x)
    torch.testing.assert_close(y, expected[:0] if rank == 0 else expected)
    torch.testing.assert_close(norm.var, want.var)


def check_autocast() -> None:
    x = torch.randn(6, 4, 3)
    rows = slice(0, 2) if dist.get_rank() == 0 else slice(2, 6)
    ours, theirs = NN.SyncBatchNorm(4), NN.BatchNorm1d(4)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = ours(x[rows].bfloat16()), theirs(x.bfloat16())[rows]
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def check_dtensor() -> None:
    """It has the statistics of the whole tensor, whatever the group."""
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.randn(6, 4, 3, dtype=torch.float64)
    x = distribute_tensor(whole, mesh, [Shard(0)]).requires_grad_()
    for group in ("world", None):
        y = NF.batch_norm(x, None, None, training=True, group=group)
        close("y", y.full_tensor(), F.batch_norm(whole, None, None, training=True))


def check_total(layout: str) -> None:
    """That the sums of these tests are those of the group."""
    rank = dist.get_rank()
    ranks = members(layout)
    assert total(torch.tensor([rank]), layout).item() == sum(ranks)
    assert sum_over(ranks, torch.tensor([rank])).item() == sum(ranks)
