"""Line 9: more than 2^31 logits, so offsets beyond 32 bits, in both operations. Needs a GPU and 40 GB of its memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import jax_api
import torch_api
from tests.support import on_gpu
from tests.trust.never_again import FRONTENDS


def has_memory() -> bool:
    return on_gpu() and torch.cuda.get_device_properties(0).total_memory > 40 * 2**30


pytestmark = pytest.mark.skipif(not has_memory(), reason="needs a GPU with 40 GB of memory")

TOKENS, HIDDEN, VOCAB = 17_000, 64, 128_256  # 2.18e9 logits
ROWS = [1, TOKENS // 2, TOKENS - 2]  # rows to look at: the last lie beyond 2^31
COLUMNS = slice(VOCAB - 3, VOCAB)  # rows of the weight's gradient to look at, which all tokens have a part in
in_both_frontends = pytest.mark.parametrize("frontend", FRONTENDS)


def make_labels() -> Tensor:
    labels = torch.randint(0, VOCAB, (TOKENS,), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    labels[0] = labels[-1] = -100
    labels[ROWS] = VOCAB - 1
    return labels


def differentiate(
    frontend: str, inputs: dict[str, Tensor], labels: Tensor, upstream: Tensor, **options: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Losses, predictions, and gradients by ``inputs``."""
    options |= {"return_predicted_tokens": True}
    if frontend == "torch":
        function = torch_api.cross_entropy if "input" not in inputs else torch_api.fused_linear_cross_entropy
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
        rows, *others = leaves.values()
        out = function(rows, *others, labels, **options) if others else function(rows, labels, **options)
        gradients = torch.autograd.grad(out.loss, list(leaves.values()), upstream)
        return out.loss.detach(), out.predicted_tokens, dict(zip(leaves, gradients, strict=True))

    @jax.jit
    def run(arrays: dict[str, jax.Array], labels: jax.Array, upstream: jax.Array) -> Any:
        def loss(arrays: dict[str, jax.Array]) -> Any:
            if "input" in arrays:
                out = jax_api.fused_linear_ce(arrays["input"], arrays["weight"], labels, **options)
            else:
                out = jax_api.cross_entropy(arrays["logits"], labels, **options)
            return out.loss, out.predicted_tokens

        losses, pullback, predicted = jax.vjp(loss, arrays, has_aux=True)
        return losses, predicted, pullback(upstream)[0]

    torch.cuda.synchronize()
    arrays = {name: jnp.from_dlpack(tensor.detach()) for name, tensor in inputs.items()}
    found = run(arrays, jnp.from_dlpack(labels.int()), jnp.from_dlpack(upstream))
    return jax.tree.map(torch.from_dlpack, jax.block_until_ready(found))


@in_both_frontends
def test_9_cross_entropy_of_more_logits_than_32_bits_can_count(frontend: str) -> None:
    logits = torch.empty(TOKENS, VOCAB, device="cuda", dtype=torch.bfloat16).normal_()
    labels, upstream = make_labels(), torch.linspace(0.5, 2.0, TOKENS, device="cuda")
    loss, predicted, gradients = differentiate(frontend, {"logits": logits}, labels, upstream, reduction="none")

    rows = logits[ROWS].double().requires_grad_()
    expected = F.cross_entropy(rows, labels[ROWS], reduction="none")
    expected.backward(upstream[ROWS].double())
    torch.testing.assert_close(loss[ROWS].double(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients["logits"][ROWS].double(), rows.grad, rtol=2**-8, atol=1e-9)
    assert torch.equal(predicted[ROWS].long(), rows.argmax(1))
    assert predicted[-1] == -1
    assert not gradients["logits"][-1].any()


# Of 2.18e9 exponentials, or gradients of logits, a slab or what is kept has all; ahead they are made in two chunks.
SCHEDULES = {"slab": 8 * 2**30, "kept": "speed", "ahead": "speed", "lean": "lean"}


@in_both_frontends
@pytest.mark.parametrize("layout", ["vh", "hv"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_9_fused_linear_of_more_logits_than_32_bits_can_count(
    frontend: str, schedule: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if frontend == "jax" and layout == "hv":
        pytest.skip("the kernels of that layout are launched from torch here")
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, device="cuda", generator=generator).bfloat16()
    weight = torch.randn(VOCAB, HIDDEN, device="cuda", generator=generator).bfloat16() / 8
    weight = weight if layout == "vh" else weight.T.contiguous().T
    labels, upstream = make_labels(), torch.linspace(0.5, 2.0, TOKENS, device="cuda")
    options: dict[str, Any] = {"memory": SCHEDULES[schedule], "reduction": "none"}
    given = upstream
    if schedule == "ahead":  # for which there is one upstream gradient; the scale is another call's than the others
        monkeypatch.setattr("core_kernels.step.MOST_SPEED_BYTES", 0)
        options |= {"reduction": "sum", "logit_scale": 1.5}
        given = torch.tensor(1.7, device="cuda")
        upstream = given.expand(TOKENS)
    scale = options.get("logit_scale", 1.0)
    loss, predicted, gradients = differentiate(frontend, {"input": x, "weight": weight}, labels, given, **options)

    losses = []
    for rows in torch.arange(TOKENS, device="cuda").split(1000):
        logits = scale * (x[rows].double() @ weight.double().T)
        losses.append(F.cross_entropy(logits, labels[rows], reduction="none", ignore_index=-100))
    expected = torch.cat(losses)
    if options["reduction"] == "none":
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    else:
        torch.testing.assert_close(loss.double(), expected.sum(), rtol=1e-5, atol=0)

    logits = scale * (x[ROWS].double() @ weight.double().T)
    assert torch.equal(predicted[ROWS].long(), logits.argmax(1))
    gradient = scale * (logits.softmax(1) - F.one_hot(labels[ROWS], VOCAB))
    grad_x = upstream[ROWS, None] * (gradient @ weight.double())
    assert (gradients["input"][ROWS].double() - grad_x).norm() < 2**-7 * grad_x.norm()
    assert not gradients["input"][-1].any()

    z = scale * (x.double() @ weight.double().T[:, COLUMNS])
    lse = expected + scale * (x.double() * weight.double()[labels.clamp(min=0)]).sum(1)
    classes = torch.arange(VOCAB, device="cuda")[COLUMNS]
    p = (z - lse[:, None]).exp() - (labels[:, None] == classes).double()
    grad_weight = scale * (p * (upstream * (labels >= 0))[:, None]).T @ x.double()
    assert (gradients["weight"][COLUMNS].double() - grad_weight).norm() < 2**-7 * grad_weight.norm()
