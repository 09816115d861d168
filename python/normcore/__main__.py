"""``python -m normcore``: facts about the installation, for build scripts and bug reports."""

from __future__ import annotations

import argparse

import normcore


def main() -> None:
    """Prints what the arguments ask for."""
    parser = argparse.ArgumentParser(prog="python -m normcore", description=__doc__)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--version", action="version", version=normcore.__version__)
    group.add_argument(
        "--cmake-prefix",
        action="store_true",
        help="print the folder that C++ projects add to CMAKE_PREFIX_PATH",
    )
    group.add_argument(
        "--build-info", action="store_true", help="print how the native library was built"
    )
    arguments = parser.parse_args()
    if arguments.cmake_prefix:
        print(normcore.cmake_prefix_path)
    else:
        for key, value in normcore.build_info().items():
            print(f"{key}: {value}")


if __name__ == "__main__":
    main()
