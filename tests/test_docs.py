"""The code of the pages for either frontend runs as written and prints what they say; their links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("jax", "torch", "transformers")}
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)  # and right after it, what it prints

STARTS = {"jax": r"^import jax$", "torch": r"^import torch$", "transformers": r"^import (torch|jax)$"}

LINKED = {**PAGES, "numerics": (ROOT / "docs" / "numerics.md").read_text()}

every_page = pytest.mark.parametrize("page", PAGES)


def _programs(page: str) -> list[tuple[str, str]]:
    """Blocks continue those above; one that imports a framework starts a program. Each with what it prints in all."""
    programs: list[tuple[str, str]] = []
    for code, printed in BLOCK.findall(PAGES[page]):
        if re.search(STARTS[page], code, re.MULTILINE):
            programs.append(("", ""))
        before, printed_before = programs[-1]
        programs[-1] = (before + code, printed_before + printed)
    return programs


PROGRAMS = {f"{page} {i}": program for page in PAGES for i, program in enumerate(_programs(page))}


@every_page
def test_there_are_blocks(page: str) -> None:
    text, blocks = PAGES[page], BLOCK.findall(PAGES[page])
    assert len(blocks) == text.count("```python") >= 4
    assert sum(bool(printed) for _, printed in blocks) == text.count("```text") >= len(blocks) - 1


def test_there_are_programs() -> None:
    assert [*PROGRAMS] == ["jax 0", "jax 1", *(f"torch {i}" for i in range(3)), "transformers 0", "transformers 1"]


@pytest.mark.parametrize(("code", "printed"), PROGRAMS.values(), ids=PROGRAMS)
def test_blocks_print_what_the_page_says(code: str, printed: str, tmp_path: Path) -> None:
    for module in ("flax", "equinox", "optax", "transformers"):
        if re.search(rf"^ *(import|from) {module}\b", code, re.MULTILINE):
            pytest.importorskip(module)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if "xla_force_host_platform_device_count" in code:
        environment["JAX_PLATFORMS"] = "cpu"
    script = tmp_path / "page.py"
    script.write_text(code)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command = [sys.executable, *(torchrun if "init_process_group" in code else []), script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((.*?)\)", LINKED[page])
    assert links
    for link in links:
        file, _, heading = link.partition("#")
        target = ROOT / "docs" / (file or f"{page}.md")
        assert target.is_file(), link
        headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE) if heading else []
        slugs = {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}
        assert not heading or heading in slugs, link
