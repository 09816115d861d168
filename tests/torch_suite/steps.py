"""One training step of a function on a sample, and how two of them are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

#: Largest error, in units in the last place of 1 and of the largest value of the same kind.
ULPS = 32


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def copy_of(t: Tensor) -> Tensor:
    """A leaf with the values and strides of `t`, gaps and all."""
    storage = t.detach().untyped_storage().clone()
    copy = torch.empty(0, dtype=t.dtype).set_(storage, t.storage_offset(), t.shape, t.stride())
    return copy.requires_grad_(t.requires_grad)


def copies_of(tree: Any) -> Any:
    return tree_map(lambda leaf: copy_of(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def random_like(t: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)


def differentiated(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of the leaves for a random cotangent of every differentiable output."""
    roots = [y for y in outputs if y.requires_grad]
    if not roots or not leaves:
        return []
    cotangents = [random_like(y) for y in roots]
    grads = torch.autograd.grad(roots, leaves, cotangents, allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in grads]


def step(function: Callable[..., Any], arguments: Any, output_only: bool) -> dict[str, Tensor]:
    """Outputs, gradients, and every tensor argument as the call has left it.

    With `output_only` the first of several outputs is the only one.
    """
    args, kwargs = copies_of(arguments)
    result = function(*args, **kwargs)
    outputs = list(result) if isinstance(result, (tuple, list)) else [result]
    if output_only:
        outputs = outputs[:1]
    given = tensors_of((args, kwargs))
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    grads = differentiated(outputs, [t for t in given if t.requires_grad])
    found |= {f"gradient {i}": g for i, g in enumerate(grads)}
    return found | {f"argument {i}": t.detach() for i, t in enumerate(given)}


def layout(t: Tensor) -> list[int]:
    """Strides of the axes that have any."""
    return [s for s, size in zip(t.stride(), t.shape) if size > 1 and t.numel() > 0]


def in_float64(tree: Any) -> Any:
    """The same values and strides, in the dtype in which torch's kernels are taken to be exact."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf.detach().double().requires_grad_(leaf.requires_grad)

    return tree_map(convert, tree)


class Expected:
    """What torch's own kernels give: in the dtypes of the sample, and in float64.

    Dtypes, shapes and layouts have to be the former's. Values have to be as near to float64 as the
    former's, or within a few units in the last place; the gradient through a norm may be a small
    difference of large terms, so a unit is that of the largest gradient, and at least of 1.
    """

    def __init__(self, found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
        self.found, self.exact = found, exact

    def compare(self, got: dict[str, Tensor], same_layout: bool) -> None:
        assert got.keys() == self.found.keys()
        for name, want in self.found.items():
            assert got[name].dtype == want.dtype, f"{name}: {got[name].dtype}, not {want.dtype}"
            assert got[name].shape == want.shape, f"{name}: {got[name].shape}, not {want.shape}"
            if same_layout:
                assert layout(got[name]) == layout(want), (
                    f"{name}: strides {got[name].stride()}, not {want.stride()}"
                )
            if not want.is_floating_point():
                assert torch.equal(got[name], want), name
                continue
            assert torch.equal(got[name].isnan(), want.isnan()), f"{name}: NaN in other places"
            unit = torch.finfo(want.dtype).eps * self.largest(name.split()[0])
            allowed = max(2 * self.error(name, want), ULPS * unit)
            error = self.error(name, got[name])
            assert error <= allowed, f"{name}: error {error:.3g}, allowed are {allowed:.3g}"

    def largest(self, kind: str) -> float:
        """The largest value of the tensors whose name starts with `kind`, at least 1."""
        return max([1.0, *(largest(t) for n, t in self.exact.items() if n.startswith(kind))])

    def error(self, name: str, t: Tensor) -> float:
        return largest(t.double() - self.exact[name])


def largest(t: Tensor) -> float:
    return t.double().nan_to_num().abs().max().item() if t.numel() else 0.0
