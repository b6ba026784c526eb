"""Tokens masked by ``where``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_api import CrossEntropyOutput, cross_entropy
from tests.jax_api.problems import (
    IGNORED,
    METRICS,
    OPTIONS,
    VOCAB,
    Arrays,
    Operation,
    Problem,
    assert_as_expected,
    assert_same_bits,
    each_operation,
    eager_and_jit,
    eagerly,
)


def results_of(operation: Operation, problem: Problem, transform: Callable[..., Any], **options: Any) -> Any:
    """Loss, metrics and gradients of a per-token loss, under the problem's upstream gradient."""

    def run(primals: Arrays, labels: jax.Array, where: jax.Array | None) -> Any:
        ours, _ = operation.losses(dataclasses.replace(problem, labels=labels), where=where, **METRICS, **options)

        def weighted(p: Arrays) -> tuple[jax.Array, CrossEntropyOutput]:
            out = ours(p)
            return (out.loss * problem.upstream).sum(), out

        return jax.value_and_grad(weighted, has_aux=True)(primals)

    where = options.pop("where", None)
    return transform(run)(problem.primals, problem.labels, where)


@pytest.mark.parametrize(
    ("reduction", "transform"),
    (("none", eagerly), ("mean", jax.jit)),
    ids=("none, eager", "mean, jit"),
)
@each_operation
def test_where_composes_with_ignore_index(operation: Operation, reduction: str, transform: Callable[..., Any]) -> None:
    problem = operation.problem()
    where = jnp.arange(problem.labels.size) % 3 != 1  # also true where the label is ignored already
    masked = dataclasses.replace(problem, labels=jnp.where(where, problem.labels, IGNORED))
    options = OPTIONS | {"reduction": reduction}
    got = results_of(operation, problem, transform, where=where, **options)
    assert_same_bits(got, results_of(operation, masked, transform, **options))
    want = operation.expected(masked, **options)
    assert 0 < (want.predicted_tokens >= 0).sum() < (np.asarray(problem.labels) != IGNORED).sum()
    assert_as_expected(got[0][1].loss, want.loss)
    assert_as_expected(got[0][1].predicted_tokens, want.predicted_tokens)


@each_operation
def test_where_uses_the_ignore_index_it_is_given(operation: Operation) -> None:
    problem = operation.problem()
    problem = dataclasses.replace(problem, labels=jnp.where(problem.labels == IGNORED, 4, problem.labels))
    where = jnp.arange(problem.labels.size) > 2
    masked = dataclasses.replace(problem, labels=jnp.where(where, problem.labels, 4))
    ours, _ = operation.losses(problem, where=where, ignore_index=4)
    assert_as_expected(ours(problem.primals), operation.expected(masked, ignore_index=4).loss)


@each_operation
def test_where_false_everywhere_gives_0(operation: Operation) -> None:
    problem = operation.problem()
    nowhere = jnp.zeros(problem.labels.shape, bool)
    (_, out), gradients = results_of(operation, problem, jax.jit, where=nowhere, **OPTIONS)
    assert (float(out.loss), float(out.z_loss), float(out.token_accuracy)) == (0.0, 0.0, 0.0)
    assert_same_bits(out.predicted_tokens, jnp.full(problem.labels.shape, -1, jnp.int32))
    assert_same_bits(gradients, jax.tree.map(jnp.zeros_like, problem.primals))


@eager_and_jit
@each_operation
def test_a_bad_label_that_where_masks_is_ignored(operation: Operation, transform: Callable[..., Any]) -> None:
    problem = operation.problem()
    bad = dataclasses.replace(problem, labels=problem.labels.at[3].set(VOCAB))
    ignored = dataclasses.replace(problem, labels=problem.labels.at[3].set(IGNORED))
    where = jnp.arange(problem.labels.size) != 3
    got = results_of(operation, bad, transform, where=where, reduction="none")
    assert_same_bits(got, results_of(operation, ignored, transform, reduction="none"))


def test_where_masks_a_label_of_more_than_32_bits() -> None:
    logits = jnp.array([[1.0, 2.0, 0.5], [3.0, 1.0, 0.0]])
    masked = cross_entropy(logits, np.array([1, 2**40]), where=jnp.array([True, False]))
    assert masked == cross_entropy(logits[:1], jnp.array([1]))
