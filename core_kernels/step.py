"""Steps: what a launch computes, reads and fills, on any device. Computed from shapes, dtypes and options alone.

Steps are frozen and hash by value, so they can be static parameters of a compiled program that is traced before its
device is known; a plan says how a step runs on one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from core_kernels.engine import ENGINES, runs_kernels
from core_kernels.options import Options
from core_kernels.problem import Problem

MEMORY = ("lean", "auto", "speed")
MIB = 2**20
# Bytes of the exponentials of all logits, up to which "auto" keeps them from the forward to the backward pass.
MOST_KEPT_BYTES = 2048 * MIB
# The same, up to which "speed" does; more are made, used and forgotten a chunk of tokens at a time.
MOST_SPEED_BYTES = 4800 * MIB
# Bytes of the tiles' statistics that the forward pass holds at a time while it keeps the exponentials.
KEPT_STATISTICS_BYTES = 64 * MIB
# Labels are sorted by comparing each with each: next to nothing for so many tokens, and less than a twentieth of the
# products for one token to so many elements of the weight.
FEW_SORTED_TOKENS, ELEMENTS_PER_SORTED_TOKEN = 16384, 256
# What a step saves only if it keeps the exponentials, or computes gradients ahead.
KEPT = ("exponentials", "label_logit", "valid_tokens", "valid_count", "sum_x", "sum_weight")
# Inputs that have a gradient, and tensors that all tokens share, in every group.
DIFFERENTIABLE = ("logits", "x", "weight", "bias")
SHARED = ("weight", "bias", "class_weight", "class_weight_sum", "first_class")
# Rows of the statistics that a shard of the vocab contributes of each token.
SHARD_MAX, SHARD_SUM, SHARD_TARGET = 0, 1, 2


@dataclass(frozen=True)
class Buffer:
    """A tensor that the caller provides: contiguous, uninitialised, on the inputs' device."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Step:
    """One launch's part of a loss. ``kind`` is one of

    - ``"loss"``: the loss and the metrics of a whole vocab;
    - ``"shard"``: what one shard of the vocab knows of each token, and
    - ``"combine"``: the loss and the metrics, from what every shard knows, side by side;
    - ``"gradient"``: gradients by the inputs that ``wanted`` names, on a whole vocab or on one shard.

    ``engine`` and ``memory`` are wishes that the plan heeds; ``index_dtype`` is that of the predictions. With ``keep``
    the loss leaves the exponentials of all logits to the gradient, which then need not project again; gradients by the
    inputs named ``ahead`` it computes itself, but for the upstream gradient, which must be one number.
    """

    kind: str
    problem: Problem
    options: Options
    engine: str = "auto"
    memory: str | int = "auto"
    index_dtype: torch.dtype = torch.int64
    wanted: tuple[str, ...] = ()
    keep: bool = False
    ahead: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of 'auto', 'triton' and 'torch', got {self.engine!r}")
        memory = self.memory
        if isinstance(memory, bool) or not isinstance(memory, (str, int)):
            raise TypeError(f"memory must be 'auto', 'speed', 'lean' or a number of bytes, got {memory!r}")
        if isinstance(memory, str) and memory not in MEMORY:
            raise ValueError(f"memory must be 'auto', 'speed', 'lean' or a number of bytes, got {memory!r}")

    def of_kind(self, kind: str) -> Step:
        return replace(self, kind=kind)

    def plain(self) -> Step:
        """The step that leaves to the gradient no more than statistics of each token."""
        return replace(self, keep=False, ahead=())

    def gradient(self, wanted: Iterable[str]) -> Step:
        """The step back: ``wanted`` names inputs among ``logits``, ``x``, ``weight`` and ``bias``."""
        return replace(self, kind="gradient", wanted=tuple(wanted))

    @functools.cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of what it reads, in order."""
        problem = self.problem
        class_weight = ("class_weight",) if problem.has_class_weight else ()
        if self.kind == "combine":
            return ("labels", *class_weight, "shard_statistics")
        names = ["logits", "labels"] if problem.hidden is None else ["x", "weight", "labels"]
        names += ["bias"] if problem.has_bias else []
        names += class_weight
        names += [] if problem.shards is None else ["first_class"]
        if self.kind == "gradient":
            names += [*(buffer.name for buffer in self.of_kind("loss").saved), "grad_loss"]
        return tuple(names)

    @functools.cached_property
    def outputs(self) -> tuple[Buffer, ...]:
        """What it is run for."""
        problem, options, n = self.problem, self.options, self.problem.tokens
        if self.kind == "shard":
            return (Buffer("shard_statistics", (self.shard_rows, n), torch.int32),)
        if self.kind == "gradient":
            shapes: dict[str, tuple[int, ...]] = {"logits": (n, problem.vocab)}
            if problem.hidden is not None:
                columns, hidden = problem.columns, problem.hidden
                shapes = {"x": (n, hidden), "weight": (columns, hidden), "bias": (columns,)}
            return tuple(
                Buffer(f"grad_{name}", shape, problem.dtype) for name, shape in shapes.items() if name in self.wanted
            )
        reduced = (n,) if options.per_token else problem.groups
        outputs = [Buffer("loss", reduced, torch.float32)]
        if options.return_z_loss:
            outputs.append(Buffer("z_loss", reduced, torch.float32))
        if options.return_token_accuracy:
            outputs.append(Buffer("token_accuracy", reduced, torch.float32))
        if options.return_predicted_tokens:
            outputs.append(Buffer("predicted_tokens", (n,), self.index_dtype))
        if options.return_counts:
            outputs += [Buffer(name, reduced, self.index_dtype) for name in ("num_valid", "num_correct")]
        return tuple(outputs)

    @functools.cached_property
    def saved(self) -> tuple[Buffer, ...]:
        """What it leaves for the gradient, beside the inputs. ``lse = lse_base + log_sum``: the sum would round."""
        if self.kind not in ("loss", "combine"):
            return ()
        n = self.problem.tokens
        saved = [Buffer("lse_base", (n,), torch.float32), Buffer("log_sum", (n,), torch.float32)]
        if self.options.use_token_scaling:
            saved.append(Buffer("token_scale", (n,), torch.float32))
        if self.options.reduction == "mean":
            saved.append(Buffer("divisors", (*self.problem.groups, 2), torch.float32))
        if self.sums_class_weight:
            saved.append(Buffer("class_weight_sum", (1,), torch.float32))
        if self.keep:
            saved.append(Buffer("exponentials", (n, aligned(self.problem.columns)), self.problem.dtype))
            saved.append(Buffer("label_logit", (n,), torch.float32))
            saved += [Buffer("valid_tokens", (n,), torch.int32), Buffer("valid_count", (1,), torch.int32)]
        if "x" in self.ahead:
            saved.append(Buffer("sum_x", (n, self.problem.hidden or 0), torch.float32))
        if "weight" in self.ahead:
            saved.append(Buffer("sum_weight", (self.problem.columns, self.problem.hidden or 0), torch.float32))
        return tuple(saved)

    @property
    def results(self) -> tuple[Buffer, ...]:
        return self.outputs + self.saved

    def is_per_token(self, name: str) -> bool:
        """Whether tokens are the first dimension of a tensor; otherwise groups are, or all tokens share it."""
        if name in ("loss", "z_loss", "token_accuracy", "num_valid", "num_correct", "grad_loss"):
            return self.options.per_token
        return name not in ("divisors", *SHARED)

    @property
    def finds_argmax(self) -> bool:
        """Whether the argmax is found by exponentials that are there: with a softcap they are times its slope."""
        return (self.keep or bool(self.ahead)) and self.options.needs_argmax and self.options.softcap is None

    @property
    def sums_class_weight(self) -> bool:
        return self.problem.has_class_weight and self.options.label_smoothing > 0

    @property
    def shard_rows(self) -> int:
        """Rows of ``shard_statistics``: maximum, sum of exponentials, the label's logit, and these if they are needed.

        They travel as int32, since a collective may flush a denormal float: floats are kept by their bits.
        """
        return 3 + (self.options.label_smoothing > 0) + self.options.needs_argmax

    @property
    def shard_smooth(self) -> int:
        return 3

    @property
    def shard_argmax(self) -> int:
        return self.shard_rows - 1


def for_gradient(step: Step, wanted: Iterable[str], device: torch.device) -> tuple[int, Step, Step]:
    """The loss ``step`` on ``device`` as it best serves the gradient by the ``wanted`` inputs that will follow: up to
    how many tokens, and how; and how with more.

    Kept exponentials are bfloat16, which has float32's range, and the gradient has to be a multiple of them: label
    smoothing, and a bias, whose gradient is their sum, are not served.
    """
    problem, memory, options = step.problem, step.memory, step.options
    served = problem.hidden is not None and why_not_kept(step) is None
    if not served or memory == "lean" or not runs_kernels(step.engine, device):
        return 0, step, step
    assert problem.hidden is not None
    kept, per_token, many = replace(step, keep=True), 2 * aligned(problem.columns), step
    if isinstance(memory, int):
        per_token += 6 * aligned(problem.hidden) + 64  # rows and vectors of the workspace
        starts = 2048  # what it takes to start each buffer at a line of memory
        most = max(0, memory - KEPT_STATISTICS_BYTES - 4 * problem.columns - starts) // per_token
    elif memory == "auto":
        most = MOST_KEPT_BYTES // per_token
    else:
        most = MOST_SPEED_BYTES // per_token
        many = step if options.per_token else replace(step, ahead=tuple(wanted))
    return min(most, most_sorted(problem)), kept, many


def most_sorted(problem: Problem) -> int:
    """Of how many tokens the labels may be sorted at a time."""
    return max(FEW_SORTED_TOKENS, problem.columns * (problem.hidden or 0) // ELEMENTS_PER_SORTED_TOKEN)


def why_not_kept(step: Step) -> str | None:
    """What about a projected loss forbids to keep its exponentials for the gradient, whatever memory there is."""
    problem = step.problem
    if problem.dtype != torch.bfloat16:
        return f"the inputs are {str(problem.dtype).removeprefix('torch.')}, and not bfloat16"
    if problem.has_bias:
        return "there is a bias"
    if step.options.label_smoothing > 0:
        return "there is label smoothing"
    if problem.shards is not None:
        return "the vocab is sharded"
    return "the call is mapped" if problem.groups else None


def aligned(columns: int) -> int:
    """A row length whose rows all start where a tensor descriptor, and a wide load, may start."""
    return math.ceil(columns / 16) * 16
