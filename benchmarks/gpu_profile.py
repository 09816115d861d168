"""What limits each CUDA kernel of normcore: hardware counters, read by Nsight Compute.

    python benchmarks/gpu_profile.py --output build/gpu_profile.json

A row per kernel of a few cases, one for every path of plan_cuda() and both passes: time, bytes read
and written in device memory and their share of the peak, share of the cycles in which a scheduler
issued an instruction, resident warps, and the stalls that warps spend most of their time in.
Needs `ncu` and the permission to read counters. Without a device or ncu the exit code is 77.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from common import Operands, backward_of, batch_norms, commit, group_norms, make_operands
from rich.console import Console
from rich.table import Table

NO_DEVICE = 77
BF16 = torch.bfloat16
# Norm, shape, groups, layout.
CASES = [
    ("group_norm", (32, 256, 56, 56), 32, "contiguous"),
    ("group_norm", (32, 256, 56, 56), 32, "channels_last"),
    ("group_norm + silu", (1, 128, 512, 512), 32, "contiguous"),
    ("group_norm", (32, 2048, 7, 7), 32, "contiguous"),
    ("group_norm", (4096, 256), 32, "contiguous"),
    ("batch_norm", (32, 256, 56, 56), 0, "contiguous"),
    ("batch_norm", (32, 256, 56, 56), 0, "channels_last"),
    ("batch_norm", (32, 2048, 7, 7), 0, "contiguous"),
    ("batch_norm", (32, 2048, 7, 7), 0, "channels_last"),
    ("batch_norm", (2, 64, 32, 32, 32), 0, "channels_last_3d"),
    ("batch_norm", (4096, 256), 0, "contiguous"),
    ("batch_norm", (32, 512, 28, 28), 0, "contiguous"),
    ("batch_norm eval", (32, 256, 56, 56), 0, "contiguous"),
    ("batch_norm eval", (32, 256, 56, 56), 0, "channels_last"),
]
METRICS = {
    "us": "gpu__time_duration.sum",
    "read": "dram__bytes_read.sum",
    "written": "dram__bytes_write.sum",
    "dram %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2 hits %": "lts__t_sector_hit_rate.pct",
    "issue %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "warps %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "blocks": "launch__grid_size",
    "threads": "launch__block_size",
    "instructions": "smsp__inst_executed.sum",
}
STALLS = ["long_scoreboard", "short_scoreboard", "barrier", "lg_throttle", "mio_throttle"]
STALLS += ["math_pipe_throttle", "wait", "not_selected", "drain", "membar", "imc_miss"]
STALLS += ["no_instruction", "tex_throttle", "dispatch_stall"]
STALL_METRIC = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
SEPARATOR = "spin_kernel"  # of torch.cuda._sleep


def run() -> None:
    """The cases, a separator before each; profiled is the second call of each."""
    operands: dict[tuple[object, ...], Operands] = {}
    for norm, shape, groups, layout in CASES:
        o = operands.setdefault(
            (shape, layout), make_operands(shape, groups or 32, layout, BF16, "cuda")
        )
        if norm.startswith("batch_norm"):
            ours, _ = batch_norms(o, not norm.endswith("eval"))
        else:
            ours, _ = group_norms(o, "silu" if norm.endswith("silu") else None)
        ours(o.x)
        backward_of(ours, o)()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda._sleep(1)
        backward = backward_of(ours, o)
        backward()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def counters(log: Path) -> list[dict[str, str]]:
    """One dictionary per kernel launch, as ncu's comma-separated page has it."""
    metrics = [*METRICS.values(), *(STALL_METRIC.format(s) for s in STALLS)]
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page"]
    command += ["raw", "--kernel-name-base", "demangled", "--print-units", "base"]
    command += ["--kernel-name", f"regex:normcore|{SEPARATOR}", "--metrics", ",".join(metrics)]
    result = subprocess.run(
        [*command, sys.executable, __file__, "--run"], capture_output=True, text=True, check=False
    )
    log.write_text(result.stdout + result.stderr)
    lines = [line for line in result.stdout.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    return rows[1:]  # the first has the units


def number(text: str | None) -> float:
    return float(text.replace(",", "")) if text else float("nan")


def table_of(rows: list[dict[str, str]]) -> list[dict[str, object]]:
    table: list[dict[str, object]] = []
    case = -1
    for row in rows:
        kernel = row["Kernel Name"]
        if SEPARATOR in kernel:
            case += 1
            continue
        norm, shape, groups, layout = CASES[case]
        short = re.search(r"(\w+_kernel)(<[^(]*>)?", kernel)
        found: dict[str, object] = {
            "case": f"{norm} {'x'.join(map(str, shape))} {layout}",
            "groups": groups,
            "kernel": "".join(p or "" for p in short.groups()) if short else kernel,
        }
        for name, metric in METRICS.items():
            found[name] = number(row.get(metric))
        found["us"] = number(row.get(METRICS["us"])) / 1e3
        stalls = {s: number(row.get(STALL_METRIC.format(s))) for s in STALLS}
        found["stalls"] = dict(sorted(stalls.items(), key=lambda item: -item[1])[:4])
        table.append(found)
    return table


def show(table: list[dict[str, object]]) -> None:
    shown = Table(title="kernels of normcore, bfloat16, forward and backward")
    columns = ["case", "kernel", *METRICS, "stalls"]
    for column in columns:
        shown.add_column(column)

    def cell(value: object) -> str:
        if isinstance(value, dict):
            return " ".join(f"{name} {ratio:.1f}" for name, ratio in value.items())
        if isinstance(value, float):
            return f"{value / 1e6:.1f}M" if value >= 1e6 else f"{value:.4g}"
        return str(value)

    for row in table:
        shown.add_row(*(cell(row[column]) for column in columns))
    Console(width=230).print(shown)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("build/gpu_profile.json"))
    parser.add_argument("--run", action="store_true", help="only run the cases: what ncu looks at")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or (not arguments.run and shutil.which("ncu") is None):
        print("no CUDA device, or no ncu on the PATH: nothing was measured")
        return NO_DEVICE
    if arguments.run:
        run()
        return 0
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    table = table_of(counters(arguments.output.with_suffix(".log")))
    show(table)
    document = {"commit": commit(), "kernels": table}
    arguments.output.write_text(json.dumps(document, indent=1))
    return 0 if table else 1


if __name__ == "__main__":
    sys.exit(main())
