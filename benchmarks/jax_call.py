"""What a call costs on the host from JAX: through Python, replayed from a CUDA graph, and by plain XLA for scale."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import optax
import torch
from loss_step import versions
from tabulate import tabulate

from jax_api import bridge, fused_linear_ce

SHAPES = {"tiny": (64, 128, 1024), "small": (512, 896, 32000)}
GRAPH = {"xla_gpu_graph_min_graph_size": 1}


def full_logits(x, weight, labels):
    logits = (x @ weight.T).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def replayed(x, weight, labels):
    return fused_linear_ce(x, weight, labels, cuda_graph=True)


CONTENDERS = {
    "through Python": (fused_linear_ce, None),
    "replayed": (replayed, GRAPH),
    "XLA, full logits": (full_logits, None),
    "XLA, full logits, graph": (full_logits, GRAPH),
}


def inputs(tokens: int, hidden: int, vocab: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, hidden), jnp.bfloat16)
    weight = jax.random.normal(keys[1], (vocab, hidden), jnp.bfloat16) / hidden**0.5
    return x, weight.astype(jnp.bfloat16), jax.random.randint(keys[2], (tokens,), 0, vocab)


def count_callbacks() -> list[int]:
    """A count of the calls that reach Python, from now on."""
    count, call = [0], bridge.PlanCallback.__call__

    def counted(self, *arguments):
        count[0] += 1
        return call(self, *arguments)

    bridge.PlanCallback.__call__ = counted
    return count


def measure(arguments: tuple[jax.Array, ...], count: list[int], rounds: int) -> dict[str, dict]:
    """Microseconds of a forward and backward pass: waited for each time, and one after the other without waiting."""
    steps = {
        name: jax.jit(jax.value_and_grad(loss, (0, 1)), compiler_options=options)
        for name, (loss, options) in CONTENDERS.items()
    }
    times: dict[str, dict[str, list[float]]] = {name: {"waited": [], "pipelined": [], "calls": []} for name in steps}
    for turn in range(rounds + 1):  # the first warms up
        for name, step in steps.items():
            before = count[0]
            waited = []
            for _ in range(20):
                start = time.perf_counter()
                jax.block_until_ready(step(*arguments))
                waited.append(time.perf_counter() - start)
            start = time.perf_counter()
            for _ in range(20):
                results = step(*arguments)
            jax.block_until_ready(results)
            if turn:
                times[name]["waited"].append(1e6 * median(waited))
                times[name]["pipelined"].append(1e6 * (time.perf_counter() - start) / 20)
                times[name]["calls"].append((count[0] - before) / 40)
    return {
        name: {
            "waited_us": median(found["waited"]),
            "pipelined_us": median(found["pipelined"]),
            "python_calls": sum(found["calls"]) / rounds,
        }
        for name, found in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True, help="results file, JSON")
    parser.add_argument("--commit", help="commit of the measured code, where git cannot tell")
    arguments = parser.parse_args()
    commit = arguments.commit or subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    results = {
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "commit": commit,
        "dtype": "bfloat16",
        "step": "value and gradients by x and weight",
        "shapes": {},
    }
    count = count_callbacks()
    for name, size in SHAPES.items():
        rows = measure(inputs(*size), count, arguments.rounds)
        results["shapes"][name] = {"size": size, "rows": rows}
        body = [[label, *row.values()] for label, row in rows.items()]
        print(tabulate(body, [f"{name} {size}", "waited, us", "pipelined, us", "Python calls"], floatfmt=".1f"), "\n")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
