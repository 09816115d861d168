"""What all Python tests share: reproducible inputs, and the devices that they run on."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Graphs that torch.compile remembers hold the operators of the library that they were made with.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import hypothesis
import pytest
import torch
from devices import needs_cuda

import normcore

# Derandomized: a run says the same every time. No deadline: the machine may be busy. Fixtures of a
# function only choose the seed and the device here, which need no reset between examples.
hypothesis.settings.register_profile(
    "normcore",
    derandomize=True,
    deadline=None,
    max_examples=40,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("normcore")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="run the tests of this device only (cpu, cuda)")


def device_of(item: pytest.Item) -> str | None:
    """The parameter of fixture `device`, if the test uses it."""
    return item.callspec.params.get("device") if hasattr(item, "callspec") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--device")
    if wanted is not None:
        on_device = {item: device_of(item) == wanted for item in items}
        config.hook.pytest_deselected(items=[item for item in items if not on_device[item]])
        items[:] = [item for item in items if on_device[item]]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Each device in turn: tensors that a test makes without naming a device are on it."""
    if request.param == "cpu":
        yield torch.device("cpu")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    torch.set_default_device(device)
    try:
        yield device
    finally:
        torch.set_default_device(None)


@pytest.fixture
def batch_invariant(device: torch.device) -> Iterator[None]:
    """Bits that do not depend on the batch size: a setting on CUDA, always so on the CPU."""
    normcore.set_batch_invariant(device.type == "cuda")
    try:
        yield
    finally:
        normcore.set_batch_invariant(False)
