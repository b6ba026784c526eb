"""Time, memory and error of the loss head, beside the floor and the peers, in one run."""

from __future__ import annotations

import argparse
import gc
import os
import time
from dataclasses import replace

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import torch
from arguments import parse
from contenders import HALF_IGNORED, SCALING, evaluation_contenders, training_contenders
from kernel_times import measure_kernels
from logits_step import measure_logits
from measure import Clock, check, release, time_calls, time_rows
from problems import floor, make_problems, projection, reference
from results import Results, table
from shapes import Size

PARTS = ("shapes", "kernels", "logits", "scaling")


def measure_shape(size: Size, device: str, clock: Clock, skip: set[str], small: bool) -> dict[str, dict]:
    """Rows of training steps, of those with half of the tokens ignored, and of evaluations.

    Steps are checked all before the first is timed, so that the references need not stay.
    """
    torch.compiler.reset()  # else the next shape would be compiled for any
    problems = make_problems(size, device)
    expected = {kind: reference(problem) for kind, problem in problems.items()}
    training, evaluation = training_contenders(skip), evaluation_contenders(skip)
    gc.freeze()  # the modules that they needed, so that collections are short
    half = {label: training[label] for label in HALF_IGNORED if label in training}

    def checked(contenders: dict, *kinds: str) -> tuple[dict, dict]:
        return check([(kind, problems[kind], expected[kind]) for kind in kinds], contenders)

    sections = {
        "training": checked(training, "random", "peaked"),
        "half ignored": checked(half, "half ignored"),
        "evaluation": checked(evaluation, "random"),
    }
    expected.clear()
    release()
    if small:
        time_calls(*sections["training"], rounds=clock.most)
    for name, (rows, steps) in sections.items():
        base, prepare = ("one projection", projection) if name == "evaluation" else ("floor", floor)
        budget = clock if name == "training" else replace(clock, seconds=clock.seconds / 2)
        time_rows(rows, {**steps, base: prepare(problems["random"])}, base, budget)
        release()
    floor_row = sections["training"][0]["floor"]
    if "ms" in floor_row:
        floor_row["tflops"] = 6e-9 * size[0] * size[1] * size[2] / floor_row["ms"]
    return {name: rows for name, (rows, _) in sections.items()}


def measure_point(size: Size, device: str, clock: Clock, skip: set[str]) -> dict[str, dict]:
    """Rows of training steps of a few contenders: how they scale."""
    torch.compiler.reset()
    problem = make_problems(size, device)["random"]
    contenders = training_contenders(skip)
    chosen = {label: contenders[label] for label in SCALING if label in contenders}
    rows, steps = check([("random", problem, reference(problem))], chosen)
    time_rows(rows, {**steps, "floor": floor(problem)}, "floor", clock)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of kernels on a GPU alone")
    parser.add_argument("--shapes", nargs="+", help="names of shapes, of all of them if left out")
    arguments = parse(parser)
    device, sizes, clock, skip = arguments.device, arguments.sizes, arguments.clock, arguments.skip
    names = arguments.shapes or list(sizes.shapes)
    if not set(names) <= set(sizes.shapes):
        parser.error(f"--shapes: on {device} there are {', '.join(sizes.shapes)}")
    brief = replace(clock, seconds=clock.seconds / 4)
    results = Results(arguments.out, device, arguments.commit, dtype="bfloat16")
    start = time.perf_counter()

    for name in names:
        size, small = sizes.shapes[name], name in sizes.small
        if "shapes" in arguments.parts:
            sections = measure_shape(size, device, clock, skip, small)
            results.add("shapes", name, value={"size": size, **sections})
            for section, rows in sections.items():
                print(table(f"{name} {size}, {section}", rows), "\n")
            print(f"{time.perf_counter() - start:.0f} s\n", flush=True)
            release()
        if "kernels" in arguments.parts and device == "cuda" and not small:
            results.add("kernels", name, value={"size": size, "ms": measure_kernels(size, device)})
            print(f"{name}, kernels: {time.perf_counter() - start:.0f} s\n", flush=True)
            release()
    if "logits" in arguments.parts:
        rows = measure_logits(sizes.logits, device, brief, skip)
        results.add("logits", value={"size": sizes.logits, "rows": rows})
        print(table(f"cross entropy of logits {sizes.logits}", rows), "\n", flush=True)
        release()
    for axis, points in sizes.scaling.items() if "scaling" in arguments.parts else ():
        for size in points:
            rows = measure_point(size, device, brief, skip)
            results.add("scaling", axis, "x".join(map(str, size)), value={"size": size, "rows": rows})
            print(table(f"{axis} {size}", rows), f"\n{time.perf_counter() - start:.0f} s\n", flush=True)
            release()


if __name__ == "__main__":
    main()
