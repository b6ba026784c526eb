"""Time, memory and error of one training step of the loss head, beside the floor and the peers, in one run."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import subprocess
import time
from importlib import metadata
from pathlib import Path
from statistics import median

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import torch
from contenders import Problem, Step, evaluation_contenders, training_contenders
from shapes import SHAPES
from tabulate import tabulate
from torch import Tensor

MIB = 2**20


def make_problem(tokens: int, hidden: int, vocab: int) -> Problem:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    x = normal(tokens, hidden).bfloat16()
    weight = (normal(vocab, hidden) / hidden**0.5).bfloat16()
    return Problem(x, weight, torch.randint(0, vocab, (tokens,), device="cuda", generator=generator))


def reference(problem: Problem, rows: int = 1024) -> Step:
    """Loss and gradients in float32, a block of tokens at a time."""
    torch.backends.cuda.matmul.allow_tf32 = False
    tokens = problem.x.shape[0]
    weight = problem.weight.float()
    grad_x = torch.empty_like(problem.x, dtype=torch.float32)
    grad_weight = torch.zeros_like(weight)
    loss = 0.0
    for first in range(0, tokens, rows):
        x, labels = problem.x[first : first + rows].float(), problem.labels[first : first + rows]
        log_p = (x @ weight.T).log_softmax(1)
        loss -= float(log_p.gather(1, labels[:, None]).double().sum())
        gradient = log_p.exp_().scatter_add_(1, labels[:, None], torch.full_like(labels[:, None], -1.0, dtype=x.dtype))
        gradient /= tokens
        grad_x[first : first + rows] = gradient @ weight
        grad_weight.addmm_(gradient.T, x)
    return Step(loss / tokens, grad_x, grad_weight)


def floor(problem: Problem):
    """The three products of a step over full shapes, on random data."""
    x, weight = problem.x, problem.weight
    logits = torch.randn(x.shape[0], weight.shape[0], device="cuda", dtype=x.dtype)
    out = torch.empty_like(logits)
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)

    def run() -> tuple:
        torch.mm(x, weight.T, out=out)
        torch.mm(logits, weight, out=grad_x)
        torch.mm(logits.T, x, out=grad_weight)
        return ()

    return run


def projection(problem: Problem):
    """The one product of an evaluation."""
    out = torch.empty(problem.x.shape[0], problem.weight.shape[0], device="cuda", dtype=problem.x.dtype)
    return lambda: torch.mm(problem.x, problem.weight.T, out=out)


def seconds(step) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def extra_memory(step) -> float:
    """Peak MiB of a torch step beyond its inputs and its gradients; a step has run before, so both are held already."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def same_bits(results: tuple, others: tuple) -> bool:
    return all(torch.equal(torch.from_dlpack(a), torch.from_dlpack(b)) for a, b in zip(results, others, strict=True))


def relative_error(value, expected: Tensor) -> float:
    value = torch.from_dlpack(value).float()
    return float((value - expected).norm() / expected.norm())


def measure(name: str, rounds: int) -> dict[str, dict]:
    """The rows of one shape: training steps over the floor, evaluations over one projection."""
    problem = make_problem(*SHAPES[name])
    expected = reference(problem)
    training = checked(problem, expected, training_contenders())
    evaluation = checked(problem, expected, evaluation_contenders())
    del expected
    gc.collect()
    torch.cuda.empty_cache()

    training |= {"floor": (floor(problem), {})}
    evaluation |= {"one projection": (projection(problem), {})}
    rows = {}
    for contenders, base in ((training, "floor"), (evaluation, "one projection")):
        times = take_turns({label: step for label, (step, _) in contenders.items() if step}, rounds)
        for label, (_, row) in contenders.items():
            if label in times:
                row |= {"ms": median(times[label]), "ms_min": min(times[label]), "ms_max": max(times[label])}
                row["over_floor"] = row["ms"] / median(times[base])
            rows[label] = row
    tokens, hidden, vocab = SHAPES[name]
    rows["floor"]["tflops"] = 6e-9 * tokens * hidden * vocab / rows["floor"]["ms"]
    return rows


def checked(problem: Problem, expected: Step, contenders: dict) -> dict[str, tuple]:
    """Each contender's step and its first figures. One that fails is reported as such, and the others go on."""
    steps: dict[str, tuple] = {}
    for label, prepare in contenders.items():
        try:
            step = prepare(problem)
            row = errors(step(), expected)
            if max(row.values()) > 0.02:
                raise AssertionError(f"wrong results: {row}")
            row["extra_mib"] = step.extra_mib if hasattr(step, "extra_mib") else extra_memory(step)
            if label.startswith("twinhead jax"):
                row["bits_of_torch"] = same_bits(step(), steps["twinhead torch"][0]())
            steps[label] = step, row
        except Exception as error:
            steps[label] = None, {"failed": f"{error!r:.300}"}
            print(f"{label} failed: {error!r:.300}", flush=True)
    return steps


def errors(results: tuple, expected: Step) -> dict[str, float]:
    """Relative errors of (loss,) or of (loss, dx, dw)."""
    found = {"loss_error": abs(float(results[0]) - expected.loss) / expected.loss}
    if len(results) == 3:
        found["dx_error"] = relative_error(results[1], expected.grad_x)
        found["dw_error"] = relative_error(results[2], expected.grad_weight)
    return found


def take_turns(steps: dict, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step, in rounds of shuffled order: what ran before, and the card's heat, favour nobody."""
    order = list(steps)
    shuffle = random.Random(0).shuffle
    times: dict[str, list[float]] = {label: [] for label in steps}
    for turn in range(rounds + 2):  # the first two warm the card up
        shuffle(order)
        for label in order:
            elapsed = seconds(steps[label])
            if turn >= 2:
                times[label].append(1e3 * elapsed)
    return times


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "jax", "liger-kernel", "tokamax"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
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
        "step": "forward + backward; evaluations: forward alone",
        "shapes": {},
    }
    for name in arguments.shapes:
        results["shapes"][name] = {"size": SHAPES[name], "rows": measure(name, arguments.rounds)}
        torch.cuda.empty_cache()
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        print(table(name, results["shapes"][name]["rows"]), flush=True)


def table(name: str, rows: dict[str, dict]) -> str:
    columns = ("ms", "over_floor", "extra_mib", "loss_error", "dx_error", "dw_error")
    body = [[label, *(row.get(column) for column in columns)] for label, row in rows.items()]
    formats = ("", ".2f", ".3f", ".0f", ".1e", ".5f", ".5f")
    return tabulate(body, [f"{name} {SHAPES[name]}", *columns], floatfmt=formats, missingval="-")


if __name__ == "__main__":
    main()
