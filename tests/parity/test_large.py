"""More than 2^31 logits: offsets beyond 32 bits, in both operations. Needs a GPU and 20 GB of its memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import torch_api
from tests.support import on_gpu

pytestmark = pytest.mark.skipif(not on_gpu(), reason="needs a GPU")

TOKENS, HIDDEN, VOCAB = 17_000, 64, 128_256  # 2.18e9 logits
ROWS = [1, TOKENS // 2, TOKENS - 2]  # rows to look at: the last lie beyond 2^31


def _labels() -> torch.Tensor:
    labels = torch.randint(0, VOCAB, (TOKENS,), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    labels[0] = labels[-1] = -100
    labels[ROWS] = VOCAB - 1
    return labels


def test_cross_entropy_of_more_logits_than_32_bits_can_count() -> None:
    logits = torch.empty(TOKENS, VOCAB, device="cuda", dtype=torch.bfloat16).normal_().requires_grad_()
    labels = _labels()
    out = torch_api.cross_entropy(logits, labels, reduction="none", return_predicted_tokens=True)
    upstream = torch.linspace(0.5, 2.0, TOKENS, device="cuda")
    out.loss.backward(upstream)

    rows = logits.detach()[ROWS].double().requires_grad_()
    expected = F.cross_entropy(rows, labels[ROWS], reduction="none")
    expected.backward(upstream[ROWS].double())
    torch.testing.assert_close(out.loss[ROWS].double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad[ROWS].double(), rows.grad, rtol=2**-8, atol=1e-9)
    assert torch.equal(out.predicted_tokens[ROWS], rows.argmax(1))
    assert out.predicted_tokens[-1] == -1
    assert not logits.grad[-1].any()


@pytest.mark.parametrize("layout", ["vh", "hv"])
def test_fused_linear_with_a_slab_of_more_than_32_bits(layout: str) -> None:
    x = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, device="cuda", dtype=torch.bfloat16) / 8
    weight = (weight if layout == "vh" else weight.T.contiguous().T).requires_grad_()
    labels = _labels()
    out = torch_api.fused_linear_cross_entropy(
        x, weight, labels, reduction="none", return_predicted_tokens=True, memory=8 * 2**30
    )
    upstream = torch.linspace(0.5, 2.0, TOKENS, device="cuda")
    out.loss.backward(upstream)

    logits = x.detach()[ROWS].double() @ weight.detach().double().T
    expected = F.cross_entropy(logits, labels[ROWS], reduction="none")
    torch.testing.assert_close(out.loss[ROWS].double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(out.predicted_tokens[ROWS], logits.argmax(1))

    gradient = logits.softmax(1) - F.one_hot(labels[ROWS], VOCAB)
    grad_x = upstream[ROWS, None] * (gradient @ weight.detach().double())
    assert (x.grad[ROWS].double() - grad_x).norm() < 2**-7 * grad_x.norm()
    column = slice(VOCAB - 3, VOCAB)  # the last rows of the weight's gradient, from all tokens
    z = x.detach().float() @ weight.detach().float().T[:, column]
    lse = out.loss.detach() + (x.detach().float() * weight.detach().float()[labels.clamp(min=0)]).sum(1)
    valid = labels >= 0
    p = (z - lse[:, None]).exp() - (labels[:, None] == torch.arange(VOCAB, device="cuda")[column]).float()
    grad_weight = (p * (upstream * valid)[:, None]).T @ x.detach().float()
    assert (weight.grad[column].float() - grad_weight).norm() < 2**-7 * grad_weight.norm()
