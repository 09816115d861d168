"""Which of torch's own test entries the suite runs."""

from __future__ import annotations

#: OpInfo entries (torch.testing._internal.common_methods_invocations), by their full names.
OPS = (
    "nn.functional.batch_norm",
    "nn.functional.batch_norm.without_cudnn",
    "nn.functional.instance_norm",
    "nn.functional.group_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_batch_norm_with_update",
    "native_group_norm",
)

#: ModuleInfo entries (torch.testing._internal.common_modules).
MODULES = (
    "nn.BatchNorm1d",
    "nn.BatchNorm2d",
    "nn.BatchNorm3d",
    "nn.InstanceNorm1d",
    "nn.InstanceNorm2d",
    "nn.InstanceNorm3d",
    "nn.GroupNorm",
)

#: What is tested, and with which entries: torch's names under the override, and our own.
ENTRIES = {"override": (*OPS, *MODULES), "functional": OPS, "nn": MODULES}
