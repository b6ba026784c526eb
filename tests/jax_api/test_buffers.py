"""XLA's own buffers under the kernels: what a call reads, writes and leaves behind, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.jax_api.problems import (
    OPTIONS,
    Arrays,
    Operation,
    assert_close,
    assert_same_bits,
    each_operation,
    eager_and_jit,
    gradient,
)
from tests.support import interpreting, on_gpu


@eager_and_jit
@each_operation
def test_inputs_are_not_written_to(operation: Operation, transform: Callable[..., Any]) -> None:
    problem = operation.problem()
    arrays = (*problem.primals.values(), problem.labels, problem.class_weight)
    before = [np.array(array) for array in arrays]
    ours, _ = operation.losses(problem, return_predicted_tokens=True, **OPTIONS)
    step = jax.value_and_grad(lambda primals: ours(primals).loss)
    jax.block_until_ready(transform(step)(problem.primals))
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(np.asarray(array), copy)


@pytest.mark.parametrize("wrap", (lambda loss: loss, jax.checkpoint), ids=("", "checkpoint"))
@each_operation
def test_donated_inputs(operation: Operation, wrap: Callable[..., Any]) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem, **OPTIONS)
    want = jax.jit(gradient(ours))(problem.primals)
    donated = jax.tree.map(jnp.array, problem.primals)
    got = jax.jit(gradient(wrap(ours)), donate_argnums=0)(donated)
    assert all(array.is_deleted() for array in donated.values())
    assert_same_bits(got, want)


@each_operation
def test_a_donating_training_step(operation: Operation) -> None:
    """Each step's parameters take the place of those before, and of nothing that is read still."""
    problem = operation.problem()
    ours, reference = operation.losses(problem, **OPTIONS)

    def step(loss: Callable[[Arrays], jax.Array]) -> Callable[[Arrays], Any]:
        def run(primals: Arrays) -> tuple[Arrays, jax.Array]:
            value, by_name = jax.value_and_grad(loss)(primals)
            return jax.tree.map(lambda p, g: p - 0.5 * g, primals, by_name), value

        return jax.jit(run, donate_argnums=0)

    got, want = [], []
    for loss, results in ((ours, got), (reference, want)):
        primals = jax.tree.map(jnp.array, problem.primals)
        run = step(loss)
        for _ in range(3):
            primals, value = run(primals)
            results.append(value)
        results.append(primals)
    assert_close(got, want)


@each_operation
def test_the_same_inputs_give_the_same_bits(operation: Operation) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem, **OPTIONS)
    eager = jax.value_and_grad(ours)
    compiled = jax.jit(eager)
    first = eager(problem.primals)
    assert np.isfinite(float(first[0]))
    assert_same_bits(eager(problem.primals), first)
    assert_same_bits(compiled(problem.primals), first)
    assert_same_bits(compiled(problem.primals), first)


# ---- order

REPEATS = 6 if interpreting() else 50
SIZE = 1024 if on_gpu() else 48


def slowly(array: jax.Array, work: jax.Array) -> jax.Array:
    """``array``, but only once a few products are through, which the compiler cannot know to be of no account."""
    product = jax.lax.fori_loop(0, 4, lambda _, w: jnp.tanh(w @ work), work)
    return array + jnp.where(product[0, 0] > 2.0, 1.0, 0.0)  # a tanh is not


def produce(primals: Arrays, scale: jax.Array, work: jax.Array) -> Arrays:
    return {name: slowly(scale * array, work) for name, array in primals.items()}


def consume(answer: tuple[jax.Array, Arrays], work: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: slowly(2.0 * leaf, work), answer)


@pytest.mark.parametrize("dispatches", ("one", "three", "eager loss"))
@each_operation
def test_a_loss_waits_for_its_inputs_and_is_waited_for(operation: Operation, dispatches: str) -> None:
    """Nothing blocks in between; every time the values are others, so that a stale buffer shows."""
    problem = operation.problem((6,))
    ours, reference = operation.losses(problem, **OPTIONS)
    work = jnp.asarray(np.random.default_rng(1).normal(size=(SIZE, SIZE)) / np.sqrt(SIZE), jnp.float32)

    stages = (produce, jax.value_and_grad(ours), consume)
    if dispatches != "one":
        stages = (jax.jit(produce), stages[1] if dispatches == "eager loss" else jax.jit(stages[1]), jax.jit(consume))

    def run(scale: jax.Array) -> Any:
        made = stages[0](problem.primals, scale, work)
        return stages[2](stages[1](made), work)

    whole = jax.jit(run) if dispatches == "one" else run
    scales = [jnp.float32(0.5 + index / REPEATS) for index in range(REPEATS)]
    got = [whole(scale) for scale in scales]
    plain = jax.jit(jax.value_and_grad(reference))
    for scale, answer in zip(scales, got, strict=True):
        want = plain(jax.tree.map(lambda array, s=scale: s * array, problem.primals))
        assert_close(answer, jax.tree.map(lambda leaf: 2.0 * leaf, want))
