"""Settings of the process."""

from __future__ import annotations

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
