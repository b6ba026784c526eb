"""Data-parallel: the tokens are split along a mesh axis, the weight and the bias are whole on each device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_api import cross_entropy, fused_linear_ce
from tests.jax_api import reference
from tests.jax_api.problems import (
    IGNORED,
    LINEAR,
    METRICS,
    OPTIONS,
    UPSTREAM,
    Arrays,
    as_numpy,
    assert_close,
    assert_same_bits,
    eager_and_jit,
    eagerly,
)
from tests.jax_api.sharded import (
    TOKENS,
    assert_as_whole,
    assert_gradients,
    checked_and_not,
    differentiate,
    make_mesh,
    need_devices,
    on_4_and_8,
    on_4_checked_and_8_not,
    random_problem,
    shard_map,
)

need_devices()

SPLIT_X = {"x": P("dp"), "weight": P(), "bias": P()}
RANDOM = random_problem()
# The first quarter, so the first two of eight devices, has no valid token; the last has them all.
PROBLEM = replace(RANDOM, labels=RANDOM.labels.at[: TOKENS // 4].set(IGNORED).at[-1].set(7))


def local_sums(primals: Arrays, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of this device's tokens: the loss and how many count."""
    return fused_linear_ce(**primals, labels=labels, reduction="sum", **OPTIONS), (labels != IGNORED).sum()


def global_mean(primals: Arrays, labels: jax.Array) -> jax.Array:
    loss, count = local_sums(primals, labels)
    return jax.lax.psum(loss, "dp") / jax.lax.psum(count, "dp")


def over_tokens(mesh: Mesh, body: Callable[..., Any] = global_mean, **how: Any) -> Any:
    """``body`` of each device's tokens, as a function of the primals."""
    mapped = shard_map(body, mesh, (SPLIT_X, P("dp")), **how)
    return lambda primals: mapped(primals, PROBLEM.labels)


@functools.cache
def mean_as_whole(function: Callable[..., Any]) -> tuple[jax.Array, Arrays]:
    return differentiate(lambda primals: function(**primals, labels=PROBLEM.labels, **OPTIONS), PROBLEM.primals)


def assert_mean(got: tuple[jax.Array, Arrays]) -> None:
    """The mean over all tokens, and its gradients times UPSTREAM."""
    for function in (fused_linear_ce, reference.fused_linear_ce):
        assert_close(got, mean_as_whole(function))
    want = LINEAR.expected(PROBLEM, class_weight=None, upstream=UPSTREAM, **OPTIONS)
    np.testing.assert_allclose(got[0], want.loss, rtol=2e-5)
    assert_gradients(got[1], want.gradients)


# ---- the mean over all tokens


@checked_and_not
@on_4_and_8
def test_differentiated_from_outside(devices: int, check_vma: bool) -> None:
    loss = over_tokens(make_mesh(dp=devices), check_vma=check_vma)
    assert_mean(differentiate(loss, PROBLEM.primals))


@checked_and_not
def test_differentiated_from_outside_eagerly(check_vma: bool) -> None:
    loss = over_tokens(make_mesh(dp=4), check_vma=check_vma)
    assert_mean(differentiate(loss, PROBLEM.primals, transform=eagerly))


@on_4_and_8
def test_differentiated_inside(devices: int) -> None:
    """The gradients of the weight and the bias come out summed over the axis, and the same on all of it."""

    def body(primals: Arrays, labels: jax.Array) -> Any:
        loss, gradients = jax.value_and_grad(global_mean)(primals, labels)
        assert {name: jax.typeof(g).manual_axis_type.varying for name, g in gradients.items()} == {
            "x": {"dp"},
            "weight": set(),
            "bias": set(),
        }
        return loss, jax.tree.map(lambda gradient: UPSTREAM * gradient, gradients)

    run = over_tokens(make_mesh(dp=devices), body, out_specs=(P(), SPLIT_X))
    assert_mean(jax.block_until_ready(jax.jit(run)(PROBLEM.primals)))


@eager_and_jit
def test_the_local_loss_differentiated_inside(transform: Callable[..., Any]) -> None:
    """Its weight's gradient is the sum over the axis too: the weight is the same on all of it."""

    def body(primals: Arrays, labels: jax.Array) -> Any:
        (loss, count), gradients = jax.value_and_grad(local_sums, has_aux=True)(primals, labels)
        count = jax.lax.psum(count, "dp")
        return jax.lax.psum(loss, "dp") / count, jax.tree.map(lambda g: UPSTREAM * g / count, gradients)

    run = over_tokens(make_mesh(dp=4), body, out_specs=(P(), SPLIT_X))
    assert_mean(jax.block_until_ready(transform(run)(PROBLEM.primals)))


