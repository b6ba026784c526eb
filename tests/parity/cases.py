"""The table of cases: operations x options x dtypes x shapes x data, each run through both frontends."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

METRICS = {
    "return_z_loss": True,
    "return_token_accuracy": True,
    "return_predicted_tokens": True,
    "return_counts": True,
}
EVERYTHING = {"label_smoothing": 0.1, "lse_square_scale": 0.01, "softcap": 8.0, "logit_scale": 0.7}
SERVED = {"lse_square_scale": 0.01, "softcap": 8.0, "logit_scale": 0.7, "use_token_scaling": True}


@dataclass(frozen=True)
class Case:
    """One row of the table. ``data`` and ``layout`` name functions below; shapes span several tiles, none even."""

    name: str
    operation: str  # "linear" or "logits"
    leading: tuple[int, ...] = (37,)
    hidden: int = 40
    vocab: int = 203
    dtype: torch.dtype = torch.float32
    label_dtype: torch.dtype = torch.int64
    options: dict[str, Any] = field(default_factory=dict)
    bias: bool = False
    class_weight: bool = False
    data: str = "random"
    layout: str = "contiguous"  # of x, weight and logits; other layouts are torch's alone, but for "transposed_weight"
    memory: str | int = "auto"
    upstream: float = 1.7  # the cotangent of a reduced loss

    @property
    def reduction(self) -> str:
        return self.options.get("reduction", "mean")

    @property
    def ignore_index(self) -> int:
        return self.options.get("ignore_index", -100)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Inputs:
    """The arrays of a case on the CPU, with exactly the values that the case's dtype can hold."""

    arrays: dict[str, Tensor]  # "x" and "weight" (and "bias"), or "logits"
    labels: Tensor
    class_weight: Tensor | None
    upstream: Tensor


