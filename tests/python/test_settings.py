"""Settings of the process."""

from __future__ import annotations

import pytest
import torch

import normcore
import normcore.functional as NF


def test_batch_invariance_is_off_until_it_is_enabled() -> None:
    assert normcore.batch_invariant() is False
    normcore.set_batch_invariant(True)
    try:
        assert normcore.batch_invariant() is True
        x = torch.randn(5, 8, 7)
        together = NF.group_norm(x, 4)
        alone = [NF.group_norm(sample[None], 4) for sample in x]
        assert torch.equal(together, torch.cat(alone))
    finally:
        normcore.set_batch_invariant(False)
    assert normcore.batch_invariant() is False


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans would be those of the device")
def test_spare_multiprocessors() -> None:
    """What a team of blocks cannot hold without them is split: the binding is for benchmarks."""

    def plan() -> str:
        x = torch.empty(1, 32, 2, 1 << 17, dtype=torch.bfloat16, device="meta")
        return normcore.explain(x, "group_norm", device="cuda", num_groups=1)

    normcore._C.set_cuda_path("team")
    try:
        assert "team path" in plan()  # 16 MiB
        normcore._C.set_spare_multiprocessors(100)
        assert normcore._C.spare_multiprocessors() == 100
        assert "team path" not in plan()
        with pytest.raises(ValueError, match=r"expected count >= 0, got -1"):
            normcore._C.set_spare_multiprocessors(-1)
    finally:
        normcore._C.set_spare_multiprocessors(0)
        normcore._C.set_cuda_path("")
