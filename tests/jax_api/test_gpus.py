"""The fused loss inside ``jax.shard_map`` on two GPUs of one process, where there are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jax_api import fused_linear_ce
from tests.jax_api.problems import HIDDEN, IGNORED, METRICS, UPSTREAM, as_numpy, assert_close, assert_same_bits
from tests.jax_api.sharded import (
    TOKENS,
    assert_as_whole,
    differentiate,
    make_mesh,
    over_vocab,
    random_problem,
    shard_map,
    unsharded,
)
from tests.support import on_gpu

GPUS = [device for device in jax.local_devices() if device.platform == "gpu"]
pytestmark = pytest.mark.skipif(not on_gpu() or len(GPUS) < 2, reason="needs two GPUs")

PROBLEM = random_problem()
OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "none"},
    {"label_smoothing": 0.1, "lse_square_scale": 0.02, "softcap": 6.0},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_vocab_over_two_is_the_whole_one(options: dict[str, Any]) -> None:
    upstream = PROBLEM.upstream if options.get("reduction") == "none" else UPSTREAM
    loss = over_vocab(make_mesh(tp=2), PROBLEM.labels, **METRICS, **options)
    assert_as_whole(differentiate(loss, PROBLEM.primals, upstream), PROBLEM, upstream, **options)


def test_tokens_over_two_have_the_mean_of_all() -> None:
    """The first of the two has few valid tokens."""
    labels = PROBLEM.labels.at[: TOKENS // 2 - 1].set(IGNORED)

    def mean(primals: Any, labels: jax.Array) -> jax.Array:
        loss = fused_linear_ce(**primals, labels=labels, reduction="sum")
        return jax.lax.psum(loss, "dp") / jax.lax.psum((labels != IGNORED).sum(), "dp")

    mapped = shard_map(mean, make_mesh(dp=2), ({"x": P("dp"), "weight": P(), "bias": P()}, P("dp")))
    got = differentiate(lambda primals: mapped(primals, labels), PROBLEM.primals)
    assert_close(got, differentiate(unsharded(labels), PROBLEM.primals))


def test_each_device_has_its_own_call() -> None:
    """In turn, over buffers that lie where they lay before: what was recorded on one device is not launched on the
    other.
    """
    operands = {name: PROBLEM.primals[name].astype(jnp.bfloat16) for name in ("x", "weight")}
    padded = jax.tree.map(lambda operand: jnp.pad(operand, ((0, 0), (0, -HIDDEN % 8))), operands)  # so read in blocks
    call = jax.jit(jax.value_and_grad(lambda primals, labels: fused_linear_ce(**primals, labels=labels)))
    placed = [jax.device_put((padded, PROBLEM.labels), device) for device in GPUS[:2]]
    first = jax.tree.map(as_numpy, call(*placed[0]))
    for _ in range(4):
        for device, arguments in zip(GPUS, placed, strict=False):
            answer = jax.block_until_ready(call(*arguments))
            assert all(array.devices() == {device} for array in jax.tree.leaves(answer))
            assert_same_bits(jax.tree.map(as_numpy, answer), first)
