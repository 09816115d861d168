"""The commands of benchmarks/ write what benchmarks/README.md says. No time is looked at."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "__main__.py").exists(), reason="no source tree with benchmarks"
)

MACHINE = {
    "processor": "a processor",
    "instructions": [],
    "cores": 1,
    "caches": {},
    "gpu": None,
}
BUILD = {"version": "0", "simd_target": "AVX2", "cxx_compiler": "a compiler"}
FACTS = {
    "machine": MACHINE,
    "versions": {"python": "3", "torch": "2", "normcore": BUILD},
    "commit": "a commit",
    "device": "cpu",
    "threads": 1,
}


def benchmarks(*arguments: str | Path, returncode: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == returncode, run.stderr
    return run


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_run_and_report(tmp_path: Path) -> None:
    results, folder = tmp_path / "speed.json", tmp_path / "report"
    operations = ["bn_forward", "bn_add_relu_forward", "gn_silu_backward"]
    chosen = ["--shapes=tiny,6x4", f"--ops={','.join(operations)}", "--dtypes=float32"]
    printed = benchmarks("run", *chosen, "--repeats=1", "--output", results).stdout
    document = json.loads(results.read_text())
    assert (document["kind"], document["pages"], document["threads"]) == ("speed", "kept", 1)
    assert set(document["malloc"]) >= {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
    assert set(document["machine"]) == {"processor", "instructions", "cores", "caches", "gpu"}
    found = [(c["operation"], c["size"], c["layout"]) for c in document["cases"]]
    inputs = [("2x8x4x4", "contiguous"), ("2x8x4x4", "channels_last"), ("6x4", "contiguous")]
    assert found == [(operation, *i) for operation in operations for i in inputs]
    for case in document["cases"]:
        assert set(case["microseconds"]) == {"normcore", "torch"}
        assert case["unavailable"] == {}
        streams = 2 if case["operation"] == "bn_forward" else 3
        assert case["bytes"] == streams * 4 * (256 if case["shape"] == "tiny" else 24)
        assert case["fraction_of_copy_speed"] > 0
        assert set(case["bounds"]) == {"calls", "memory", "arithmetic"}
        assert case["bounds"]["memory"] == case["copy_microseconds"]
        if case["shape"] == "tiny":
            assert case["bounds"]["calls"] == case["microseconds"]["normcore"]
        if document["machine"]["caches"]:
            assert case["cache"] == "warm"

    report = benchmarks("report", results, "--output", folder).stdout
    assert (folder / "report.md").read_text() == report.removesuffix("\n")
    assert printed.partition("\n")[2].split("![")[0].split("## ")[0] in report
    slower = [f"slower than torch: {n} of 9" in report for n in range(10)]
    faster = [f"as fast as or faster than torch: {9 - n} of 9" in report for n in range(10)]
    assert slower == faster
    assert sum(slower) == 1
    assert all(f"### float32, {operation}, channels_last" in report for operation in operations)
    for name in ("speed_float32_over_torch.png", "speed_float32_copy.png"):
        assert f"]({name})" in report
        assert is_png(folder / name)

    # Files of before there were bounds have empty cells.
    for case in document["cases"]:
        del case["bounds"], case["cache"]
    results.write_text(json.dumps(document))
    header, _, row, *_ = (
        benchmarks("report", results).stdout.partition("## Every case")[2].split("\n| ", 3)[1:]
    )
    places = [header.split(" | ").index(name) for name in ("cache", "bound")]
    assert [row.split(" | ")[i].strip() for i in places] == ["", ""]

    # A peer that could not run a case is told, with the reason.
    document["cases"][0]["unavailable"]["onednn"] = "no such library"
    results.write_text(json.dumps(document))
    told = benchmarks("report", results).stdout.partition("## Not measured")[2]
    assert "| onednn | no such library | bn_forward tiny contiguous float32 | 1 |" in told


def test_accuracy(tmp_path: Path) -> None:
    results = tmp_path / "accuracy.json"
    printed = benchmarks("accuracy", "--quick", "--output", results).stdout
    document = json.loads(results.read_text())
    assert document["contenders"] == ["normcore", "torch"]
    for case in document["cases"]:
        outputs = {"y", "dx", "dscale", "dbias"}
        outputs |= {"running var"} if case["norm"] == "batch_norm" else set()
        assert all(set(errors) == outputs for errors in case["errors"].values())
        largest = max(map(float, case["errors"]["normcore"].values()))
        assert largest < (1e-6 if case["dtype"] == "float32" else 4e-3)
    assert any("bfloat16, mean/std 10000" in line for line in document["left_out"])
    assert benchmarks("report", results).stdout.partition("\n")[2].strip() in (
        printed.partition("\n")[2].strip()
    )

    # What is not finite is drawn too.
    document["cases"][0]["errors"]["torch"]["y"] = "inf"
    results.write_text(json.dumps(document))
    assert "](accuracy_errors.png)" in benchmarks("report", results, "--output", tmp_path).stdout
    assert is_png(tmp_path / "accuracy_errors.png")


def speed_case(**changes: object) -> dict[str, object]:
    """Of a synthetic document: 100 us, a copy takes half of it."""
    case = {
        "operation": "bn_forward",
        "shape": "resnet_7",
        "size": "8x512x7x7",
        "groups": 32,
        "layout": "contiguous",
        "dtype": "float32",
        "microseconds": {"normcore": 100.0},
        "unavailable": {},
        "bytes": 8 * 512 * 49 * 8,
        "copy_microseconds": 50.0,
        "fraction_of_copy_speed": 0.5,
        "cache": "warm",
        "bounds": {"calls": 10.0, "memory": 50.0, "arithmetic": None},
    }
    return case | changes


def test_warm_cold_and_bounds(tmp_path: Path) -> None:
    bounds = {"calls": 10.0, "memory": 50.0, "arithmetic": 71.2}
    document = FACTS | {
        "kind": "speed",
        "peers": [],
        "cases": [
            speed_case(),
            speed_case(fraction_of_copy_speed=0.02),
            speed_case(cache="cold", fraction_of_copy_speed=0.8, bounds=bounds),
            speed_case(shape="tiny", fraction_of_copy_speed=0.001),
        ],
    }
    results = tmp_path / "speed.json"
    results.write_text(json.dumps(document))
    report = benchmarks("report", results).stdout
    assert "| float32 | 10 | 2 | 80 | 1 |" in report  # sqrt(50 * 2); without tiny
    assert "| 50 | warm | memory 50 % |" in report
    assert "| 80 | cold | arithmetic 71 % |" in report


def test_estimates_of_arithmetic() -> None:
    program = """
