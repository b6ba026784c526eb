"""Cross entropy of logits that are given: how near forward and backward pass come to the speed of a plain copy."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from measure import WRONG, Clock, memory, reason, relative_error, release, take_turns
from problems import Result
from torch import Tensor

import torch_api

# The bytes that each pass must move, in units of the logits': the forward pass reads them, the backward pass reads them
# and writes their gradient. Its time is that of a step without the forward pass's.
PASSES = {"forward": 1, "backward": 2, "step": 3}
TIMED = ("forward", "step")


class TorchPasses:
    """The forward pass of one contender, and a step of both, over its own copy of the logits: Liger-Kernel writes into
    it.
    """

    def __init__(self, loss_fn: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> None:
        self.logits, self.labels, self.loss_fn = logits.clone().requires_grad_(), labels, loss_fn

    def forward(self) -> Tensor:
        self.logits.grad = None
        return self.loss_fn(self.logits, self.labels)

    def step(self) -> Result:
        loss = self.forward()
        loss.backward()
        return Result(loss.detach(), self.logits.grad)


class JaxPasses:
    """The same, compiled."""

    def __init__(self, loss_fn: Callable, logits: Tensor, labels: Tensor) -> None:
        import jax
        import jax.numpy as jnp

        self.arguments = jnp.from_dlpack(logits), jnp.from_dlpack(labels.int())
        self.loss, self.both = jax.jit(loss_fn), jax.jit(jax.value_and_grad(loss_fn))

    def forward(self) -> tuple[Any]:
        return (self.loss(*self.arguments),)

    @property
    def extra_mib(self) -> float:
        return self.both.lower(*self.arguments).compile().memory_analysis().temp_size_in_bytes / 2**20

    def step(self) -> Result:
        return Result(*self.both(*self.arguments))


def upcast_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)


def liger(logits: Tensor, labels: Tensor) -> Tensor:
    """Its forward pass computes the gradient too."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss()(logits, labels)


def quack(logits: Tensor, labels: Tensor) -> Tensor:
    from quack.cross_entropy import cross_entropy

    return cross_entropy(logits, labels, reduction="mean")


def jax_contenders() -> dict[str, Callable]:
    import jax.numpy as jnp
    import optax

    import jax_api

    def full(logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()

    return {"twinhead jax": jax_api.cross_entropy, "jax": full}


def contenders(logits: Tensor, labels: Tensor) -> dict[str, Callable[[], TorchPasses | JaxPasses]]:
    of_torch = {
        "twinhead torch": torch_api.cross_entropy,
        "torch eager": upcast_loss,
        "torch compile": torch.compile(upcast_loss, dynamic=False),
    }
    of_torch |= {
        name: fn for name, package, fn in (("liger", "liger_kernel", liger), ("quack", "quack", quack))
        if find_spec(package)
    }  # fmt: skip
    of_jax = jax_contenders() if find_spec("jax") and find_spec("optax") else {}
    return {
        **{name: (lambda fn=fn: TorchPasses(fn, logits, labels)) for name, fn in of_torch.items()},
        **{name: (lambda fn=fn: JaxPasses(fn, logits, labels)) for name, fn in of_jax.items()},
    }


def reference(logits: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Loss and gradient in float32."""
    log_p = logits.float().log_softmax(1)
    loss = -float(log_p.gather(1, labels[:, None]).double().mean())
    ones = torch.ones_like(labels[:, None], dtype=log_p.dtype)
    return loss, log_p.exp_().scatter_add_(1, labels[:, None], -ones).div_(len(labels))


def measure_logits(size: tuple[int, int], device: str, clock: Clock, skip: set[str]) -> dict[str, dict]:
    """Rows with the milliseconds of each pass, and its share of the bandwidth that a copy of the logits has."""
    torch.compiler.reset()
    generator = torch.Generator(device).manual_seed(0)
    logits = (2 * torch.randn(size, device=device, generator=generator)).bfloat16()
    labels = torch.randint(0, size[1], size[:1], device=device, generator=generator)
    loss, gradient = reference(logits, labels)
    rows: dict[str, dict] = {}
    steps: dict[str, Callable] = {}
    for label, prepare in contenders(logits, labels).items():
        if label in skip:
            continue
        row = rows[label] = {}
        try:
            passes = prepare()
            result = passes.step()
            row["random"] = {
                "loss_error": abs(float(result.loss) - loss) / loss,
                "dx_error": relative_error(result.grad_x, gradient),
            }
            if not all(error <= WRONG for error in row["random"].values()):
                raise AssertionError("wrong results")
            del result  # its gradient makes room for the next
            row |= {"extra_mib": passes.extra_mib} if isinstance(passes, JaxPasses) else memory(passes.step)
            steps |= {f"{label}, {name}": getattr(passes, name) for name in TIMED}
        except Exception as error:
            row["failed"] = reason(error)
            print(f"{label} failed: {row['failed']}", flush=True)
        release()
    del gradient
    copy = torch.empty_like(logits)
    times, failures = take_turns({**steps, "copy": lambda: copy.copy_(logits)}, clock)
    copied = median(times["copy"])
    for label, row in rows.items():
        for name in TIMED:
            if f"{label}, {name}" in failures:
                row["failed"] = failures[f"{label}, {name}"]
            if f"{label}, {name}" in times:
                row[f"{name}_ms"] = median(times[f"{label}, {name}"])
        if {"forward_ms", "step_ms"} <= row.keys():
            row["backward_ms"] = row["step_ms"] - row["forward_ms"]
        for name in PASSES:
            if f"{name}_ms" in row:  # a copy reads and writes: it moves the logits twice
                row[f"{name}_share"] = PASSES[name] / 2 * copied / row[f"{name}_ms"]
    rows["copy"] = {"ms": copied, "gb_per_s": 4e-6 * logits.numel() / copied}
    return rows
