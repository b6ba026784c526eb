"""The tables of docs/numerics.md: errors against float64, ours with torch's in brackets."""

from __future__ import annotations

from markup import DTYPES, by, markdown, prose, shown, versions

PARTS = {"loss": "loss", "x": "`dX`", "weight": "`dW`", "bias": "`db`", "logits": "`dlogits`"}
MORE = 2.0  # times torch's error: in bold from there on


def tables(results: dict) -> str:
    errors, size = results["errors"], results["size"]
    where = "A CPU" if results["device"] == "cpu" else f"One {results['device']}"
    parts = [
        prose(f"{where}, {versions(results, ('python', 'torch', 'triton'))}."),
        f"Linear cross entropy, {by(size)}:",
        table(errors["linear"]),
        f"Cross entropy of given logits, {by([size[0], size[2]])}:",
        table(errors["logits"]),
    ]
    if "many tokens" in errors:
        parts += [f'`memory="speed"` past 4.7 GiB of exponentials, {by(results["many_tokens"])}:']
        parts += [table(errors["many tokens"])]
    return "\n\n".join(parts)


def table(errors: dict) -> str:
    """A row for each dtype, kind of data and ``memory=``; of the last one row for those that read alike."""
    first = next(iter(next(iter(errors.values())).values()))
    parts = list(first["torch"])
    body = []
    for dtype, kinds in errors.items():
        for data, rows in kinds.items():
            alike: dict[tuple[str, ...], list[str]] = {}
            for name, row in rows.items():
                if name not in ("reference", "torch"):
                    alike.setdefault(tuple(cell(row[part], rows["torch"][part]) for part in parts), []).append(name)
            loss = shown(rows["reference"]["loss"])
            body += [[DTYPES[dtype], data, loss, ", ".join(names), *cells] for cells, names in alike.items()]
    memory = len(first) > 3  # torch's row, ours and the reference: there is nothing to tell apart
    rows = [["", "data", "its loss", "`memory=`", *(PARTS[part] for part in parts)], *body]
    head, *body = rows if memory else [row[:3] + row[4:] for row in rows]
    return markdown(head, body)


def cell(ours: float, torchs: float) -> str:
    text = shown(ours)
    return f"{f'**{text}**' if ours > MORE * torchs else text} ({shown(torchs)})"
