"""The checks of torch's test_ops.py, test_ops_gradients.py and functorch on OpInfo entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from outcomes import Outcomes, Skip
from skips import Facts, run_on_our_kernels
from steps import Expected, copies_of, in_float64, step, tensors_of
from targets import Target
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import ErrorInput, OpInfo, SampleInput
from torch.utils._pytree import tree_map

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def find_op(name: str) -> OpInfo:
    for op in op_db:
        if op.full_name == name:
            return op
    raise Skip("this torch has no such entry")


def arguments_of(sample: SampleInput) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (sample.input, *sample.args), sample.kwargs


def eps_of(entry: str, sample: SampleInput) -> float:
    if entry.startswith("nn."):
        return sample.kwargs.get("eps", 1e-5)
    return sample.args[-1]


def channels_last(sample: SampleInput) -> SampleInput:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = formats[sample.input.dim()]

    def arrange(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dim() != sample.input.dim():
            return t
        return t.detach().contiguous(memory_format=memory_format).requires_grad_(t.requires_grad)

    return sample.transform(arrange)


def layouts_of(sample: SampleInput) -> Iterator[tuple[str, SampleInput]]:
    yield "as given", sample
    yield "not contiguous", sample.noncontiguous()
    if sample.input.dim() in (4, 5):
        yield "channels_last", channels_last(sample)


class OpChecks:
    """All checks of one entry against one target."""

    def __init__(self, entry: str, target: Target, outcomes: Outcomes) -> None:
        self.entry, self.target, self.outcomes = entry, target, outcomes
        self.op = find_op(entry)
        self.function = target.function(entry, self.op)

    def run(self) -> None:
        for dtype in DTYPES:
            if self.op.supports_dtype(dtype, "cpu"):
                self.values(dtype, "reference", requires_grad=False)
                self.values(dtype, "sample", requires_grad=True)
        self.derivatives("gradcheck", self.gradcheck)
        self.derivatives("gradgradcheck", self.gradgradcheck)
        if self.op.supports_forward_ad:
            self.derivatives("forward_ad", self.forward_ad)
        self.derivatives("vmap", self.vmap)
        self.errors()

    def check(
        self, name: str, dtype: torch.dtype, text: str, sample: SampleInput, body: Callable[[], Any]
    ) -> None:
        """Runs `body` with our kernels in place, unless the table of skips has the sample."""
        facts = Facts(self.target, self.entry, name, sample.input, eps_of(self.entry, sample))
        run = partial(run_on_our_kernels, facts, body)
        self.outcomes.run(self.entry, name, str(dtype).removeprefix("torch."), text, run)

    def values(self, dtype: torch.dtype, kind: str, requires_grad: bool) -> None:
        """Outputs, statistics and gradients are those of torch's own kernels."""
        make = self.op.reference_inputs if kind == "reference" else self.op.sample_inputs
        for i, given in enumerate(make("cpu", dtype, requires_grad=requires_grad)):
            for layout, sample in layouts_of(given):
                arguments = arguments_of(sample)
                body = partial(self.compare, arguments, self.expected(arguments))
                name = "gradients" if requires_grad else "forward"
                self.check(name, dtype, f"{kind} {i}, {layout}", sample, body)

    def step(self, function: Callable[..., Any], arguments: Any) -> dict[str, Tensor]:
        return step(function, arguments, output_only=not self.target.is_torch)

    def expected(self, arguments: Any) -> Expected:
        return Expected(self.step(self.op, arguments), self.step(self.op, in_float64(arguments)))

    def compare(self, arguments: Any, expected: Expected) -> None:
        got = self.step(self.function, arguments)
        expected.compare(got, same_layout=self.target.is_torch)

    def derivatives(self, name: str, body: Callable[[SampleInput], Any]) -> None:
        samples = self.op.sample_inputs("cpu", torch.float64, requires_grad=True)
        for i, sample in enumerate(samples):
            self.check(name, torch.float64, f"sample {i}", sample, partial(body, sample))

    def of_leaves(self, sample: SampleInput) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
        """The call as a function of the tensors that require grad, and those tensors."""
        arguments = arguments_of(sample)
        leaves = tuple(t for t in tensors_of(arguments) if t.requires_grad)

        def function(*values: Tensor) -> Any:
            given = dict(zip(map(id, leaves), values))
            args, kwargs = tree_map(lambda leaf: given.get(id(leaf), leaf), arguments)
            result = self.op.gradcheck_wrapper(self.function, *args, **kwargs)
            return sample.output_process_fn_grad(result)

        return function, leaves

    def gradcheck(self, sample: SampleInput) -> None:
        function, leaves = self.of_leaves(sample)
        assert gradcheck(
            function,
            leaves,
            check_grad_dtypes=True,
            check_undefined_grad=True,
            check_batched_grad=self.op.check_batched_grad,
        )

    def gradgradcheck(self, sample: SampleInput) -> None:
        function, leaves = self.of_leaves(sample)
        assert gradgradcheck(function, leaves, check_grad_dtypes=True, fast_mode=True)

    def forward_ad(self, sample: SampleInput) -> None:
        function, leaves = self.of_leaves(sample)
        assert gradcheck(
            function,
            leaves,
            check_forward_ad=True,
            check_backward_ad=False,
            check_undefined_grad=True,
            check_batched_forward_grad=self.op.check_batched_forward_grad,
            check_batched_grad=False,
        )
        if self.op.supports_fwgrad_bwgrad:
            assert gradgradcheck(
                function,
                leaves,
                check_fwd_over_rev=True,
                check_rev_over_rev=False,
                check_undefined_grad=False,
                check_batched_grad=False,
                fast_mode=True,
            )

    def vmap(self, sample: SampleInput) -> None:
        """vmap over all tensors of a sample gives what a loop gives."""

        def scaled(factor: float) -> Any:
            return tree_map(
                lambda leaf: leaf.detach() * factor if isinstance(leaf, Tensor) else leaf,
                arguments_of(sample),
            )

        samples = [scaled(factor) for factor in (1.0, 0.5, 1.5)]
        batch = tree_map(
            lambda *leaves: torch.stack(leaves) if isinstance(leaves[0], Tensor) else leaves[0],
            *samples,
        )
        in_dims = tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, batch)
        call = lambda args, kwargs: self.function(*args, **kwargs)  # noqa: E731
        want = torch.stack([self.step(self.function, s)["output 0"] for s in samples])
        got = torch.vmap(call, in_dims=in_dims)(*copies_of(batch))
        got = got[0] if isinstance(got, tuple) else got
        torch.testing.assert_close(got, want)

    def errors(self) -> None:
        """What torch rejects is rejected; with torch's words by torch's function."""
        if self.op.error_inputs_func is None:
            return
        for i, error in enumerate(self.op.error_inputs("cpu")):
            body = partial(self.error, error)
            self.check("errors", torch.float32, f"error {i}", error.sample_input, body)

    def error(self, error: ErrorInput) -> None:
        args, kwargs = arguments_of(error.sample_input)
        if self.target.is_torch:
            expected = pytest.raises(error.error_type, match=error.error_regex)
        else:
            expected = pytest.raises((ValueError, IndexError), match=r"expected .*, got")
        with expected:
            self.function(*args, **kwargs)