import benchmarks.bounds as bounds_module
from benchmarks.bounds import Bounds, shrunk
from benchmarks.cases import TINY, Case, shape_of

bounds_module.cache_bytes = lambda level: 512 << 10
values = 2 * 512 * 49
for text, size in (
    ("8x512x7x7", (2, 512, 7, 7)),  # short planes stay
    ("8x64x56x56", (1, 64, 784)),
    ("4096x256", (196, 256)),
    ("2x64x4x4", (2, 64, 4, 4)),  # is small enough
):
    shape = shape_of(text)
    small = shrunk(shape, values)
    assert (small.size, small.groups) == (size, shape.groups), small

# 20 us whatever the values, 7 of them the call, and 1 us per 1000 values.
bounds = Bounds(threads=1)
case = Case("bn_forward", shape_of("8x64x112x112"), "contiguous", "float32")
others = bounds.missing(case)
bounds.learn({c: 7.0 if c.shape == TINY else 20 + c.values / 1000 for c in others})
assert bounds.missing(case) == []
estimates = bounds.of(case, 40.0)
assert (estimates["calls"], estimates["memory"]) == (7.0, 40.0)
assert len(others) == 3
assert abs(estimates["arithmetic"] - (13 + case.values / 1000)) < 1e-6
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_scaling(tmp_path: Path) -> None:
    results, folder = tmp_path / "scaling.json", tmp_path / "report"
    chosen = ["--max-values=1e5", "--ops=gn_forward,bn_backward", "--dtypes=float32"]
    printed = benchmarks("scaling", *chosen, "--repeats=1", "--output", results).stdout
    document = json.loads(results.read_text())
    assert (document["kind"], document["threads"]) == ("scaling", [1, 2])
    found = {(c["family"], c["size"], c["values"], c["groups"]) for c in document["cases"]}
    assert found == {("samples", "1x64x56x56", 200704, 32), ("slices", "1x2x50000", 10**5, 2)}
    assert len(document["cases"]) == 2 * 2 * 2  # operations, layouts, families
    for case in document["cases"]:
        times = case["microseconds"]
        assert {(name, *times[name]) for name in times} == {
            ("normcore", "1", "2"),
            ("copy", "1", "2"),
        }
        assert case["speedup"]["copy"] == {"2": times["copy"]["1"] / times["copy"]["2"]}

    times, case = {"1": 400.0, "2": 200.0}, document["cases"][0]
    case |= {"values": 10**5, "microseconds": {"normcore": times}, "speedup": {}}
    case["speedup"]["normcore"] = {"2": 2.0}
    case["unavailable"] = {"copy": "no memory"}
    document["left_out"] = {"a case": "a reason"}
    results.write_text(json.dumps(document))
    report = benchmarks("report", results, "--output", folder).stdout
    assert f"| 1e+05 | {case['size']} | 4 |  | 2 |  | 2.00 |  |" in report
    assert "### float32, bn_backward, slices, channels_last" in report
    assert "### float32, bn_backward, slices, channels_last" in printed
    assert "| copy | no memory | gn_forward" in report
    assert "- a case: a reason" in report
    assert is_png(folder / "scaling_float32.png")


