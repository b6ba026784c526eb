"""The README's snippets run as written, and print what it says they print; its commands exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

# A Python block, and the text block right after it, if there is one: what it prints.
SNIPPETS = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", README, re.DOTALL)


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) == README.count("```python") >= 3
    assert sum(bool(printed) for _, printed in SNIPPETS) == README.count("```text") >= 2


@pytest.mark.parametrize(("code", "printed"), SNIPPETS)
def test_snippet_prints_what_the_readme_says(code: str, printed: str, tmp_path: Path) -> None:
    script = tmp_path / "snippet.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=ROOT, env=_environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


def test_commands_are_those_of_the_run_script() -> None:
    commands = re.findall(r"^\./run (\w+)", README, re.MULTILINE)
    assert commands == ["demo", "test"]
    usage = subprocess.run([ROOT / "run"], capture_output=True, text=True)
    assert usage.returncode == 2
    assert all(f"./run {command}" in usage.stderr for command in commands)


def test_pictures_exist() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def test_the_counts_of_models_are_those_of_the_table() -> None:
    page = (ROOT / "docs" / "transformers.md").read_text()
    rows = re.findall(r"^\| (\w+ForCausalLM) \| (yes|no) \| (.*) \|$", page, re.MULTILINE)
    fused = sum(answer == "yes" for _, answer, _ in rows)
    assert f"of the {len(rows)} classes" in README and f"`ForCausalLM`, {fused} are fused" in README
    assert all(bool(reason) == (answer == "no") for _, answer, reason in rows)
