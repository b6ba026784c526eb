"""The fused loss inside ``jax.shard_map`` on two GPUs of one process, where there are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jax_api import fused_linear_ce
from tests.jax_api.problems import IGNORED, METRICS, UPSTREAM, assert_close
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

pytestmark = pytest.mark.skipif(not on_gpu() or jax.local_device_count("gpu") < 2, reason="needs two GPUs")

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
    """One after the other, and none waits: what a plan recorded on one device is not launched on the other."""
    call = jax.jit(lambda primals, labels: fused_linear_ce(**primals, labels=labels))
    losses = []
    for device in 2 * jax.local_devices(backend="gpu")[:2]:
        primals, labels = jax.device_put((PROBLEM.primals, PROBLEM.labels), device)
        losses.append(call(primals, labels))
        assert losses[-1].devices() == {device}
    assert len({float(loss) for loss in losses}) == 1 and jnp.isfinite(losses[0])
