"""The code of the page for JAX users runs as written and prints what the page says; its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "jax.md"
TEXT = PAGE.read_text()

# A Python block, and the text block right after it, if there is one: what it prints.
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", TEXT, re.DOTALL)


def _programs() -> list[tuple[str, str]]:
    """Blocks continue those above; one that imports JAX starts a new program. Each with what it prints in all."""
    programs: list[tuple[str, str]] = []
    for code, printed in BLOCKS:
        if re.search(r"^import jax$", code, re.MULTILINE):
            programs.append(("", ""))
        before, printed_before = programs[-1]
        programs[-1] = (before + code, printed_before + printed)
    return programs


def test_there_are_blocks() -> None:
    assert len(BLOCKS) == TEXT.count("```python") >= 10
    assert sum(bool(printed) for _, printed in BLOCKS) == TEXT.count("```text") >= len(BLOCKS) - 1


@pytest.mark.parametrize(("code", "printed"), _programs(), ids=["one device", "several devices"])
def test_blocks_print_what_the_page_says(code: str, printed: str, tmp_path: Path) -> None:
    for module in ("flax", "equinox", "optax"):
        if module in code:
            pytest.importorskip(module)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if "xla_force_host_platform_device_count" in code:
        environment["JAX_PLATFORMS"] = "cpu"
    script = tmp_path / "page.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((.*?)\)", TEXT)
    assert links
    for link in links:
        file, _, heading = link.partition("#")
        target = PAGE.parent / file if file else PAGE
        assert target.is_file(), link
        headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE) if heading else []
        slugs = {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}
        assert not heading or heading in slugs, link
