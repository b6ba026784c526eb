"""Labels that are no class: an error where they can be read, NaN where they cannot; and any ``ignore_index``."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.jax_api.problems import (
    IGNORED,
    UPSTREAM,
    VOCAB,
    Arrays,
    Operation,
    assert_as_expected,
    assert_same_bits,
    call_or_trace,
    each_operation,
    x64_by_config,
)

BAD_LABELS = (VOCAB, VOCAB + 1000, 2**31 - 1, -1, -(2**31))
labels_are_read = pytest.mark.skipif(jax.default_backend() != "cpu", reason="labels on a GPU are not read back")


def loss_and_gradients(operation: Operation, arrays: Arrays, labels: Any, **options: Any) -> Any:
    """Value and gradients; a per-token loss is pulled back by uneven gradients from upstream."""
    problem = operation.problem((2, 3))
    fixed = {"labels": labels, operation.class_weight: problem.class_weight, **options}
    value, vjp = jax.vjp(lambda primals: operation.function(**primals, **fixed), arrays)
    return value, vjp(problem.upstream if value.ndim else jnp.float32(UPSTREAM))[0]


@labels_are_read
@pytest.mark.parametrize("check_labels", (False, True))
@pytest.mark.parametrize("value", BAD_LABELS)
@each_operation
def test_a_bad_label_raises_in_a_plain_call(
    operation: Operation, value: int, check_labels: bool, nothing_runs: None
) -> None:
    problem = operation.problem((2, 3))
    labels = problem.labels.at[1, 0].set(value)
    with pytest.raises(IndexError) as caught:
        operation.function(**problem.primals, labels=labels, check_labels=check_labels)
    assert str(caught.value) == (
        f"labels[1, 0] = {value} is out of range: a label must be in [0, {VOCAB}) or equal ignore_index=-100"
    )


@labels_are_read
@each_operation
def test_the_first_bad_label_is_named(operation: Operation, nothing_runs: None) -> None:
    problem = operation.problem()
    labels = problem.labels.at[4].set(-7).at[2].set(-5)
    with pytest.raises(IndexError) as caught:
        operation.function(**problem.primals, labels=labels, ignore_index=IGNORED)
    assert str(caught.value) == (
        f"labels[2] = -5 is out of range: a label must be in [0, {VOCAB}) or equal ignore_index=-100"
    )


@labels_are_read
@each_operation
def test_a_bad_0d_label_is_named(operation: Operation, nothing_runs: None) -> None:
    problem = operation.problem(())
    with pytest.raises(IndexError) as caught:
        operation.function(**problem.primals, labels=jnp.int32(VOCAB), ignore_index=3)
    assert str(caught.value) == (
        f"labels = {VOCAB} is out of range: a label must be in [0, {VOCAB}) or equal ignore_index=3"
    )


@labels_are_read
@pytest.mark.parametrize("value", (2**32 + 3, 2**40, -(2**32) + 3))
@each_operation
def test_a_bad_int64_label_of_numpy_is_not_wrapped(operation: Operation, value: int, nothing_runs: None) -> None:
    """With x64 off JAX would wrap it to 32 bits, which may give a class."""
    problem = operation.problem()
    labels = np.array(problem.labels, np.int64)
    labels[2] = value
    with pytest.raises(IndexError) as caught:
        operation.function(**problem.primals, labels=labels)
    assert str(caught.value) == (
        f"labels[2] = {value} is out of range: a label must be in [0, {VOCAB}) or equal ignore_index=-100"
    )


@labels_are_read
@each_operation
def test_a_bad_int64_label_raises_under_x64(operation: Operation, nothing_runs: None) -> None:
    problem = operation.problem()
    with x64_by_config():
        labels = problem.labels.astype(jnp.int64).at[2].set(2**32 + 3)
        with pytest.raises(IndexError) as caught:
            operation.function(**problem.primals, labels=labels)
    assert str(caught.value) == (
        f"labels[2] = 4294967299 is out of range: a label must be in [0, {VOCAB}) or equal ignore_index=-100"
    )


@each_operation
def test_check_labels_raises_wherever_the_call_runs(operation: Operation, nothing_runs: None) -> None:
    problem = operation.problem()
    labels = problem.labels.at[3].set(VOCAB)
    with pytest.raises(IndexError) as caught:
        operation.function(**problem.primals, labels=labels, check_labels=True)
    assert str(caught.value) == (
        f"labels[3] = {VOCAB} is out of range: a label must be in [0, {VOCAB}) or equal ignore_index=-100"
    )


@each_operation
def test_check_labels_needs_labels_that_are_not_traced(operation: Operation, nothing_runs: None) -> None:
    problem = operation.problem()
    with pytest.raises(ValueError) as caught:
        arguments = {**problem.primals, "labels": problem.labels, "check_labels": True}
        call_or_trace(operation.function, arguments, trace=True)
    assert str(caught.value) == (
        "check_labels=True needs labels whose values are known, and these are traced: call outside jit and other "
        "transformations, or leave it off: a bad label then gives a NaN loss"
    )


@each_operation
def test_check_labels_passes_good_labels(operation: Operation) -> None:
    problem = operation.problem()
    checked, _ = operation.losses(problem, check_labels=True)
    assert_as_expected(checked(problem.primals), operation.expected(problem).loss)


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@each_operation
def test_a_bad_label_that_is_not_read_gives_nan_and_no_gradient(operation: Operation, reduction: str) -> None:
    problem = operation.problem((2, 3))
    labels = problem.labels.at[0, 2].set(VOCAB).at[1, 1].set(-1)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1, "lse_square_scale": 0.02}

    run = lambda primals, labels: loss_and_gradients(operation, primals, labels, **options)  # noqa: E731
    loss, gradients = jax.jit(run)(problem.primals, labels)

    upstream = problem.upstream if reduction == "none" else jnp.float32(UPSTREAM)
    want = operation.expected(dataclasses.replace(problem, labels=labels), upstream=upstream, **options)
    assert np.isnan(want.loss).sum() == (2 if reduction == "none" else 1)
    assert_as_expected(loss, want.loss)
    for name, by_name in gradients.items():
        assert np.any(want.gradients[name])
        assert_as_expected(by_name, want.gradients[name])
    by_rows = np.asarray(gradients[operation.rows])
    assert not np.any(by_rows[0, 2]) and not np.any(by_rows[1, 1]) and np.any(by_rows[0, 1])


@each_operation
def test_any_bad_label_gives_the_same_nan(operation: Operation) -> None:
    problem = operation.problem((2, 3))
    run = jax.jit(lambda primals, labels: loss_and_gradients(operation, primals, labels, reduction="none"))
    want = run(problem.primals, problem.labels.at[1, 0].set(-3))
    assert np.isnan(np.asarray(want[0])).tolist() == [[False, False, False], [True, False, False]]
    for value in BAD_LABELS:
        assert_same_bits(run(problem.primals, problem.labels.at[1, 0].set(value)), want)


@pytest.mark.skipif(jax.default_backend() == "cpu", reason="labels on a CPU are read")
@each_operation
def test_a_plain_call_on_a_gpu_does_not_read_the_labels(operation: Operation) -> None:
    problem = operation.problem()
    labels = problem.labels.at[2].set(VOCAB)
    ours, _ = operation.losses(dataclasses.replace(problem, labels=labels), reduction="none")
    want = operation.expected(dataclasses.replace(problem, labels=labels), reduction="none")
    assert_as_expected(ours(problem.primals), want.loss)


@pytest.mark.parametrize("ignore_index", (5, VOCAB + 3, -1, 0))
@each_operation
def test_ignore_index_inside_and_outside_the_classes(operation: Operation, ignore_index: int) -> None:
    problem = operation.problem((2, 3))
    labels = jnp.where(problem.labels == IGNORED, ignore_index, problem.labels).at[1, 0].set(ignore_index)
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": "none"}
    loss, gradients = loss_and_gradients(operation, problem.primals, labels, **options)
    relabelled = dataclasses.replace(problem, labels=labels)
    want = operation.expected(relabelled, upstream=problem.upstream, **options)
    assert (want.loss == 0).sum() >= 3
    assert_as_expected(loss, want.loss)
    for name, by_name in gradients.items():
        assert_as_expected(by_name, want.gradients[name])


@pytest.mark.parametrize("ignore_index", (2**32 - 1, 2**40, -(2**40)))
@each_operation
def test_an_ignore_index_beyond_32_bits_ignores_no_label_of_32_bits(operation: Operation, ignore_index: int) -> None:
    """2**32 - 1 is -1 in 32 bits: it must not be taken for it."""
    problem = operation.problem()
    labels = jnp.where(problem.labels == IGNORED, 4, problem.labels).at[2].set(-1).at[3].set(0)
    ours = jax.jit(
        lambda primals, labels: operation.function(
            **primals, labels=labels, ignore_index=ignore_index, reduction="none"
        )
    )
    want = operation.expected(
        dataclasses.replace(problem, labels=labels), class_weight=None, ignore_index=ignore_index, reduction="none"
    )
    assert np.isnan(want.loss).tolist() == [position == 2 for position in range(problem.labels.size)]
    assert_as_expected(ours(problem.primals, labels), want.loss)
