"""Errors of losses and gradients against float64, beside those of the framework's own: by dtype, data and ``memory=``.

    python benchmarks/errors.py --out benchmarks/results/errors.json
    python benchmarks/report.py benchmarks/results/errors.json    # the tables of docs/numerics.md

The framework is torch, over full logits that are upcast to float32, as language models do; and the same in float64 is
what both are compared with. The JAX frontend returns the bits of the torch frontend, so it has no numbers of its own.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import relative_error
from problems import IGNORED, make_problems
from results import Results
from shapes import Size
from torch import Tensor

import torch_api

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MEMORY = ("speed", "auto", "lean")
SIZES = {"cuda": (4096, 1024, 32000), "cpu": (512, 256, 4096), "tiny": (23, 32, 101)}
MANY_TOKENS = (20480, 64, 131072)  # whose exponentials are past what memory="speed" keeps: it takes chunks of tokens
LARGE = 100.0  # a feature of that size in every row of x and of the weight adds its square to every logit
TINY_NATS = 14.0  # how far a label's logit is above the others' log-sum-exp
LOSS_SCALE = 16.0  # the upstream gradient of each token in fp16, whose gradients are too small for it without one
BLOCK = 1024  # tokens that the float64 reference holds the logits of

Leaves = dict[str, Tensor]  # "x", "weight" and maybe "bias", or "logits"
Answer = dict[str, Tensor]  # "loss", and the gradient of each leaf
Loss = Callable[[Leaves, Tensor], Tensor]


def framework(leaves: Leaves, labels: Tensor) -> Tensor:
    logits = leaves.get("logits")
    if logits is None:
        logits = F.linear(leaves["x"], leaves["weight"], leaves.get("bias"))
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, ignore_index=IGNORED)


def twinhead(memory: str) -> Loss:
    def loss(leaves: Leaves, labels: Tensor) -> Tensor:
        if "logits" in leaves:
            return torch_api.cross_entropy(leaves["logits"], labels)
        return torch_api.fused_linear_cross_entropy(
            leaves["x"], leaves["weight"], labels, leaves.get("bias"), memory=memory
        )

    return loss


def answer(loss_fn: Loss, leaves: Leaves, labels: Tensor, scale: float) -> Answer:
    """Loss and gradients, with an upstream gradient of ``scale``, which is divided out in float64."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    loss = loss_fn(leaves, labels)
    gradients = torch.autograd.grad(loss, list(leaves.values()), torch.full_like(loss, scale))
    return {"loss": loss.detach()} | {n: g.double() / scale for n, g in zip(leaves, gradients, strict=True)}


