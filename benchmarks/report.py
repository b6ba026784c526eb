"""Turns a results file into the sections of pages that are made from it, and plots: the README's on performance and the
tables of benchmarks/README.md; its table of small training loops; the README's on convergence; or the tables of
docs/numerics.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from convergence_page import summary as convergence_summary
from errors_page import tables as error_tables
from loops_page import table as loops_table
from markup import by, markdown, prose, rewrite, versions
from plots import draw, draw_convergence
from targets import HEADS, LOGITS, SMALL, TARGETS, Target

ROOT = Path(__file__).parent.parent
BASES = {"training": "floor", "half ignored": "floor", "evaluation": "one projection"}
BETTER = {"ratio": ("is faster", 2), "extra_mib": ("takes fewer MiB", 0)}  # with the digits that count
CALLS = ("waited_us", "host_us", "pipelined_us")
VENDOR = "vendor"
KERNELS = {  # the vendor's product that each is beside, and what it does
    "project_statistics": ("logits", "logits and their statistics"),
    "slab_gradient": ("logits", "logits again, and their gradient"),
    "input_gradient": ("dX", "dX"),
    "weight_gradient": ("dW", "dW"),
}


def summary(results: dict) -> str:
    """The README's: training steps at the heads of real models, the aims, and where a peer is ahead."""
    shapes = results["shapes"]
    heads = [name for name in shapes if name not in SMALL]
    parts = [
        prose(
            f"One {results['device']}, bf16, {versions(results)}. The time of a training step"
            " over the **floor**: the three matrix products that any exact step needs, over full shapes, by the"
            " vendor's library. In brackets the peak MiB beyond inputs and gradients. *metrics* is with predictions and"
            " accuracy. An empty cell was not run."
        ),
        steps_table(shapes, heads, "training"),
        "![Time over floor against extra memory, per shape](docs/benchmark_memory.png)",
        prose(
            "What this project aims at, beside what was measured; in bold what misses its aim. *Evaluation* is without"
            " gradients, over one product."
        ),
        targets_table(TARGETS, shapes, [name for name in HEADS if name in shapes]),
        targets_table(TARGETS, shapes, [name for name in SMALL if name in shapes]),
        targets_table(LOGITS, results, ["logits"]) if "logits" in results else "",
        prose(
            "Where a peer is ahead of the best of ours, and then where it is ahead of one of our modes in time and in"
            " memory. In brackets what it pays: its time over the floor (of an evaluation over one projection), and, if"
            " it is twice ours or more, the worst error of its gradients over ours:"
        ),
        "\n".join(f"- {line}" for line in ahead(shapes) + ahead_in_both(shapes)) or "- Nowhere, of what was measured.",
        "![Time over floor and extra memory against tokens and vocab](docs/benchmark_scaling.png)"
        if "scaling" in results
        else "",
    ]
    return "\n\n".join(part for part in parts if part)


def details(results: dict) -> str:
    """What the summary leaves out: the other steps, errors, calls and given logits."""
    shapes = results["shapes"]
    heads = [name for name in shapes if name not in SMALL]
    called = [name for name in shapes if any("waited_us" in row for row in shapes[name]["training"].values())]
    parts = [
        "Half of the tokens ignored: time over the floor of all tokens (extra MiB).",
        steps_table(shapes, heads, "half ignored"),
        "Evaluation: time over one projection (extra MiB).",
        steps_table(shapes, heads, "evaluation"),
        "Relative errors of `dX` / `dW` against float32, in thousandths: random data, and peaked data.",
        errors_table(shapes, heads),
    ]
    if called:
        parts += [
            prose(
                "Small problems, in microseconds: a training step that is waited for / the time until its call returns,"
                " where none is waited for / the time of each of those."
            ),
            calls_table(shapes, called),
        ]
    if "kernels" in results:
        parts += [
            prose(
                "Where the time goes: milliseconds of a step in each product, and over the vendor's of the same"
                " operands, which took turns with the step; then in all other kernels."
            ),
            kernels_table(results["kernels"]),
        ]
    if "logits" in results:
        parts += [
            prose(
                f"Cross entropy of given logits, {by(results['logits']['size'])}: share of the bandwidth of a plain"
                " copy, where the forward pass reads the logits, and the backward pass reads them and writes their"
                " gradient. Liger-Kernel does both in its forward pass."
            ),
            logits_table(results["logits"]["rows"]),
        ]
    return "\n\n".join(parts)


