"""Larger programs: both axes at once, transformations inside ``jax.shard_map``, and a model around the loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_api import fused_linear_ce
from tests.jax_api import reference
from tests.jax_api.problems import (
    HIDDEN,
    IGNORED,
    LINEAR,
    METRICS,
    OPTIONS,
    UPSTREAM,
    Arrays,
    Problem,
    assert_as_expected,
    assert_close,
    eager_and_jit,
)
from tests.jax_api.sharded import (
    TOKENS,
    VOCAB,
    assert_as_whole,
    assert_gradients,
    checked_and_not,
    differentiate,
    make_mesh,
    need_devices,
    over_vocab,
    place,
    random_problem,
    shard_map,
)

need_devices()

PROBLEM = random_problem()
BATCHES = random_problem((3, TOKENS))
STEPS = jnp.asarray([1.5, -2.0, 0.5])
SPLIT = {"x": P("dp"), "weight": P("tp"), "bias": P("tp")}

meshes = pytest.mark.parametrize("shape", ((2, 2), (2, 4), (4, 2)), ids=lambda shape: "x".join(map(str, shape)))
on_8_checked_and_not = pytest.mark.parametrize(("shape", "check_vma"), (((2, 4), True), ((4, 2), False)), ids=str)


def global_mean(primals: Arrays, labels: jax.Array, engine: str = "torch") -> jax.Array:
    """``engine``: the launches are those of test_sharded_vocab.py, and interpreting all of them again takes minutes."""
    loss = fused_linear_ce(**primals, labels=labels, vocab_axis="tp", reduction="sum", engine=engine, **OPTIONS)
    return jax.lax.psum(loss, "dp") / jax.lax.psum((labels != IGNORED).sum(), "dp")


@functools.cache
def mean_as_whole() -> tuple[jax.Array, Arrays]:
    """In plain JAX."""
    return differentiate(
        lambda primals: reference.fused_linear_ce(**primals, labels=PROBLEM.labels, **OPTIONS), PROBLEM.primals
    )


# ---- tokens and vocab


@checked_and_not
@meshes
def test_tokens_and_vocab(shape: tuple[int, int], check_vma: bool) -> None:
    mesh = make_mesh(dp=shape[0], tp=shape[1])
    mean = functools.partial(global_mean, engine="auto")
    loss = shard_map(mean, mesh, (SPLIT, P("dp")), check_vma=check_vma)
    got = differentiate(lambda primals: loss(primals, PROBLEM.labels), PROBLEM.primals)
    assert_close(got, mean_as_whole())
    want = LINEAR.expected(PROBLEM, class_weight=None, upstream=UPSTREAM, **OPTIONS)
    assert_gradients(got[1], want.gradients)


@eager_and_jit
def test_arrays_that_are_placed_on_an_explicit_mesh(transform: Callable[..., Any]) -> None:
    mesh = make_mesh(AxisType.Explicit, dp=2, tp=4)
    primals = {name: place(array, mesh, *SPLIT[name]) for name, array in PROBLEM.primals.items()}
    labels = place(PROBLEM.labels, mesh, "dp")
    loss = shard_map(global_mean, mesh, (SPLIT, P("dp")))
    with jax.set_mesh(mesh):  # JAX needs it to differentiate eagerly
        got = differentiate(lambda primals: loss(primals, labels), primals, transform=transform)
    assert_close(got, mean_as_whole())
    assert {name: g.sharding.spec[0] for name, g in got[1].items()} == {"x": "dp", "weight": "tp", "bias": "tp"}


@on_8_checked_and_not
def test_outputs_per_token(shape: tuple[int, int], check_vma: bool) -> None:
    """Everything varies along the axis of the tokens, and nothing along that of the vocab."""
    options = {"reduction": "none", "use_token_scaling": True, **OPTIONS}

    def body(primals: Arrays, labels: jax.Array, class_weight: jax.Array) -> Any:
        return fused_linear_ce(**primals, labels=labels, ce_weight=class_weight, vocab_axis="tp", **METRICS, **options)

    mesh = make_mesh(dp=shape[0], tp=shape[1])
    mapped = shard_map(body, mesh, (SPLIT, P("dp"), P()), out_specs=P("dp"), check_vma=check_vma)
    got = differentiate(
        lambda primals: mapped(primals, PROBLEM.labels, PROBLEM.class_weight), PROBLEM.primals, PROBLEM.upstream
    )
    assert_as_whole(got, PROBLEM, PROBLEM.upstream, ce_weight=PROBLEM.class_weight, **options)


@meshes
def test_differentiated_inside(shape: tuple[int, int]) -> None:
    """Each gradient comes out as its array went in: split along one axis, and the same along the other."""

    def body(primals: Arrays, labels: jax.Array) -> Any:
        loss, gradients = jax.value_and_grad(global_mean)(primals, labels)
        return loss, jax.tree.map(lambda gradient: UPSTREAM * gradient, gradients)

    run = shard_map(body, make_mesh(dp=shape[0], tp=shape[1]), (SPLIT, P("dp")), out_specs=(P(), SPLIT))
    got = jax.block_until_ready(jax.jit(run)(PROBLEM.primals, PROBLEM.labels))
    assert_close(got, mean_as_whole())


@on_8_checked_and_not
def test_a_vocab_over_two_axes(shape: tuple[int, int], check_vma: bool) -> None:
    """The second axis is the faster one, as in a PartitionSpec."""
    options = {"ce_weight": PROBLEM.class_weight, **OPTIONS}
    mesh = make_mesh(a=shape[0], b=shape[1])
    loss = over_vocab(mesh, PROBLEM.labels, ("a", "b"), check_vma=check_vma, **METRICS, **options)
    assert_as_whole(differentiate(loss, PROBLEM.primals), PROBLEM, **options)


def test_a_vocab_over_two_axes_in_reverse() -> None:
    loss = over_vocab(make_mesh(a=2, b=4), PROBLEM.labels, ("b", "a"), engine="torch", **METRICS)
    assert_as_whole(differentiate(loss, PROBLEM.primals), PROBLEM)


def test_a_vocab_over_two_axes_and_tokens_over_a_third() -> None:
    def body(primals: Arrays, labels: jax.Array) -> jax.Array:
        how = {"vocab_axis": ("a", "b"), "reduction": "sum", "engine": "torch"}
        loss = fused_linear_ce(**primals, labels=labels, **how, **OPTIONS)
        return jax.lax.psum(loss, "dp") / jax.lax.psum((labels != IGNORED).sum(), "dp")

    specs = {"x": P("dp"), "weight": P(("a", "b")), "bias": P(("a", "b"))}
    loss = shard_map(body, make_mesh(a=2, dp=2, b=2), (specs, P("dp")))
    got = differentiate(lambda primals: loss(primals, PROBLEM.labels), PROBLEM.primals)
    assert_close(got, mean_as_whole())


# ---- transformations inside


def one_loss(primals: Arrays, x: jax.Array, labels: jax.Array, function: Callable[..., Any], **how: Any) -> jax.Array:
    return function(**primals | {"x": x}, labels=labels, **OPTIONS, **how)


def scanned(primals: Arrays, labels: jax.Array, loss: Callable[..., Any]) -> jax.Array:
    def step(total: jax.Array, batch: Any) -> Any:
        x, labels, factor = batch
        return total + factor * loss(primals, x, labels), None

    return jax.lax.scan(step, jnp.float32(0), (primals["x"], labels, STEPS))[0]


def checkpointed(primals: Arrays, labels: jax.Array, loss: Callable[..., Any]) -> jax.Array:
    return scanned(primals, labels, jax.checkpoint(loss))


def mapped(primals: Arrays, labels: jax.Array, loss: Callable[..., Any]) -> jax.Array:
    return (STEPS * jax.vmap(loss, (None, 0, 0))(primals, primals["x"], labels)).sum()


def mapped_in_turn(primals: Arrays, labels: jax.Array, loss: Callable[..., Any]) -> jax.Array:
    return (STEPS * jax.lax.map(lambda batch: loss(primals, *batch), (primals["x"], labels))).sum()


PROGRAMS = {"scan": scanned, "checkpoint in scan": checkpointed, "vmap": mapped, "map": mapped_in_turn}


@functools.cache
def program_as_whole(program: Callable[..., Any]) -> tuple[jax.Array, Arrays]:
    return differentiate(
        lambda primals: program(primals, BATCHES.labels, lambda *args: one_loss(*args, reference.fused_linear_ce)),
        BATCHES.primals,
    )


@checked_and_not
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_inside(program: Callable[..., Any], check_vma: bool) -> None:
    def body(primals: Arrays, labels: jax.Array) -> jax.Array:
        how = {"vocab_axis": "tp", "engine": "auto" if program is mapped else "torch"}
        return program(primals, labels, lambda *args: one_loss(*args, fused_linear_ce, **how))

    specs = {"x": P(), "weight": P("tp"), "bias": P("tp")}
    loss = shard_map(body, make_mesh(tp=4), (specs, P()), check_vma=check_vma)
    got = differentiate(lambda primals: loss(primals, BATCHES.labels), BATCHES.primals)
    assert_close(got, program_as_whole(program))


def test_vmap_from_outside() -> None:
    def losses(primals: Arrays) -> jax.Array:
        def of_batch(x: jax.Array, labels: jax.Array) -> jax.Array:
            return over_vocab(make_mesh(tp=4), labels, engine="torch", **OPTIONS)(primals | {"x": x})

        return jax.vmap(of_batch)(primals["x"], BATCHES.labels)

    def in_turn(primals: Arrays) -> jax.Array:
        pairs = zip(primals["x"], BATCHES.labels, strict=True)
        return jnp.stack([one_loss(primals, x, labels, reference.fused_linear_ce) for x, labels in pairs])

    assert_close(*(differentiate(function, BATCHES.primals, STEPS) for function in (losses, in_turn)))


@checked_and_not
def test_vmap_from_outside_over_an_axis_of_the_mesh(check_vma: bool) -> None:
    def body(primals: Arrays, labels: jax.Array) -> jax.Array:
        total = fused_linear_ce(**primals, labels=labels, reduction="sum", engine="torch", **OPTIONS)
        return jax.lax.psum(total, "tok")

    in_specs = ({"x": P("tok"), "weight": P(), "bias": P()}, P("tok"))
    run = shard_map(body, make_mesh(dp=3, tok=2), in_specs, check_vma=check_vma)
    axes = ({"x": 0, "weight": None, "bias": None}, 0)

    def sharded(primals: Arrays) -> jax.Array:
        return jax.vmap(run, axes, spmd_axis_name="dp")(primals, BATCHES.labels)

    def whole(primals: Arrays) -> jax.Array:
        one = functools.partial(reference.fused_linear_ce, reduction="sum", **OPTIONS)
        return jax.vmap(lambda primals, labels: one(**primals, labels=labels), axes)(primals, BATCHES.labels)

    assert_close(*(differentiate(function, BATCHES.primals, STEPS) for function in (sharded, whole)))


def test_vmap_of_grad_inside() -> None:
    """One gradient of the weight per batch."""

    def body(primals: Arrays, labels: jax.Array) -> Any:
        return jax.vmap(jax.value_and_grad(global_mean), ({"x": 0, "weight": None, "bias": None}, 0))(primals, labels)

    in_specs = {"x": P(None, "dp"), "weight": P("tp"), "bias": P("tp")}
    out_specs = {"x": P(None, "dp"), "weight": P(None, "tp"), "bias": P(None, "tp")}
    run = shard_map(body, make_mesh(dp=2, tp=2), (in_specs, P(None, "dp")), (P(), out_specs))
    loss, gradients = jax.block_until_ready(jax.jit(run)(BATCHES.primals, BATCHES.labels))
    for batch, labels in enumerate(BATCHES.labels):
        primals = BATCHES.primals | {"x": BATCHES.primals["x"][batch]}
        problem = Problem(primals, labels, BATCHES.class_weight, BATCHES.upstream[batch])
        want = LINEAR.expected(problem, class_weight=None, **OPTIONS)
        assert_as_expected(loss[batch], want.loss)
        assert_gradients({name: gradient[batch] for name, gradient in gradients.items()}, want.gradients)


def test_the_output_as_auxiliary_inside() -> None:
    def body(primals: Arrays, labels: jax.Array) -> Any:
        def loss(primals: Arrays) -> Any:
            out = fused_linear_ce(**primals, labels=labels, vocab_axis="tp", **METRICS, **OPTIONS)
            return UPSTREAM * out.loss, out

        (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(primals)
        return out, gradients

    specs = {"x": P(), "weight": P("tp"), "bias": P("tp")}
    run = shard_map(body, make_mesh(tp=4), (specs, P()), out_specs=(P(), specs))
    assert_as_whole(jax.block_until_ready(jax.jit(run)(PROBLEM.primals, PROBLEM.labels)), PROBLEM, **OPTIONS)


# ---- a model


def model(parameters: Arrays, tokens: jax.Array, labels: jax.Array, function: Callable[..., Any], **how: Any) -> Any:
    hidden = jnp.tanh(jnp.matmul(tokens, parameters["inner"], precision="highest"))
    return function(hidden, parameters["weight"], labels, parameters["bias"], **OPTIONS, **how)


RNG = np.random.default_rng(7)
PARAMETERS = {
    "inner": jnp.asarray(RNG.normal(size=(5, HIDDEN)), jnp.float32),
    "weight": PROBLEM.primals["weight"],
    "bias": jnp.zeros(VOCAB),
}
INPUTS = jnp.asarray(RNG.normal(size=(TOKENS, 5)), jnp.float32)
PARAMETER_SPECS = {"inner": P(), "weight": P("tp"), "bias": P("tp")}


def sharded_model(parameters: Arrays, tokens: jax.Array, labels: jax.Array) -> jax.Array:
    how = {"vocab_axis": "tp", "engine": "torch"}
    loss = model(parameters, tokens, labels, fused_linear_ce, reduction="sum", **how)
    return jax.lax.psum(loss, "dp") / jax.lax.psum((labels != IGNORED).sum(), "dp")


@functools.cache
def whole_model() -> tuple[jax.Array, Arrays]:
    return differentiate(lambda p: model(p, INPUTS, PROBLEM.labels, reference.fused_linear_ce), PARAMETERS)


@on_8_checked_and_not
def test_a_model(shape: tuple[int, int], check_vma: bool) -> None:
    specs = (PARAMETER_SPECS, P("dp"), P("dp"))
    loss = shard_map(sharded_model, make_mesh(dp=shape[0], tp=shape[1]), specs, check_vma=check_vma)
    got = differentiate(lambda parameters: loss(parameters, INPUTS, PROBLEM.labels), PARAMETERS)
    assert_close(got, whole_model())


def test_steps_of_training_inside() -> None:
    """Each gradient is as its parameter, which so keeps its sharding from step to step."""

    def descend(loss: Callable[..., Any]) -> Callable[..., Any]:
        def run(parameters: Arrays, tokens: jax.Array, labels: jax.Array) -> Any:
            def step(parameters: Arrays, _: None) -> Any:
                value, gradients = jax.value_and_grad(loss)(parameters, tokens, labels)
                return jax.tree.map(lambda p, g: p - 0.5 * g, parameters, gradients), value

            return jax.lax.scan(step, parameters, length=3)

        return run

    specs = (PARAMETER_SPECS, P("dp"), P("dp"))
    run = shard_map(descend(sharded_model), make_mesh(dp=2, tp=4), specs, out_specs=(PARAMETER_SPECS, P()))
    got = jax.block_until_ready(jax.jit(run)(PARAMETERS, INPUTS, PROBLEM.labels))
    plain = descend(lambda *arguments: model(*arguments, reference.fused_linear_ce))
    assert_close(got, jax.jit(plain)(PARAMETERS, INPUTS, PROBLEM.labels), rtol=1e-4, atol=1e-5)
