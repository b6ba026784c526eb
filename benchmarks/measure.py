"""How a step is checked and measured: errors, memory, time beside others, and the time it keeps the host."""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from problems import IGNORED, Problem, Result
from torch import Tensor

MIB = 2**20
ERRORS = ("loss_error", "dx_error", "dw_error")
WRONG = 0.05  # a larger error on random data is no matter of rounding
TURN_SECONDS, MOST_CALLS = 0.1, 20  # of a turn, which is at most so many calls of a step
CROWDED = 64 * 1024  # MiB: a step that takes more is not timed beside the others, which keep their pools of memory


@dataclass(frozen=True)
class Clock:
    """How long contenders take turns: ``seconds``, within ``least`` and ``most`` rounds."""

    seconds: float
    least: int = 5
    most: int = 30

    def over(self, turns: int, elapsed: float) -> bool:
        return turns >= self.most or (turns >= self.least and elapsed >= self.seconds)


def wait(results: Any = None) -> None:
    for result in results if isinstance(results, tuple) else ():
        if hasattr(result, "block_until_ready"):
            result.block_until_ready()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def release() -> None:
    """Gives torch's unused memory back, for JAX to have."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def seconds(step: Callable, calls: int = 1) -> float:
    """Of a call, of so many that follow each other and are waited for together, as those of a training loop are."""
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        results = step()
    wait(results)
    return (time.perf_counter() - start) / calls


def shuffled(labels: Iterable[str]) -> Iterator[list[str]]:
    """The labels in one random order after another, the same ones in every run."""
    order, shuffle = list(labels), random.Random(0).shuffle
    while True:
        shuffle(order)
        yield order


def take_turns(steps: dict[str, Callable], clock: Clock) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Milliseconds of a call of each step, in rounds of shuffled order: what ran before, and the card's heat, favour
    nobody. A turn is several calls, if they are short, after as many that do not count: at its limit of power, a card
    is faster for a while after work that took less of it.

    Steps that fail leave, with the reason.
    """
    times: dict[str, list[float]] = {label: [] for label in steps}
    calls = dict.fromkeys(steps, 1)
    failures: dict[str, str] = {}
    orders, start = shuffled(steps), 0.0
    turn = -2  # the first two rounds warm the card up
    while turn < 0 or not clock.over(turn, time.perf_counter() - start):
        if turn == 0:
            start = time.perf_counter()
        order = next(orders)
        for label in [label for label in order if label not in failures]:
            try:
                seconds(steps[label], calls[label])
                elapsed = seconds(steps[label], calls[label])
            except Exception as error:
                failures[label] = reason(error)
            if label in failures:
                release()  # what the error held on to is gone by now
                continue
            if turn < 0:
                calls[label] = min(MOST_CALLS, max(1, round(TURN_SECONDS / elapsed)))
            else:
                times[label].append(1e3 * elapsed)
        turn += 1
    return {label: found for label, found in times.items() if label not in failures}, failures


def time_rows(rows: dict[str, dict], steps: dict[str, Callable], base: str, clock: Clock) -> None:
    """Adds times to the rows, over that of ``base``, which takes turns with them."""
    times, failures = take_turns(steps, clock)
    for label, found in times.items():
        row = rows.setdefault(label, {})
        row |= {"ms": median(found), "ms_min": min(found), "ms_max": max(found), "rounds": len(found)}
        if base in times:
            row["ratio"] = row["ms"] / median(times[base])
    for label, failure in failures.items():
        rows.setdefault(label, {})["failed"] = failure


def time_calls(rows: dict[str, dict], steps: dict[str, Callable], rounds: int) -> None:
    """Adds the times of a call to the rows: medians of the rounds, in which steps take turns in shuffled order."""
    found: dict[str, list[tuple[float, ...]]] = {label: [] for label in steps}
    for turn, order in enumerate(itertools.islice(shuffled(steps), rounds + 1)):  # the first warms up
        for label in order:
            try:
                times = call_times(steps[label])
            except Exception as error:
                rows[label]["failed"] = reason(error)
                continue
            if turn:
                found[label].append(times)
    for label, turns in found.items():
        for name, values in zip(("waited_us", "host_us", "pipelined_us"), zip(*turns, strict=True), strict=False):
            rows[label][name] = median(values)


