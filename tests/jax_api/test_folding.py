"""A batch of tokens over one weight is one launch over more tokens: seen in the program, before it is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from core_kernels import Plan
from jax_api.bridge import Call
from tests.jax_api.problems import (
    HIDDEN,
    LINEAR,
    LOGITS,
    METRICS,
    OPTIONS,
    VOCAB,
    Arrays,
    Operation,
    Problem,
    as_numpy,
    assert_same_bits,
    each_operation,
    gradient,
)

BATCH, TOKENS = 3, 5
LOOPS = {"scan", "while"}


def equations(jaxpr: Any) -> Iterator[Any]:
    """All that a program does, those of its parts included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def program(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    return list(equations(jax.make_jaxpr(function)(*arguments).jaxpr))


def calls(program: list[Any]) -> list[Call]:
    return [equation.params["call"] for equation in program if equation.primitive.name == "twinhead_launch"]


def kinds(program: list[Any]) -> list[str]:
    return [call.step.kind for call in calls(program)]


def primitives(program: list[Any]) -> set[str]:
    return {equation.primitive.name for equation in program}


def largest(program: list[Any]) -> int:
    """The most elements that any array has that a program makes."""
    return max(variable.aval.size for equation in program for variable in equation.outvars)


def batched(operation: Operation, *mapped: str, **options: Any) -> tuple[Callable[[Arrays], jax.Array], Problem]:
    """The losses of a batch, as a function of the primals; ``mapped`` are the primals that have the batch in front."""
    problem = operation.problem((BATCH, TOKENS))
    primals = {name: jnp.stack([a] * BATCH) if name != operation.rows else a for name, a in problem.primals.items()}
    primals = {name: a if name in mapped else a[0] for name, a in primals.items()}

    def losses(primals: Arrays) -> Any:
        axes = {name: 0 if name in mapped else None for name in primals}
        fixed = {operation.class_weight: problem.class_weight, **OPTIONS, **options}
        return jax.vmap(lambda p, labels: operation.function(**p, labels=labels, **fixed), (axes, 0))(
            primals, problem.labels
        )

    return losses, Problem(primals, problem.labels, problem.class_weight, problem.upstream)


def total(losses: Callable[[Arrays], jax.Array]) -> Callable[[Arrays], jax.Array]:
    def run(primals: Arrays) -> jax.Array:
        by_entry = losses(primals)
        return jnp.vdot(by_entry, jnp.linspace(-2.0, 1.5, by_entry.size).reshape(by_entry.shape))

    return run


PROGRAMS: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "losses": (lambda losses: losses, ["loss"]),
    "jit of losses": (jax.jit, ["loss"]),
    "grad": (lambda losses: jax.grad(total(losses)), ["loss", "gradient"]),
    "jit of grad": (lambda losses: jax.jit(jax.grad(total(losses))), ["loss", "gradient"]),
    "grad of jit": (lambda losses: jax.grad(total(jax.jit(losses))), ["loss", "gradient"]),
    "grad of checkpoint": (lambda losses: jax.grad(total(jax.checkpoint(losses))), ["loss", "loss", "gradient"]),
}


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize(("transform", "launched"), PROGRAMS.values(), ids=PROGRAMS)
@each_operation
def test_a_batch_over_one_weight_is_one_launch(
    operation: Operation, transform: Callable[[Any], Any], launched: list[str], reduction: str
) -> None:
    losses, problem = batched(operation, operation.rows, reduction=reduction)
    made = program(transform(losses), problem.primals)
    assert kinds(made) == launched
    assert {call.step.problem.tokens for call in calls(made)} == {BATCH * TOKENS}
    assert not primitives(made) & LOOPS
    if operation is LINEAR:  # no weight per entry
        assert largest(made) <= VOCAB * HIDDEN
    assert calls(made)[0].step.problem.groups == (BATCH,)


def test_a_batch_of_batches_over_one_weight_is_one_launch() -> None:
    problem = LINEAR.problem((2, BATCH, TOKENS))
    axes = {name: 0 if name == "x" else None for name in problem.primals}
    loss = lambda p, labels: LINEAR.function(**p, labels=labels, **OPTIONS)  # noqa: E731
    mapped = jax.vmap(jax.vmap(loss, (axes, 0)), (axes, 0))
    made = program(jax.grad(total(lambda p: mapped(p, problem.labels))), problem.primals)
    assert kinds(made) == ["loss", "gradient"]
    assert {call.step.problem.tokens for call in calls(made)} == {2 * BATCH * TOKENS}
    assert {call.step.problem.groups for call in calls(made)} == {(2, BATCH)}
    assert not primitives(made) & LOOPS


def test_gradients_by_tokens_one_by_one_are_one_launch() -> None:
    """Nothing that the entries share is differentiated, so nothing has to be kept apart."""
    problem = LINEAR.problem((BATCH, TOKENS))
    shared = {name: problem.primals[name] for name in ("weight", "bias")}
    by_x = jax.vmap(jax.grad(lambda x, labels: LINEAR.function(x=x, labels=labels, **shared, **OPTIONS)))
    made = program(by_x, problem.primals["x"], problem.labels)
    assert kinds(made) == ["loss", "gradient"]
    assert {call.step.problem.tokens for call in calls(made)} == {BATCH * TOKENS}
    assert not primitives(made) & LOOPS


