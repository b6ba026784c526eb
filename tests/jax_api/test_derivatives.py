"""What is differentiated: only what is asked for, once, and in reverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_kernels import Plan
from jax_api import fused_linear_ce
from tests.jax_api.problems import (
    LINEAR,
    OPTIONS,
    UPSTREAM,
    Arrays,
    Loss,
    Operation,
    as_numpy,
    assert_close,
    assert_same_bits,
    each_operation,
    eager_and_jit,
    gradient,
)

FORWARD_MODE = (
    "forward-mode differentiation (jax.jvp, jax.jacfwd) of twinhead's losses is not supported: its kernels compute "
    "gradients; use jax.grad, jax.vjp or jax.jacrev, or a loss in plain JAX"
)
SECOND_DERIVATIVE = (
    "second derivatives of twinhead's losses are not supported: the gradient is computed by a kernel; "
    "differentiate once, or use a loss in plain JAX"
)


def run(function: Callable[..., Any], *arguments: Any) -> Any:
    return jax.block_until_ready(function(*arguments))


def gradients_of(plans: list[Plan]) -> list[tuple[str, ...]]:
    return [tuple(buffer.name for buffer in plan.outputs) for plan in plans if plan.step.kind == "gradient"]


# ---- only what is asked for


ARGNUMS = {"x": 0, "weight": 1, "bias": 3}


def gradients_by(names: Sequence[str]) -> dict[str, jax.Array]:
    """The named gradients of one and the same loss, by argument number."""
    problem = LINEAR.problem()
    primals = problem.primals

    def loss(*arguments: jax.Array) -> jax.Array:
        return UPSTREAM * fused_linear_ce(*arguments, ce_weight=problem.class_weight, **OPTIONS)

    back = jax.grad(loss, argnums=tuple(ARGNUMS[name] for name in names))
    results = run(back, primals["x"], primals["weight"], problem.labels, primals["bias"])
    return dict(zip(names, results, strict=True))


@pytest.fixture(scope="module")
def all_gradients() -> dict[str, jax.Array]:
    return gradients_by(tuple(ARGNUMS))


@pytest.mark.parametrize(
    "names",
    (("x",), ("weight",), ("bias",), ("x", "weight"), ("x", "bias"), ("weight", "bias"), ("x", "weight", "bias")),
    ids=" and ".join,
)
def test_a_subset_of_gradients_is_the_full_run_without_the_rest(
    names: tuple[str, ...], all_gradients: dict[str, jax.Array], launches: list[Plan]
) -> None:
    subset = gradients_by(names)
    assert all(np.any(as_numpy(by_name)) for by_name in subset.values())
    assert_same_bits(subset, {name: all_gradients[name] for name in names})

    assert gradients_of(launches) == [tuple(f"grad_{name}" for name in names)]
    back = launches[-1]
    scratch = {buffer.name for buffer in back.workspace}
    sums = "rows" if back.engine == "triton" else "grad_rows"
    assert (sums in scratch) == ("x" in names)


@eager_and_jit
@each_operation
def test_an_undifferentiated_call_runs_no_gradient(
    operation: Operation, transform: Callable[..., Any], launches: list[Plan]
) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem)
    run(transform(ours), problem.primals)
    assert [plan.step.kind for plan in launches] == ["loss"]
    launches.clear()
    run(transform(gradient(ours)), problem.primals)
    assert [plan.step.kind for plan in launches] == ["loss", "gradient"]
    assert gradients_of(launches) == [tuple(f"grad_{name}" for name in problem.primals)]


@eager_and_jit
def test_what_is_stopped_is_not_computed(transform: Callable[..., Any], launches: list[Plan]) -> None:
    problem = LINEAR.problem()
    ours, reference = LINEAR.losses(problem)

    def frozen(loss: Loss) -> Loss:
        return lambda primals: loss(primals | {"weight": jax.lax.stop_gradient(primals["weight"])})

    got = run(transform(gradient(frozen(ours))), problem.primals)
    assert_close(got, jax.jit(gradient(frozen(reference)))(problem.primals))
    assert not np.any(as_numpy(got["weight"]))
    assert gradients_of(launches) == [("grad_x", "grad_bias")]


@each_operation
def test_metrics_are_detached(operation: Operation, launches: list[Plan]) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem, **OPTIONS)
    with_metrics, _ = operation.losses(problem, return_z_loss=True, return_token_accuracy=True, **OPTIONS)

    def metrics(primals: Arrays) -> jax.Array:
        out = with_metrics(primals)
        return 3.0 * out.z_loss + 5.0 * out.token_accuracy

    assert not any(np.any(as_numpy(g)) for g in jax.tree.leaves(run(jax.grad(metrics), problem.primals)))
    assert gradients_of(launches) == []
    both = jax.grad(lambda primals: UPSTREAM * with_metrics(primals).loss + metrics(primals))(problem.primals)
    assert_same_bits(both, gradient(ours)(problem.primals))


@each_operation
def test_predictions_have_no_gradient(operation: Operation) -> None:
    problem = operation.problem()
    with_predictions, _ = operation.losses(problem, reduction="none", return_predicted_tokens=True)
    without, _ = operation.losses(problem, reduction="none")
    out, vjp = jax.vjp(with_predictions, problem.primals)
    nothing = np.zeros(out.predicted_tokens.shape, jax.dtypes.float0)
    by_name = vjp(type(out)(loss=problem.upstream, predicted_tokens=nothing))[0]
    assert_same_bits(by_name, jax.vjp(without, problem.primals)[1](problem.upstream)[0])


@each_operation
def test_class_weights_have_no_gradient(operation: Operation, launches: list[Plan]) -> None:
    problem = operation.problem()

    def loss(primals: Arrays, class_weight: jax.Array) -> jax.Array:
        return UPSTREAM * operation.function(
            **primals, labels=problem.labels, **{operation.class_weight: class_weight}, **OPTIONS
        )

    by_class_weight = run(jax.grad(loss, argnums=1), problem.primals, problem.class_weight)
    assert_same_bits(by_class_weight, jnp.zeros_like(problem.class_weight))
    assert gradients_of(launches) == []
    with_class_weight = jax.grad(loss, argnums=(0, 1))(problem.primals, problem.class_weight)
    assert_same_bits(with_class_weight[0], jax.grad(loss)(problem.primals, problem.class_weight))
    assert_same_bits(with_class_weight[1], by_class_weight)


# ---- derivatives that there are none of


def sum_of_gradients(loss: Loss) -> Loss:
    return lambda primals: sum(by_name.sum() for by_name in jax.tree.leaves(jax.grad(loss)(primals)))


def pulled_back(loss: Loss, primals: Arrays) -> Callable[[float], jax.Array]:
    return lambda cotangent: sum(by_name.sum() for by_name in jax.vjp(loss, primals)[1](cotangent)[0].values())


def along(function: Callable[[Arrays], Any]) -> Callable[[Arrays], Any]:
    return lambda primals: jax.jvp(function, (primals,), (primals,))


def one_of_a_batch(function: Callable[[Arrays], Any]) -> Callable[[Arrays], Any]:
    return lambda primals: function(jax.tree.map(lambda array: array[None], primals))


SECOND_DERIVATIVES: dict[str, Callable[[Loss], Callable[[Arrays], Any]]] = {
    "grad of grad": lambda loss: jax.grad(sum_of_gradients(loss)),
    "jit of grad of grad": lambda loss: jax.jit(jax.grad(sum_of_gradients(loss))),
    "grad of jit of grad": lambda loss: jax.grad(jax.jit(sum_of_gradients(loss))),
    "grad of grad of checkpoint": lambda loss: jax.grad(sum_of_gradients(jax.checkpoint(loss))),
    "jacrev of grad": lambda loss: jax.jacrev(jax.grad(loss)),
    "jacfwd of grad": lambda loss: jax.jacfwd(jax.grad(loss)),
    "jvp of jvp": lambda loss: along(along(loss)),
    "jvp of grad": lambda loss: along(jax.grad(loss)),
    "hessian": jax.hessian,
    "vmap of hessian": lambda loss: one_of_a_batch(jax.vmap(jax.hessian(loss))),
    "by the cotangent": lambda loss: lambda primals: jax.grad(pulled_back(loss, primals))(1.0),
}
FORWARD: dict[str, Callable[[Loss], Callable[[Arrays], Any]]] = {
    "jvp": along,
    "jit of jvp": lambda loss: jax.jit(along(loss)),
    "jvp of jit": lambda loss: along(jax.jit(loss)),
    "jvp of checkpoint": lambda loss: along(jax.checkpoint(loss)),
    "jvp of vmap": lambda loss: one_of_a_batch(along(jax.vmap(loss))),
    "jacfwd": jax.jacfwd,
    "linearize": lambda loss: lambda primals: jax.linearize(loss, primals)[1](primals),
}


@pytest.mark.parametrize("second", SECOND_DERIVATIVES)
@each_operation
def test_a_second_derivative_is_refused(operation: Operation, second: str) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem)
    with pytest.raises(NotImplementedError) as caught:
        SECOND_DERIVATIVES[second](ours)(problem.primals)
    assert str(caught.value) == SECOND_DERIVATIVE


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("forward", FORWARD)
@each_operation
def test_forward_mode_is_refused(operation: Operation, forward: str, reduction: str) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem, reduction=reduction)
    with pytest.raises(NotImplementedError) as caught:
        FORWARD[forward](ours)(problem.primals)
    assert str(caught.value) == FORWARD_MODE


@each_operation
def test_forward_mode_of_what_no_tangent_reaches(operation: Operation) -> None:
    """Nothing is differentiated, so nothing is refused."""
    problem = operation.problem()
    ours, _ = operation.losses(problem)
    value, tangent = jax.jvp(lambda scale: scale * ours(problem.primals), (2.0,), (3.0,))
    assert_close((value, tangent), (2.0 * ours(problem.primals), 3.0 * ours(problem.primals)))
