import hypothesis
import pytest
import torch

# Derandomized: a run says the same every time. No deadline: the machine may be busy.
hypothesis.settings.register_profile(
    "normcore", derandomize=True, deadline=None, max_examples=40, print_blob=True
)
hypothesis.settings.load_profile("normcore")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
