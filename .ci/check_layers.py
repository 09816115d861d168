#!/usr/bin/env python3
"""Checks who may include whom, and that no source file grows beyond 900 lines.

The build enforces most of it (kernels/ is configured before torch is looked for); this names the
line that breaks a rule, and covers what the compiler would accept.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 900
CXX = {".cpp", ".cu", ".cuh", ".h"}
SOURCES = CXX | {".cmake", ".py", ".pyi", ".txt"}
FOLDERS = ("benchmarks", "cmake", "csrc", "examples", "kernels", "python", "tests")

TORCH = re.compile(r"(torch|ATen|c10|caffe2)/")
PYTHON = re.compile(
    r"(Python\.h|pybind11/|torch/csrc/(autograd/)?python|torch/python\.h|torch/extension\.h)"
)
KERNEL_INTERNALS = re.compile(r"((kernels/)?(cpu|cuda|plan)/|hwy/)")

# folder -> (what it must not include, why)
FORBIDDEN = {
    "kernels": [(TORCH, "kernels/ is free of torch"), (PYTHON, "kernels/ is free of Python")],
    "csrc": [
        (PYTHON, "csrc/ is free of Python"),
        (KERNEL_INTERNALS, "csrc/ sees kernels/include only"),
    ],
    "tests/kernels": [(TORCH, "the kernel tests are free of torch")],
}


def includes(path: Path) -> list[tuple[int, str]]:
    """Line numbers and names of all files that a file includes."""
    lines = path.read_text().splitlines()
    matches = (
        (n, re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', line)) for n, line in enumerate(lines, 1)
    )
    return [(number, match[1]) for number, match in matches if match]


def main() -> int:
    problems = []
    for folder, rules in FORBIDDEN.items():
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in CXX:
                continue
            for number, name in includes(path):
                problems += [
                    f"{path.relative_to(ROOT)}:{number}: includes {name}: {reason}"
                    for pattern, reason in rules
                    if pattern.match(name)
                ]
    problems += [
        f"{path.relative_to(ROOT)}: CUDA sources belong to kernels/cuda"
        for path in sorted((ROOT / "csrc").rglob("*.cu*"))
    ]
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SOURCES and path.is_file():
                count = len(path.read_text().splitlines())
                if count > MAX_LINES:
                    problems.append(
                        f"{path.relative_to(ROOT)}: {count} lines, more than {MAX_LINES}"
                    )
    print("\n".join(problems) if problems else "layers: no problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
