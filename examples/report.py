"""What comes out of the runs: a table, a passage with every token's prediction, a picture, and the difference."""

from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter

console = Console(highlight=False)

HIT, MISS, UNASKED = "bold green underline", "red", "dim"
COLOURS = {"torch": "tab:orange", "jax": "tab:blue"}


@dataclass
class Run:
    """The record of one frontend's training."""

    frontend: str
    device: str
    train: list[tuple[float, float]] = field(default_factory=list)  # loss, accuracy of each step's batch
    held_out: list[tuple[int, float, float]] = field(default_factory=list)  # steps done, loss, accuracy
    seconds: float = 0.0  # in training steps
    tokens_per_second: float = 0.0  # of the median step
    passage: np.ndarray = field(default_factory=lambda: np.empty(0, int))  # the predicted ids

    @property
    def label(self) -> str:
        return f"{self.frontend} ({self.device})"


def print_runs(runs: list[Run], uniform: float, unigram: float) -> None:
    """The result of every run, with the two baselines that know nothing of the context."""
    table = Table(title="Held-out text, after training", title_justify="left", title_style="bold")
    table.add_column("model")
    for heading in ("loss (nats/token)", "accuracy", "training time", "tokens/s"):
        table.add_column(heading, justify="right")
    table.add_row("uniform, log V", f"{uniform:.4f}", style="dim")
    table.add_row("token frequencies", f"{unigram:.4f}", style="dim")
    for run in runs:
        _, loss, accuracy = run.held_out[-1]
        table.add_row(
            run.label, f"{loss:.4f}", f"{accuracy:.2%}", f"{run.seconds:.1f} s", f"{run.tokens_per_second:,.0f}"
        )
    console.print(table)


def print_passage(runs: list[Run], text: list[str], labels: np.ndarray, vocabulary: list[str]) -> None:
    """The text, and under each token what each run predicted for its place from the tokens before it.

    `text` is one token longer than `labels`: its first token is context only. Ignored ones have no prediction.
    """
    heading = ("\nA held-out passage, and the token predicted for each place: ", "bold")
    console.print(Text.assemble(heading, ("right", HIT), " ", ("wrong", MISS), " ", ("ignored", UNASKED), "\n"))

    names = ["text", *(run.frontend for run in runs)]
    margin = max(map(len, names)) + 3
    lines = [Text() for _ in names]

    def flush() -> None:
        for name, line in zip(names, lines, strict=True):
            console.print(Text.assemble((f"{name:>{margin - 3}} │ ", "dim"), line), no_wrap=True, overflow="crop")
            line.truncate(0)
        console.print()

    for place, token in enumerate(text):
        asked = place > 0 and labels[place - 1] >= 0
        cells = [(visible(token), "" if asked else UNASKED)]
        for run in runs:
            predicted = vocabulary[run.passage[place - 1]] if asked else ""
            shown = visible(predicted) if "\n" in token else visible(predicted).rstrip()
            cells.append((shown, HIT if predicted == token else MISS))
        width = max(len(cell) for cell, _ in cells)
        if lines[0] and ("\n" in token or margin + len(lines[0]) + width > console.width):
            flush()
        for line, (cell, style) in zip(lines, cells, strict=True):
            line.append(cell, style)
            line.append(" " * (width - len(cell)))
    flush()


def visible(token: str) -> str:
    """The token with its line breaks as signs, so that it stays on its line; an indent after them is kept."""
    return token.replace("\n", "⏎")


def save_passage(run: Run, text: list[str], labels: np.ndarray, vocabulary: list[str], path: Path) -> None:
    """What :func:`print_passage` prints of one run, as a picture: each token, and under it its prediction."""
    columns, lines = 96, [[]]  # of characters; each line's cells: column, token, prediction, colour
    column = 0
    for place, token in enumerate(text):
        asked = place > 0 and labels[place - 1] >= 0
        predicted = vocabulary[run.passage[place - 1]] if asked else ""
        cell = visible(token), visible(predicted).rstrip()
        width = max(map(len, cell))
        if lines[-1] and ("\n" in token or column + width > columns):
            lines.append([])
            column = 0
        lines[-1].append((column, *cell, "tab:green" if predicted == token else "tab:red" if asked else "grey"))
        column += width

    figure, axes = plt.subplots(figsize=(11, 0.5 * len(lines) + 0.6), layout="constrained")
    axes.set(xlim=(-7, columns), ylim=(len(lines), 0))
    axes.set_axis_off()
    axes.set_title("A held-out passage, and under each token its prediction: right in green, wrong in red", loc="left")
    font = {"family": "monospace", "fontsize": 11.5, "va": "center"}
    for i, line in enumerate(lines):
        for offset, name in ((0.3, "text"), (0.65, run.frontend)):
            axes.text(-1.5, i + offset, name, color="grey", ha="right", **font)
        for column, token, predicted, colour in line:
            axes.text(column, i + 0.3, token, color="grey" if colour == "grey" else "black", **font)
            weight = "bold" if colour == "tab:green" else "normal"
            axes.text(column, i + 0.65, predicted, color=colour, weight=weight, **font)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save_curves(runs: list[Run], uniform: float, unigram: float, path: Path) -> None:
    """Loss and accuracy of every step and of the held-out evaluations, all runs in one picture."""
    figure, (loss_axes, accuracy_axes) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for i, run in enumerate(runs):
        # The first run is a wide pale line, the next a thin dark one on top: both show where they are the same.
        line = {"color": COLOURS[run.frontend], "linewidth": (4.0, 1.0)[i], "alpha": (0.5, 1.0)[i]}
        marker = {"color": COLOURS[run.frontend], "linestyle": "none", "marker": "ox"[i], "markersize": (10, 6)[i]}
        if i == 0:
            marker |= {"markerfacecolor": "none", "markeredgewidth": 1.5}
        steps, *held_out = zip(*run.held_out, strict=True)
        for axes, train, scores in zip((loss_axes, accuracy_axes), zip(*run.train, strict=True), held_out, strict=True):
            axes.plot(train, label=f"{run.label}, training batch", **line)
            axes.plot(steps, scores, label=f"{run.label}, held out", zorder=3, clip_on=False, **marker)
    for level, name in ((uniform, "uniform, log V"), (unigram, "token frequencies")):
        loss_axes.axhline(level, color="grey", linewidth=0.8, linestyle=":")
        loss_axes.annotate(
            name, (1, level), (-4, 3), ("axes fraction", "data"), "offset points", ha="right", color="grey"
        )
    loss_axes.set(title="Cross entropy", xlabel="training step", ylabel="loss (nats per token)", ylim=(0, None))
    accuracy_axes.set(
        title="Next-token accuracy", xlabel="training step", ylabel="tokens predicted right", ylim=(0, None)
    )
    accuracy_axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    accuracy_axes.legend(loc="lower right")
    for axes in (loss_axes, accuracy_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def print_agreement(runs: list[Run]) -> None:
    """One line: where the runs ended, and how far apart."""
    ends = ", ".join(f"{run.frontend} {run.held_out[-1][1]:.4f}" for run in runs)
    if len(runs) == 1:
        console.print(f"{ends} held-out loss")
        return
    first, second = runs
    apart = abs(first.held_out[-1][1] - second.held_out[-1][1])
    asked = first.passage >= 0
    same = np.mean(first.passage[asked] == second.passage[asked])
    console.print(
        f"{ends}: |difference| {apart:.2g} in held-out loss; predicted tokens agree on {same:.1%} of the passage",
        soft_wrap=True,
    )