def make_inputs(case: Case) -> Inputs:
    """Draw a case's data: labels with the first and last token ignored, an upstream gradient neither 1 nor uniform."""
    generator = torch.Generator().manual_seed(sum(map(ord, case.name)))
    normal = functools.partial(torch.randn, generator=generator)
    tokens = torch.Size(case.leading).numel()
    if case.operation == "linear":
        arrays = {"x": normal(tokens, case.hidden), "weight": normal(case.vocab, case.hidden) / case.hidden**0.5}
        arrays["x"] *= 2.0
    else:
        arrays = {"logits": 2.0 * normal(tokens, case.vocab)}
    if case.bias:
        arrays["bias"] = normal(case.vocab)
    labels = torch.randint(0, case.vocab, (tokens,), generator=generator)
    if tokens > 2:
        labels[0] = labels[-1] = case.ignore_index
    DATA[case.data](arrays, labels, case)

    leading = case.leading
    arrays = {k: v.view(*leading, v.shape[-1]) if k in ("x", "logits") else v for k, v in arrays.items()}
    arrays = {k: LAYOUTS[case.layout](k, v.to(case.dtype)) for k, v in arrays.items()}
    upstream = normal(leading) if case.reduction == "none" else torch.tensor(case.upstream)
    if case.reduction == "none" and tokens:
        upstream.view(-1)[0] = upstream.view(-1)[tokens // 2] = 0.0
    class_weight = torch.rand(case.vocab, generator=generator) + 0.5 if case.class_weight else None
    return Inputs(arrays, labels.view(leading).to(case.label_dtype), class_weight, upstream)


# What the numbers are. Each function changes arrays and labels in place, before they are rounded to the case's dtype.


def _random(arrays: dict[str, Tensor], labels: Tensor, case: Case) -> None:
    pass


def _ties(arrays: dict[str, Tensor], labels: Tensor, case: Case) -> None:
    """The largest logit three times over, in distant blocks; small integers, so that the ties are exact."""
    if case.operation == "linear":
        for array in arrays.values():
            array.copy_(array.mul(1.5).round().clamp(-2, 2))
        arrays["weight"][[60, 150, 202]] = arrays["weight"][5] = 2.0 * arrays["weight"][5].sign()
        arrays["x"][:, :] = arrays["x"].abs() * arrays["weight"][5].sign()
        labels[1:9] = torch.tensor([5, 60, 150, 202, 5, 60, 150, 202])
    else:
        arrays["logits"][:, [60, 150, 202]] = 20.0
        labels[1:9] = torch.tensor([60, 150, 202, 60, 60, 150, 202, 1])


def _masked_start(arrays: dict[str, Tensor], labels: Tensor, case: Case) -> None:
    """A vocabulary whose first blocks are masked with -inf, in every row."""
    first = 70
    labels[(labels >= 0) & (labels < first)] = first + 5
    (arrays["bias"] if case.operation == "linear" else arrays["logits"])[..., :first] = float("-inf")


def _masked_target(arrays: dict[str, Tensor], labels: Tensor, case: Case) -> None:
    """Tokens whose own label is masked with -inf: loss +inf."""
    _masked_start(arrays, labels, case)
    labels[4] = 3


def _broken_rows(arrays: dict[str, Tensor], labels: Tensor, case: Case) -> None:
    """Valid rows with NaN (first and later blocks) and inf, a row that is all -inf, beside whole ones."""
    logits = arrays["logits"]
    logits[3, 7] = logits[3, 150] = float("nan")
    logits[4, 199] = float("nan")
    logits[5, 100] = float("inf")
    logits[6, 100], logits[6, 180] = float("inf"), float("nan")
    logits[7] = float("-inf")
    labels[3] = 7


def _broken_x(arrays: dict[str, Tensor], labels: Tensor, case: Case) -> None:
    """A row of x with NaN: that token, and no other token's loss, prediction or dx."""
    arrays["x"][3, 5] = float("nan")
    arrays["x"][4, 2] = float("inf")


def _broken_ignored(arrays: dict[str, Tensor], labels: Tensor, case: Case) -> None:
    """Ignored rows full of NaN and inf, at the ends and in between: nothing of them may reach anything."""
    labels[[5, 6, 20]] = case.ignore_index
    rows = arrays["x"] if case.operation == "linear" else arrays["logits"]
    rows[[0, 5, -1]] = float("nan")
    rows[[6, 20]] = float("inf")


def _all_ignored(arrays: dict[str, Tensor], labels: Tensor, case: Case) -> None:
    labels.fill_(case.ignore_index)


def _half_ignored(arrays: dict[str, Tensor], labels: Tensor, case: Case) -> None:
    labels[::2] = case.ignore_index


def _large(arrays: dict[str, Tensor], labels: Tensor, case: Case) -> None:
    """Logits around 1e4, losses from nearly 0 to hundreds of nats."""
    arrays["logits"].mul_(30.0).add_(1e4)


def _lowest(arrays: dict[str, Tensor], labels: Tensor, case: Case) -> None:
    """Rows of the lowest finite number, as masks write it, and one of a number whose square overflows."""
    arrays["logits"][[2, 5]] = torch.finfo(torch.float32).min
    arrays["logits"][7, 11] = 1e20
    labels[7] = 11


def _peaked(arrays: dict[str, Tensor], labels: Tensor, case: Case) -> None:
    """Hidden states that point at their label: losses of about 1e-6, and some far from it."""
    valid = labels >= 0
    arrays["weight"] /= arrays["weight"].norm(dim=1, keepdim=True)
    arrays["x"][valid] = 24.0 * arrays["weight"][labels[valid]]
    labels[10] = (labels[10] + 1) % case.vocab


def _far(arrays: dict[str, Tensor], labels: Tensor, case: Case) -> None:
    """Labels whose logits lie so many nats below the largest: past them exponentials relative to theirs overflow."""
    arrays["weight"] /= arrays["weight"].norm(dim=1, keepdim=True)
    for token, nats in enumerate((20.0, 39.0, 45.0, 87.0, 100.0, 700.0), 3):
        labels[token] = 2 * token
        arrays["weight"][2 * token + 1] = -arrays["weight"][2 * token]
        arrays["x"][token] = nats / 2 * arrays["weight"][2 * token + 1]


def _shared_labels(arrays: dict[str, Tensor], labels: Tensor, case: Case) -> None:
    """A label that most tokens share, and others of eight tokens, of nine and of two; not all of them side by side."""
    labels[1:-1] = 17
    for label, tokens in ((16, 8), (18, 9), (case.vocab - 1, 2)):
        labels[label % 16 + 1 : -1 : 3][:tokens] = label


def _same_rows(arrays: dict[str, Tensor], labels: Tensor, case: Case) -> None:
    """All rows alike, as an expanded tensor has them."""
    rows = arrays["x"] if case.operation == "linear" else arrays["logits"]
    rows[:] = rows[0].clone()


DATA = {
    "random": _random,
    "ties": _ties,
    "masked_start": _masked_start,
    "masked_target": _masked_target,
    "broken_rows": _broken_rows,
    "broken_x": _broken_x,
    "broken_ignored": _broken_ignored,
    "all_ignored": _all_ignored,
    "half_ignored": _half_ignored,
    "large": _large,
    "lowest": _lowest,
    "peaked": _peaked,
    "far": _far,
    "shared_labels": _shared_labels,
    "same_rows": _same_rows,
}


# How the numbers lie in memory.


def _column_major(name: str, array: Tensor) -> Tensor:
    return array.transpose(-1, -2).contiguous().transpose(-1, -2) if array.dim() > 1 else array


def _sliced(name: str, array: Tensor) -> Tensor:
    padded = torch.full([2 * size + 1 for size in array.shape], float("nan"), dtype=array.dtype)
    view = padded[tuple(slice(1, None, 2) for _ in array.shape)]
    view.copy_(array)
    return view


def _expanded(name: str, array: Tensor) -> Tensor:
    return array[:1].clone().expand(array.shape) if name in ("x", "logits") else array


LAYOUTS = {
    "contiguous": lambda name, array: array.contiguous(),
    "transposed_weight": lambda name, array: _column_major(name, array) if name == "weight" else array,
    "column_major": _column_major,
    "sliced": _sliced,
    "expanded": _expanded,
}


def _table() -> list[Case]:
    linear, logits = Case("", "linear"), Case("", "logits")
    rows: list[tuple[str, Case, dict[str, Any]]] = []

    def add(name: str, *cases: Case, **changes: Any) -> None:
        rows.extend((name, case, changes) for case in cases)

    def options(**values: Any) -> dict[str, Any]:
        return {"options": values}

    both = (linear, logits)
    add("mean", *both)
    add("sum", *both, **options(reduction="sum"))
    add("none", *both, **options(reduction="none"))
    add("smoothing", *both, **options(label_smoothing=0.1))
    add("smoothing_one", *both, **options(label_smoothing=1.0))
    add("z_loss", *both, **options(lse_square_scale=0.01))
    add("softcap", *both, **options(softcap=5.0))
    add("softcap_small", *both, vocab=10, **options(softcap=2.0))
    add("logit_scale", *both, **options(logit_scale=-0.3))
    add("class_weight", *both, class_weight=True)
    add("class_weight_none", *both, class_weight=True, **options(reduction="none"))
    add("weighted_smoothing", *both, class_weight=True, **options(label_smoothing=0.2))
    add("num_items", *both, class_weight=True, **options(num_items_in_batch=101, lse_square_scale=0.01))
    add("num_items_none_valid", *both, data="all_ignored", **options(num_items_in_batch=0))
    add("ignore_inside_vocab", *both, **options(ignore_index=17))
    add("ignore_beyond_vocab", *both, **options(ignore_index=300))
    for reduction in ("mean", "sum", "none"):
        add(f"everything_{reduction}", *both, class_weight=True, **options(**EVERYTHING, reduction=reduction))
        add(f"token_scaling_{reduction}", linear, **options(use_token_scaling=True, reduction=reduction))
    add("bias", linear, bias=True)
    add(
        "all_options_of_linear", linear, bias=True, class_weight=True, **options(**EVERYTHING, use_token_scaling=True)
    )

    add("int32_labels", *both, label_dtype=torch.int32)
    add("leading_dimensions", *both, leading=(3, 2, 5), **options(reduction="none"))
    add("no_leading_dimension", *both, leading=())
    add("one_token", *both, leading=(1,), **options(lse_square_scale=0.01))
    add("one_class", *both, vocab=1, **options(lse_square_scale=0.01))
    add("two_classes", *both, vocab=2)
    add("one_hidden", linear, hidden=1)
    add("even_tiles", *both, leading=(32,), hidden=32, vocab=128)
    add("empty", *both, leading=(0,))
    add("empty_leading", *both, leading=(2, 0), **options(reduction="none"))

    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        add(name, *both, dtype=dtype, leading=(53,), vocab=301)
        add(f"{name}_none", *both, dtype=dtype, **options(reduction="none"))
        add(f"{name}_everything", linear, dtype=dtype, bias=True, class_weight=True, **options(**EVERYTHING))
        add(f"{name}_everything", logits, dtype=dtype, class_weight=True, **options(**EVERYTHING))
        add(f"{name}_peaked", linear, dtype=dtype, data="peaked")

    # What kept exponentials serve, and what falls back.
    small = replace(linear, dtype=torch.bfloat16, vocab=101)
    add("bf16_far", small, data="far")
    add("bf16_served_options", small, class_weight=True, data="half_ignored", **options(**SERVED))
    add("bf16_transposed_weight", small, vocab=104, layout="transposed_weight")
    add("bf16_broken_x", small, leading=(13,), data="broken_x", **options(reduction="none"))
    add("bf16_masked_start", small, leading=(13,), bias=True, data="masked_start")

    # Gradients that fp16 holds only with a loss scale in them.
    add("fp16_loss_scale", *both, dtype=torch.float16, leading=(53,), vocab=301, upstream=65536.0)

    add("ties", *both, data="ties")
    add("ties_none", *both, data="ties", **options(reduction="none"))
    add("bf16_ties", *both, data="ties", dtype=torch.bfloat16)
    add("masked_start", linear, bias=True, data="masked_start")
    add("masked_start", logits, data="masked_start")
    add("masked_start_softcap", logits, data="masked_start", **options(softcap=5.0))
    add("masked_start_smoothing", logits, data="masked_start", **options(label_smoothing=0.1))
    add("masked_target", logits, data="masked_target", **options(reduction="none"))
    add("broken_rows", logits, data="broken_rows", **options(reduction="none"))
    add("broken_x", linear, data="broken_x", **options(reduction="none"))
    add("broken_ignored", *both, data="broken_ignored")
    add("bf16_broken_ignored", *both, data="broken_ignored", dtype=torch.bfloat16)
    add("all_ignored", *both, data="all_ignored", class_weight=True, **options(**EVERYTHING))
    add("all_ignored_none", *both, data="all_ignored", **options(reduction="none"))
    add("half_ignored", *both, data="half_ignored", class_weight=True, **options(lse_square_scale=0.01))
    add("large_logits", logits, data="large", **options(label_smoothing=0.1))
    add("large_logits_none", logits, data="large", **options(reduction="none"))
    add("lowest", logits, data="lowest", **options(reduction="none"))
    add("peaked", linear, data="peaked")
    add("peaked_none", linear, data="peaked", **options(reduction="none", label_smoothing=0.1))

    add("many_slices", linear, memory=38_000)
    add("many_slices_everything", linear, memory=38_000, bias=True, class_weight=True, **options(**EVERYTHING))
    add("many_slices_odd_hidden", linear, hidden=30, memory=38_000)  # whose sums no descriptor can have
    add("transposed_weight", linear, layout="transposed_weight", memory=38_000)
    # Slabs of which the first could lie in the weight's gradient.
    many = replace(linear, leading=(40,), hidden=64, vocab=1600, memory=70_000)
    add("lent_slabs", many)
    add("lent_slabs_transposed_weight", many, layout="transposed_weight")
    add("bf16_lent_slabs", many, dtype=torch.bfloat16)
    add("bf16_lent_slabs_transposed_weight", many, dtype=torch.bfloat16, layout="transposed_weight")
    add("column_major", *both, layout="column_major")
    add("sliced", *both, layout="sliced", **options(reduction="none"))
    add("expanded", *both, layout="expanded", data="same_rows", **options(reduction="none"))
    add("bf16_sliced", *both, layout="sliced", dtype=torch.bfloat16)
    cases = [replace(case, name=f"{case.operation}-{name}", **changes) for name, case, changes in rows]
    assert len({case.name for case in cases}) == len(cases), "two cases of one name"
    return cases


CASES = _table()
