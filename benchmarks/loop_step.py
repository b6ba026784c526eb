"""Time of a step of a training loop so small that the host decides.

    python benchmarks/loop_step.py --out benchmarks/results/NAME_loop.json
    python benchmarks/loop_step.py --device cpu --out /tmp/loop.json    # at toy size, to see that it runs

A step is a layer, the head and its loss, forward and backward, and SGD of both weights: in torch by an optimizer, in
JAX in one compiled program to which the weights are donated. In ``loss_step.py`` the inputs stay as they are, and a
step's gradients are held until the next ones are there. A loop gives its memory back, and gets the same again, so that
recorded launches can be replayed.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable, Set
from importlib.util import find_spec
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import torch
from arguments import parse
from contenders import LossFn, peers, twinhead, upcast_loss
from measure import WRONG, memory, reason, time_rows
from problems import Result, Start, make_start
from results import Results, table

CHECKED = 10  # steps whose losses are compared

Loop = Callable[[], Result]  # one step, which moves the weights
Prepare = Callable[[Start], Loop]


def torch_loop(loss_fn: LossFn) -> Prepare:
    def prepare(start: Start) -> Loop:
        layer, weight = (matrix.clone().requires_grad_() for matrix in (start.layer, start.weight))
        optimizer = torch.optim.SGD([layer, weight], start.rate)

        def step() -> Result:
            loss = loss_fn(torch.tanh(start.inputs @ layer), weight, start.labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return Result(loss.detach())

        return step

    return prepare


def contenders(skip: Set[str]) -> dict[str, Prepare]:
    losses = {"twinhead torch": twinhead(), "torch eager": upcast_loss}
    losses |= {"torch compile": torch.compile(upcast_loss, dynamic=False), **peers()}
    found = {label: torch_loop(loss_fn) for label, loss_fn in losses.items()}
    if find_spec("jax") and find_spec("optax"):
        import jax_contenders

        found |= jax_contenders.loop_contenders()
    return {label: prepare for label, prepare in found.items() if label not in skip}


def check(start: Start, found: dict[str, Prepare]) -> tuple[dict[str, dict], dict[str, Loop]]:
    """The largest relative error of each loop's first losses against those in float32, and the memory of a step, as
    rows; and the loops, that many steps on. One that fails is reported as such, and the others go on.
    """
    exact = torch_loop(upcast_loss)(start.in_float32())
    expected = [float(exact().loss) for _ in range(CHECKED)]
    rows: dict[str, dict] = {}
    loops: dict[str, Loop] = {}
    for label, prepare in found.items():
        row: dict[str, Any] = {}
        rows[label] = row
        try:
            loop = prepare(start)
            losses = [loop().loss for _ in expected]  # not waited for, as in a loop
            row["loss_error"] = max(abs(float(loss) / right - 1) for loss, right in zip(losses, expected, strict=True))
            if not row["loss_error"] <= WRONG:  # NaN is wrong too
                raise AssertionError("wrong losses")
            row |= memory(loop)
            loops[label] = loop
        except Exception as error:
            row["failed"] = reason(error)
    return rows, loops


def main() -> None:
    arguments = parse(argparse.ArgumentParser(description="A step of a training loop so small that the host decides."))
    device, sizes = arguments.device, arguments.sizes
    results = Results(arguments.out, device, arguments.commit, dtype="bfloat16")
    for name in sorted(sizes.small):
        size = sizes.shapes[name]
        torch.compiler.reset()  # else the next size would be compiled for any
        rows, loops = check(make_start(size, device), contenders(arguments.skip))
        gc.freeze()  # the modules that they needed, so that collections are short
        time_rows(rows, loops, "torch compile", arguments.clock)
        results.add("loops", name, value={"size": size, "rows": rows})
        print(table(f"{name} {size}", rows), "\n", flush=True)


if __name__ == "__main__":
    main()
