"""The results file: measurements with the device, the versions and the commit that they are of."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

PACKAGES = (
    "torch", "triton", "jax", "optax", "transformers", "liger-kernel", "cut-cross-entropy", "quack-kernels", "tokamax",
)  # fmt: skip
COLUMNS = (
    "ms", "ratio", "extra_mib", "loss_error", "dx_error", "dw_error", "predictions_wrong",
    "waited_us", "host_us", "pipelined_us", "forward_share", "backward_share", "step_share",
)  # fmt: skip
FORMATS = (".2f", ".3f", ".0f", ".1e", ".5f", ".5f", ".5f", ".0f", ".0f", ".0f", ".2f", ".2f", ".2f")


class Results:
    """What was measured, written to its file after each part.

    Parts that the file has already are kept if device, versions, commit and the other ``facts`` are the same, so that a
    long run can be made in several.
    """

    def __init__(self, path: Path, device: str, commit: str | None, **facts: Any) -> None:
        self.path = path
        measured = {
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "versions": versions(),
            "commit": commit or subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
            **facts,
        }
        found = json.loads(path.read_text()) if path.exists() else {}
        same = all(found.get(key) == value for key, value in measured.items())
        self.parts: dict[str, Any] = (found if same else {}) | measured

    def add(self, *keys: str, value: dict) -> None:
        place = self.parts
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.parts, indent=1) + "\n")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def table(title: str, rows: dict[str, dict]) -> str:
    """Rows with the errors of their first problem."""
    flat = [(label, {**row.get("random", row.get("half ignored", {})), **row}) for label, row in rows.items()]
    shown = [i for i, column in enumerate(COLUMNS) if any(column in row for _, row in flat)]
    body = [[label, *(row.get(COLUMNS[i]) for i in shown), row.get("failed", "")[:60]] for label, row in flat]
    headers = [title, *(COLUMNS[i] for i in shown), ""]
    return tabulate(body, headers, floatfmt=("", *(FORMATS[i] for i in shown), ""), missingval="-")