def test_scaling_leaves_out_what_memory_does_not_hold() -> None:
    program = """
from benchmarks.cases import Case, shape_of
from benchmarks.scaling import needed_bytes, too_large

forward, backward = (
    Case(operation, shape_of("1x64x56x56"), "contiguous", "float32")
    for operation in ("gn_forward", "gn_backward")
)
enough = int(needed_bytes(forward) / 0.8) + 1
assert needed_bytes(forward) > 2 * 4 * forward.values
assert too_large(forward, enough) is None
assert too_large(forward, None) is None
reason = too_large(backward, enough)
assert reason.endswith("GB of available memory"), reason
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_chain(tmp_path: Path) -> None:
    results = tmp_path / "chain.json"
    chosen = ["--sizes=2x8x4x4", "--dtypes=float32", "--repeats=1"]
    benchmarks("chain", *chosen, "--output", results)
    document = json.loads(results.read_text())
    found = [(c["norm"], c["mode"], c["layout"]) for c in document["cases"]]
    assert found == list(
        itertools.product(
            ("batch_norm", "group_norm"),
            ("inference", "training"),
            ("contiguous", "channels_last"),
        )
    )
    for case in document["cases"]:
        for key in ("microseconds", "norm_microseconds"):
            assert set(case[key]) == {"normcore", "torch"}, case["unavailable"]
        passes = ["forward"] + ["backward"] * (case["mode"] == "training")
        assert case["stores"] == dict.fromkeys(passes, "cached")

    case = document["cases"][2]
    case["microseconds"] = {"normcore": 120.0, "torch": 130.0}
    case["norm_microseconds"] = {"normcore": 20.0, "torch": 50.0}
    case["stores"] = {"forward": "streaming", "backward": "cached"}
    results.write_text(json.dumps(document))
    report = benchmarks("report", results, "--output", tmp_path).stdout
    stores = "forward streaming, backward cached"
    assert f"| 2x8x4x4 | {stores} | 120 | 130 | 20 | 50 | 100 | 80 | 1.250 |" in report


def test_chain_measures_both_sides_of_the_threshold_of_streaming_stores() -> None:
    program = """
from benchmarks.chain import sizes_around_threshold, stores

