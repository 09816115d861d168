"""The training examples on one or two epochs: they learn, and write what they say."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_train_digits(tmp_path: Path) -> None:
    """Also what the C++ application reads."""
    command = [sys.executable, str(EXAMPLES / "train_digits.py"), "--epochs=2", "--output"]
    run = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True)
    found = re.findall(r"^(\S+) accuracy: (0\.\d{4}) \((\d+)/360\)$", run.stdout, re.MULTILINE)
    assert [name for name, _, _ in found] == ["normcore", "torch.nn"]
    assert all(float(accuracy) > 0.9 for _, accuracy, _ in found)
    assert (tmp_path / "losses.png").stat().st_size > 1000

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
        model = torch.jit.load(tmp_path / "digits_model.pt")
        held_out = torch.jit.load(tmp_path / "digits_test.pt")
    assert not model.training
    assert (held_out.images.dtype, held_out.labels.dtype) == (torch.float32, torch.int64)
    assert held_out.images.shape == (360, 1, 8, 8)
    correct = (model(held_out.images).argmax(1) == held_out.labels).sum()
    assert int(correct) == int(found[0][2])


def test_ddp_digits(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(EXAMPLES / "ddp_digits.py"), "--epochs=1", "--at-least=0.9", "--output"]
    run = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"^(.+) accuracy: (0\.\d{4}) \(\d+/360\)$", run.stdout, re.MULTILINE))
    assert list(found) == ["synchronised", "local", "local, mean statistics", "one process"]
    assert abs(float(found["synchronised"]) - float(found["one process"])) < 0.01
    losses = dict(re.findall(r"^(.+): losses within (\S+) of", run.stdout, re.MULTILINE))
    assert float(losses["synchronised"]) < 1e-3
    assert float(losses["local"]) > 0.1
    assert "synchronised: the same bits on all ranks: True" in run.stdout
    assert (tmp_path / "ddp_losses.png").stat().st_size > 1000
