"""Where the time of a step goes: each of our kernels, beside the vendor's product of the same operands."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from contenders import METRICS, evaluation, training, twinhead
from measure import shuffled, wait
from problems import make_problems, products
from shapes import Size
from torch.autograd import DeviceType

STEPS = {
    "speed": training(twinhead(memory="speed")),
    "speed, metrics": training(twinhead(memory="speed", **METRICS)),
    "lean": training(twinhead(memory="lean")),
    "evaluation, metrics": evaluation(twinhead(**METRICS)),
}
VENDOR = "vendor"
BURST_SECONDS = 0.4  # of calls that follow each other, and as many before them: the card is as hot as in training
ROUNDS = 3


def kernel_ms(step: Callable[[], Any], calls: int = 1) -> dict[str, float]:
    """Milliseconds of a call in each kernel, after as many calls that do not count. A launch that starts before others
    have ended takes time from then on.
    """
    step()
    wait()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(2 * calls):
            step()
        wait()
    launches = [(event.time_range, event.name) for event in profile.events() if event.device_type == DeviceType.CUDA]
    launches.sort(key=lambda launch: launch[0].start)
    times, ended = defaultdict(float), 0.0
    for taken, name in launches[len(launches) // 2 :]:
        times[name] += max(0.0, taken.end - max(taken.start, ended)) / 1e3 / calls
        ended = max(ended, taken.end)
    return dict(times)


def product_ms(three: dict[str, Callable], calls: int = 1) -> dict[str, float]:
    """Milliseconds of each of the vendor's products, which alternate as those of a step do; likewise."""
    order = [name for _ in range(calls) for name in three]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(order) + 1)]
    for name in order:
        three[name]()
    marks[0].record()
    for name, mark in zip(order, marks[1:], strict=True):
        three[name]()
        mark.record()
    wait()
    times = dict.fromkeys(three, 0.0)
    for name, begin, end in zip(order, marks, marks[1:], strict=False):
        times[name] += begin.elapsed_time(end) / calls
    return times


def measure_kernels(size: Size, device: str) -> dict[str, dict[str, float]]:
    """Medians of the milliseconds of each kernel, by step, and of the vendor's products, in shuffled rounds."""
    problem = make_problems(size, device)["random"]
    three = products(problem)
    times: dict[str, Callable[[int], dict[str, float]]] = {VENDOR: partial(product_ms, three)}
    times |= {label: partial(kernel_ms, prepare(problem)) for label, prepare in STEPS.items()}
    calls = {label: max(1, round(BURST_SECONDS * 1e3 / sum(turn(1).values()))) for label, turn in times.items()}

    found: dict[str, list[dict[str, float]]] = {label: [] for label in times}
    for order in itertools.islice(shuffled(times), ROUNDS):
        for label in order:
            found[label].append(times[label](calls[label]))
    return {
        label: {name: median(turn.get(name, 0.0) for turn in turns) for name in turns[0]}
        for label, turns in found.items()
    }