for mode in ("inference", "training"):
    for norm in ("batch_norm", "group_norm"):
        for layout in ("contiguous", "channels_last"):
            for dtype in ("float32", "bfloat16"):
                found = [stores(c) for c in sizes_around_threshold(norm, mode, layout, dtype)]
                assert found == ["cached", "streaming", "streaming"], found
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_cuda_rehearsal_and_report(tmp_path: Path) -> None:
    """gpu.py goes the same way without a device, on small tensors."""
    results, folder = tmp_path / "cuda.json", tmp_path / "report"
    chosen = ["--rehearse", "--peers=", "--paths=block,run", "--case-seconds=0.01"]
    chosen += ["--only=resnet 28, (batch_norm|group_norm), contiguous, bfloat16"]
    gpu = [sys.executable, "benchmarks/gpu.py", *chosen, "--output", str(results)]
    printed = subprocess.run(gpu, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    document = json.loads(results.read_text())
    assert (document["kind"], document["rehearsal"]) == ("cuda", True)
    assert document["failures"] == []
    found = {(r["operation"], r["candidate"]) for r in document["results"]}
    assert len(found) == len(document["results"])
    for norm in ("batch_norm train", "group_norm"):
        # Images are no runs.
        assert {name for op, name in found if op == norm} == {
            *("normcore", "normcore block", "torch", "copy")
        }
    assert "normcore block over normcore as planned" in printed

    # torch twice as fast in one case, three times as slow in all others.
    for r in document["results"]:
        is_lost = r["operation"] == "group_norm backward"
        factor = (0.5 if is_lost else 3.0) if r["candidate"] == "torch" else 1.0
        r |= {"cold_us": 10 * factor, "percent_of_copy_cold": 50.0}
    document["left_out"] = ["a case: torch.compile"]
    results.write_text(json.dumps(document))
    report = benchmarks("report", results, "--output", folder).stdout
    first = report.split("slowest beside the best peer first")[1].splitlines()[4]
    assert first.startswith("| resnet 28 | contiguous | bfloat16 | group_norm backward | 10 |")
    assert first.endswith("| 10 | 50 | 0.50 |  |  |")
    assert "| eager | 7 | 1 | " in report
    assert " | 0.50 | 3.00 |" in report
    assert "- left out: a case: torch.compile" in report
    assert is_png(folder / "cuda_roofline.png")


def test_sync(tmp_path: Path) -> None:
    results, folder = tmp_path / "sync.json", tmp_path / "report"
    chosen = ["--ranks=1,2", "--shapes=2x8x4x4", "--repeats=1", "--networks=slow=100:1"]
    printed = benchmarks("sync", *chosen, "--output", results).stdout
    document = json.loads(results.read_text())
    assert (document["kind"], document["threads"]) == ("sync", 1)
    assert [(c["ranks"], c["size"]) for c in document["cases"]] == [(1, "2x8x4x4"), (2, "2x8x4x4")]
    for case in document["cases"][:1]:
        assert set(case["microseconds"]) == {"normcore", "torch", "local"}
        assert not any(part for passes in case["collectives"].values() for part in passes.values())
    for case in document["cases"][1:]:
        channels = case["channels"]
        assert set(case["microseconds"]) == {
            *("normcore", "torch", "local", "normcore collectives", "torch collectives")
        }
        sent = {
            name: [
                (c["collective"], c["dtype"], c["bytes"]) for part in passes.values() for c in part
            ]
            for name, passes in case["collectives"].items()
        }
        assert sent == {
            "normcore": [
                ("all_reduce", "float64", 64 * channels),
                ("all_reduce", "float64", 16 * channels),
            ],
            "torch": [
                ("all_gather", "float32", 8 * channels + 4),
                ("all_reduce", "float32", 8 * channels),
            ],
            "local": [],
        }
        assert case["collectives"]["normcore"]["backward without grad_x"] == []
    assert {(m["collective"], m["ranks"]) for m in document["messages"]} == {
        ("all_reduce", 2),
        ("all_gather", 2),
    }
    assert [n["name"] for n in document["networks"]] == ["slow", "gloo here"]
    assert document["networks"][1]["within a factor of"] >= 1

    report = benchmarks("report", results, "--output", folder).stdout
    assert "| 2x8x4x4 | 2 | normcore | forward | all_reduce of 512 bytes | 512 |" in report
    assert report.partition("## Measured")[2] == printed.partition("## Measured")[2]
    assert is_png(folder / "sync_ranks.png")


def test_cost_model_of_collectives() -> None:
    program = """
from benchmarks.sync_model import Network, collectives_of, cost, fit, microseconds, sent

assert cost("all_reduce", "ring", 4, 1000) == (6, 1500)
assert cost("all_reduce", "tree", 5, 1000) == (6, 6000)
assert cost("all_reduce", "doubling", 8, 1000) == (3, 3000)
assert cost("all_gather", "tree", 4, 1000) == cost("all_gather", "ring", 4, 1000) == (3, 3000)
assert cost("all_gather", "doubling", 5, 1000) == (3, 4000)

ours, theirs = (collectives_of(name, 100) for name in ("normcore", "torch"))
assert sent(ours, 2) == 8000
assert sent(theirs, 2) == 1604
assert sent(ours, 17) > sent(theirs, 17)
assert sent(ours, 19) < sent(theirs, 19)

network = Network("n", alpha=3.0, speed=2.0)
assert microseconds(ours, "ring", 2, network) == 4 * 3.0 + 8000 / 2000
samples = [(m, n, 3.0 * m + n / 2000) for m in (2, 6, 14) for n in (64, 5000, 10**6)]
found, factor = fit("found", samples)
assert abs(found.alpha - 3) < 1e-9 and abs(found.speed - 2) < 1e-9 and factor < 1 + 1e-9
assert fit("speed alone", [(1, 1000, 2.0), (2, 1000, 1.0)])[0].alpha == 0
assert fit("alpha alone", [(2, 1000, 10.0), (2, 10**6, 9.0)])[0].speed == float("inf")
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("command", "option", "message"),
    [
        ("run", "--ops=layer_norm", "'layer_norm' is none of bn_forward"),
        ("run", "--shapes=2x", "'2x' is neither a size such as 2x64x14x14 nor one of resnet_56"),
        ("scaling", "--threads=0", "'0' is not like 1,2"),
        ("scaling", "--max-values=1e4", "1e4 is less than 100000, the first step"),
        ("chain", "--sizes=4096x256", "4096x256 is no size of images"),
        ("sync", "--ranks=0,2", "'0,2' is not like 1,2"),
        ("sync", "--networks=slow", "'slow' is not like NAME=MICROSECONDS:GB/S"),
    ],
)
def test_wrong_arguments(command: str, option: str, message: str) -> None:
    assert message in benchmarks(command, option, returncode=2).stderr
