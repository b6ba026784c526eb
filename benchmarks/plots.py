"""Plots of results files: time against memory, how both scale with tokens and with the vocab; curves of training."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from convergence_page import curves, spread
from markup import DTYPES
from targets import SMALL

AXES = {"tokens": 0, "vocab": 2}  # places in a size
VALUES = {"ratio": "time over floor", "extra_mib": "extra MiB"}
RATIOS = (1, 1.5, 2, 3, 5, 10)  # that are marked on an axis


def draw(results: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in (("memory", time_against_memory(results)), ("scaling", scaling(results))):
        if figure is not None:
            figure.savefig(folder / f"benchmark_{name}.png", dpi=110, bbox_inches="tight")
            plt.close(figure)


def style(label: str) -> dict:
    """Ours are filled circles, peers hollow squares."""
    ours = label.startswith("twinhead")
    return {"marker": "o" if ours else "s", "markersize": 7 if ours else 5, "markerfacecolor": None if ours else "none"}


def colours(labels: list[str]) -> dict[str, tuple]:
    return dict(zip(labels, plt.get_cmap("tab20").colors * 2, strict=False))


def time_against_memory(results: dict) -> plt.Figure | None:
    shapes = {name: shape for name, shape in results["shapes"].items() if name not in SMALL}
    points = {
        name: {
            label: (row["extra_mib"], row["ratio"])
            for label, row in shape["training"].items()
            if "extra_mib" in row and "ratio" in row and not label.endswith(("metrics", "cuda graph"))
        }
        for name, shape in shapes.items()
    }
    labels = list(dict.fromkeys(label for found in points.values() for label in found))
    if not labels:
        return None
    colour = colours(labels)
    figure, panels = plt.subplots(1, len(shapes), figsize=(4 * len(shapes), 4), squeeze=False, sharex=True)
    for panel, (name, found) in zip(panels[0], points.items(), strict=True):
        for label, (extra, ratio) in found.items():
            panel.plot(max(extra, 1), ratio, color=colour[label], linestyle="none", label=label, **style(label))
        panel.set(title=name, xlabel="extra MiB", xscale="log")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("time over floor")
    legends = [panel.get_legend_handles_labels() for panel in panels[0]]
    handles = {text: handle for legend in legends for handle, text in zip(*legend, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4)
    return figure


def points_along(results: dict, axis: str) -> dict[int, dict[str, dict]]:
    """Rows by the value on the axis: of the points measured for it, and of the shapes that lie on the same line."""
    place = AXES[axis]
    found = {tuple(point["size"]): point["rows"] for point in results.get("scaling", {}).get(axis, {}).values()}
    if not found:
        return {}
    line = {size[:place] + size[place + 1 :] for size in found}
    for shape in results["shapes"].values():
        size = tuple(shape["size"])
        if size[:place] + size[place + 1 :] in line:
            found[size] = shape["training"]
    return {size[place]: found[size] for size in sorted(found)}


def scaling(results: dict) -> plt.Figure | None:
    lines = {axis: points for axis in AXES if (points := points_along(results, axis))}
    if not lines:
        return None
    first = next(iter(results["scaling"].values()))
    labels = [label for label in next(iter(first.values()))["rows"] if label != "floor"]
    colour = colours(labels)
    figure, panels = plt.subplots(2, len(lines), figsize=(5 * len(lines), 7), squeeze=False)
    for column, (axis, points) in enumerate(lines.items()):
        for panel, (key, name) in zip(panels[:, column], VALUES.items(), strict=True):
            for label in labels:
                measured = [(at, rows[label][key]) for at, rows in points.items() if key in rows.get(label, {})]
                if measured:
                    panel.plot(*zip(*measured, strict=True), color=colour[label], label=label, **style(label))
            panel.set(xlabel=axis, ylabel=name, xscale="log", yscale="log")
            panel.set_xticks(list(points), labels=list(points))
            if key == "ratio":
                panel.set_yticks(RATIOS, labels=RATIOS)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    panels[0, 0].legend()
    return figure


def draw_convergence(results: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figure = convergence(results)
    figure.savefig(folder / "convergence.png", dpi=110, bbox_inches="tight")
    plt.close(figure)


def convergence(results: dict) -> plt.Figure:
    """Held-out loss of every seed, and how far ours and the framework's are apart at equal seed."""
    steps, found = results["evaluated"], curves(results)
    figure, panels = plt.subplots(
        2, len(found), figsize=(3.6 * len(found), 6.5), sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    for (upper, lower), ((frontend, dtype), losses) in zip(panels.T, found.items(), strict=True):
        ours, theirs = losses["twinhead"], losses["framework"]
        # The framework's are wide pale lines, ours thin dark ones on top: both show where they are the same.
        wide = upper.plot(steps, theirs.T, color="tab:orange", linewidth=5, alpha=0.5)
        thin = upper.plot(steps, ours.T, color="tab:blue", linewidth=1, marker="o", markersize=3)
        difference = np.abs(ours - theirs)
        each = lower.plot(
            steps, np.where(difference > 0, difference, np.nan).T, color="tab:blue", marker="o", markersize=3
        )
        (between,) = lower.plot(steps, spread(theirs), color="grey", linestyle="--")
        upper.set_title(f"{frontend}, {DTYPES[dtype]}")
        lower.set(xlabel="training step", yscale="log")
        for panel in (upper, lower):
            panel.grid(alpha=0.3)
    upper.legend([wide[0], thin[0]], ["framework, each seed", "twinhead, each seed"])
    lower.legend([each[0], between], ["difference at equal seed", "deviation between seeds"])
    panels[0, 0].set_ylabel("held-out loss (nats per token)")
    panels[1, 0].set_ylabel("nats per token")
    return figure
