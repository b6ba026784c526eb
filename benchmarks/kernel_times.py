"""Where the time of a step goes: each of our kernels, beside the vendor's product of the same operands."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from contenders import METRICS, evaluation, training, twinhead
from measure import Clock, seconds, wait
from problems import make_problems, products
from shapes import Size

STEPS = {
    "speed": training(twinhead(memory="speed")),
    "speed, metrics": training(twinhead(memory="speed", **METRICS)),
    "lean": training(twinhead(memory="lean")),
    "evaluation, metrics": evaluation(twinhead(**METRICS)),
}
VENDOR = "vendor"
BURST_SECONDS = 0.3  # of calls that follow each other, so that the card is as hot as in training


def kernel_ms(step: Callable[[], Any], calls: int = 1) -> dict[str, float]:
    """Milliseconds of a call in each kernel, after one call that does not count."""
    step()
    wait()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            step()
        wait()
    times = {event.key: event.device_time_total / 1e3 / calls for event in profile.key_averages()}
    return {name: ms for name, ms in times.items() if ms > 0}


def product_ms(three: dict[str, Callable], calls: int) -> dict[str, float]:
    """Milliseconds of each of the vendor's products, which alternate as those of a step do."""
    order = [name for _ in range(calls) for name in three]
    for product in three.values():
        product()
    wait()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(order) + 1)]
    marks[0].record()
    for name, mark in zip(order, marks[1:], strict=True):
        three[name]()
        mark.record()
    wait()
    times = dict.fromkeys(three, 0.0)
    for name, begin, end in zip(order, marks, marks[1:], strict=False):
        times[name] += begin.elapsed_time(end) / calls
    return times


def measure_kernels(size: Size, device: str, clock: Clock) -> dict[str, dict[str, float]]:
    """Medians of the milliseconds of each kernel, by step, and of the vendor's products, in shuffled rounds."""
    problem = make_problems(size, device)["random"]
    steps = {label: prepare(problem) for label, prepare in STEPS.items()}
    three = products(problem)
    turns: dict[str, Callable[[], dict[str, float]]] = {}
    for label, step in steps.items():
        step()
        turns[label] = partial(kernel_ms, step, max(1, round(BURST_SECONDS / seconds(step))))
    whole = sum(product_ms(three, 1).values()) / 1e3
    turns[VENDOR] = partial(product_ms, three, max(1, round(BURST_SECONDS / whole)))

    found: dict[str, list[dict[str, float]]] = {label: [] for label in turns}
    order, shuffle, start = list(turns), random.Random(0).shuffle, time.perf_counter()
    while not clock.over(len(found[VENDOR]), time.perf_counter() - start):
        shuffle(order)
        for label in order:
            found[label].append(turns[label]())
    return {
        label: {name: median(times.get(name, 0.0) for times in rounds) for name in rounds[0]}
        for label, rounds in found.items()
    }
