"""What the functions of the JAX frontend take and answer with: signatures, outputs, dtypes, shapes, layouts."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import torch_api
from jax_api import CrossEntropyOutput, cross_entropy, fused_linear_ce
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
    assert_as_expected,
    assert_close,
    assert_same_bits,
    each_operation,
    eager_and_jit,
    eagerly,
    kernels_run,
    with_output_as_auxiliary,
    x64_by_config,
)

FIELDS = {
    "return_z_loss": ("z_loss",),
    "return_token_accuracy": ("token_accuracy",),
    "return_predicted_tokens": ("predicted_tokens",),
    "return_counts": ("num_valid", "num_correct"),
}

# ---- signatures

POSITIONAL = {
    cross_entropy: {"logits": inspect.Parameter.empty, "labels": inspect.Parameter.empty},
    fused_linear_ce: {
        "x": inspect.Parameter.empty,
        "weight": inspect.Parameter.empty,
        "labels": inspect.Parameter.empty,
        "bias": None,
    },
}
SHARED_KEYWORDS = {
    "ignore_index": -100,
    "lse_square_scale": 0.0,
    "label_smoothing": 0.0,
    "reduction": "mean",
    "softcap": None,
    "return_z_loss": False,
    "return_token_accuracy": False,
    "return_predicted_tokens": False,
    "logit_scale": 1.0,
    "return_counts": False,
    "num_items_in_batch": None,
    "where": None,
    "engine": "auto",
    "check_labels": False,
    "cuda_graph": False,
}
KEYWORDS = {
    cross_entropy: SHARED_KEYWORDS | {"weight": None},
    fused_linear_ce: SHARED_KEYWORDS
    | {
        "ce_weight": None,
        "accum_dtype": None,
        "use_token_scaling": False,
        "weight_layout": "vh",
        "vocab_axis": None,
        "memory": "auto",
    },
}


def defaults(function: Callable[..., Any], kind: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is kind}


@pytest.mark.parametrize("function", (cross_entropy, fused_linear_ce))
def test_signature(function: Callable[..., Any]) -> None:
    positional = defaults(function, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert list(positional.items()) == list(POSITIONAL[function].items())
    assert defaults(function, inspect.Parameter.KEYWORD_ONLY) == KEYWORDS[function]
    assert len(inspect.signature(function).parameters) == len(positional) + len(KEYWORDS[function])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    ((cross_entropy, torch_api.cross_entropy), (fused_linear_ce, torch_api.fused_linear_cross_entropy)),
)
def test_options_have_the_names_and_defaults_of_the_torch_frontend(
    ours: Callable[..., Any], theirs: Callable[..., Any]
) -> None:
    def options(function: Callable[..., Any]) -> dict[str, Any]:
        parameters = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    torch_only = {"size_average", "reduce", "process_group"}  # two that are deprecated; vocab_axis is the third
    jax_only = {"where", "weight_layout", "vocab_axis", "cuda_graph"}
    theirs_alone = {name: default for name, default in options(theirs).items() if name not in torch_only}
    assert {name: default for name, default in options(ours).items() if name not in jax_only} == theirs_alone


# ---- the output


@eager_and_jit
@each_operation
def test_without_flags_the_loss_is_a_bare_array(operation: Operation, transform: Callable[..., Any]) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem)
    loss = transform(ours)(problem.primals)
    assert isinstance(loss, jax.Array) and loss.shape == ()
    assert_as_expected(loss, operation.expected(problem).loss)


@pytest.mark.parametrize("reduction", ("none", "mean"))
@pytest.mark.parametrize("flag", FIELDS)
@each_operation
def test_a_flag_fills_its_field_and_no_other(operation: Operation, flag: str, reduction: str) -> None:
    problem = operation.problem((2, 3))
    ours, _ = operation.losses(problem, reduction=reduction, **{flag: True}, **OPTIONS)
    out = ours(problem.primals)
    assert isinstance(out, CrossEntropyOutput)
    want = operation.expected(problem, reduction=reduction, **OPTIONS)
    for field in dataclasses.fields(CrossEntropyOutput):
        value = getattr(out, field.name)
        if field.name in ("loss", *FIELDS[flag]):
            assert_as_expected(value, getattr(want, field.name))
        else:
            assert value is None


def test_the_output_is_a_pytree() -> None:
    out = CrossEntropyOutput(loss=jnp.float32(1.5), predicted_tokens=jnp.array([3, -1]))
    assert [leaf.tolist() for leaf in jax.tree.leaves(out)] == [1.5, [3, -1]]

    doubled = jax.tree.map(lambda leaf: 2 * leaf, out)
    assert isinstance(doubled, CrossEntropyOutput)
    assert (float(doubled.loss), doubled.predicted_tokens.tolist()) == (3.0, [6, -2])
    assert doubled.z_loss is None and doubled.token_accuracy is None

    through_jit = jax.jit(lambda tree: tree)(out)
    assert_same_bits(through_jit, out)
    assert jax.tree.structure(out) != jax.tree.structure(dataclasses.replace(out, z_loss=jnp.float32(0)))


def test_the_fields_of_the_output_are_in_order() -> None:
    fields = [field.name for field in dataclasses.fields(CrossEntropyOutput)]
    assert fields == ["loss", "z_loss", "token_accuracy", "predicted_tokens", "num_valid", "num_correct"]
    full = CrossEntropyOutput(*(jnp.float32(index) for index in range(6)))
    assert [float(leaf) for leaf in jax.tree.leaves(full)] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(dataclasses.FrozenInstanceError):
        full.loss = jnp.float32(1)  # type: ignore[misc]


# ---- dtypes


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16, jnp.float16))
@each_operation
def test_the_loss_is_float32_and_a_gradient_has_its_inputs_dtype(operation: Operation, dtype: Any) -> None:
    problem = operation.problem(dtype=dtype)
    ours, _ = operation.losses(problem, **METRICS)
    (_, out), gradients = jax.value_and_grad(with_output_as_auxiliary(ours), has_aux=True)(problem.primals)
    assert (out.loss.dtype, out.z_loss.dtype, out.token_accuracy.dtype) == (jnp.float32,) * 3
    assert out.predicted_tokens.dtype == jnp.int32
    want = operation.expected(problem)
    assert_as_expected(out.loss, want.loss)
    assert_as_expected(out.predicted_tokens, want.predicted_tokens, rtol=0, atol=0)
    rounding = max(2 * float(jnp.finfo(dtype).eps), 2e-5)
    for name, by_name in gradients.items():
        assert by_name.dtype == dtype
        assert_as_expected(by_name, want.gradients[name], rtol=rounding, atol=rounding * 5e-2)


def test_class_weights_may_have_another_float_dtype() -> None:
    problem = LINEAR.problem(dtype=jnp.bfloat16)
    ours, _ = LINEAR.losses(problem)
    assert problem.class_weight.dtype == jnp.float32
    assert_as_expected(ours(problem.primals), LINEAR.expected(problem).loss)


@pytest.mark.parametrize(
    ("enabled", "label_dtype", "transform"),
    ((x64_by_config, jnp.int64, jax.jit), (lambda: jax.enable_x64(True), jnp.int32, eagerly)),
    ids=("by configuration, int64 labels, jit", "by context manager, int32 labels, eager"),
)
@each_operation
def test_x64_widens_predictions_and_labels_and_nothing_else(
    operation: Operation,
    enabled: Callable[[], contextlib.AbstractContextManager[Any]],
    label_dtype: Any,
    transform: Callable[..., Any],
) -> None:
    problem = operation.problem()

    def run(problem: Problem) -> Any:
        ours, _ = operation.losses(problem, **METRICS, **OPTIONS)
        return transform(jax.value_and_grad(with_output_as_auxiliary(ours), has_aux=True))(problem.primals)

    (narrow_loss, narrow), narrow_gradients = run(problem)
    with enabled():
        labels = problem.labels.astype(label_dtype)
        assert labels.dtype == label_dtype
        (loss, out), gradients = run(dataclasses.replace(problem, labels=labels))
        for name in ("predicted_tokens", "num_valid", "num_correct"):
            assert getattr(out, name).dtype == jnp.int64
            out = dataclasses.replace(out, **{name: getattr(out, name).astype(jnp.int32)})
    assert_same_bits((loss, out, gradients), (narrow_loss, narrow, narrow_gradients))


# ---- shapes


@pytest.mark.parametrize("leading", ((2, 3), (1, 3, 2)))
@each_operation
def test_leading_dimensions_are_tokens(operation: Operation, leading: tuple[int, ...]) -> None:
    flat = operation.problem((6,))
    shaped = dataclasses.replace(
        flat,
        primals=flat.primals | {operation.rows: flat.primals[operation.rows].reshape(*leading, -1)},
        labels=flat.labels.reshape(leading),
    )

    def run(problem: Problem, cotangent: jax.Array) -> tuple[Any, Arrays]:
        ours, _ = operation.losses(problem, reduction="none", **METRICS, **OPTIONS)
        loss, vjp, out = jax.vjp(with_output_as_auxiliary(ours), problem.primals, has_aux=True)
        return (loss, out), vjp(cotangent)[0]

    want, want_gradients = run(flat, flat.upstream)
    got, gradients = run(shaped, flat.upstream.reshape(leading))
    assert_same_bits(got, jax.tree.map(lambda leaf: leaf.reshape(leading), want))
    rows = want_gradients[operation.rows].reshape(*leading, -1)
    assert_same_bits(gradients, want_gradients | {operation.rows: rows})


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@each_operation
def test_a_single_token_has_0d_labels(operation: Operation, reduction: str) -> None:
    problem = operation.problem(())
    assert problem.labels.shape == ()
    ours, _ = operation.losses(problem, reduction=reduction, **METRICS, **OPTIONS)
    (_, out), gradients = jax.value_and_grad(with_output_as_auxiliary(ours), has_aux=True)(problem.primals)
    want = operation.expected(problem, reduction=reduction, **OPTIONS)
    for field in dataclasses.fields(CrossEntropyOutput):
        assert_as_expected(getattr(out, field.name), getattr(want, field.name))
    for name, by_name in gradients.items():
        assert_as_expected(by_name, want.gradients[name])


@pytest.mark.parametrize("leading", ((0,), (2, 0)))
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@eager_and_jit
@each_operation
def test_an_empty_batch_has_loss_0_and_gradient_0(
    operation: Operation, transform: Callable[..., Any], reduction: str, leading: tuple[int, ...]
) -> None:
    problem = operation.problem(leading)
    ours, _ = operation.losses(problem, reduction=reduction, **METRICS)

    def total_and_output(primals: Arrays) -> tuple[jax.Array, CrossEntropyOutput]:
        out = ours(primals)
        return out.loss.sum(), out

    (_, out), gradients = transform(jax.value_and_grad(total_and_output, has_aux=True))(problem.primals)
    per_token = jnp.zeros(leading)
    reduced = per_token if reduction == "none" else jnp.float32(0)
    no_tokens, count = per_token.astype(jnp.int32), reduced.astype(jnp.int32)
    assert_same_bits(out, CrossEntropyOutput(reduced, reduced, reduced, no_tokens, count, count))
    assert_same_bits(gradients, jax.tree.map(jnp.zeros_like, problem.primals))


# ---- the weight's layout


def test_weight_layout_hv_is_the_transposed_weight() -> None:
    problem = LINEAR.problem()
    flipped = dataclasses.replace(problem, primals=problem.primals | {"weight": problem.primals["weight"].T})
    vh, _ = LINEAR.losses(problem, **OPTIONS)
    hv, _ = LINEAR.losses(flipped, weight_layout="hv", **OPTIONS)

    want, want_gradients = jax.value_and_grad(vh)(problem.primals)
    want_gradients |= {"weight": want_gradients["weight"].T}
    compare = assert_same_bits if kernels_run() else assert_close
    for transform in (lambda f: f, jax.jit):
        got, gradients = transform(jax.value_and_grad(hv))(flipped.primals)
        assert gradients["weight"].shape == (HIDDEN, VOCAB)
        compare((got, gradients), (want, want_gradients))


def test_weight_layout_hv_of_an_empty_batch_has_a_gradient_of_its_layout() -> None:
    problem = LINEAR.problem((0,))
    flipped = problem.primals | {"weight": problem.primals["weight"].T}
    by_weight = jax.grad(lambda p: fused_linear_ce(**p, labels=problem.labels, weight_layout="hv"))(flipped)["weight"]
    assert_same_bits(by_weight, jnp.zeros((HIDDEN, VOCAB)))


# ---- numpy, engines


@each_operation
def test_numpy_arrays_are_accepted(operation: Operation) -> None:
    problem = operation.problem()
    where = jnp.arange(problem.labels.size) != 2
    arrays = {**problem.primals, "labels": problem.labels, operation.class_weight: problem.class_weight, "where": where}
    in_numpy = {name: np.array(array) for name, array in arrays.items()}
    in_numpy[operation.rows] = np.asfortranarray(in_numpy[operation.rows])
    in_numpy["labels"] = in_numpy["labels"].astype(np.int64)  # NumPy's own default
    got = operation.function(**in_numpy, **METRICS, **OPTIONS)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(got))
    assert_same_bits(got, operation.function(**arrays, **METRICS, **OPTIONS))


@pytest.mark.parametrize("engine", ("torch", "triton"))
@each_operation
def test_the_engine_can_be_chosen(operation: Operation, engine: str) -> None:
    if engine == "triton" and not kernels_run():
        pytest.skip("the kernels do not run here")
    problem = operation.problem()
    automatic, _ = operation.losses(problem, **METRICS, **OPTIONS)
    chosen, _ = operation.losses(problem, engine=engine, **METRICS, **OPTIONS)
    is_default = (engine == "triton") == kernels_run()
    compare = assert_same_bits if is_default else assert_close
    for transform in (lambda f: f, lambda f: jax.grad(lambda p: f(p).loss)):
        compare(transform(chosen)(problem.primals), transform(automatic)(problem.primals))


def test_items_may_be_a_fraction() -> None:
    """As a sum of class weights may be."""
    problem = LOGITS.problem()
    fraction, _ = LOGITS.losses(problem, num_items_in_batch=jnp.float32(0.25))
    total, _ = LOGITS.losses(problem, reduction="sum")
    assert_same_bits(fraction(problem.primals), 4 * total(problem.primals))


def test_accum_dtype_changes_nothing() -> None:
    problem = LINEAR.problem()
    plain, _ = LINEAR.losses(problem)
    for accum_dtype in (jnp.float32, "bfloat16", np.dtype("float16")):
        chosen, _ = LINEAR.losses(problem, accum_dtype=accum_dtype)
        assert_same_bits(chosen(problem.primals), plain(problem.primals))


def test_logits_are_the_projection_with_an_identity() -> None:
    """The two operations agree where they compute the same loss."""
    problem = LOGITS.problem()
    logits = problem.primals["logits"]
    got = fused_linear_ce(logits, jnp.eye(VOCAB), problem.labels, ce_weight=problem.class_weight, **METRICS, **OPTIONS)
    want = cross_entropy(logits, problem.labels, weight=problem.class_weight, **METRICS, **OPTIONS)
    assert_close(got, want)
