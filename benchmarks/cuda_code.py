"""What the compiler made of the CUDA kernels: registers and instructions, without a device.

    python benchmarks/cuda_code.py build/cuda/kernels/CMakeFiles/normcore_cuda_kernels.dir/cuda/*.o

Reads object files with cuobjdump (the toolkit's, or that in Triton's wheel) and prints a Markdown
table of the kernels whose name matches --only, by default the plain bfloat16 ones. Instructions are
those of the whole kernel, of which a call runs some; `async` are copies from global to shared
memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

STAGES = ("resident", "team", "reduce", "apply")  # of kernels/cuda/call.h
INSTRUCTIONS = {
    "global loads": r"LDG",
    "async": r"LDGSTS",
    "global stores": r"STG",
    "shared loads": r"LDS|LD\.E",
    "barriers": r"BAR|UCGABAR",
}


def cuobjdump(*arguments: str | Path) -> str:
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = importlib.util.find_spec("triton")
        assert triton is not None, "no cuobjdump on this machine"
        assert triton.origin is not None
        tool = str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    command = [tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def demangled(names: list[str]) -> list[str]:
    run = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    shorter = re.sub(r"normcore::kernels::(cuda::)?|\(anonymous namespace\)::", "", run.stdout)
    return shorter.splitlines()


def counts_of(code: str) -> Iterator[tuple[str, Counter[str]]]:
    """By kernel: instructions in all, and of each kind."""
    for part in code.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", body)
        found = Counter(instructions=sum(opcode != "NOP" for opcode in opcodes))
        for kind, pattern in INSTRUCTIONS.items():
            found[kind] = sum(re.match(rf"(?:{pattern})(?:\.|$)", o) is not None for o in opcodes)
        yield name.strip(), found


def registers_of(usage: str) -> dict[str, int]:
    found = re.findall(r"Function (\S+):\s+REG:(\d+)", usage)
    return {name: int(registers) for name, registers in found}


def title_of(kernel: str) -> str:
    """The name of a kernel with that of its stage."""
    name = re.split(r"\(", kernel.removeprefix("void "), maxsplit=1)[0]
    stage = re.search(r"\(Stage\)(\d)", kernel)
    name = re.split(r"<", name, maxsplit=1)[0].removesuffix("_kernel")
    return f"{name}, {STAGES[int(stage[1])]}" if stage else name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("objects", nargs="+", type=Path)
    plain = r"__nv_bfloat16, \d+, (\d+, \(Stage\)\d, )?true|__nv_bfloat16, \d+, true"
    parser.add_argument("--only", default=plain, help="regular expression: part of a kernel's name")
    arguments = parser.parse_args()
    columns = ["registers", "instructions", *INSTRUCTIONS]
    print("| kernel | vectors | " + " | ".join(columns) + " |")
    print("| --- | --: |" + " --: |" * len(columns))
    for path in arguments.objects:
        registers = registers_of(cuobjdump("--dump-resource-usage", path))
        counts = dict(counts_of(cuobjdump("--dump-sass", path)))
        for name, kernel in zip(counts, demangled(list(counts)), strict=True):
            if not re.search(arguments.only, kernel):
                continue
            vectors = re.search(r"(\d+), \(Stage\)", kernel.replace("(int)", ""))
            cells = [registers[name], *counts[name].values()]
            print(
                f"| {title_of(kernel)} | {vectors[1] if vectors else ''} | "
                + " | ".join(map(str, cells))
                + " |"
            )


if __name__ == "__main__":
    main()
