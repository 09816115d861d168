"""normcore.explain: plans for people, without running anything."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch

import normcore

IMAGES = (32, 256, 56, 56)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_docstring_example() -> None:
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    (example,) = finder.find(
        normcore.explain, "explain", globs={"torch": torch, "normcore": normcore}
    )
    assert example.examples
    assert runner.run(example).failed == 0


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
@pytest.mark.parametrize("op", ["batch_norm", "group_norm"])
@pytest.mark.parametrize("backward", [False, True])
def test_names_operator_pass_device_and_shape(op: str, device: str, backward: bool) -> None:
    text = normcore.explain(meta(*IMAGES), op, device=device, backward=backward)
    direction = "backward" if backward else "forward"
    extent = "n=32 c=256 s=3136 planes"
    assert text.startswith(
        f"{op} {direction} on {device}, bfloat16 [32, 256, 56, 56] as {extent}: "
    )
    assert "path" in text


def test_sees_layouts() -> None:
    x = meta(*IMAGES).contiguous(memory_format=torch.channels_last)
    assert " as n=1 c=256 s=100352 rows: " in normcore.explain(x, "batch_norm", device="cpu")
    assert " as n=32 c=256 s=3136 rows: " in normcore.explain(x, "group_norm", device="cpu")
    strided = meta(32, 256, 56, 112)[..., ::2]
    assert " copied to n=32 c=256 s=3136 planes: " in normcore.explain(
        strided, "group_norm", device="cpu"
    )


def test_sees_mask_mode_and_size() -> None:
    x = meta(2, 64, 10, 10)
    assert normcore.explain(x, "batch_norm", training=False, device="cpu").startswith(
        "batch_norm inference on"
    )
    assert "split path" in normcore.explain(meta(1, 128, 1024, 1024), "group_norm", device="cuda")
    assert "stream path" in normcore.explain(x, "batch_norm", training=False, device="cuda")
    assert "nothing to do" in normcore.explain(meta(0, 4, 5), "batch_norm", device="cpu")
    rows = x.contiguous(memory_format=torch.channels_last)
    mask = torch.ones(2, 1, 10, 10, dtype=torch.bool, device="meta")
    plain = normcore.explain(rows, "batch_norm", device="cpu")
    assert normcore.explain(rows, "batch_norm", mask=mask, device="cpu") != plain  # not folded


def test_sees_alignment() -> None:
    flat = torch.empty(2 * 64 * 100 + 1)
    aligned, unaligned = flat[:-1].view(2, 64, 100), flat[1:].view(2, 64, 100)
    assert "vectors of 4 elements" in normcore.explain(aligned, "batch_norm", device="cuda")
    assert "vectors of 1 elements" in normcore.explain(unaligned, "batch_norm", device="cuda")


def test_depends_on_batch_invariance() -> None:
    x = meta(1, 32, 100, 100)
    normal = normcore.explain(x, "group_norm", device="cuda", num_groups=1)
    assert normal == normcore.explain(x, "group_norm", device="cuda", num_groups=1)
    normcore.set_batch_invariant(True)
    try:
        invariant = normcore.explain(meta(1, 8, 50, 50), "group_norm", device="cuda", num_groups=1)
        many = normcore.explain(meta(64, 8, 50, 50), "group_norm", device="cuda", num_groups=1)
        assert invariant.split(":")[1].split(",")[0] == many.split(":")[1].split(",")[0]
    finally:
        normcore.set_batch_invariant(False)


def test_a_path_that_was_asked_for() -> None:
    """Where it can run the call; normcore._C.set_cuda_path is for tests and benchmarks."""

    def path(x: torch.Tensor, **options: Any) -> str:
        text = normcore.explain(x, "group_norm", device="cuda", num_groups=32, **options)
        return text.split(": ")[1].split(" path")[0]

    slices, values = meta(*IMAGES), meta(4, 64)
    assert normcore._C.cuda_path() == ""
    assert path(slices) in ("cluster", "split")  # by the device at hand, if there is one
    try:
        for name in ("cluster", "split"):
            normcore._C.set_cuda_path(name)
            assert normcore._C.cuda_path() == name
            assert path(slices) == path(slices, backward=True) == name
        normcore._C.set_cuda_path("block")
        assert path(slices) in ("cluster", "split")  # not in registers
        assert path(values) in ("pack", "block")
        with pytest.raises(ValueError, match=r"expected name to be pack, block.* got blocks"):
            normcore._C.set_cuda_path("blocks")
        assert normcore._C.cuda_path() == "block"
    finally:
        normcore._C.set_cuda_path("")


def test_follows_the_rules_of_the_operator() -> None:
    with pytest.raises(
        ValueError, match="expected op to be batch_norm or group_norm, got layer_norm"
    ):
        normcore.explain(meta(2, 4), "layer_norm")
    with pytest.raises(ValueError, match="expected num_groups to divide"):
        normcore.explain(meta(2, 4), "group_norm", num_groups=3)
    with pytest.raises(IndexError, match="expected axis in"):
        normcore.explain(meta(2, 4), "batch_norm", axis=2)
    with pytest.raises(TypeError, match="expected input to have dtype"):
        normcore.explain(meta(2, 4, dtype=torch.int32), "batch_norm")
    with pytest.raises(NotImplementedError, match="CPU or CUDA device, got meta"):
        normcore.explain(meta(2, 4), "batch_norm")
    with pytest.raises(ValueError, match="affine_per_sample with group_norm only"):
        normcore.explain(meta(2, 4), "batch_norm", device="cpu", affine_per_sample=True)


def test_activation() -> None:
    def text(**options: Any) -> str:
        return normcore.explain(meta(2, 64, 28, 28), "group_norm", device="cpu", **options)

    assert "activation kept" in text(backward=True, activation="silu")
    assert "activation kept" not in text(backward=True, activation="relu")
    assert "activation kept" not in text(activation="silu")
    with pytest.raises(ValueError, match="expected activation to be"):
        text(activation="swish")
