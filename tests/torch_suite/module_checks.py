"""The checks of torch's test_modules.py on ModuleInfo entries."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from outcomes import Outcomes
from skips import Facts, run_on_our_kernels
from steps import Expected, copies_of, copy_of, differentiated, in_float64
from targets import Modules, Override
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.testing._internal.common_modules import (
    ErrorModuleInput,
    ModuleErrorEnum,
    ModuleInfo,
    ModuleInput,
    module_db,
)
from torch.testing._internal.common_utils import noncontiguous_like

# Of second derivatives, random projections are compared, as in torch's own runs.
DERIVATIVES = {"gradcheck": gradcheck, "gradgradcheck": partial(gradgradcheck, fast_mode=True)}


def find_module(name: str) -> ModuleInfo:
    return next(info for info in module_db if info.name == name)


def randomize(module: nn.Module) -> nn.Module:
    """Values that no mistake leaves as they are: torch starts from ones and zeros."""
    generator = torch.Generator().manual_seed(3)
    for t in [*module.parameters(), *module.buffers()]:
        if t.is_floating_point():
            values = torch.rand(t.shape, generator=generator, dtype=torch.float64)
            t.data.copy_(values + 0.5)
    return module


def layouts_of(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "as given", x
    yield "not contiguous", noncontiguous_like(x)
    if x.dim() in (4, 5):
        memory_format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        yield "channels_last", x.detach().contiguous(memory_format=memory_format).requires_grad_()


def train_step(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and state of a copy of the module after one step."""
    module, x = deepcopy(module), copy_of(x)
    y = module(x)
    leaves = [x, *module.parameters()]
    found = {f"gradient {i}": g for i, g in enumerate(differentiated([y], leaves))}
    state = {f"state {name}": t for name, t in module.state_dict().items()}
    return found | {"output": y.detach()} | state


def expected_of(module: nn.Module, x: Tensor) -> Expected:
    exact = train_step(deepcopy(module).double(), in_float64(x))
    return Expected(train_step(module, x), exact)


class ModuleChecks:
    """All checks of one entry against one target."""

    def __init__(self, entry: str, target: Override | Modules, outcomes: Outcomes) -> None:
        self.entry, self.target, self.outcomes = entry, target, outcomes
        self.info = find_module(entry)
        self.module_class = target.module(self.info)

    def run(self) -> None:
        self.errors()
        for training in (True, False):
            for dtype in self.info.supported_dtypes("cpu"):
                for text, module, of_torch, x, given in self.samples(dtype, training):
                    self.values(dtype, text, module, of_torch, x)
                    self.check("pickle", dtype, text, module, x, partial(self.pickle, module, x))
                    if given.reference_fn is not None:
                        body = partial(self.reference, module, x, given)
                        self.check("reference", dtype, text, module, x, body)
            for text, module, _, x, _ in self.samples(torch.float64, training):
                for name, test in DERIVATIVES.items():
                    body = partial(self.derivative, test, module, x)
                    self.check(name, torch.float64, text, module, x, body)

    def inputs(self, make: Any, dtype: torch.dtype, training: bool) -> list[Any]:
        return list(make(self.info, "cpu", dtype, requires_grad=True, training=training))

    def samples(
        self, dtype: torch.dtype, training: bool
    ) -> Iterator[tuple[str, nn.Module, nn.Module, Tensor, ModuleInput]]:
        """The module to be tested beside torch's, with the same state."""
        mode = "train" if training else "eval"
        for i, given in enumerate(self.inputs(self.info.module_inputs_func, dtype, training)):
            constructor = given.constructor_input
            module, of_torch = (
                kind(*constructor.args, **constructor.kwargs).to(dtype).train(training)
                for kind in (self.module_class, self.info.module_cls)
            )
            module.load_state_dict(randomize(of_torch).state_dict())
            (x,) = given.forward_input.args
            yield f"{i} {given.desc or 'default'}, {mode}", module, of_torch, x, given

    def check(
        self,
        name: str,
        dtype: torch.dtype,
        text: str,
        module: Any,
        x: Tensor,
        body: Callable[[], Any],
    ) -> None:
        """Runs `body` with our kernels in place, unless the table of skips has the sample."""
        facts = Facts(self.target, self.entry, name, x, module.eps)
        run = partial(run_on_our_kernels, facts, body)
        self.outcomes.run(self.entry, name, str(dtype).removeprefix("torch."), text, run)

    def values(
        self, dtype: torch.dtype, text: str, module: nn.Module, of_torch: nn.Module, x: Tensor
    ) -> None:
        """Output, gradients and statistics are those of torch's own kernels, in every layout."""
        for name, arranged in layouts_of(x):
            body = partial(self.compare, module, arranged, expected_of(of_torch, arranged))
            self.check("forward and gradients", dtype, f"{text}, {name}", module, x, body)

    def compare(self, module: nn.Module, x: Tensor, expected: Expected) -> None:
        expected.compare(train_step(module, x), same_layout=self.target.is_torch)

    def pickle(self, module: nn.Module, x: Tensor) -> None:
        """A module that was used, saved and loaded goes on like the original."""
        used = deepcopy(module)
        used(x)
        loaded = pickle.loads(pickle.dumps(used))
        for got, want in zip(train_step(loaded, x).values(), train_step(used, x).values()):
            assert torch.equal(got, want)

    def reference(self, module: nn.Module, x: Tensor, given: ModuleInput) -> None:
        """The output is that of the entry's own reference function."""
        want = given.reference_fn(deepcopy(module), x)
        got = deepcopy(module)(x)
        torch.testing.assert_close(got, want)

    def derivative(self, test: Callable[..., bool], module: nn.Module, x: Tensor) -> None:
        names = [name for name, _ in module.named_parameters()]

        def function(x: Tensor, *parameters: Tensor) -> Any:
            state = dict(zip(names, parameters)) | copies_of(dict(module.named_buffers()))
            return functional_call(module, state, (x,))

        assert test(function, (x, *module.parameters()))

    def errors(self) -> None:
        """What torch rejects in training is rejected with its words."""
        make = self.info.module_error_inputs_func
        if make is None:
            return
        for i, error in enumerate(self.inputs(make, torch.float32, True)):
            given = error.module_error_input
            constructor = given.constructor_input
            construct = partial(self.module_class, *constructor.args, **constructor.kwargs)
            if error.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:  # no kernel is involved
                body = partial(self.error, construct, error)
                self.outcomes.run(self.entry, "errors", "float32", f"error {i}", body)
                continue
            module = construct()
            (x,) = given.forward_input.args
            body = partial(self.error, partial(module, x), error)
            self.check("errors", torch.float32, f"error {i}", module, x, body)

    def error(self, call: Callable[[], Any], error: ErrorModuleInput) -> None:
        with pytest.raises(error.error_type, match=error.error_regex):
            call()