@on_4_and_8
def test_the_local_loss_differentiated_inside_and_summed_by_hand(devices: int) -> None:
    """Without check_vma JAX does not know what varies, and leaves the sum to the caller."""

    def body(primals: Arrays, labels: jax.Array) -> Any:
        (loss, count), gradients = jax.value_and_grad(local_sums, has_aux=True)(primals, labels)
        summed = gradients | {name: jax.lax.psum(gradients[name], "dp") for name in ("weight", "bias")}
        count = jax.lax.psum(count, "dp")
        return jax.lax.psum(loss, "dp") / count, jax.tree.map(lambda g: UPSTREAM * g / count, summed)

    run = over_tokens(make_mesh(dp=devices), body, out_specs=(P(), SPLIT_X), check_vma=False)
    assert_mean(jax.block_until_ready(jax.jit(run)(PROBLEM.primals)))


# ---- what each device has


@on_4_checked_and_8_not
def test_each_device_has_the_mean_of_its_tokens(devices: int, check_vma: bool) -> None:
    """Or 0, of no valid token."""

    def body(primals: Arrays, labels: jax.Array) -> jax.Array:
        return fused_linear_ce(**primals, labels=labels, **OPTIONS)[None]

    loss = over_tokens(make_mesh(dp=devices), body, out_specs=P("dp"), check_vma=check_vma)

    def one_by_one(primals: Arrays) -> jax.Array:
        parts = zip(jnp.split(primals["x"], devices), jnp.split(PROBLEM.labels, devices), strict=True)
        return jnp.stack([fused_linear_ce(**primals | {"x": x}, labels=labels, **OPTIONS) for x, labels in parts])

    upstream = jnp.arange(1.0, devices + 1)
    got, want = (differentiate(f, PROBLEM.primals, upstream) for f in (loss, one_by_one))
    assert_close(got, want)
    assert not np.any(as_numpy(got[0][: devices // 4]))
    assert np.all(as_numpy(got[0][devices // 4 :]))


@on_4_checked_and_8_not
def test_one_loss_and_one_prediction_per_token(devices: int, check_vma: bool) -> None:
    options = {"reduction": "none", "ce_weight": PROBLEM.class_weight, **OPTIONS}

    def body(primals: Arrays, labels: jax.Array) -> Any:
        return fused_linear_ce(**primals, labels=labels, **METRICS, **options)

    loss = over_tokens(make_mesh(dp=devices), body, out_specs=P("dp"), check_vma=check_vma)
    assert_as_whole(differentiate(loss, PROBLEM.primals, PROBLEM.upstream), PROBLEM, PROBLEM.upstream, **options)


@on_4_checked_and_8_not
def test_given_logits(devices: int, check_vma: bool) -> None:
    logits = PROBLEM.primals["x"] @ PROBLEM.primals["weight"].T

    def body(logits: jax.Array, labels: jax.Array) -> jax.Array:
        loss = cross_entropy(logits, labels, reduction="sum", **OPTIONS)
        return jax.lax.psum(loss, "dp") / jax.lax.psum((labels != IGNORED).sum(), "dp")

    mapped = shard_map(body, make_mesh(dp=devices), (P("dp"), P("dp")), check_vma=check_vma)
    got = differentiate(lambda primals: mapped(primals["logits"], PROBLEM.labels), {"logits": logits})
    want = differentiate(lambda p: cross_entropy(p["logits"], PROBLEM.labels, **OPTIONS), {"logits": logits})
    assert_close(got, want)


# ---- what varies is known


@pytest.mark.parametrize("name", ("loss", "z_loss", "predicted_tokens", "num_valid", "num_correct"))
def test_an_output_of_each_device_is_not_the_same_on_all(name: str) -> None:
    def body(primals: Arrays, labels: jax.Array) -> jax.Array:
        return getattr(fused_linear_ce(**primals, labels=labels, **METRICS), name)

    run = over_tokens(make_mesh(dp=4), body, out_specs=P())
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(run)(PROBLEM.primals)


def test_a_gradient_of_each_device_is_not_the_same_on_all() -> None:
    run = over_tokens(make_mesh(dp=4), jax.grad(global_mean), out_specs=P())
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(run)(PROBLEM.primals)


def test_a_loss_of_whole_arrays_is_the_same_on_all() -> None:
    def body(primals: Arrays, labels: jax.Array) -> Any:
        return fused_linear_ce(**primals, labels=labels, **METRICS)

    mapped = shard_map(body, make_mesh(dp=4), (P(), P()))
    got = differentiate(lambda primals: mapped(primals, PROBLEM.labels), PROBLEM.primals)
    assert_as_whole(got, PROBLEM)
    assert_same_bits(got[0], jax.jit(body)(PROBLEM.primals, PROBLEM.labels))
