"""Loads the golden vectors of tests/golden (README.md there explains arrays and manifest)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from devices import place
from torch import Tensor

import normcore

FOLDER = Path(__file__).parents[1] / "golden"
DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}
_NOT_OURS = ("use_fast_variance", "force_float32_reductions")


@dataclass(frozen=True)
class Case:
    """One entry of the manifest."""

    entry: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.entry[name]

    @property
    def is_batch_norm(self) -> bool:
        return bool(self.op == "batch_norm")

    @property
    def is_treex(self) -> bool:
        return bool(self.source.startswith("treex"))

    @property
    def arrays(self) -> dict[str, Tensor]:
        """The tensors by name, on the default device."""
        return place(self._loaded)

    @cached_property
    def _loaded(self) -> dict[str, Tensor]:
        """The tensors of the file; bfloat16 is stored as its bit pattern under ``NAME_bf16``."""
        tensors = {}
        with np.load(FOLDER / self.file, allow_pickle=False) as arrays:
            for name in arrays.files:
                array = np.array(arrays[name])
                if name.endswith("_bf16"):
                    bits = torch.from_numpy(array.view(np.int16))
                    tensors[name.removesuffix("_bf16")] = bits.view(torch.bfloat16)
                else:
                    tensors[name] = torch.from_numpy(array)
        return tensors

    def step(self, index: int) -> dict[str, Tensor]:
        """The arrays of one step of a case with several."""
        shared = ("scale", "bias", "mean0", "var0", "mask")
        return {k: v if k in shared else v[index] for k, v in self.arrays.items()}

    def build(self, x: Tensor, **more: Any) -> normcore.BatchNorm | normcore.GroupNorm:
        """The module of the case, initialized from `x` and holding the case's state."""
        options = {k: v for k, v in self.ctor.items() if k not in _NOT_OURS} | more
        treex_default = "float32" if self.is_treex else None
        dtype = options.get("dtype", treex_default)
        options["dtype"] = None if dtype is None else DTYPES[dtype]
        options["param_dtype"] = DTYPES[
            options.get("param_dtype") or self.dtypes["param"] or "float32"
        ]
        if self.is_batch_norm:
            module: Any = normcore.BatchNorm(**options)
        else:
            if not self.is_treex:
                options.setdefault("epsilon", 1e-6)  # Flax's default
            module = normcore.GroupNorm(**options)
        module.init(x)
        if self.is_batch_norm and self.dtypes["stats"] == "float64":
            module.mean, module.var = module.mean.double(), module.var.double()
        with torch.no_grad():
            for ours, theirs in (
                ("scale", "scale"),
                ("bias", "bias"),
                ("mean", "mean0"),
                ("var", "var0"),
            ):
                if theirs in self.arrays and getattr(module, ours, None) is not None:
                    getattr(module, ours).copy_(self.arrays[theirs])
        return module

    def check(self, name: str, got: Tensor, arrays: dict[str, Tensor]) -> None:
        """Compares at the stated tolerance, with the float64 truth where the case has one."""
        tolerances = {k.removesuffix("_bf16"): v for k, v in self.tolerance.items()}
        key = f"{name}_truth" if f"{name}_truth" in arrays else name
        rtol, atol = tolerances[key]
        want = arrays[key].to(torch.float64)
        if name.startswith("new_") and want.isnan().any():
            # Documented deviation: a channel with no valid element keeps its running statistics.
            want = torch.where(want.isnan(), arrays[f"{name.removeprefix('new_')}0"], want)
        torch.testing.assert_close(
            got.detach().to(torch.float64), want, rtol=rtol, atol=atol, equal_nan=True,
            msg=lambda text: f"{self.name}, {key}: {text}",
        )  # fmt: skip

    def call_and_check(self, module: Any, arrays: dict[str, Tensor]) -> None:
        """One call, forward and backward, and everything the case knows about it."""
        x = arrays["x"].clone()
        inputs = {"dscale": module.scale, "dbias": module.bias}
        if x.is_floating_point():
            inputs["dx"] = x.requires_grad_()
        inputs = {name: t for name, t in inputs.items() if t is not None}
        arguments: dict[str, Any] = {"mask": arrays["mask"]} if self.call.get("mask") else {}
        if self.is_batch_norm:
            arguments["use_running_average"] = self.call["use_running_average"]
        y = module(x, **arguments)
        assert y.dtype == DTYPES[self.dtypes["y"]]
        self.check("y", y, arrays)
        if "dy" in arrays and inputs:
            grads = torch.autograd.grad(y, list(inputs.values()), arrays["dy"])
            for name, grad in zip(inputs, grads):
                self.check(name, grad, arrays)
        if self.is_batch_norm:
            self.check("new_mean", module.mean, arrays)
            self.check("new_var", module.var, arrays)


def cases() -> list[Case]:
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    return [Case(entry) for entry in manifest["cases"]]
