"""The losses over batches: ``vmap`` in all its spellings, and loops. Each entry is as a call of its own gives it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_api import CrossEntropyOutput
from tests.jax_api.problems import (
    LINEAR,
    LOGITS,
    METRICS,
    OPTIONS,
    Arrays,
    Operation,
    Problem,
    assert_as_expected,
    assert_close,
    each_operation,
)

BATCH, TOKENS = 3, 4
UPSTREAM = np.array([1.5, -2.0, 0.5], np.float32)  # one per entry

Axes = dict[str, int]


def arguments(operation: Operation, axes: Axes, sizes: tuple[int, ...] = (BATCH,)) -> Arrays:
    """Arguments by name, in NumPy; those in ``axes`` are batches, whose dimensions ``sizes`` lie in front."""
    rows = operation.problem((*sizes, TOKENS))
    one = operation.problem((TOKENS,), seed=99)
    many = [operation.problem((TOKENS,), seed=seed) for seed in range(math.prod(sizes))]

    def named(problem: Problem) -> Arrays:
        arrays = {**problem.primals, "labels": problem.labels, operation.class_weight: problem.class_weight}
        return {name: np.array(array) for name, array in arrays.items()}

    def batch(name: str) -> Any:
        if name in (operation.rows, "labels"):
            return named(rows)[name]
        stacked = np.stack([named(problem)[name] for problem in many])
        return stacked.reshape(*sizes, *stacked.shape[1:])

    return {name: batch(name) if name in axes else array for name, array in named(one).items()}


def entry(arrays: Arrays, axes: Axes, index: Any) -> Arrays:
    return {name: array[index] if name in axes else array for name, array in arrays.items()}


def floats(operation: Operation, arrays: Arrays) -> Arrays:
    """Those that have a gradient."""
    return {name: array for name, array in arrays.items() if name not in ("labels", operation.class_weight)}


@functools.cache
def reference_of_one(operation: Operation) -> Callable[[Arrays], tuple[Any, Arrays]]:
    """Value and gradients of one entry, in plain JAX."""

    def run(arrays: Arrays) -> tuple[jax.Array, Arrays]:
        loss = lambda p: operation.reference(**{**arrays, **p}, **OPTIONS)  # noqa: E731
        return jax.value_and_grad(loss)(floats(operation, arrays))

    compiled = jax.jit(run)
    return lambda arrays: jax.tree.map(np.asarray, compiled(arrays))


def expected(operation: Operation, arrays: Arrays, axes: Axes) -> tuple[Any, Arrays, Arrays]:
    """The losses of a batch; the gradients of each, weighted by ``UPSTREAM``; and those of the sum."""
    answers = [reference_of_one(operation)(entry(arrays, axes, index)) for index in range(BATCH)]
    each = {
        name: np.stack([u * by_name[name] for u, (_, by_name) in zip(UPSTREAM, answers, strict=True)])
        for name in answers[0][1]
    }
    total = {name: by_name if name in axes else by_name.sum(0) for name, by_name in each.items()}
    return np.stack([loss for loss, _ in answers]), each, total


def placed(arrays: Arrays, axes: Axes, positions: Axes) -> Arrays:
    """The batch dimension of each array moved from the front to its position."""
    return {name: np.moveaxis(a, 0, positions[name]) if name in axes else a for name, a in arrays.items()}


AXES: dict[str, tuple[Operation, Axes]] = {
    "linear, tokens": (LINEAR, {"x": 0, "labels": 0}),
    "linear, tokens, other axes": (LINEAR, {"x": 1, "labels": -1}),
    "linear, x": (LINEAR, {"x": 2}),
    "linear, labels": (LINEAR, {"labels": 0}),
    "linear, weight": (LINEAR, {"weight": 1}),
    "linear, bias": (LINEAR, {"bias": 0}),
    "linear, everything": (LINEAR, {"x": 0, "labels": 0, "weight": 0, "bias": 0, "ce_weight": 0}),
    "linear, tokens and class weights": (LINEAR, {"x": 0, "labels": 0, "ce_weight": 1}),
    "logits, tokens": (LOGITS, {"logits": 0, "labels": 0}),
    "logits, tokens, other axes": (LOGITS, {"logits": -1, "labels": 1}),
    "logits, logits": (LOGITS, {"logits": 1}),
    "logits, labels": (LOGITS, {"labels": 1}),
    "logits, everything": (LOGITS, {"logits": 0, "labels": 0, "weight": 0}),
}


def in_axes(arrays: Arrays, axes: Axes) -> tuple[dict[str, int | None]]:
    return ({name: axes.get(name) for name in arrays},)


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "loss": lambda loss: loss,
    "jit": jax.jit,
    "checkpoint": functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable),
}
SPELLED: dict[str, tuple[Operation, Axes, bool, str]] = {
    **{name: (*AXES[name], True, "loss") for name in AXES},
    **{f"{name}, eager": (*AXES[name], False, "loss") for name in ("linear, tokens", "logits, everything")},
    **{f"{name}, of jit": (*AXES[name], False, "jit") for name in ("linear, tokens", "logits, tokens")},
    **{f"{name}, of checkpoint": (*AXES[name], True, "checkpoint") for name in ("linear, tokens", "linear, weight")},
}


@pytest.mark.parametrize(("operation", "axes", "compiled", "wrapped"), SPELLED.values(), ids=SPELLED)
def test_losses_of_a_batch_and_their_gradient(operation: Operation, axes: Axes, compiled: bool, wrapped: str) -> None:
    arrays = arguments(operation, axes)
    shown = placed(arrays, axes, axes)
    mapped = jax.vmap(WRAPPED[wrapped](lambda a: operation.function(**a, **OPTIONS)), in_axes(arrays, axes))

    def total(primals: Arrays) -> tuple[jax.Array, jax.Array]:
        losses = mapped({**shown, **primals})
        return (UPSTREAM * losses).sum(), losses

    run = jax.grad(total, has_aux=True)
    gradients, losses = (jax.jit(run) if compiled else run)(floats(operation, shown))
    want, _, want_gradients = expected(operation, arrays, axes)
    assert_close(losses, want)
    assert_close(gradients, placed(want_gradients, axes, axes))


@pytest.mark.parametrize("name", ("linear, tokens, other axes", "linear, weight", "logits, tokens"))
def test_losses_of_a_batch_that_is_not_differentiated(name: str) -> None:
    operation, axes = AXES[name]
    arrays = arguments(operation, axes)
    mapped = jax.vmap(lambda arrays: operation.function(**arrays, **OPTIONS), in_axes(arrays, axes))
    want = expected(operation, arrays, axes)[0]
    assert_close(mapped(placed(arrays, axes, axes)), want)
    assert_close(jax.jit(mapped)(placed(arrays, axes, axes)), want)


@pytest.mark.parametrize(("operation", "axes"), AXES.values(), ids=AXES)
def test_gradients_of_a_batch_one_by_one(operation: Operation, axes: Axes) -> None:
    arrays = arguments(operation, axes)

    def of_one(arrays: Arrays, upstream: jax.Array) -> tuple[jax.Array, Arrays]:
        value, vjp = jax.vjp(lambda p: operation.function(**{**arrays, **p}, **OPTIONS), floats(operation, arrays))
        return value, vjp(upstream)[0]

    got = jax.jit(jax.vmap(of_one, (*in_axes(arrays, axes), 0)))(placed(arrays, axes, axes), UPSTREAM)
    assert_close(got, expected(operation, arrays, axes)[:2])


@each_operation
def test_vmap_of_grad_in_eager_mode(operation: Operation) -> None:
    axes = {operation.rows: 0, "labels": 0}
    arrays = arguments(operation, axes)

    def of_one(arrays: Arrays, upstream: jax.Array) -> Arrays:
        loss = lambda p: upstream * operation.function(**{**arrays, **p}, **OPTIONS)  # noqa: E731
        return jax.grad(loss)(floats(operation, arrays))

    got = jax.vmap(of_one, (*in_axes(arrays, axes), 0))(arrays, UPSTREAM)
    assert_close(got, expected(operation, arrays, axes)[1])


# ---- each reduction, with all that can be asked for


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("shared", (True, False), ids=("folded", "one by one"))
@each_operation
def test_metrics_of_a_batch(operation: Operation, reduction: str, shared: bool) -> None:
    """Per-token results come out along axis 1, and upstream differs by token."""
    axes = {operation.rows: 0, "labels": 0} | ({} if shared else {operation.class_weight: 0})
    arrays = arguments(operation, axes)
    per_token = reduction == "none"
    upstream = np.array(operation.problem((BATCH, TOKENS)).upstream) if per_token else UPSTREAM
    options = OPTIONS | {"reduction": reduction}
    out_axis = 1 if per_token else 0
    mapped = jax.vmap(
        lambda arrays: operation.function(**arrays, **METRICS, **options),
        in_axes(arrays, axes),
        CrossEntropyOutput(out_axis, out_axis, out_axis, -1, out_axis, out_axis),
    )

    def total(primals: Arrays) -> tuple[jax.Array, CrossEntropyOutput]:
        out = mapped({**arrays, **primals})
        return (jnp.moveaxis(out.loss, out_axis, 0) * upstream).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(floats(operation, arrays))
    wants = []
    for index in range(BATCH):
        one = entry(arrays, axes, index)
        problem = Problem(floats(operation, one), one["labels"], one[operation.class_weight], upstream)
        wants.append(operation.expected(problem, upstream=upstream[index], **options))
    for field in ("loss", "z_loss", "token_accuracy", "num_valid", "num_correct"):
        assert_as_expected(getattr(out, field), np.stack([getattr(want, field) for want in wants], out_axis))
    assert_as_expected(out.predicted_tokens, np.stack([want.predicted_tokens for want in wants], -1), 0, 0)
    for name, by_name in gradients.items():
        by_entry = [want.gradients[name] for want in wants]
        assert_as_expected(by_name, np.stack(by_entry) if name in axes else np.sum(by_entry, 0))


@pytest.mark.parametrize(
    "option",
    (
        {"use_token_scaling": True},
        {"weight_layout": "hv"},
        {"engine": "torch", "memory": "lean"},
        {"where": np.array([True, True, False, True])},
        {"ignore_index": 3},
    ),
    ids=lambda option: " ".join(option),
)
def test_other_options_of_a_batch(option: dict[str, Any]) -> None:
    """As in a loop over the entries, each a call of its own."""
    axes = {"x": 0, "labels": 0}
    arrays = arguments(LINEAR, axes)
    if option.get("weight_layout") == "hv":
        arrays["weight"] = arrays["weight"].T
    if "ignore_index" in option:
        arrays["labels"] = np.where(arrays["labels"] == -100, 3, arrays["labels"])

    def of_one(arrays: Arrays) -> jax.Array:
        return LINEAR.function(**arrays, **option, **OPTIONS)

    def gradient(losses: Callable[[Arrays], jax.Array]) -> Any:
        total = lambda p: (UPSTREAM * losses({**arrays, **p})).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(total))(floats(LINEAR, arrays))

    want = gradient(lambda arrays: jnp.stack([of_one(entry(arrays, axes, index)) for index in range(BATCH)]))
    assert_close(gradient(jax.vmap(of_one, in_axes(arrays, axes))), want)


# ---- batches of batches


NESTED: dict[str, tuple[Operation, Sequence[str], Sequence[str]]] = {
    "linear, tokens in tokens": (LINEAR, ("x", "labels"), ("x", "labels")),
    "linear, labels in tokens": (LINEAR, ("x", "labels"), ("labels",)),
    "linear, tokens in weights": (LINEAR, ("weight", "bias"), ("x", "labels")),
    "linear, weights in tokens": (LINEAR, ("x", "labels"), ("weight",)),
    "logits, tokens in tokens": (LOGITS, ("logits", "labels"), ("logits", "labels")),
    "logits, labels in logits": (LOGITS, ("logits",), ("labels",)),
}


@pytest.mark.parametrize(("operation", "outer", "inner"), NESTED.values(), ids=NESTED)
def test_a_batch_of_batches(operation: Operation, outer: Sequence[str], inner: Sequence[str]) -> None:
    sizes = (2, BATCH)
    full = arguments(operation, dict.fromkeys({*outer, *inner}, 0), sizes)
    arrays = dict(full)
    for name in {*outer, *inner}:  # of both sizes; what only one maps has only that
        arrays[name] = full[name][:, 0] if name not in inner else full[name][0] if name not in outer else full[name]
    upstream = np.array(operation.problem(sizes).upstream)
    one = lambda arrays: operation.function(**arrays, **OPTIONS)  # noqa: E731
    mapped = jax.vmap(jax.vmap(one, in_axes(arrays, dict.fromkeys(inner, 0))), in_axes(arrays, dict.fromkeys(outer, 0)))

    def total(primals: Arrays) -> tuple[jax.Array, jax.Array]:
        losses = mapped({**arrays, **primals})
        return (upstream * losses).sum(), losses

    (_, losses), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(floats(operation, arrays))
    losses = np.asarray(losses)
    want = {name: np.zeros(array.shape, np.float32) for name, array in gradients.items()}
    for i in range(sizes[0]):
        for j in range(sizes[1]):
            at = {n: ((i,) if n in outer else ()) + ((j,) if n in inner else ()) for n in arrays}
            loss, by_name = reference_of_one(operation)({name: array[at[name]] for name, array in arrays.items()})
            np.testing.assert_allclose(losses[i, j], loss, rtol=2e-5)
            for name, g in by_name.items():
                want[name][at[name]] += upstream[i, j] * g
    assert_close(gradients, want)


# ---- other ways over a batch


def by_scan(function: Callable[[Arrays], jax.Array], shared: Arrays, mapped: Arrays) -> jax.Array:
    def step(carry: jax.Array, batch: Arrays) -> tuple[jax.Array, jax.Array]:
        loss = function({**shared, **batch})
        return carry + loss, loss

    return jax.lax.scan(step, jnp.float32(0), mapped)[1]


def by_map(function: Callable[[Arrays], jax.Array], shared: Arrays, mapped: Arrays) -> jax.Array:
    return jax.lax.map(lambda batch: function({**shared, **batch}), mapped)


def by_map_in_batches(function: Callable[[Arrays], jax.Array], shared: Arrays, mapped: Arrays) -> jax.Array:
    return jax.lax.map(lambda batch: function({**shared, **batch}), mapped, batch_size=2)


def by_vmap_of_scan(function: Callable[[Arrays], jax.Array], shared: Arrays, mapped: Arrays) -> jax.Array:
    """A batch of scans, each over one entry."""
    scan = lambda batch: by_scan(function, shared, jax.tree.map(lambda a: a[None], batch))[0]  # noqa: E731
    return jax.vmap(scan)(mapped)


def by_vmap_of_cond(function: Callable[[Arrays], jax.Array], shared: Arrays, mapped: Arrays) -> jax.Array:
    def of_one(batch: Arrays) -> jax.Array:
        return jax.lax.cond(batch["labels"][1] >= 0, function, lambda _: jnp.float32(0), {**shared, **batch})

    return jax.vmap(of_one)(mapped)


def by_vmap_with_a_name(function: Callable[[Arrays], jax.Array], shared: Arrays, mapped: Arrays) -> jax.Array:
    """A collective over the batch: each entry gets its own loss back, by way of the sum."""

    def of_one(batch: Arrays) -> jax.Array:
        loss = function({**shared, **batch})
        return jax.lax.psum(loss, "batch") - jax.lax.psum(loss, "batch") + loss

    return jax.vmap(of_one, axis_name="batch")(mapped)


@pytest.mark.parametrize(
    "way", (by_scan, by_map, by_map_in_batches, by_vmap_of_scan, by_vmap_of_cond, by_vmap_with_a_name)
)
@each_operation
def test_other_ways_over_a_batch(operation: Operation, way: Callable[..., jax.Array]) -> None:
    axes = {operation.rows: 0, "labels": 0}
    arrays = arguments(operation, axes)

    def total(primals: Arrays) -> tuple[jax.Array, jax.Array]:
        all_arrays = {**arrays, **primals}
        shared = {name: array for name, array in all_arrays.items() if name not in axes}
        mapped = {name: array for name, array in all_arrays.items() if name in axes}
        losses = way(lambda arrays: operation.function(**arrays, **OPTIONS), shared, mapped)
        return (UPSTREAM * losses).sum(), losses

    (_, losses), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(floats(operation, arrays))
    want_losses, _, want = expected(operation, arrays, axes)
    assert_close(losses, want_losses)
    assert_close(gradients, want)
