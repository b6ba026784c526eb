"""Compare every causal model class of the installed transformers with itself, enabled, and write the table of them.

    python -m tests.transformers.sweep                    # all of them, a minute or two
    python -m tests.transformers.sweep LlamaForCausalLM   # some, with how far apart loss and gradients are
    python -m tests.transformers.sweep --write            # all, into docs/transformers.md

Each class runs in a process of its own, which may fail or take too long without harm to the others. It is here, with
the tests, because they share how a tiny model of each class is made.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from tqdm import tqdm

from tests.transformers.families import GRADIENT_BOUND, LOSS_BOUND, MULTIMODAL, Result, causal_classes, compare

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"
MARKS = "<!-- the sweep's table begins -->", "<!-- the sweep's table ends -->"
SECONDS = 120  # that a class may take


def run(name: str) -> Result:
    """The comparison in a process of its own, forked from this one, which has imported everything."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(SECONDS) else Result(name, False, f"not done in {SECONDS} s")
    except EOFError:
        return Result(name, False, "its process died")
    finally:
        process.kill()
        process.join()


def _work(name: str, sender: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        result = compare(name)
    except Exception as error:
        result = Result(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
    sender.send(result)


def table(results: Iterable[Result]) -> str:
    """Which classes are fused; of the others, why not."""
    results = list(results)
    fused = [r for r in results if r.equal]
    causal = [r for r in results if r.name.endswith("ForCausalLM")]
    worst = {bound: max(getattr(r, bound) for r in fused) for bound in ("loss_error", "gradient_error")}
    lines = [
        f"transformers {transformers.__version__}, torch {torch.__version__}: {sum(r.equal for r in causal)} of "
        f"{len(causal)} classes that end in `ForCausalLM`, and {len(fused) - sum(r.equal for r in causal)} of "
        f"{len(results) - len(causal)} multimodal ones, are fused and equal to themselves unpatched in float32. The "
        f"greatest relative errors: {worst['loss_error']:.1e} in the loss, {worst['gradient_error']:.1e} in the "
        "gradient of any parameter.",
        "",
        "| class | fused | why not |",
        "|---|---|---|",
        *(f"| {r.name} | {'yes' if r.equal else 'no'} | {r.note} |" for r in results),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare causal model classes with themselves, enabled.")
    parser.add_argument("names", nargs="*", help="classes; all of them if none is named")
    parser.add_argument("--write", action="store_true", help=f"write the table to {PAGE.name}")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    names = arguments.names or causal_classes() + MULTIMODAL
    results = [run(name) for name in tqdm(names, unit=" classes", disable=None)]
    for result in results:
        if arguments.names or not result.equal:
            errors = f"loss {result.loss_error:.1e}, gradient {result.gradient_error:.1e} ({result.worst})"
            print(f"{result.name}: {'fused' if result.equal else result.note}; {errors}")
    print(f"{sum(r.equal for r in results)} of {len(results)} fused, within {LOSS_BOUND} and {GRADIENT_BOUND}")
    if arguments.write:
        begin, end = MARKS
        page = PAGE.read_text()
        PAGE.write_text(re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{table(results)}\n{end}", page, flags=re.DOTALL))


if __name__ == "__main__":
    sys.exit(main())
