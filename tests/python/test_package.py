"""The installed package: versions, the check against the wrong torch, the command line."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import normcore


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def test_is_not_the_source_tree() -> None:
    assert Path(__file__).parents[2] / "python" not in Path(normcore.__file__).parents


def test_version() -> None:
    assert normcore.__version__ == importlib.metadata.version("normcore")
    assert normcore.build_info()["version"] == normcore.__version__


def test_wheel_pins_the_torch_it_was_built_for() -> None:
    minor = ".".join(torch.__version__.split(".")[:2])
    assert normcore.build_info()["torch_version"] == minor
    assert importlib.metadata.requires("normcore") == [f"torch=={minor}.*"]


def test_build_info() -> None:
    info = normcore.build_info()
    assert isinstance(info["cuda"], bool)
    assert info["cxx_compiler"]
    assert info["simd_target"]


@pytest.mark.parametrize("version", ["1.13.1", "2.1.0", "99.0.0+cpu"])
def test_other_torch_is_refused_with_advice(version: str) -> None:
    built_for = normcore.build_info()["torch_version"]
    result = run_python("-c", f"import torch; torch.__version__ = {version!r}; import normcore")
    assert result.returncode != 0
    assert (
        f"ImportError: normcore {normcore.__version__} was built for torch {built_for}, but torch "
        f"{version} is installed." in result.stderr
    )
    assert f'pip install "torch=={built_for}.*"' in result.stderr


def test_torch_patch_release_is_accepted() -> None:
    built_for = normcore.build_info()["torch_version"]
    result = run_python(
        "-c", f"import torch; torch.__version__ = '{built_for}.99+cu999'; import normcore"
    )
    assert result.returncode == 0, result.stderr


def test_command_line() -> None:
    assert run_python("-m", "normcore", "--version").stdout.strip() == normcore.__version__
    prefix = Path(run_python("-m", "normcore", "--cmake-prefix").stdout.strip())
    assert (prefix / "lib/cmake/normcore/normcoreConfig.cmake").is_file()
    assert (prefix / "include/normcore/normcore.h").is_file()
    assert "simd_target: " in run_python("-m", "normcore", "--build-info").stdout
    assert run_python("-m", "normcore").returncode == 2


def test_is_typed() -> None:
    assert (Path(normcore.__file__).parent / "py.typed").is_file()
