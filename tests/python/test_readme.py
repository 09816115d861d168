"""The README's snippets run, and what it refers to exists.

A snippet with a comment in front that names a file is that file: those of tests/consumer are
compiled and run against an installed package. All other Python snippets run here.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"(?:<!-- (\S+) -->\n)?```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [code for _, language, code in SNIPPETS if language == "python"]
NAMED = [(name, code) for name, _, code in SNIPPETS if name]


def test_snippets_are_found() -> None:
    assert len(PYTHON) == 4
    languages = [language for _, language, _ in SNIPPETS]
    assert languages.count("cpp") == 2
    assert all(name for name, language, _ in SNIPPETS if language in ("cpp", "cmake"))


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: f"{len(code)}_characters")
def test_python_snippet(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize(("name", "code"), NAMED, ids=[name for name, _ in NAMED])
def test_named_snippet_is_the_file(name: str, code: str) -> None:
    text = (ROOT / name).read_text()
    if name.startswith("tests/consumer/"):
        assert code == text
    else:  # an excerpt
        lines = text.splitlines()
        assert all(line in lines for line in code.splitlines())


def test_consumer_project_builds_the_snippets() -> None:
    project = (ROOT / "tests/consumer/CMakeLists.txt").read_text()
    programs = [Path(name).stem for name, _ in NAMED if name.endswith(".cpp")]
    assert len(programs) == 2
    assert all(re.search(rf"\b{program}\b", project) for program in programs)


def test_links_and_tests_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert all((ROOT / link).exists() for link in links)
    tests = set(re.findall(r"`(test_\w+\.py)`", README))
    assert len(tests) > 10
    assert all((ROOT / "tests/python" / test).exists() for test in tests)


def test_commands_exist() -> None:
    commands = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert commands == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{command}:", makefile, re.MULTILINE) for command in commands)
