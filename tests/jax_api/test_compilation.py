"""When a loss is compiled: once for calls that are equal, however they are spelled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch

from core_kernels import Options, Plan, Step, linear_problem, plan
from core_kernels.problem import Argument
from jax_api.bridge import Call, PlanCallback
from tests.jax_api.problems import (
    HIDDEN,
    OPTIONS,
    TOKENS,
    UPSTREAM,
    VOCAB,
    Arrays,
    Operation,
    assert_same_bits,
    each_operation,
)

Run = Callable[[Arrays, jax.Array], Any]


def loss_of(operation: Operation, **options: Any) -> Run:
    return lambda primals, labels: operation.function(**primals, labels=labels, **OPTIONS, **options)


def batched(operation: Operation) -> dict[str, Any]:
    return {name: 0 if name == operation.rows else None for name in operation.problem((1,)).primals}


# Each is called anew for every step, as a training loop may do by mistake.
EAGER: dict[str, Callable[[Operation], Run]] = {
    "eager": loss_of,
    "eager, labels checked": lambda operation: loss_of(operation, check_labels=True),
    "grad": lambda operation: jax.grad(loss_of(operation)),
    "value_and_grad": lambda operation: jax.value_and_grad(loss_of(operation)),
    "vjp": lambda operation: lambda p, labels: jax.vjp(loss_of(operation), p, labels)[1](jnp.float32(UPSTREAM))[0],
    "vmap": lambda operation: jax.vmap(loss_of(operation), (batched(operation), 0)),
    "grad of vmap": lambda operation: jax.grad(
        lambda p, labels: jnp.vdot(jax.vmap(loss_of(operation), (batched(operation), 0))(p, labels), jnp.arange(2.0))
    ),
    "vmap over everything": lambda operation: lambda p, labels: jax.vmap(loss_of(operation))(
        p | {name: jnp.stack([p[name], -p[name]]) for name in p.keys() - {operation.rows}}, labels
    ),
    "grad of vmap over everything": lambda operation: jax.grad(
        lambda p, labels: jnp.vdot(EAGER["vmap over everything"](operation)(p, labels), jnp.arange(2.0))
    ),
    "jacrev": lambda operation: jax.jacrev(loss_of(operation, reduction="none")),
    "vmap of grad": lambda operation: jax.vmap(
        jax.grad(lambda rows, p, labels: loss_of(operation)({**p, operation.rows: rows}, labels)), (0, None, 0)
    ),
}


def new_arrays(operation: Operation, seed: int, leading: tuple[int, ...]) -> tuple[Arrays, jax.Array]:
    problem = operation.problem(leading, seed=seed)
    return problem.primals, problem.labels


@pytest.mark.parametrize("spelled", EAGER)
@each_operation
def test_an_equal_call_made_anew_compiles_nothing(operation: Operation, spelled: str, compilations: list[str]) -> None:
    tokens = 3 + list(EAGER).index(spelled)  # a shape of its own: nothing is compiled for it yet
    leading = (2, tokens) if "vmap" in spelled else (tokens,)

    def step(seed: int) -> Any:
        primals, labels = new_arrays(operation, seed, leading)
        if spelled == "vmap of grad":
            rest = {name: array for name, array in primals.items() if name != operation.rows}
            return jax.block_until_ready(EAGER[spelled](operation)(primals[operation.rows], rest, labels))
        return jax.block_until_ready(EAGER[spelled](operation)(primals, labels))

    first = step(0)
    assert compilations
    compilations.clear()
    assert_same_bits(step(0), first)
    assert compilations == []


@each_operation
def test_tokens_in_another_shape_launch_the_same_program(operation: Operation, plans: list[Plan]) -> None:
    losses = [jax.jit(loss_of(operation))(*new_arrays(operation, 0, leading)) for leading in ((24,), (4, 6), (2, 3, 4))]
    assert {plan.problem.leading for plan in plans} == {(24,)}
    assert losses[0].shape == () and all(jnp.array_equal(loss, losses[0]) for loss in losses)


@each_operation
def test_checking_labels_compiles_nothing_more(operation: Operation, compilations: list[str]) -> None:
    primals, labels = new_arrays(operation, 0, (3,))
    unchecked = loss_of(operation)(primals, labels)
    compilations.clear()
    assert_same_bits(loss_of(operation, check_labels=True)(primals, labels), unchecked)
    assert compilations == []


@each_operation
def test_equal_jitted_calls_share_one_compilation(operation: Operation) -> None:
    jitted = jax.jit(jax.value_and_grad(loss_of(operation)))
    results = []
    for seed in range(3):
        results.append(jitted(*new_arrays(operation, seed, (TOKENS,))))
        assert jitted._cache_size() == 1
    assert len({float(loss) for loss, _ in results}) == 3


@each_operation
def test_a_function_jitted_twice_is_compiled_once(operation: Operation, compilations: list[str]) -> None:
    step = jax.value_and_grad(loss_of(operation))
    first = jax.block_until_ready(jax.jit(step)(*new_arrays(operation, 0, (TOKENS,))))
    other = new_arrays(operation, 1, (TOKENS,))
    again = new_arrays(operation, 0, (TOKENS,))
    compilations.clear()
    jax.block_until_ready(jax.jit(step)(*other))
    assert_same_bits(jax.jit(step)(*again), first)
    assert compilations == []


@each_operation
def test_a_jitted_loss_differentiated_anew_is_compiled_once(operation: Operation, compilations: list[str]) -> None:
    jitted = jax.jit(loss_of(operation))
    batches = [new_arrays(operation, seed, (TOKENS,)) for seed in range(3)]
    for primals, labels in batches[:2]:
        jax.block_until_ready(jax.grad(lambda p, labels: UPSTREAM * jitted(p, labels))(primals, labels))
    compilations.clear()
    jax.block_until_ready(jax.grad(lambda p, labels: UPSTREAM * jitted(p, labels))(*batches[2]))
    assert compilations == []


def test_calls_and_callbacks_are_equal_by_value() -> None:
    """They are static parameters of the compiled programs, which are looked up by them."""

    def made(
        softcap: float = 6.0,
        names: tuple[str, ...] | None = None,
        engine: str = "torch",
        transposed: bool = False,
        cuda_graph: bool = False,
    ) -> tuple[Call, PlanCallback]:
        problem = linear_problem(
            Argument("x", (TOKENS, HIDDEN), torch.float32),
            Argument("weight", (VOCAB, HIDDEN), torch.float32),
            Argument("labels", (TOKENS,), torch.int32),
            None,
            None,
        )
        step = Step("loss", problem, Options(softcap=softcap), engine)
        step = step if names is None else step.gradient(names)
        flipped = frozenset({"weight"} if transposed else ())
        return Call(step, flipped, cuda_graph), PlanCallback(plan(step, torch.device("cpu")), flipped)

    different: tuple[dict[str, Any], ...] = (
        {"softcap": 6.0},
        {"softcap": 7.0},
        {"names": ("x",)},
        {"names": ("weight",)},
        {"transposed": True},
    )
    values, again = ([made(**changes) for changes in different] for _ in range(2))
    assert again == values
    assert [hash(value) for value in again] == [hash(value) for value in values]
    for kind in range(2):
        assert len({value[kind] for value in values}) == len(values)
    assert made(softcap=6) == values[0]
    assert made(cuda_graph=True)[0] != made()[0]
    assert made(engine="auto")[0] != made()[0]

    ran = made()[1]
    ran.ready.add(0)  # what it has done changes nothing
    assert (ran, hash(ran)) == (made()[1], hash(made()[1])) and made()[1].ready == set()