def call_times(step: Callable, calls: int = 20) -> tuple[float, ...]:
    """Microseconds of a call that is waited for; until one returns, where none is waited for; and of each of those."""
    waited = median(seconds(step) for _ in range(calls))
    returned = []
    start = time.perf_counter()
    for _ in range(calls):
        called = time.perf_counter()
        results = step()
        returned.append(time.perf_counter() - called)
    wait(results)
    return 1e6 * waited, 1e6 * median(returned), 1e6 * (time.perf_counter() - start) / calls


def check(
    problems: Iterable[tuple[str, Problem, Result]], contenders: dict[str, Callable]
) -> tuple[dict[str, dict], dict[str, Callable]]:
    """Each contender's errors on every problem and its memory on the first, as rows; and its steps on the first.

    One that fails is reported as such, and the others go on.
    """
    rows: dict[str, dict] = {}
    steps: dict[str, Callable] = {}
    for label, prepare in contenders.items():
        row: dict[str, Any] = {}
        rows[label] = row
        try:
            for kind, problem, expected in problems:
                step = prepare(problem)
                row[kind] = errors(step(), expected)
                if label not in steps:
                    if not all(row[kind].get(name, 0.0) <= WRONG for name in ERRORS):  # NaN is wrong too
                        raise AssertionError("wrong results")
                    row |= memory(step)
                    row |= bits(step, steps.get(twin(label)))
                    steps[label] = step
        except Exception as error:
            row["failed"] = reason(error)
            steps.pop(label, None)
            print(f"{label} failed: {row['failed']}", flush=True)
        release()
        if row.get("extra_mib", 0) > CROWDED:
            row["untimed"] = "takes too much memory to be timed beside the others"
            steps.pop(label, None)
    return rows, steps


def reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def errors(result: Result, expected: Result) -> dict[str, float]:
    """Relative errors of loss and gradients, and the share of valid tokens with another prediction."""
    found = {"loss_error": abs(float(result.loss) - expected.loss) / expected.loss}
    for name, value, right in (
        ("dx_error", result.grad_x, expected.grad_x),
        ("dw_error", result.grad_weight, expected.grad_weight),
    ):
        if value is not None:
            found[name] = relative_error(value, right)
    if result.predicted is not None:
        right = expected.predicted
        wrong = torch.from_dlpack(result.predicted) != right
        found["predictions_wrong"] = float(wrong[right != IGNORED].float().mean())
    return found


def relative_error(value: Any, expected: Tensor) -> float:
    value = torch.from_dlpack(value).float()
    return float((value - expected).norm() / expected.norm())


def memory(step: Callable) -> dict[str, float]:
    """Peak MiB of a step beyond its inputs and its gradients, which are there before, from an earlier run, and after;
    of a step that lets go of them, gradients included. Not known on a CPU.
    """
    if (planned := getattr(step, "extra_mib", None)) is not None:
        return {"extra_mib": planned}
    if not torch.cuda.is_initialized():
        return {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return {"extra_mib": (torch.cuda.max_memory_allocated() - before) / MIB}


def twin(label: str) -> str:
    """The torch contender whose bits a contender of ours in JAX must have; its own label for all others."""
    return label.replace("twinhead jax", "twinhead torch").removesuffix(", cuda graph")


def bits(step: Callable, other: Callable | None) -> dict[str, bool]:
    """Whether two steps return the same bits: loss and gradients, or what there is of them."""
    if other is None:
        return {}
    pairs = zip(step()[:3], other()[:3], strict=True)
    return {"bits_of_torch": all(torch.equal(*map(torch.from_dlpack, pair)) for pair in pairs if pair[0] is not None)}
