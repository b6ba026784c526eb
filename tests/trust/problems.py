"""The space of calls that the property tests draw from: a case of the parity tests, with drawn data."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.parity.cases import LAYOUTS, METRICS, Case, Inputs

USUAL, TINY, PEAKED = 1.0, 2.0**-12, 128.0  # of logits: around 1, of 1e-4, and up to beyond 1e3
SHIFT = 8.0  # in units of the magnitude; added to exact numbers it does not round them, in bfloat16 either


@dataclass(frozen=True)
class Problem(Case):
    """A case whose data are drawn too. Its ``layout`` is that of the weight; of logits, ``rows_layout``.

    ``exact`` numbers are few multiples of a power of two, so that float32 logits are the exact ones, in any order of
    summation, and ties are ties.
    """

    seed: int = 0
    exact: bool = True
    magnitude: float = USUAL
    right: float = 0.0  # the share of tokens whose label has the largest logit
    tied: bool = False  # three classes alike, the largest in many rows
    masked: str = "none"  # classes whose logits are -inf
    ignored: str = "none"  # tokens whose label is ignore_index
    poisoned: bool = False  # ignored rows hold NaN and inf
    rows_layout: str = "contiguous"
    strided: bool = False  # bias, class weights, labels and upstream gradient have gaps
    wanted: tuple[str, ...] = ()  # the inputs that require a gradient
    metrics: dict[str, bool] = field(default_factory=dict)

    @property
    def rows(self) -> str:
        return "x" if self.operation == "linear" else "logits"

    @property
    def differentiable(self) -> tuple[str, ...]:
        return ("logits",) if self.operation == "logits" else ("x", "weight", "bias")[: 2 + self.bias]


def make_inputs(problem: Problem) -> Inputs:
    """The data of a problem, on the CPU; among several tokens with an upstream gradient each, the first has 0."""
    generator = torch.Generator().manual_seed(problem.seed)
    leading, vocab = problem.leading, problem.vocab
    tokens = torch.Size(leading).numel()
    numbers = functools.partial(_numbers, problem, generator)
    if problem.operation == "linear":
        arrays = {"x": problem.magnitude * numbers(tokens, problem.hidden), "weight": numbers(vocab, problem.hidden)}
        if problem.bias:
            arrays["bias"] = problem.magnitude * numbers(vocab)
    else:
        arrays = {"logits": 4.0 * problem.magnitude * numbers(tokens, vocab)}
    arrays = {name: array.to(problem.dtype).float() for name, array in arrays.items()}
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    if problem.tied:
        _tie(arrays, labels, generator)
    masked = _mask(problem, arrays, generator)
    right = torch.rand(tokens, generator=generator) < problem.right
    labels = torch.where(right, _logits(arrays).argmax(1), labels)
    if masked.any():  # a label that is masked costs inf: one of them stays
        labels[1:] = torch.where(masked[labels[1:]], (~masked).nonzero()[0], labels[1:])
    ignored = _ignored(problem, tokens, generator)
    labels[ignored] = problem.ignore_index
    if problem.poisoned:
        arrays[problem.rows][labels == problem.ignore_index] = float("nan")
        arrays[problem.rows][(labels == problem.ignore_index) & (torch.arange(tokens) % 2 == 0)] = float("inf")

    upstream = torch.tensor(problem.upstream)
    if problem.reduction == "none":
        upstream = upstream * torch.randn(tokens, generator=generator)
        upstream[:1] = 0.0
        upstream = upstream.view(leading)
    class_weight = None
    if problem.class_weight:
        class_weight = torch.rand(vocab, generator=generator) + 0.5
        if not masked.any():  # what an infinite loss is over no weight at all is not said
            class_weight[torch.rand(vocab, generator=generator) < 0.1] = 0.0
    arrays = {k: v.view(*leading, v.shape[-1]) if k == problem.rows else v for k, v in arrays.items()}
    arrays = {k: v.to(problem.dtype) for k, v in arrays.items()}
    layouts = {problem.rows: problem.rows_layout, "weight": problem.layout}
    gaps = _with_gaps if problem.strided else torch.Tensor.contiguous
    return Inputs(
        {k: gaps(v) if k == "bias" else LAYOUTS[layouts[k]](k, v) for k, v in arrays.items()},
        gaps(labels.view(leading).to(problem.label_dtype)),
        None if class_weight is None else gaps(class_weight),
        gaps(upstream),
    )


def _with_gaps(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


def _numbers(problem: Problem, generator: torch.Generator, *shape: int) -> Tensor:
    normal = torch.randn(shape, generator=generator)
    return normal.mul(2.0).round().clamp(-6, 6) / 4.0 if problem.exact else normal / 2.0


def _logits(arrays: dict[str, Tensor]) -> Tensor:
    if "logits" in arrays:
        return arrays["logits"]
    return arrays["x"] @ arrays["weight"].T + arrays.get("bias", torch.zeros(()))


def _tie(arrays: dict[str, Tensor], labels: Tensor, generator: torch.Generator) -> None:
    vocab = _logits(arrays).shape[1]
    alike = torch.randperm(vocab, generator=generator)[:3]
    rows = torch.rand(len(labels), generator=generator) < 0.7
    if "logits" in arrays:
        top = arrays["logits"].amax(1, keepdim=True).expand(-1, len(alike))
        arrays["logits"][:, alike] = torch.where(rows[:, None], top, arrays["logits"][:, alike])
    else:
        for name in arrays.keys() - {"x"}:
            arrays[name][alike] = arrays[name][alike[0]].clone()
        pointing = arrays["x"].abs() * arrays["weight"][alike[0]].sign()
        arrays["x"] = torch.where(rows[:, None], pointing, arrays["x"])
    some = torch.rand(len(labels), generator=generator) < 0.5
    labels[some] = alike[torch.randint(0, len(alike), (int(some.sum()),), generator=generator)]


def _mask(problem: Problem, arrays: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    masked = torch.zeros(problem.vocab, dtype=torch.bool)
    if problem.masked == "none":
        return masked
    if problem.masked == "first":
        masked[: problem.vocab - 1 - problem.vocab // 4] = True
    else:
        masked = torch.rand(problem.vocab, generator=generator) < 0.4
        masked[torch.randint(0, problem.vocab, (1,), generator=generator)] = False
    arrays["bias" if problem.bias else "logits"][..., masked] = float("-inf")
    return masked


def _ignored(problem: Problem, tokens: int, generator: torch.Generator) -> Tensor:
    if problem.ignored == "some":
        return torch.rand(tokens, generator=generator) < 0.5
    ignored = torch.full((tokens,), problem.ignored == "all")
    if problem.ignored == "ends":
        ignored[:1] = ignored[-1:] = True
    return ignored


def _subsets(names: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1)))


# What is drawn, by name: simple values first, for a failure shrinks towards them; twice, what is more usual.
LEADING = ((3,), (1,), (), (0,), (2,), (9,), (31,), (32,), (33,), (41,), (65,), (2, 0), (3, 4), (1, 1, 1), (2, 3, 5))
SPACE: dict[str, tuple[Any, ...]] = {
    "operation": ("linear", "logits"),
    "leading": LEADING,
    "hidden": (2, 1, 7, 16, 31, 32, 33, 40, 64, 65),
    "vocab": (3, 1, 2, 7, 16, 31, 32, 33, 61, 63, 64, 65, 101, 127, 128, 129, 193, 257),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "label_dtype": (torch.int64, torch.int32),
    "bias": (False, True),
    "class_weight": (False, True),
    "exact": (True, False),
    "magnitude": (USUAL, TINY, PEAKED),
    "right": (0.0, 0.3, 1.0),
    "tied": (False, True),
    "masked": ("none", "first", "some"),
    "ignored": ("none", "ends", "some", "all"),
    "poisoned": (False, True),
    "layout": ("contiguous", "transposed_weight", "column_major", "sliced"),
    "rows_layout": ("contiguous", "column_major", "sliced", "expanded"),
    "strided": (False, True),
    "memory": ("auto", "lean", "speed", "least"),
    "upstream": (1.7, -0.3, 2.0**-7, 100.0),
    "metrics": _subsets(tuple(METRICS)),
}
OPTIONS: dict[str, tuple[Any, ...]] = {
    "reduction": ("mean", "sum", "none", "mean"),
    "label_smoothing": (0.0, 0.1, 1.0),
    "lse_square_scale": (0.0, 0.01, 0.1),
    "softcap": (None, 5.0, 50.0),
    "logit_scale": (1.0, 0.7, 4.0, -0.3),
    "use_token_scaling": (False, True),
    "num_items_in_batch": (None, None, 101),
}
DEFAULTS = {name: values[0] for name, values in OPTIONS.items()}


@st.composite
def problems(draw: st.DrawFn, **only: tuple[Any, ...]) -> Problem:
    """Any problem, or of these values only. Draws that have no meaning together give way to the simpler one."""
    facts = {name: draw(st.sampled_from(only.get(name, values))) for name, values in SPACE.items()}
    options = {name: draw(st.sampled_from(only.get(name, values))) for name, values in OPTIONS.items()}
    vocab = facts["vocab"]
    options["ignore_index"] = draw(st.sampled_from(only.get("ignore_index", (-100, -1, 0, vocab // 2, vocab))))
    if facts["operation"] == "logits":
        facts |= {"bias": False, "memory": "auto", "layout": "contiguous"}
        options["use_token_scaling"] = False
    if facts["masked"] != "none":  # masked by a bias; and no cap, no sign, and no smoothing: it has no finite loss
        facts["bias"] = facts["operation"] == "linear"
        options |= {"logit_scale": abs(options["logit_scale"]), "use_token_scaling": False}
    if facts["rows_layout"] == "expanded":  # the first row is all rows
        facts["poisoned"] = False
        facts["rows_layout"] = "expanded" if facts["leading"] else "contiguous"
    if vocab == 1:
        facts |= {"tied": False, "masked": "none"}
    if options["reduction"] != "mean":
        options["num_items_in_batch"] = None
    facts["metrics"] = dict.fromkeys(facts["metrics"], True)
    changed = {name: value for name, value in options.items() if value != DEFAULTS.get(name, -100)}
    problem = Problem("drawn", **facts, options=changed, seed=draw(st.integers(0, 2**32 - 1)))
    wanted = draw(st.sampled_from(_subsets(problem.differentiable)[::-1]))
    return Problem(**{**vars(problem), "wanted": wanted})