def cell(row: dict | None) -> str:
    if row is None:
        return ""
    if "failed" in row:
        return "failed"
    time = f"{row['ratio']:.2f}" if "ratio" in row else "-"
    return f"{time} ({row['extra_mib']:.0f})" if "extra_mib" in row else time


def labels_of(shapes: dict, names: list[str], table: str) -> list[str]:
    """Of the contenders, in their order."""
    labels = dict.fromkeys(label for name in names for label in shapes[name][table])
    return [label for label in labels if label != BASES[table]]


def steps_table(shapes: dict, names: list[str], table: str) -> str:
    base = BASES[table]
    times = [shapes[name][table][base].get("ms") for name in names]
    body = [[f"{base}, ms", *("-" if ms is None else f"{ms:.2f}" for ms in times)]]
    for label in labels_of(shapes, names, table):
        body.append([label, *(cell(shapes[name][table].get(label)) for name in names)])
    return markdown(["", *(f"{name} {by(shapes[name]['size'])}" for name in names)], body)


def errors_table(shapes: dict, names: list[str]) -> str:
    def of(row: dict) -> str:
        return ", ".join(
            " / ".join(f"{1e3 * row[data][name]:.2f}" for name in ("dx_error", "dw_error"))
            for data in ("random", "peaked")
            if data in row
        )

    body = []
    for label in labels_of(shapes, names, "training"):
        body.append([label, *(of(shapes[name]["training"].get(label, {})) or "-" for name in names)])
    return markdown(["", *names], body)


def targets_table(targets: tuple[Target, ...], shapes: dict, names: list[str]) -> str:
    body = []
    for target in targets:
        if any(name in target.bounds for name in names):
            body.append([target.name, *(aim(target, shapes, name) for name in names)])
    return markdown(["", *names], body)


def aim(target: Target, shapes: dict, name: str) -> str:
    value, sign = target.value(shapes[name]), "≥" if target.lower else "≤"
    bound = f"{sign} {target.bounds[name]:g}"
    if value is None:
        return f"- ({bound})"
    shown = f"{value:.{target.digits}f}"
    return f"{shown} ({bound})" if target.met(name, value) else f"**{shown}** ({bound})"


def calls_table(shapes: dict, names: list[str]) -> str:
    def calls(row: dict) -> str:
        return " / ".join(f"{row[key]:.0f}" for key in CALLS) if CALLS[0] in row else "failed"

    body = []
    for label in labels_of(shapes, names, "training"):
        body.append([label, *(calls(shapes[name]["training"].get(label, {})) for name in names)])
    return markdown(["", *(f"{name} {by(shapes[name]['size'])}" for name in names)], body)


def kernels_table(kernels: dict) -> str:
    shapes = [shape["ms"] for shape in kernels.values()]

    def product(times: dict, step: str, name: str, kernel: str) -> str:
        ms = times[step].get(kernel)
        return "-" if ms is None else f"{ms:.2f} ({ms / times[VENDOR][name]:.3f})"

    def others(times: dict[str, float]) -> str:
        return f"{sum(ms for kernel, ms in times.items() if kernel not in KERNELS):.2f}"

    body = [[f"vendor: {name}", *(f"{times[VENDOR][name]:.2f}" for times in shapes)] for name in shapes[0][VENDOR]]
    for step in [step for step in shapes[0] if step != VENDOR]:
        for kernel, (name, what) in KERNELS.items():
            if any(kernel in times[step] for times in shapes):
                body.append([f"{step}: {what}", *(product(times, step, name, kernel) for times in shapes)])
        body.append([f"{step}: other kernels", *(others(times[step]) for times in shapes)])
    return markdown(["", *kernels], body)


