"""The two operations with random inputs for them, and how their results are compared."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_api
from jax_api import CrossEntropyOutput
from tests.jax_api import reference
from tests.parity import oracle
from tests.support import interpreting

Arrays = dict[str, jax.Array]
Loss = Callable[[Arrays], jax.Array]

TOKENS, VOCAB, HIDDEN = 7, 70, 10  # several tiles of the vocabulary, the last one ragged
IGNORED = -100
OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "lse_square_scale": 0.02, "softcap": 6.0, "logit_scale": 0.8}
METRICS = {
    "return_z_loss": True,
    "return_token_accuracy": True,
    "return_predicted_tokens": True,
    "return_counts": True,
}
UPSTREAM = -1.7


@dataclass(frozen=True)
class Problem:
    """One call's arrays by keyword: what can be differentiated, what cannot, and a gradient from upstream per token."""

    primals: Arrays
    labels: jax.Array
    class_weight: jax.Array
    upstream: jax.Array


@dataclass(frozen=True)
class Operation:
    """A public function, its twins in plain JAX and in float64, and the names of its arguments."""

    name: str
    function: Callable[..., Any]
    reference: Callable[..., jax.Array]
    oracle: Callable[..., oracle.Expected]
    rows: str  # the argument that has one row per token
    class_weight: str

    def problem(
        self, leading: tuple[int, ...] = (TOKENS,), dtype: Any = jnp.float32, seed: int = 0, vocab: int = VOCAB
    ) -> Problem:
        """Random arrays; the first and the last label are ignored if there are more than two."""
        rng = np.random.default_rng(seed)

        def normal(shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
            return jnp.asarray(rng.normal(scale=scale, size=shape).astype(np.float32)).astype(dtype)

        if self is LINEAR:
            primals = {
                "x": normal((*leading, HIDDEN)),
                "weight": normal((vocab, HIDDEN), 0.6),
                "bias": normal((vocab,), 0.5),
            }
        else:
            primals = {"logits": normal((*leading, vocab), 2.0)}
        labels = rng.integers(0, vocab, math.prod(leading))
        if labels.size > 2:
            labels[[0, -1]] = IGNORED
        return Problem(
            primals=primals,
            labels=jnp.asarray(labels.reshape(leading), jnp.int32),
            class_weight=jnp.asarray(rng.uniform(0.5, 2.0, vocab), jnp.float32),
            upstream=jnp.asarray(rng.normal(size=leading), jnp.float32),
        )

    def losses(self, problem: Problem, **options: Any) -> tuple[Callable[[Arrays], Any], Callable[[Arrays], jax.Array]]:
        """The public function and its twin in plain JAX, both as functions of the primals alone."""
        fixed = {"labels": problem.labels, self.class_weight: problem.class_weight, **options}
        return lambda primals: self.function(**primals, **fixed), lambda primals: self.reference(**primals, **fixed)

    def expected(self, problem: Problem, **options: Any) -> oracle.Expected:
        """The oracle's answer for the same call."""
        options.setdefault("class_weight", problem.class_weight)
        arrays = {"labels": problem.labels, **problem.primals, **options}
        return self.oracle(**{name: as_numpy(a) if isinstance(a, jax.Array) else a for name, a in arrays.items()})


LINEAR = Operation(
    "linear", jax_api.fused_linear_ce, reference.fused_linear_ce, oracle.fused_linear_ce, "x", "ce_weight"
)
LOGITS = Operation("logits", jax_api.cross_entropy, reference.cross_entropy, oracle.cross_entropy, "logits", "weight")

each_operation = pytest.mark.parametrize("operation", (LINEAR, LOGITS), ids=lambda operation: operation.name)


def eagerly(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


eager_and_jit = pytest.mark.parametrize("transform", (eagerly, jax.jit), ids=("eager", "jit"))


def gradient(loss: Loss) -> Callable[[Arrays], Arrays]:
    """Its upstream gradient is not 1."""
    return jax.grad(lambda primals: UPSTREAM * loss(primals))


def with_output_as_auxiliary(loss: Callable[[Arrays], CrossEntropyOutput]) -> Callable[[Arrays], Any]:
    def run(primals: Arrays) -> tuple[jax.Array, CrossEntropyOutput]:
        out = loss(primals)
        return out.loss, out

    return run


def call_or_trace(call: Callable[..., Any], arguments: dict[str, Any], trace: bool) -> None:
    """Call plainly, or trace with every JAX array an argument of the program, without compiling or running it."""
    if not trace:
        call(**arguments)
        return
    arrays = {name: value for name, value in arguments.items() if isinstance(value, jax.Array)}
    static = {name: value for name, value in arguments.items() if name not in arrays}
    jax.jit(lambda arrays: call(**arrays, **static)).trace(arrays)


def kernels_run() -> bool:
    """Whether ``engine="auto"`` means the Triton kernels here."""
    return interpreting() or jax.default_backend() != "cpu"


def as_numpy(array: Any) -> np.ndarray:
    """A copy in a dtype that NumPy itself knows."""
    array = jnp.asarray(array)
    return np.array(array.astype(jnp.float32) if array.dtype in (jnp.bfloat16, jnp.float16) else array)


def assert_close(got: Any, want: Any, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    """Equal structure, shapes and dtypes, and values within float32's rounding."""
    _compare(got, want, lambda g, w: np.testing.assert_allclose(g, w, rtol=rtol, atol=atol))


def assert_same_bits(got: Any, want: Any) -> None:
    """Equal structure, shapes, dtypes and values, NaN included."""
    _compare(got, want, np.testing.assert_array_equal)


def assert_as_expected(got: Any, want: np.ndarray, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    """As the oracle says, which answers in float64."""
    assert got.shape == want.shape
    np.testing.assert_allclose(as_numpy(got), want, rtol=rtol, atol=atol)


def _compare(got: Any, want: Any, compare: Callable[[np.ndarray, np.ndarray], None]) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for got_leaf, want_leaf in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (got_leaf.shape, got_leaf.dtype) == (want_leaf.shape, want_leaf.dtype)
        compare(as_numpy(got_leaf), as_numpy(want_leaf))


@contextlib.contextmanager
def x64_by_config() -> Iterator[None]:
    """64-bit types, switched on for the process as ``JAX_ENABLE_X64`` does."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)
