"""The table of benchmarks/README.md on small training loops."""

from __future__ import annotations

from markup import by, markdown, prose, shown, versions


def table(results: dict) -> str:
    loops = results["loops"]
    worst = {
        name: max((row["loss_error"] for row in loop["rows"].values() if "ms" in row), default=0.0)
        for name, loop in loops.items()
    }
    errors = " and ".join(f"{shown(error)} at {name}" for name, error in worst.items())
    about = prose(
        f"One {results['device']}, bf16, {versions(results)}. Milliseconds of a step, and in brackets the peak MiB"
        f" beyond weights and batch. The first losses differ from those of a float32 loop by up to {errors}."
    )
    labels = dict.fromkeys(label for loop in loops.values() for label in loop["rows"])
    body = [[label, *(cell(loop["rows"].get(label, {})) for loop in loops.values())] for label in labels]
    head = ["", *(f"{name} {by(loop['size'])}" for name, loop in loops.items())]
    return f"{about}\n\n{markdown(head, body)}"


def cell(row: dict) -> str:
    if "ms" not in row:
        return "failed" if "failed" in row else ""
    return f"{row['ms']:.2f} ({row['extra_mib']:.0f})" if "extra_mib" in row else f"{row['ms']:.2f}"
