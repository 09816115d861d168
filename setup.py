"""Builds the native library through CMake; everything else about the package is in pyproject.toml.

Needs cmake, ninja and the torch to build against in the environment (pip install
--no-build-isolation). NORMCORE_BUILD_DIR is the CMake build folder, kept between builds, CMAKE_ARGS
holds further arguments of the configure step and MAX_JOBS limits parallel compile jobs.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def project_version() -> str:
    match = re.search(
        r"^\s*VERSION ([0-9.]+)$", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE
    )
    assert match
    return match[1]


def torch_minor() -> str:
    """The minor version to build for, such as "2.15": libtorch's C++ ABI changes with each one."""
    try:
        return ".".join(importlib.metadata.version("torch").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            "normcore is built against the torch it will run with: install torch first, then "
            "run pip install --no-build-isolation"
        ) from None


class CMakeBuild(build_ext):
    """Configures, builds and installs into the package folder; the same for wheel and editable."""

    def build_extension(self, ext: Extension) -> None:
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        spec = importlib.util.find_spec("torch")
        assert spec is not None
        build = os.environ.get("NORMCORE_BUILD_DIR") or str(
            ROOT / "build" / f"torch{torch_minor()}-{sys.implementation.cache_tag}"
        )
        configure = [
            *("cmake", "-S", str(ROOT), "-B", build, "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            "-DCMAKE_INSTALL_LIBDIR=lib",
            "-DNORMCORE_PYTHON=ON",
            "-DNORMCORE_TESTS=OFF",
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DTORCH_ROOT={Path(spec.origin).parent}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        subprocess.check_call(configure)
        subprocess.check_call(
            ["cmake", "--build", build, "--target", "normcore", "_C", "--parallel", jobs]
        )
        subprocess.check_call(["cmake", "--install", build, "--prefix", str(package)])


setup(
    version=project_version(),
    install_requires=[f"torch=={torch_minor()}.*"],
    ext_modules=[Extension("normcore._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
