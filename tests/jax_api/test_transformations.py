"""The losses under JAX's transformations: each must give what the same transformation of plain JAX gives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from core_kernels import Options, Plan, linear_problem, plan_backward, plan_forward
from core_kernels.problem import Argument
from jax_api import CrossEntropyOutput, custom_vjp, fused_linear_ce
from jax_api.bridge import PlanCallback
from tests.jax_api.problems import (
    HIDDEN,
    LINEAR,
    OPTIONS,
    TOKENS,
    VOCAB,
    Arrays,
    Operation,
    Problem,
    as_numpy,
    assert_as_expected,
    assert_close,
    assert_same_bits,
    each_operation,
    eager_and_jit,
)

Loss = Callable[[Arrays], jax.Array]

UPSTREAM = -1.7
SECOND_DERIVATIVE = (
    "second derivatives of twinhead's losses are not supported: the gradient is computed by a kernel; "
    "differentiate once, or use a loss in plain JAX"
)


@pytest.fixture
def backward_plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Every backward plan that the test makes."""
    plans: list[Plan] = []

    def spy(forward: Plan, wanted: Any) -> Plan:
        plans.append(plan_backward(forward, wanted))
        return plans[-1]

    monkeypatch.setattr(custom_vjp, "plan_backward", spy)
    return plans


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Every compilation that JAX reports while the test runs."""
    events: list[str] = []

    def listen(event: str, duration: float, **details: Any) -> None:
        if "compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def gradient(loss: Loss) -> Callable[[Arrays], Arrays]:
    """Its upstream gradient is not 1."""
    return jax.grad(lambda primals: UPSTREAM * loss(primals))


def sum_of_gradients(loss: Loss) -> Loss:
    return lambda primals: sum(by_name.sum() for by_name in jax.tree.leaves(jax.grad(loss)(primals)))


def outputs_of(plans: list[Plan]) -> list[tuple[str, ...]]:
    return [tuple(buffer.name for buffer in plan.outputs) for plan in plans]


# ---- one call, transformed


@functools.cache
def reference_answer(operation: Operation) -> tuple[jax.Array, Arrays]:
    """Value and gradient, in plain JAX, of the loss that the transformations below are applied to."""
    problem = operation.problem()
    _, reference = operation.losses(problem, **OPTIONS)
    return jax.jit(reference)(problem.primals), jax.jit(gradient(reference))(problem.primals)


def in_cond(loss: Loss) -> Loss:
    def run(primals: Arrays) -> jax.Array:
        finite = jnp.isfinite(next(iter(primals.values()))).all()
        return jax.lax.cond(finite, loss, lambda _: jnp.float32(0), primals)

    return run


def on_transposed(
    transform: Callable[[Loss], Callable[[Arrays], Arrays]],
) -> Callable[[Loss], Callable[[Arrays], Arrays]]:
    """Hand over the transposed arrays, and let the program turn them back."""

    def flip(primals: Arrays) -> Arrays:
        return {name: array.T for name, array in primals.items()}

    return lambda loss: lambda primals: flip(transform(lambda flipped: loss(flip(flipped)))(flip(primals)))


VALUES: dict[str, Callable[[Loss], Loss]] = {
    "eager": lambda loss: loss,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "cond": in_cond,
}
GRADIENTS: dict[str, Callable[[Loss], Callable[[Arrays], Arrays]]] = {
    "grad": gradient,
    "jit of grad": lambda loss: jax.jit(gradient(loss)),
    "grad of jit": lambda loss: gradient(jax.jit(loss)),
    "grad of checkpoint": lambda loss: gradient(jax.checkpoint(loss)),
    "jit of grad of checkpoint": lambda loss: jax.jit(gradient(jax.checkpoint(loss))),
    "grad of cond": lambda loss: gradient(in_cond(loss)),
    "jit of grad on transposed arrays": on_transposed(lambda loss: jax.jit(gradient(loss))),
}


@pytest.mark.parametrize("transformation", VALUES)
@each_operation
def test_the_value_of_a_transformed_loss(operation: Operation, transformation: str) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem, **OPTIONS)
    assert_close(VALUES[transformation](ours)(problem.primals), reference_answer(operation)[0])


@pytest.mark.parametrize("transformation", GRADIENTS)
@each_operation
def test_the_gradient_of_a_transformed_loss(operation: Operation, transformation: str) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem, **OPTIONS)
    assert_close(GRADIENTS[transformation](ours)(problem.primals), reference_answer(operation)[1])


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


def test_a_vjp_can_be_called_twice_with_different_cotangents() -> None:
    problem = LINEAR.problem()
    ours, _ = LINEAR.losses(problem, **OPTIONS)
    _, vjp = jax.vjp(ours, problem.primals)
    first, second = vjp(jnp.float32(1.5))[0], vjp(jnp.float32(-3.0))[0]
    assert_close(second, jax.tree.map(lambda g: -2.0 * g, first))
    assert_same_bits(vjp(jnp.float32(1.5))[0], first)


def test_jacrev_has_one_row_per_token() -> None:
    problem = LINEAR.problem((4,))
    ours, _ = LINEAR.losses(problem, reduction="none", **OPTIONS)
    rows = jax.jacrev(ours)(problem.primals)
    for token in range(4):
        want = LINEAR.expected(problem, reduction="none", upstream=np.eye(4)[token], **OPTIONS)
        for name, by_name in rows.items():
            assert_as_expected(by_name[token], want.gradients[name])


@eager_and_jit
@each_operation
def test_value_and_grad_with_the_output_as_auxiliary(operation: Operation, transform: Callable[..., Any]) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(
        problem, return_z_loss=True, return_token_accuracy=True, return_predicted_tokens=True, **OPTIONS
    )

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


# ---- control flow over steps, and batches


STEP_UPSTREAM = np.array([1.5, -2.0], np.float32)


def scanned(operation: Operation, problem: Problem, function: Callable[..., Any]) -> Loss:
    """A scan over steps: the rows and labels are scanned over, everything else is closed over."""

    def total(primals: Arrays) -> jax.Array:
        rows = primals[operation.rows]
        shared = {name: array for name, array in primals.items() if name != operation.rows}

        def step(carry: jax.Array, batch: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            rows, labels, upstream = batch
            return carry + upstream * function(**{operation.rows: rows}, labels=labels, **shared, **OPTIONS), None

        return jax.lax.scan(step, jnp.float32(0), (rows, problem.labels, STEP_UPSTREAM))[0]

    return total


def mapped(operation: Operation, problem: Problem, function: Callable[..., Any]) -> Loss:
    """A vmap over batches that share everything but rows and labels."""

    def total(primals: Arrays) -> jax.Array:
        axes = {name: 0 if name == operation.rows else None for name in primals}
        batched = jax.vmap(lambda p, labels: function(**p, labels=labels, **OPTIONS), in_axes=(axes, 0))
        return (STEP_UPSTREAM * batched(primals, problem.labels)).sum()

    return total


@pytest.mark.parametrize("transformation", ("eager", "jit of grad"))
@pytest.mark.parametrize("over_batches", (scanned, mapped), ids=("scan", "vmap"))
@each_operation
def test_losses_of_several_batches(
    operation: Operation, over_batches: Callable[..., Loss], transformation: str
) -> None:
    problem = operation.problem((2, 3))
    ours = over_batches(operation, problem, operation.function)
    want = reference_of_batches(operation)
    if transformation == "eager":
        assert_close(ours(problem.primals), want[0])
    else:
        assert_close(GRADIENTS[transformation](ours)(problem.primals), want[1])


@functools.cache
def reference_of_batches(operation: Operation) -> tuple[jax.Array, Arrays]:
    problem = operation.problem((2, 3))

    def total(primals: Arrays) -> jax.Array:
        rows = primals[operation.rows]
        losses = [
            operation.reference(**primals | {operation.rows: rows[step]}, labels=problem.labels[step], **OPTIONS)
            for step in range(len(STEP_UPSTREAM))
        ]
        return (STEP_UPSTREAM * jnp.stack(losses)).sum()

    return jax.jit(total)(problem.primals), jax.jit(gradient(total))(problem.primals)


def test_scan_with_the_weight_in_the_carry_trains_it() -> None:
    """Gradient descent inside a scan, the weight its carry: every step sees the step before."""
    problem = LINEAR.problem((2, 3))

    def run(function: Callable[..., Any]) -> Any:
        def step(shared: Arrays, batch: tuple[jax.Array, jax.Array]) -> tuple[Arrays, jax.Array]:
            rows, labels = batch
            loss, grads = jax.value_and_grad(lambda p: function(x=rows, labels=labels, **p, **OPTIONS))(shared)
            return jax.tree.map(lambda p, g: p - 0.5 * g, shared, grads), loss

        shared = {"weight": problem.primals["weight"], "bias": problem.primals["bias"]}
        return jax.jit(lambda start: jax.lax.scan(step, start, (problem.primals["x"], problem.labels)))(shared)

    assert_close(run(LINEAR.function), run(LINEAR.reference))


def test_vmap_of_grad_over_a_batch_of_weights() -> None:
    problem = LINEAR.problem((5,))
    weights = jnp.stack([LINEAR.problem((5,), seed=seed).primals["weight"] for seed in range(3)])

    def batched(function: Callable[..., Any]) -> Callable[[jax.Array], Any]:
        fixed = {"x": problem.primals["x"], "bias": problem.primals["bias"], "labels": problem.labels}
        return jax.vmap(jax.value_and_grad(lambda weight: function(weight=weight, **fixed, **OPTIONS)))

    assert_close(batched(LINEAR.function)(weights), jax.jit(batched(LINEAR.reference))(weights))


# ---- only what is asked for


ARGNUMS = {"x": 0, "weight": 1, "bias": 3}


def gradients_by(names: Sequence[str]) -> dict[str, jax.Array]:
    """The named gradients of one and the same loss, by argument number."""
    problem = LINEAR.problem()
    primals = problem.primals

    def loss(*arguments: jax.Array) -> jax.Array:
        return UPSTREAM * fused_linear_ce(*arguments, ce_weight=problem.class_weight, **OPTIONS)

    run = jax.grad(loss, argnums=tuple(ARGNUMS[name] for name in names))
    return dict(zip(names, run(primals["x"], primals["weight"], problem.labels, primals["bias"]), strict=True))


@pytest.fixture(scope="module")
def all_gradients() -> dict[str, jax.Array]:
    return gradients_by(tuple(ARGNUMS))


@pytest.mark.parametrize(
    "names",
    (("x",), ("weight",), ("bias",), ("x", "weight"), ("x", "bias"), ("weight", "bias"), ("x", "weight", "bias")),
    ids=" and ".join,
)
def test_a_subset_of_gradients_is_the_full_run_without_the_rest(
    names: tuple[str, ...], all_gradients: dict[str, jax.Array], backward_plans: list[Plan]
) -> None:
    subset = gradients_by(names)
    assert all(np.any(as_numpy(by_name)) for by_name in subset.values())
    assert_same_bits(subset, {name: all_gradients[name] for name in names})

    assert outputs_of(backward_plans) == [tuple(f"grad_{name}" for name in names)]
    scratch = {buffer.name for plan in backward_plans for buffer in plan.workspace}
    packed = {"valid_x"} if "weight" in names and backward_plans[0].engine == "triton" else set()
    assert scratch == {"slab"} | packed | ({"grad_rows"} if "x" in names else set())


@eager_and_jit
@each_operation
def test_an_undifferentiated_call_plans_no_gradient(
    operation: Operation, transform: Callable[..., Any], backward_plans: list[Plan]
) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem)
    transform(ours)(problem.primals)
    assert backward_plans == []
    gradient(ours)(problem.primals)
    assert outputs_of(backward_plans) == [tuple(f"grad_{name}" for name in problem.primals)]


def test_what_is_stopped_is_not_computed(backward_plans: list[Plan]) -> None:
    problem = LINEAR.problem()
    ours, reference = LINEAR.losses(problem)

    def frozen(loss: Loss) -> Loss:
        return lambda primals: loss(primals | {"weight": jax.lax.stop_gradient(primals["weight"])})

    got = gradient(frozen(ours))(problem.primals)
    assert_close(got, jax.jit(gradient(frozen(reference)))(problem.primals))
    assert not np.any(as_numpy(got["weight"]))
    assert outputs_of(backward_plans) == [("grad_x", "grad_bias")]


@each_operation
def test_metrics_are_detached(operation: Operation, backward_plans: list[Plan]) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem, **OPTIONS)
    with_metrics, _ = operation.losses(problem, return_z_loss=True, return_token_accuracy=True, **OPTIONS)

    def metrics(primals: Arrays) -> jax.Array:
        out = with_metrics(primals)
        return 3.0 * out.z_loss + 5.0 * out.token_accuracy

    assert not any(np.any(as_numpy(g)) for g in jax.tree.leaves(jax.grad(metrics)(problem.primals)))
    assert backward_plans == []
    both = jax.grad(lambda primals: UPSTREAM * with_metrics(primals).loss + metrics(primals))(problem.primals)
    assert_same_bits(both, gradient(ours)(problem.primals))


def test_class_weights_have_no_gradient(backward_plans: list[Plan]) -> None:
    problem = LINEAR.problem()

    def loss(primals: Arrays, class_weight: jax.Array) -> jax.Array:
        return fused_linear_ce(**primals, labels=problem.labels, ce_weight=class_weight)

    by_class_weight = jax.grad(loss, argnums=1)(problem.primals, problem.class_weight)
    assert_same_bits(by_class_weight, jnp.zeros_like(problem.class_weight))
    assert backward_plans == []
    with_class_weight = jax.grad(loss, argnums=(0, 1))(problem.primals, problem.class_weight)
    assert_same_bits(with_class_weight[0], jax.grad(loss)(problem.primals, problem.class_weight))


# ---- derivatives that there are none of


SECOND_DERIVATIVES: dict[str, Callable[[Loss], Callable[[Arrays], Any]]] = {
    "grad of grad": lambda loss: jax.grad(sum_of_gradients(loss)),
    "jit of grad of grad": lambda loss: jax.jit(jax.grad(sum_of_gradients(loss))),
    "jacrev of grad": lambda loss: jax.jacrev(jax.grad(loss)),
    "hessian": jax.hessian,
    "by the cotangent": lambda loss: (
        lambda primals: jax.grad(
            lambda cotangent: sum(by_name.sum() for by_name in jax.vjp(loss, primals)[1](cotangent)[0].values())
        )(1.0)
    ),
}


@pytest.mark.parametrize("second", SECOND_DERIVATIVES)
@each_operation
def test_a_second_derivative_is_refused(operation: Operation, second: str) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem)
    with pytest.raises(NotImplementedError) as caught:
        SECOND_DERIVATIVES[second](ours)(problem.primals)
    assert str(caught.value) == SECOND_DERIVATIVE


@pytest.mark.parametrize("forward", ("jvp", "jacfwd"))
@each_operation
def test_forward_mode_is_refused(operation: Operation, forward: str) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem)
    with pytest.raises(TypeError, match="custom_vjp"):
        if forward == "jvp":
            jax.jvp(ours, (problem.primals,), (problem.primals,))
        else:
            jax.jacfwd(ours)(problem.primals)


# ---- compilations


@each_operation
def test_equal_calls_share_one_compilation(operation: Operation) -> None:
    def step(primals: Arrays, labels: jax.Array) -> Any:
        return jax.value_and_grad(lambda p: operation.function(**p, labels=labels, **OPTIONS))(primals)

    jitted = jax.jit(step)
    results = []
    for seed in range(3):
        problem = operation.problem(seed=seed)
        results.append(jitted(problem.primals, problem.labels))
        assert jitted._cache_size() == 1
    assert len({float(loss) for loss, _ in results}) == 3


@each_operation
def test_an_equal_eager_call_compiles_nothing(operation: Operation, compilations: list[str]) -> None:
    problem = operation.problem((3,))  # a shape of its own: nothing is compiled for it yet

    def run() -> Any:
        arrays = {name: jnp.array(array) for name, array in problem.primals.items()}  # new ones, as in training
        return jax.value_and_grad(lambda p: operation.function(**p, labels=problem.labels, **OPTIONS))(arrays)

    first = run()
    assert compilations
    compilations.clear()
    assert_same_bits(run(), first)
    assert compilations == []


def test_callbacks_are_equal_by_value() -> None:
    def callback(softcap: float = 6.0, names: tuple[str, ...] | None = None, transposed: bool = False) -> PlanCallback:
        problem = linear_problem(
            Argument("x", (TOKENS, HIDDEN), torch.float32),
            Argument("weight", (VOCAB, HIDDEN), torch.float32),
            Argument("labels", (TOKENS,), torch.int32),
            None,
            None,
        )
        plan = plan_forward(problem, Options(softcap=softcap), torch.device("cpu"), engine="torch")
        plan = plan if names is None else plan_backward(plan, names)
        return PlanCallback(plan, frozenset({"weight"} if transposed else ()))

    calls: tuple[dict[str, Any], ...] = (
        {"softcap": 6.0},
        {"softcap": 7.0},
        {"names": ("x",)},
        {"names": ("weight",)},
        {"transposed": True},
    )
    callbacks = [callback(**call) for call in calls]
    again = [callback(**call) for call in calls]
    assert again == callbacks
    assert [hash(c) for c in again] == [hash(c) for c in callbacks]
    assert len(set(callbacks)) == len(callbacks)
    assert callback(softcap=6) == callbacks[0]


# ---- what a call leaves behind


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


@each_operation
def test_donated_inputs(operation: Operation) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem, **OPTIONS)
    want = jax.jit(gradient(ours))(problem.primals)
    donated = jax.tree.map(jnp.array, problem.primals)
    got = jax.jit(gradient(ours), donate_argnums=0)(donated)
    assert all(array.is_deleted() for array in donated.values())
    assert_same_bits(got, want)


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