def reference(leaves: Leaves, labels: Tensor) -> Answer:
    """The same by the framework in float64, a block of tokens at a time."""
    leaves = {name: leaf.detach().double() for name, leaf in leaves.items()}
    per_token = "logits" if "logits" in leaves else "x"
    total: Answer = {"loss": torch.zeros((), dtype=torch.float64, device=labels.device)}
    total |= {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    valid = int((labels != IGNORED).sum())
    for start in range(0, len(labels), BLOCK):
        rows, share = slice(start, start + BLOCK), int((labels[start : start + BLOCK] != IGNORED).sum()) / valid
        part = answer(framework, leaves | {per_token: leaves[per_token][rows]}, labels[rows], 1.0)
        total["loss"] += share * part["loss"]
        for name in leaves:
            place = total[name][rows] if name == per_token else total[name]
            place += share * part[name]
    return total


def linear_problems(size: Size, device: str, dtype: torch.dtype) -> Iterator[tuple[str, Leaves, Tensor]]:
    """Kinds of data; the first and last token are ignored."""
    problems = make_problems(size, device, dtype)
    for problem in problems.values():
        problem.labels[0] = problem.labels[-1] = IGNORED
    random = problems["random"]
    x, weight, labels = random.x.detach(), random.weight.detach(), random.labels
    yield "random", {"x": x, "weight": weight}, labels
    peaked = problems["peaked"]
    yield "peaked", {"x": peaked.x.detach(), "weight": weight}, peaked.labels
    large = {"x": x.clone(), "weight": weight.clone()}
    for leaf in large.values():
        leaf[:, 0] = LARGE
    yield "logits about 1e4", large, labels
    direction = F.normalize(weight.float(), dim=1)[labels.clamp(min=0)]
    yield "tiny loss", {"x": ((math.log(size[2]) + TINY_NATS) * direction).to(dtype), "weight": weight}, labels


def logits_problems(size: Size, device: str, dtype: torch.dtype) -> Iterator[tuple[str, Leaves, Tensor]]:
    """The same kinds, of given logits."""
    tokens, _, vocab = size
    generator = torch.Generator(device).manual_seed(1)
    logits = 2.0 * torch.randn(tokens, vocab, device=device, generator=generator)
    labels = torch.randint(0, vocab, (tokens,), device=device, generator=generator)
    labels[0] = labels[-1] = IGNORED
    own = F.one_hot(labels.clamp(min=0), vocab)
    kinds = {
        "random": logits,
        "peaked": torch.where(own > 0, math.log(vocab) + 1.0, logits),
        "logits about 1e4": 1e4 + 30.0 * logits,
        "tiny loss": torch.where(own > 0, math.log(vocab) + 2.0 + TINY_NATS, logits),  # their lse is 2 above log(vocab)
    }
    for data, values in kinds.items():
        yield data, {"logits": values.to(dtype)}, labels


def measure(contenders: dict[str, Loss], leaves: Leaves, labels: Tensor) -> dict[str, dict[str, float]]:
    """Relative errors of each contender's loss and gradients, as norms, and the loss itself."""
    expected = reference(leaves, labels)
    fp16 = next(iter(leaves.values())).dtype == torch.float16
    scale = LOSS_SCALE * len(labels) if fp16 else 1.0
    rows = {}
    for name, loss_fn in contenders.items():
        got = answer(loss_fn, leaves, labels, scale)
        rows[name] = {part: relative_error(got[part].double(), expected[part]) for part in expected}
    return {"reference": {"loss": float(expected["loss"])}} | rows


def measure_linear(size: Size, device: str, dtype: torch.dtype, contenders: dict[str, Loss]) -> dict[str, dict]:
    """Of each kind of data, loss and gradients without a bias, and the gradient of one from a second run with it."""
    found = {}
    for data, leaves, labels in linear_problems(size, device, dtype):
        rows = measure(contenders, leaves, labels)
        generator = torch.Generator(device).manual_seed(2)
        bias = torch.randn(size[2], device=device, generator=generator).to(dtype)
        for name, row in measure(contenders, leaves | {"bias": bias}, labels).items():
            if "bias" in row:
                rows[name]["bias"] = row["bias"]
        found[data] = rows
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="results file, JSON")
    parser.add_argument("--tiny", action="store_true", help="a few tokens and classes, to see that it runs")
    parser.add_argument("--commit", help="commit of the measured code, where git cannot tell")
    arguments = parser.parse_args()

    torch.backends.cuda.matmul.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = SIZES["tiny" if arguments.tiny else device]
    results = Results(arguments.out, device, arguments.commit, size=size, many_tokens=MANY_TOKENS)
    linear = {"torch": framework} | {memory: twinhead(memory) for memory in MEMORY}
    start = time.perf_counter()
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        results.add("errors", "linear", name, value=measure_linear(size, device, dtype, linear))
        contenders = {"torch": framework, "twinhead": twinhead("auto")}
        problems = logits_problems(size, device, dtype)
        results.add("errors", "logits", name, value={d: measure(contenders, *given) for d, *given in problems})
        print(f"{time.perf_counter() - start:.0f} s  {name}", flush=True)
    if device == "cuda" and not arguments.tiny:
        contenders = {"torch": framework, "speed": twinhead("speed")}
        problems = list(linear_problems(MANY_TOKENS, device, torch.bfloat16))
        value = {data: measure(contenders, *given) for data, *given in problems}
        results.add("errors", "many tokens", "bfloat16", value=value)
        print(f"{time.perf_counter() - start:.0f} s  many tokens", flush=True)


if __name__ == "__main__":
    main()
