"""Every kernel of the suite under NVIDIA's compute-sanitizer, by hand, on a GPU.

    python -m tests.trust.sanitize --out benchmarks/results/h100_sanitizer.json

runs the calls below once under each tool: memcheck (accesses out of bounds or misaligned), racecheck (hazards in shared
memory), initcheck (reads of memory that nobody wrote) and synccheck (barriers). Torch's caching of memory is off, so
each tensor is an allocation of its own, and a step past its end is a step out of bounds. The tools run side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import triton
from torch import Tensor

from core_kernels import Options, Plan, Step, launch, launching, plan
from tests.core_kernels import problems
from tests.core_kernels.test_kept import CASES as KEPT_CASES
from tests.core_kernels.test_kept import SCHEDULES, loss_of, tensors_of
from tests.parity import frontends
from tests.parity.cases import CASES as PARITY_CASES
from tests.parity.cases import make_inputs
from torch_api import operator

# Those that between them launch every kernel, with and without each of its parts: each is compiled, and then watched.
PARITY = (
    "linear-everything_mean", "linear-everything_none", "linear-bf16_everything", "linear-fp16", "linear-sliced",
    "linear-transposed_weight", "linear-one_token", "linear-broken_x", "linear-many_slices_everything",
    "logits-everything_mean", "logits-everything_none", "logits-bf16_everything", "logits-expanded", "logits-one_class",
)  # fmt: skip
KEPT = ("mean", "every_option", "shared_labels", "one_class", "no_descriptor", "transposed_odd_weight", "broken_x")
BY_TMA = {"slab", "exponentials", "grad_weight", "rows", "sum_x", "sum_weight"}  # stored through tensor descriptors
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: .*\((\d+) error")
ACCESS = re.compile(r"(between|and) (\w+) access at (\w+)\+\S+ in (\S+)")
DONE = re.compile(r"^ran (\d+) calls of the kernels (.*)$", re.MULTILINE)


def launch_over(planned: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Launch over memory that nobody has written, each buffer an allocation, but for what initcheck does not see
    written. That holds NaN, as all does in ``tests/core_kernels``, where no NaN may come out.
    """
    buffers = {name: tensor for name, tensor in tensors.items() if name != "workspace"}
    buffers |= {b.name: torch.empty(b.shape, dtype=b.dtype, device="cuda") for b in planned.workspace}
    for name in BY_TMA & buffers.keys() - {*planned.inputs}:
        buffers[name].fill_(float("nan"))
    launch(planned, buffers)


def run(step: Step, inputs: problems.Tensors) -> problems.Tensors:
    planned = plan(step, torch.device("cuda"))
    results = {b.name: torch.empty(b.shape, dtype=b.dtype, device="cuda") for b in step.results}
    launch_over(planned, {name: inputs[name] for name in step.inputs} | results)
    return results


def calls() -> Iterator[None]:
    """Losses and gradients: of the parity table, of each schedule's own, and of shards of the vocab."""
    device = torch.device("cuda")
    for case in (case for case in PARITY_CASES if case.name in PARITY):
        yield frontends.run_torch(case, make_inputs(case), device)
    for case in (case for case in KEPT_CASES if case.name in KEPT):
        inputs = tensors_of(make_inputs(case), device)
        for schedule in SCHEDULES:
            if not (schedule == "ahead" and case.options.get("reduction") == "none"):
                loss = loss_of(case, schedule)
                saved = problems.saved_of(loss, run(loss, inputs))
                yield run(loss.gradient(("x", "weight")), inputs | saved)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        loss = Step("loss", problems.linear(34, 36, 202, dtype), replace(problems.EVERYTHING, reduction="sum"))
        yield problems.differentiate_sharded(loss, problems.random_inputs(loss, device), 2)
    plain = Step("loss", problems.linear(34, 36, 202, bias=False, class_weight=False), Options())
    yield problems.differentiate_sharded(plain, problems.random_inputs(plain, device), 2)


def run_calls() -> None:
    operator.launch_plan = launch_over
    count = sum(1 for _ in calls())
    torch.cuda.synchronize()
    kernels = sorted({kernel.name for kernel in launching._FOUND.values()})
    print(f"ran {count} calls of the kernels {' '.join(kernels)}", flush=True)


def hazards(output: str) -> dict[str, dict[str, int]]:
    """How many hazards racecheck reports between which two lines of which kernel."""
    found: Counter[str] = Counter()
    first = ""
    for word, access, kernel, line in ACCESS.findall(output):
        if word == "between":
            first = f"{kernel}: {access} in {line}"
        else:
            found[f"{first}, {access} in {line}"] += 1
    return {"hazards": dict(sorted(found.items()))} if found else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="results file, JSON; without it the calls run once, unwatched")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--commit", help="commit of the measured code, where git cannot tell")
    arguments = parser.parse_args()
    if arguments.out is None:
        run_calls()
        return
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    watched = [sys.executable, "-m", "tests.trust.sanitize"]
    running = {
        tool: subprocess.Popen(
            ["compute-sanitizer", "--tool", tool, "--print-limit", "10000", *watched],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for tool in arguments.tools
    }
    version = subprocess.check_output(["compute-sanitizer", "--version"], text=True)
    measured = {
        "device": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "compute-sanitizer": re.findall(r"\d+\.\d+[\d.]*", version)[-1],
        },
        "commit": arguments.commit or subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
        "tools": {},
    }
    for tool, process in running.items():
        output, _ = process.communicate()
        summary, done = SUMMARY.search(output), DONE.search(output)
        if summary is None or done is None:
            sys.exit(f"{tool} did not end as it should:\n{output[-4000:]}")
        errors, calls = int(summary[1] or summary[2]), int(done[1])
        measured["tools"][tool] = {"errors": errors, "calls": calls, "kernels": done[2].split(), **hazards(output)}
        print(f"{tool}: {errors} errors in {calls} calls", output[:20000] if errors else "", flush=True)
        arguments.out.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
