"""The table of benchmarks/README.md on small training loops."""

from __future__ import annotations

from markup import by, markdown, prose, shown, versions


def table(results: dict) -> str:
    loops = results["loops"]
    about = prose(
        f"One {results['device']}, bf16, {versions(results)}. Milliseconds of a step; in brackets the peak MiB beyond"
        " weights and batch, and the largest relative error of the first losses against those of a float32 loop."
    )
    labels = dict.fromkeys(label for loop in loops.values() for label in loop["rows"])
    body = [[label, *(cell(loop["rows"].get(label, {})) for loop in loops.values())] for label in labels]
    head = ["", *(f"{name} {by(loop['size'])}" for name, loop in loops.items())]
    return f"{about}\n\n{markdown(head, body)}"


def cell(row: dict) -> str:
    if "ms" not in row:
        return "failed" if "failed" in row else ""
    memory = f"{row['extra_mib']:.0f}, " if "extra_mib" in row else ""
    return f"{row['ms']:.2f} ({memory}{shown(row['loss_error'])})"
