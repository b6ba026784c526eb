"""Markdown for the pages that reports write: filled lines, tables, what was measured with, sections between markers."""

from __future__ import annotations

import textwrap
from pathlib import Path

NAMES = {
    "python": "Python", "torch": "torch", "triton": "Triton", "jax": "JAX", "optax": "optax",
    "liger-kernel": "Liger-Kernel", "cut-cross-entropy": "cut-cross-entropy", "quack-kernels": "QuACK",
    "tokamax": "tokamax",
}  # fmt: skip
DTYPES = {"float32": "float32", "bfloat16": "bf16", "float16": "fp16"}


def prose(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body] if body else []
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by(size: list[int]) -> str:
    return "x".join(map(str, size))


def shown(value: float) -> str:
    """Two digits, and no zeros that tell nothing: 1.7e-3."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}" if abs(int(exponent)) > 1 else f"{value:.2g}"


def versions(results: dict, names: tuple[str, ...] = tuple(NAMES)) -> str:
    """Of what was measured with, and the commit."""
    found = (f"{NAMES[name]} {version}" for name, version in results["versions"].items() if name in names)
    return f"{', '.join(found)}; commit {results['commit'][:7]}"


def rewrite(page: Path, section: str, text: str) -> None:
    """Puts the text between the page's markers of the section."""
    begin, end = (f"<!-- {section}:{side} -->" for side in ("begin", "end"))
    before, _, rest = page.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{page} lacks the markers {begin} and {end}")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")
