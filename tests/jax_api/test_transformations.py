"""The losses under JAX's transformations: each must give what the same transformation of plain JAX gives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from jax_api import CrossEntropyOutput
from tests.jax_api.problems import (
    LINEAR,
    METRICS,
    OPTIONS,
    UPSTREAM,
    Arrays,
    Loss,
    Operation,
    assert_as_expected,
    assert_close,
    assert_same_bits,
    each_operation,
    eager_and_jit,
    eagerly,
    gradient,
)

Transformation = Callable[[Loss], Callable[[Arrays], Any]]


@functools.cache
def reference_answer(operation: Operation) -> tuple[jax.Array, Arrays]:
    """Value and gradient, in plain JAX, of the loss that the transformations below are applied to."""
    problem = operation.problem()
    _, reference = operation.losses(problem, **OPTIONS)
    return jax.jit(reference)(problem.primals), jax.jit(gradient(reference))(problem.primals)


# ---- transformations of a loss that leave its value as it is


def in_cond(loss: Loss) -> Loss:
    def run(primals: Arrays) -> jax.Array:
        finite = jnp.isfinite(next(iter(primals.values()))).all()
        return jax.lax.cond(finite, loss, lambda _: jnp.float32(0), primals)

    return run


def in_switch(loss: Loss) -> Loss:
    def run(primals: Arrays) -> jax.Array:
        index = jnp.isfinite(next(iter(primals.values()))).all().astype(jnp.int32)
        return jax.lax.switch(index, (lambda _: jnp.float32(0), loss), primals)

    return run


def in_scan(loss: Loss) -> Loss:
    """The sum over two steps, weighted unevenly, of one and the same loss."""

    def run(primals: Arrays) -> jax.Array:
        shares = jnp.array([2.5, -1.5], jnp.float32)
        return jax.lax.scan(lambda total, share: (total + share * loss(primals), None), jnp.float32(0), shares)[0]

    return run


def in_map(loss: Loss) -> Loss:
    return lambda primals: jax.lax.map(lambda share: share * loss(primals), jnp.array([0.25, 0.75])).sum()


def in_fori_loop(loss: Loss) -> Loss:
    return lambda primals: jax.lax.fori_loop(0, 2, lambda i, total: total + (2 * i - 0.5) * loss(primals), 0.0)


def in_while_loop(loss: Loss) -> Loss:
    """JAX differentiates no while loop in reverse."""

    def run(primals: Arrays) -> jax.Array:
        def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            step, total = carry
            return step + 1, total + (2.0 * step - 0.5) * loss(primals)

        return jax.lax.while_loop(lambda carry: carry[0] < 2, body, (jnp.float32(0), jnp.float32(0)))[1]

    return run


def kept_by_name(loss: Loss) -> Loss:
    """Everything is recomputed but what is named: what goes in, and what comes out."""

    def named(primals: Arrays) -> jax.Array:
        primals = {name: checkpoint_name(2.0 * array, "in") for name, array in primals.items()}
        return checkpoint_name(loss({name: array / 2.0 for name, array in primals.items()}), "out")

    return jax.checkpoint(named, policy=jax.checkpoint_policies.save_only_these_names("in", "out"))


def on_transposed(loss: Loss) -> Loss:
    """The arrays come transposed in memory, and the program turns them back."""
    flipped = jax.jit(lambda primals: loss({name: array.T for name, array in primals.items()}))
    return lambda primals: flipped({name: array.T for name, array in primals.items()})


POLICIES = ("nothing_saveable", "everything_saveable", "dots_with_no_batch_dims_saveable")
WRAPPED: dict[str, Callable[[Loss], Loss]] = {
    "alone": lambda loss: loss,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    **{
        f"checkpoint, {policy}": functools.partial(jax.checkpoint, policy=getattr(jax.checkpoint_policies, policy))
        for policy in POLICIES
    },
    "checkpoint, kept by name": kept_by_name,
    "checkpoint of jit": lambda loss: jax.checkpoint(jax.jit(loss)),
    "cond": in_cond,
    "switch": in_switch,
    "scan": in_scan,
    "checkpoint of scan": lambda loss: jax.checkpoint(in_scan(loss)),
    "scan of checkpoint": lambda loss: in_scan(jax.checkpoint(loss)),
    "map": in_map,
    "fori_loop": in_fori_loop,
    "on transposed arrays": on_transposed,
}


@pytest.mark.parametrize("wrapped", (*WRAPPED, "while_loop"))
@each_operation
def test_the_value_of_a_transformed_loss(operation: Operation, wrapped: str) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem, **OPTIONS)
    wrap = in_while_loop if wrapped == "while_loop" else WRAPPED[wrapped]
    assert_close(wrap(ours)(problem.primals), reference_answer(operation)[0])


@pytest.mark.parametrize(
    ("wrapped", "transform"),
    (
        *((name, jax.jit) for name in WRAPPED),
        *((name, eagerly) for name in ("alone", "jit", "checkpoint", "on transposed arrays")),
    ),
    ids=(*(f"{name}, jit" for name in WRAPPED), "alone", "jit", "checkpoint", "on transposed arrays"),
)
@each_operation
def test_the_gradient_of_a_transformed_loss(operation: Operation, wrapped: str, transform: Callable[..., Any]) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem, **OPTIONS)
    got = transform(gradient(WRAPPED[wrapped](ours)))(problem.primals)
    assert_close(got, reference_answer(operation)[1])


@each_operation
def test_a_gradient_inside_control_flow(operation: Operation) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem, **OPTIONS)
    rows = operation.rows

    def of_gradient(primals: Arrays) -> jax.Array:
        return (gradient(ours)(primals)[rows] * problem.upstream[:, None]).sum()

    want = (reference_answer(operation)[1][rows] * problem.upstream[:, None]).sum()
    for wrap in (in_cond, in_scan, in_while_loop):
        assert_close(wrap(of_gradient)(problem.primals), want)


@each_operation
def test_without_jit(operation: Operation) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem, **OPTIONS)
    with jax.disable_jit():
        value, by_name = ours(problem.primals), gradient(jax.jit(ours))(problem.primals)
    assert_close((value, by_name), reference_answer(operation))


# ---- derivatives in their several spellings


@eager_and_jit
@each_operation
def test_vjp_takes_one_cotangent_per_token(operation: Operation, transform: Callable[..., Any]) -> None:
    problem = operation.problem((2, 3))
    ours, _ = operation.losses(problem, reduction="none", **OPTIONS)

    def pull_back(primals: Arrays, cotangent: jax.Array) -> tuple[jax.Array, Arrays]:
        value, vjp = jax.vjp(ours, primals)
        return value, vjp(cotangent)[0]

    value, gradients = transform(pull_back)(problem.primals, problem.upstream)
    want = operation.expected(problem, reduction="none", upstream=problem.upstream, **OPTIONS)
    assert_as_expected(value, want.loss)
    for name, by_name in gradients.items():
        assert_as_expected(by_name, want.gradients[name])


@each_operation
def test_a_vjp_can_be_called_twice_with_different_cotangents(operation: Operation) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem, **OPTIONS)
    _, vjp = jax.vjp(ours, problem.primals)
    first, second = vjp(jnp.float32(1.5))[0], vjp(jnp.float32(-3.0))[0]
    assert_close(second, jax.tree.map(lambda g: -2.0 * g, first))
    assert_same_bits(vjp(jnp.float32(1.5))[0], first)


@eager_and_jit
@each_operation
def test_jacrev_has_one_row_per_token(operation: Operation, transform: Callable[..., Any]) -> None:
    problem = operation.problem((4,))
    ours, _ = operation.losses(problem, reduction="none", **OPTIONS)
    rows = transform(jax.jacrev(ours))(problem.primals)
    for token in range(4):
        want = operation.expected(problem, reduction="none", upstream=np.eye(4)[token], **OPTIONS)
        for name, by_name in rows.items():
            assert_as_expected(by_name[token], want.gradients[name])


@eager_and_jit
@each_operation
def test_value_and_grad_with_the_output_as_auxiliary(operation: Operation, transform: Callable[..., Any]) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem, **METRICS, **OPTIONS)

    def loss_and_output(primals: Arrays) -> tuple[jax.Array, CrossEntropyOutput]:
        out = ours(primals)
        return UPSTREAM * out.loss, out

    both = jax.value_and_grad(loss_and_output, has_aux=True)
    (value, out), gradients = transform(both)(problem.primals)

    want = operation.expected(problem, upstream=UPSTREAM, **OPTIONS)
    assert_as_expected(value, UPSTREAM * want.loss)
    for name, by_name in gradients.items():
        assert_as_expected(by_name, want.gradients[name])
    assert_as_expected(out.loss, want.loss)
    assert_as_expected(out.z_loss, want.z_loss)
    assert_as_expected(out.token_accuracy, want.token_accuracy)
    assert_as_expected(out.predicted_tokens, want.predicted_tokens, rtol=0, atol=0)


@each_operation
def test_linearize_is_of_use_for_its_transpose(operation: Operation) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem, **OPTIONS)
    value, push = jax.linearize(ours, problem.primals)
    pull = jax.linear_transpose(push, problem.primals)
    assert_close((value, pull(jnp.float32(UPSTREAM))[0]), reference_answer(operation))


# ---- training inside a loop


def trained(function: Callable[..., Any], loop: Callable[..., Any]) -> Any:
    """Gradient descent by a loop of JAX's, the weight its carry: every step sees the step before."""
    problem = LINEAR.problem((2, 3))
    rows, labels = problem.primals["x"], problem.labels

    def step(shared: Arrays, index: jax.Array) -> tuple[Arrays, jax.Array]:
        run = jax.value_and_grad(lambda p: function(x=rows[index], labels=labels[index], **p, **OPTIONS))
        loss, grads = run(shared)
        return jax.tree.map(lambda p, g: p - 0.5 * g, shared, grads), loss

    shared = {"weight": problem.primals["weight"], "bias": problem.primals["bias"]}
    return jax.jit(lambda start: loop(step, start))(shared)


def by_scan(step: Callable[..., Any], start: Arrays) -> Any:
    return jax.lax.scan(step, start, jnp.arange(2))


def by_while(step: Callable[..., Any], start: Arrays) -> Any:
    def body(carry: Any) -> Any:
        index, shared, losses = carry
        shared, loss = step(shared, index)
        return index + 1, shared, losses.at[index].set(loss)

    return jax.lax.while_loop(lambda carry: carry[0] < 2, body, (jnp.int32(0), start, jnp.zeros(2)))[1:]


@pytest.fixture(scope="module")
def trained_in_plain_jax() -> Any:
    return trained(LINEAR.reference, by_scan)


@pytest.mark.parametrize("loop", (by_scan, by_while))
def test_training_in_a_loop(loop: Callable[..., Any], trained_in_plain_jax: Any) -> None:
    assert_close(trained(LINEAR.function, loop), trained_in_plain_jax)
