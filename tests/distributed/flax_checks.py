"""What every rank of test_flax_sync.py checks: the golden case of several ranks, its own row."""

from __future__ import annotations

import torch.distributed as dist
from golden import Case, cases
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import normcore

SYNC = {case.name: case for case in cases() if case.kind == "sync"}
SHARED = ("scale", "bias", "mean0", "var0")


def own_row(case: Case) -> dict[str, Tensor]:
    rank = dist.get_rank()
    return {name: t if name in SHARED else t[rank] for name, t in case.arrays.items()}


def check(name: str, sync_weighting: str, axis_name: str) -> None:
    case = SYNC[name]
    mesh = init_device_mesh("cpu", (case.world_size,), mesh_dim_names=(case.ctor["axis_name"],))
    row = own_row(case)
    module = case.build(row["x"], sync_weighting=sync_weighting, axis_name=axis_name)
    with normcore.distributed.use_mesh(mesh):
        case.call_and_check(module, row)