@pytest.mark.parametrize("mapped", (("weight",), ("x", "weight"), ("x", "weight", "bias"), ("x", "bias")), ids=" ".join)
@pytest.mark.parametrize("transformation", ("losses", "jit of grad"))
def test_a_batch_of_weights_is_a_loop(transformation: str, mapped: tuple[str, ...]) -> None:
    transform, launched = PROGRAMS[transformation]
    losses, problem = batched(LINEAR, *mapped)
    primals = dict(problem.primals)
    made = program(transform(losses), primals)
    assert kinds(made) == launched
    assert {call.step.problem.tokens for call in calls(made)} == {TOKENS}
    assert sum(equation.primitive.name in LOOPS for equation in made) == len(launched)


def test_a_gradient_of_the_weight_per_entry_is_a_loop() -> None:
    """The loss is folded still."""
    problem = LINEAR.problem((BATCH, TOKENS))
    rest = {name: array for name, array in problem.primals.items() if name != "weight"}
    axes = {name: 0 if name == "x" else None for name in rest}

    def by_weight(weight: jax.Array, rest: Arrays, labels: jax.Array) -> jax.Array:
        return jax.grad(lambda w: LINEAR.function(weight=w, **rest, labels=labels))(weight)

    made = program(jax.vmap(by_weight, (None, axes, 0)), problem.primals["weight"], rest, problem.labels)
    assert [(call.step.kind, call.step.problem.tokens) for call in calls(made)] == [
        ("loss", BATCH * TOKENS),
        ("gradient", TOKENS),
    ]
    assert sum(equation.primitive.name in LOOPS for equation in made) == 1


@each_operation
def test_a_fold_runs_one_launch(operation: Operation, launches: list[Plan]) -> None:
    """The tokens of a batch, in a row, get the bits that they get as one call per token."""
    losses, problem = batched(operation, operation.rows, reduction="none")
    got = jax.block_until_ready(jax.value_and_grad(total(losses))(problem.primals))
    assert [(plan.step.kind, plan.problem.tokens) for plan in launches] == [
        ("loss", BATCH * TOKENS),
        ("gradient", BATCH * TOKENS),
    ]
    ours, _ = operation.losses(problem, reduction="none", **OPTIONS)
    assert_same_bits(got, jax.value_and_grad(total(ours))(problem.primals))


# ---- empty


def empty_batch(operation: Operation, leading: tuple[int, ...]) -> tuple[Problem, dict[str, int | None]]:
    problem = operation.problem(leading)
    return problem, {name: 0 if name == operation.rows else None for name in problem.primals}


@pytest.mark.parametrize("leading", ((0, TOKENS), (BATCH, 0), (0, 0)), ids=str)
@pytest.mark.parametrize("reduction", ("mean", "none"))
@each_operation
def test_an_empty_axis(operation: Operation, reduction: str, leading: tuple[int, ...]) -> None:
    problem, axes = empty_batch(operation, leading)
    mapped = jax.vmap(
        lambda p, labels: operation.function(**p, labels=labels, reduction=reduction, **METRICS, **OPTIONS), (axes, 0)
    )

    def run(primals: Arrays) -> Any:
        out = mapped(primals, problem.labels)
        return total(lambda _: out.loss)(primals), out

    for transform in (lambda f: f, jax.jit):
        (_, out), gradients = transform(jax.value_and_grad(run, has_aux=True))(problem.primals)
        assert out.loss.shape == out.z_loss.shape == (leading if reduction == "none" else leading[:1])
        assert out.predicted_tokens.shape == leading
        assert not any(np.any(as_numpy(leaf)) for leaf in jax.tree.leaves(out))
        assert_same_bits(gradients, jax.tree.map(jnp.zeros_like, problem.primals))


@pytest.mark.parametrize("leading", ((0, TOKENS), (BATCH, 0)), ids=str)
def test_an_empty_axis_of_gradients_one_by_one(leading: tuple[int, ...]) -> None:
    problem, axes = empty_batch(LINEAR, leading)
    one_by_one = jax.vmap(jax.grad(lambda p, labels: LINEAR.function(**p, labels=labels)), (axes, 0))
    gradients = one_by_one(problem.primals, problem.labels)
    want = {name: a.shape if name == "x" else (leading[0], *a.shape) for name, a in problem.primals.items()}
    assert {name: by_name.shape for name, by_name in gradients.items()} == want
    assert not any(np.any(as_numpy(by_name)) for by_name in gradients.values())


def test_an_empty_batch_of_weights() -> None:
    problem = LINEAR.problem((TOKENS,))
    weights = jnp.zeros((0, VOCAB, HIDDEN))
    losses = lambda w: jax.vmap(lambda w: LINEAR.function(**problem.primals | {"weight": w}, labels=problem.labels))(w)  # noqa: E731
    assert losses(weights).shape == (0,)
    assert_same_bits(jax.grad(lambda w: losses(w).sum())(weights), weights)


# ---- what is recomputed


@pytest.mark.parametrize(
    ("policy", "launched"),
    (("nothing_saveable", ["loss", "loss", "gradient"]), ("everything_saveable", ["loss", "gradient"])),
)
@pytest.mark.parametrize("operation", (LINEAR, LOGITS), ids=lambda operation: operation.name)
def test_a_checkpoint_recomputes_the_loss_unless_it_is_kept(
    operation: Operation, policy: str, launched: list[str]
) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem)
    kept = jax.checkpoint(ours, policy=getattr(jax.checkpoint_policies, policy))
    assert kinds(program(gradient(kept), problem.primals)) == launched
