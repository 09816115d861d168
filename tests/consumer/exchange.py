"""State and results that Python and the C++ consumers must agree on, bit for bit.

    python exchange.py write FILE     two norms, an input and their outputs, as a TorchScript file
    python exchange.py check FILE SAVED
                                      SAVED: what app.cpp saved after loading FILE; same state?

app.cpp reads FILE as an archive into its own modules, torchscript.cpp runs it.
"""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor, nn

import normcore


class Exchange(nn.Module):
    """``batch_norm`` and ``group_norm`` in a row, with what calls on ``x`` have to give."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        x = torch.randn(6, 8, 5, 7) * 2 + 1
        self.batch_norm = normcore.BatchNorm(axis=1, momentum=0.9, activation="relu")
        self.group_norm = normcore.GroupNorm(
            num_groups=4, axis=1, epsilon=1e-3, dtype=torch.bfloat16, activation="silu"
        )
        self(x)  # takes the features from x and moves the statistics
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        trained = copy.deepcopy(self)
        self.register_buffer("y_train", trained(x).detach())
        self.register_buffer("mean_after", trained.batch_norm.mean)
        self.register_buffer("var_after", trained.batch_norm.var)
        self.eval()
        self.register_buffer("x", x)
        self.register_buffer("y_eval", self(x).detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.group_norm(self.batch_norm(x))


def write(path: str) -> None:
    torch.jit.script(Exchange()).save(path)


def check(path: str, saved_path: str) -> None:
    want = torch.jit.load(path).batch_norm.state_dict()
    saved = torch.jit.load(saved_path)  # what torch::save writes is a TorchScript archive
    got = normcore.BatchNorm(axis=1)
    got.load_state_dict(saved.state_dict())
    assert list(got.state_dict()) == list(want)
    for name, tensor in want.items():
        assert torch.equal(got.state_dict()[name], tensor), name


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](*sys.argv[2:])
