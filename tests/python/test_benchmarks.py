"""The commands of benchmarks/ write what benchmarks/README.md says. No time is looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "__main__.py").exists(), reason="no source tree with benchmarks"
)


def benchmarks(*arguments: str | Path, returncode: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == returncode, run.stderr
    return run


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
        assert (folder / name).read_bytes().startswith(b"\x89PNG")

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


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--ops=layer_norm", "'layer_norm' is none of bn_forward"),
        ("--shapes=2x", "'2x' is neither a size such as 2x64x14x14 nor one of resnet_56"),
    ],
)
def test_wrong_arguments(option: str, message: str) -> None:
    assert message in benchmarks("run", option, returncode=2).stderr
