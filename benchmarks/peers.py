"""The contenders of a case: normcore, its peers, and a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch._functorch.config

from .cases import STREAMS, Case, has_residual, is_backward
from .common import (
    Norm,
    Operands,
    add_relu_batch_norms,
    backward_of,
    batch_norms,
    group_norms,
    make_operands,
    with_residual,
)
from .onednn import OneDnn, UnavailableError
from .timing import Call, Contender

NORMS: Mapping[str, Callable[[Operands], tuple[Norm, Norm]]] = {
    "bn_forward": lambda o: batch_norms(o, True),
    "bn_backward": lambda o: batch_norms(o, True),
    "bn_eval": lambda o: batch_norms(o, False),
    "bn_add_relu_forward": add_relu_batch_norms,
    "bn_add_relu_backward": add_relu_batch_norms,
    "gn_forward": group_norms,
    "gn_backward": group_norms,
    "gn_silu_forward": lambda o: group_norms(o, "silu"),
    "gn_silu_backward": lambda o: group_norms(o, "silu"),
}

# A backward pass of torch.compile is run many times: it must not take over what it was given.
torch._functorch.config.donated_buffer = False


@dataclass
class Contenders:
    ready: dict[str, Contender] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)  # name -> reason

    def add(self, name: str, make: Callable[[], Contender]) -> None:
        """A contender that cannot run a case is no reason to leave out the others."""
        try:
            self.ready[name] = make()
        except UnavailableError as error:
            self.unavailable[name] = str(error)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            self.unavailable[name] = f"{type(error).__name__}: {lines[0][:200]}"

    def close(self) -> None:
        for contender in self.ready.values():
            if isinstance(contender, OneDnn):
                contender.close()


def copy_of(case: Case, o: Operands) -> Callable[[], object]:
    """As much traffic as the case cannot avoid, by the plainest kernel of torch."""
    if STREAMS[case.operation] == 2:
        return o.x.clone
    target = torch.empty_like(o.x)
    if STREAMS[case.operation] == 4:
        other = torch.empty_like(o.x)
        return lambda: torch._foreach_copy_([target, other], [o.x, o.grad])
    if is_backward(case.operation):
        return lambda: torch.add(o.x, o.grad, out=target)
    return lambda: torch.add(o.x, o.grad)


def operands_of(case: Case, device: str) -> Operands:
    dtype = getattr(torch, case.dtype)
    o = make_operands(case.shape.size, case.shape.groups, case.layout, dtype, device)
    return with_residual(o) if has_residual(case.operation) else o


def call_of(case: Case, norm: Norm, o: Operands, device: str) -> Call:
    """The forward or the backward pass of a norm."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    if is_backward(case.operation):
        return Call(backward_of(norm, o), synchronize)
    return Call(torch.no_grad()(lambda: norm(o.x)), synchronize)


def normcore_alone(case: Case, device: str) -> Call:
    o = operands_of(case, device)
    return call_of(case, NORMS[case.operation](o)[0], o, device)


def contenders(case: Case, peers: Iterable[str], device: str) -> Contenders:
    """Those that can run the case, and why the others cannot."""
    o = operands_of(case, device)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    found = Contenders()

    def call(norm: Norm) -> Contender:
        return call_of(case, norm, o, device)

    # Norms of their own for each: a call must not change the statistics that another one uses.
    make: dict[str, Callable[[], Contender]] = {
        "normcore": lambda: call(NORMS[case.operation](o)[0]),
        "torch": lambda: call(NORMS[case.operation](o)[1]),
        "compile": lambda: call(
            torch.compile(NORMS[case.operation](o)[1], dynamic=False, fullgraph=True)
        ),
        "onednn": lambda: OneDnn(case, torch.get_num_threads()),
        "copy": lambda: Call(copy_of(case, o), synchronize),
    }
    for name in ("normcore", *peers, "copy"):
        if name == "onednn" and device != "cpu":
            found.unavailable[name] = "runs on the CPU only"
        else:
            found.add(name, make[name])
    return found