def logits_table(rows: dict[str, dict]) -> str:
    def share(row: dict, name: str) -> str:
        if "failed" in row:
            return "failed"
        return f"{row[f'{name}_share']:.2f}" if f"{name}_share" in row else "-"

    passes = ("forward", "backward", "step")
    body = [[label, *(share(row, name) for name in passes)] for label, row in rows.items() if label != "copy"]
    return markdown(["", "forward", "backward", "both"], body)


def measured(rows: dict[str, dict], *keys: str) -> dict[str, dict]:
    """Those that have all of this, and did not fail."""
    return {label: row for label, row in rows.items() if row.keys() >= {*keys} and "failed" not in row}


def shown(row: dict, key: str) -> str:
    """With the digits that count."""
    return f"{row[key]:.{BETTER[key][1]}f}"


def ahead(shapes: dict) -> list[str]:
    """A line per peer and table in which it is faster than our fastest, or takes less memory than our leanest."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name, sections in shapes.items():
        for table in BASES:
            for key, (verb, _) in BETTER.items():
                rows = measured(sections[table], key)
                ours = [row for label, row in rows.items() if label.startswith("twinhead")]
                if not ours or (key == "extra_mib" and name in SMALL):
                    continue
                least = min(ours, key=lambda row: row[key])
                for label in labels_of(shapes, [name], table):
                    if label in rows and float(shown(rows[label], key)) < float(shown(least, key)):
                        place = f"{shown(rows[label], key)} against {shown(least, key)} at {name}"
                        found.setdefault((table, verb, label), []).append(place + price(rows[label], least, key))
    return [f"{table}: {label} {verb}, {'; '.join(places)}." for (table, verb, label), places in found.items()]


def ahead_in_both(shapes: dict) -> list[str]:
    """A line per peer and table in which it is no slower than one of our modes, and takes less memory."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, table in itertools.product((name for name in shapes if name not in SMALL), BASES):
        rows = measured(shapes[name][table], *BETTER)
        modes = [label for label in rows if label.startswith("twinhead torch") and "metrics" not in label]
        peers = [label for label in rows if not label.startswith("twinhead")]
        for label, mode in itertools.product(peers, modes):
            theirs, ours = ([shown(rows[each], key) for key in BETTER] for each in (label, mode))  # time and memory
            if float(theirs[0]) <= float(ours[0]) and float(theirs[1]) < float(ours[1]):
                place = f"{mode} at {name}, {' and '.join(theirs)} MiB against {' and '.join(ours)}"
                found.setdefault((table, label), []).append(place + price(rows[label], rows[mode], "ratio"))
    return [
        f"{table}: {label} is no slower and takes fewer MiB than {'; '.join(places)}."
        for (table, label), places in found.items()
    ]


def price(row: dict, ours: dict, key: str) -> str:
    """The time that memory is saved at, and how much larger the worst of a gradient's errors is than ours."""
    paid = [f"{row['ratio']:.2f} in time"] if key == "extra_mib" and "ratio" in row else []
    errors = [
        row[data][name] / ours[data][name]
        for data in ("random", "peaked", "half ignored")
        for name in ("dx_error", "dw_error")
        if name in row.get(data, {}) and name in ours.get(data, {})
    ]
    if errors and max(errors) >= 2:
        paid.append(f"{max(errors):.1f} times the error")
    return f" (at {' and '.join(paid)})" if paid else ""


def report(results: dict, root: Path) -> None:
    """Writes what the file is of into the pages under ``root``."""
    if "curves" in results:
        rewrite(root / "README.md", "convergence", convergence_summary(results))
        draw_convergence(results, root / "docs")
    elif "errors" in results:
        rewrite(root / "docs" / "numerics.md", "errors", error_tables(results))
    elif "loops" in results:
        rewrite(root / "benchmarks" / "README.md", "loops", loops_table(results))
    else:
        rewrite(root / "README.md", "benchmark", summary(results))
        rewrite(root / "benchmarks" / "README.md", "benchmark", details(results))
        draw(results, root / "docs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=ROOT / "benchmarks" / "results" / "h100.json")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder whose pages and plots are written")
    arguments = parser.parse_args()
    report(json.loads(arguments.results.read_text()), arguments.root)


if __name__ == "__main__":
    main()
