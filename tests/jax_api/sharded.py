"""The fused loss inside ``jax.shard_map``, on virtual CPU devices, and how it is compared with the unsharded call."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_api import CrossEntropyOutput, fused_linear_ce
from tests.jax_api.problems import (
    IGNORED,
    LINEAR,
    METRICS,
    UPSTREAM,
    Arrays,
    Problem,
    assert_as_expected,
    assert_close,
    assert_same_bits,
)

# What JAX must find before it starts: the tests are skipped without, and test_sharded.py runs them with it.
DEVICES = "--xla_force_host_platform_device_count=8"
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{DEVICES} --xla_backend_optimization_level=0"}  # compiles faster

TOKENS, VOCAB = 16, 56  # both divide by 8

checked_and_not = pytest.mark.parametrize("check_vma", (True, False), ids=("vma", "no_vma"))
on_4_and_8 = pytest.mark.parametrize("devices", (4, 8))
on_4_checked_and_8_not = pytest.mark.parametrize(("devices", "check_vma"), ((4, True), (8, False)))


def need_devices() -> None:
    """Skip the test module that calls this unless JAX will have the devices."""
    if os.environ.get("JAX_PLATFORMS") != "cpu" or DEVICES not in os.environ.get("XLA_FLAGS", ""):
        pytest.skip(f"run by test_sharded.py, as JAX_PLATFORMS=cpu XLA_FLAGS={DEVICES} pytest", allow_module_level=True)


def make_mesh(axis_type: AxisType = AxisType.Auto, **sizes: int) -> Mesh:
    devices = jax.devices()[: math.prod(sizes.values())]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (axis_type,) * len(sizes), devices=devices)


def place(array: jax.Array, mesh: Mesh, *spec: Any) -> jax.Array:
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def random_problem(leading: tuple[int, ...] = (TOKENS,), vocab: int = VOCAB, **options: Any) -> Problem:
    return LINEAR.problem(leading, vocab=vocab, **options)


def shard_map(body: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any = None, **options: Any) -> Any:
    """``jax.shard_map``; the results are the same on every device unless ``out_specs`` says otherwise."""
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs or P(), **options)


def over_vocab(
    mesh: Mesh, labels: jax.Array, axis: str | tuple[str, ...] = "tp", *, check_vma: bool = True, **arguments: Any
) -> Callable[[Arrays], Any]:
    """``fused_linear_ce`` as a function of the primals, its weight and bias sharded along ``axis``."""
    whole = {"labels": labels} | {name: a for name, a in arguments.items() if isinstance(a, jax.Array)}
    options = {name: option for name, option in arguments.items() if name not in whole}
    weight = P(None, axis) if options.get("weight_layout") == "hv" else P(axis)
    specs = {"x": P(), "weight": weight, "bias": P(axis)}

    def body(primals: Arrays, whole: Arrays) -> Any:
        return fused_linear_ce(**primals, **whole, vocab_axis=axis, **options)

    def run(primals: Arrays) -> Any:
        in_specs = ({name: specs[name] for name in primals}, P())
        return shard_map(body, mesh, in_specs, check_vma=check_vma)(primals, whole)

    return run


def unsharded(labels: jax.Array, **arguments: Any) -> Callable[[Arrays], Any]:
    """``fused_linear_ce`` as a function of the primals; bad labels do not raise, being traced."""
    call = jax.jit(lambda primals, labels: fused_linear_ce(**primals, labels=labels, **arguments))
    return lambda primals: call(primals, labels)


def differentiate(
    loss: Callable[[Arrays], Any],
    primals: Arrays,
    upstream: Any = UPSTREAM,
    transform: Callable[..., Any] = jax.jit,
) -> tuple[Any, Arrays]:
    """What ``loss`` answers with, and the gradients of its sum weighed by ``upstream``."""

    def weighed(primals: Arrays) -> tuple[jax.Array, Any]:
        out = loss(primals)
        return (upstream * getattr(out, "loss", out)).sum(), out

    (_, out), gradients = jax.block_until_ready(transform(jax.value_and_grad(weighed, has_aux=True))(primals))
    return out, gradients


def assert_as_whole(
    got: tuple[CrossEntropyOutput, Arrays], problem: Problem, upstream: Any = UPSTREAM, **options: Any
) -> None:
    """As the unsharded call answers with METRICS, and as the oracle says."""
    output, gradients = got
    labels = jnp.where(options.pop("where", True), problem.labels, IGNORED)
    whole, whole_gradients = differentiate(unsharded(labels, **METRICS, **options), problem.primals, upstream)
    assert_close(output, whole)
    assert_close(gradients, whole_gradients)
    assert_same_bits(output.predicted_tokens, whole.predicted_tokens)
    for name in ("token_accuracy", "num_valid", "num_correct"):
        assert_same_bits(getattr(output, name), getattr(whole, name))

    options["class_weight"] = options.pop("ce_weight", None)
    want = LINEAR.expected(
        Problem(problem.primals, labels, problem.class_weight, upstream), upstream=upstream, **options
    )
    for name in ("loss", "z_loss", "token_accuracy", "num_valid", "num_correct"):
        assert_as_expected(getattr(output, name), getattr(want, name))
    np.testing.assert_array_equal(output.predicted_tokens, want.predicted_tokens)
    assert_gradients(gradients, want.gradients)


def assert_gradients(got: Mapping[str, jax.Array], want: Mapping[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        assert_as_expected(gradient, want[name])
