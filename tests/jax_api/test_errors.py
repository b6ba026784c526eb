"""Bad input: each error's type and exact text, in a plain call and while a program is being traced."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_api import cross_entropy, fused_linear_ce
from tests.jax_api.problems import Operation, call_or_trace, each_operation, x64_by_config


@dataclasses.dataclass(frozen=True)
class Spec:
    """An array that a test makes only when it runs, since some dtypes exist only then."""

    shape: tuple[int, ...]
    dtype: Any = jnp.float32

    def make(self) -> jax.Array:
        if self.dtype == "key":
            return jax.random.split(jax.random.key(0), self.shape)
        return jnp.ones(self.shape, self.dtype)


# Two by three tokens, 20 classes, 8 hidden. The ones in the labels are class 1.
GOOD: dict[Callable[..., Any], dict[str, Any]] = {
    fused_linear_ce: {"x": Spec((2, 3, 8)), "weight": Spec((20, 8)), "labels": Spec((2, 3), jnp.int32)},
    cross_entropy: {"logits": Spec((2, 3, 20)), "labels": Spec((2, 3), jnp.int32)},
}


@dataclasses.dataclass(frozen=True)
class Bad:
    """A call that is good but for ``changes``, and the error that it must give."""

    function: Callable[..., Any]
    changes: dict[str, Any]
    error: type[Exception]
    message: str


def bad_options(function: Callable[..., Any]) -> list[Bad]:
    """Options that both functions have."""
    flags = ("return_z_loss", "return_token_accuracy", "return_predicted_tokens", "return_counts", "check_labels")
    numbers = ("label_smoothing", "lse_square_scale", "logit_scale", "softcap")
    table: list[tuple[dict[str, Any], type[Exception], str]] = [
        *(({name: 1}, TypeError, f"{name} must be True or False, got 1") for name in flags),
        *(({name: None}, TypeError, f"{name} must be True or False, got None") for name in flags),
        *(({name: "1"}, TypeError, f"{name} must be a Python number, got '1'") for name in numbers),
        *(({name: True}, TypeError, f"{name} must be a Python number, got True") for name in numbers),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be between 0 and 1, got -0.1"),
        ({"label_smoothing": 1.1}, ValueError, "label_smoothing must be between 0 and 1, got 1.1"),
        ({"label_smoothing": float("nan")}, ValueError, "label_smoothing must be between 0 and 1, got nan"),
        ({"label_smoothing": None}, TypeError, "label_smoothing must be a Python number, got None"),
        ({"lse_square_scale": -1e-4}, ValueError, "lse_square_scale must be finite and not negative, got -0.0001"),
        ({"lse_square_scale": float("inf")}, ValueError, "lse_square_scale must be finite and not negative, got inf"),
        ({"logit_scale": 0}, ValueError, "logit_scale must be finite and not 0, got 0"),
        ({"logit_scale": float("-inf")}, ValueError, "logit_scale must be finite and not 0, got -inf"),
        ({"softcap": 0.0}, ValueError, "softcap must be None, or finite and greater than 0, got 0.0"),
        ({"softcap": -30.0}, ValueError, "softcap must be None, or finite and greater than 0, got -30.0"),
        ({"softcap": float("inf")}, ValueError, "softcap must be None, or finite and greater than 0, got inf"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got 1.0"),
        ({"ignore_index": True}, TypeError, "ignore_index must be an int, got True"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
        ({"ignore_index": 2**63}, ValueError, "ignore_index must fit in 64 bits, got 9223372036854775808"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of 'none', 'mean' and 'sum', got 'avg'"),
        ({"reduction": None}, ValueError, "reduction must be one of 'none', 'mean' and 'sum', got None"),
        ({"cuda_graph": 1}, TypeError, "cuda_graph must be True or False, got 1"),
        ({"cuda_graph": []}, TypeError, "cuda_graph must be True or False, got []"),
        ({"num_items_in_batch": 7.0}, TypeError, "num_items_in_batch must be an int or an array, got 7.0"),
        ({"num_items_in_batch": True}, TypeError, "num_items_in_batch must be an int or an array, got True"),
        ({"num_items_in_batch": -1}, ValueError, "num_items_in_batch must not be negative, got -1"),
        ({"num_items_in_batch": Spec((2,))}, ValueError, "num_items_in_batch must be one number, got shape (2,)"),
        (
            {"num_items_in_batch": 7, "reduction": "sum"},
            ValueError,
            "num_items_in_batch must be None unless reduction is 'mean', got reduction='sum'",
        ),
        ({"engine": "cuda"}, ValueError, "engine must be one of 'auto', 'triton' and 'torch', got 'cuda'"),
        ({"engine": None}, ValueError, "engine must be one of 'auto', 'triton' and 'torch', got None"),
        ({"where": Spec((2, 3), jnp.int32)}, TypeError, "where must be boolean, got int32"),
        ({"where": [True]}, TypeError, "where must be a JAX or NumPy array, got list"),
        (
            {"where": Spec((3,), jnp.bool_)},
            ValueError,
            "where must have the shape of labels, (2, 3), got (3,)",
        ),
        (
            {"where": Spec((2, 3), jnp.bool_), "ignore_index": 2**31},
            ValueError,
            "ignore_index must fit in the labels' int32 when where is given, got 2147483648",
        ),
        ({"labels": [[1, 1, 1], [1, 1, 1]]}, TypeError, "labels must be a JAX or NumPy array, got list"),
        ({"labels": 1}, TypeError, "labels must be a JAX or NumPy array, got int"),
        *(
            ({"labels": Spec((2, 3), dtype)}, TypeError, f"labels must be int32 or int64 class indices, got {dtype}")
            for dtype in ("float32", "bool", "int16", "uint8", "uint32")
        ),
    ]
    return [Bad(function, changes, error, message) for changes, error, message in table]


def bad_logits(changes: dict[str, Any], error: type[Exception], message: str) -> Bad:
    return Bad(cross_entropy, changes, error, message)


def bad_linear(changes: dict[str, Any], error: type[Exception], message: str) -> Bad:
    return Bad(fused_linear_ce, changes, error, message)


BAD_LOGITS = [
    bad_logits({"logits": Spec(())}, ValueError, "logits must have shape (..., V), got a scalar"),
    bad_logits(
        {"logits": Spec((2, 3, 0))},
        ValueError,
        "logits must have at least one class in its last dimension, got shape (2, 3, 0)",
    ),
    bad_logits(
        {"logits": Spec((6, 20))},
        ValueError,
        "labels must have shape (6,) to match logits of shape (6, 20), got (2, 3)",
    ),
    bad_logits({"logits": [1.0]}, TypeError, "logits must be a JAX or NumPy array, got list"),
    bad_logits({"logits": None}, TypeError, "logits must be a JAX or NumPy array, got NoneType"),
    *(
        bad_logits(
            {"logits": Spec((2, 3, 20), dtype)},
            TypeError,
            f"logits must be float32, bfloat16 or float16, got {dtype}",
        )
        for dtype in ("float64", "int32", "float8_e4m3fn", "complex64")
    ),
    bad_logits({"weight": Spec((19,))}, ValueError, "weight must have shape (20,), got (19,)"),
    bad_logits({"weight": Spec((20, 1))}, ValueError, "weight must have shape (20,), got (20, 1)"),
    bad_logits({"weight": Spec((20,), "int32")}, TypeError, "weight must be float32, bfloat16 or float16, got int32"),
    bad_logits(
        {"weight": Spec((20,), "float64")}, TypeError, "weight must be float32, bfloat16 or float16, got float64"
    ),
    bad_logits({"weight": [1.0] * 20}, TypeError, "weight must be a JAX or NumPy array, got list"),
]

VOCAB_AXIS = "vocab_axis must be None, a mesh axis' name or a tuple of them, got "
BAD_LINEAR = [
    *(bad_linear({"vocab_axis": axis}, TypeError, f"{VOCAB_AXIS}{axis!r}") for axis in ((), ["tp"], 0, ("tp", 1))),
    bad_linear({"x": Spec(())}, ValueError, "x must have shape (..., H), got a scalar"),
    bad_linear({"x": [[1.0]]}, TypeError, "x must be a JAX or NumPy array, got list"),
    bad_linear({"weight": 1.0}, TypeError, "weight must be a JAX or NumPy array, got float"),
    bad_linear({"weight": None}, TypeError, "weight must be a JAX or NumPy array, got NoneType"),
    *(
        bad_linear(
            {"x": Spec((2, 3, 8), dtype)},
            TypeError,
            f"x must be float32, bfloat16 or float16, got {name}",
        )
        for dtype, name in (
            ("float64", "float64"),
            ("int32", "int32"),
            ("bool", "bool"),
            ("float8_e5m2", "float8_e5m2"),
            ("int4", "int4"),
            ("key", "key<fry>"),
        )
    ),
    bad_linear(
        {"x": np.ones((2, 3, 8))},  # NumPy's float64 is not cast in silence, though JAX would
        TypeError,
        "x must be float32, bfloat16 or float16, got float64",
    ),
    bad_linear(
        {"weight": Spec((20, 8), "float64")},
        TypeError,
        "weight must be float32, bfloat16 or float16, got float64",
    ),
    bad_linear(
        {"weight": Spec((20, 8), jnp.bfloat16)},
        TypeError,
        "weight must have the dtype of x, float32, got bfloat16: cast one of them",
    ),
    bad_linear(
        {"x": Spec((2, 3, 8), jnp.float16)},
        TypeError,
        "weight must have the dtype of x, float16, got float32: cast one of them",
    ),
    bad_linear(
        {"bias": Spec((20,), jnp.bfloat16)},
        TypeError,
        "bias must have the dtype of x, float32, got bfloat16: cast one of them",
    ),
    bad_linear({"bias": Spec((20,), "int32")}, TypeError, "bias must be float32, bfloat16 or float16, got int32"),
    bad_linear({"bias": [0.0] * 20}, TypeError, "bias must be a JAX or NumPy array, got list"),
    bad_linear({"bias": Spec((8,))}, ValueError, "bias must have shape (20,), got (8,)"),
    bad_linear({"bias": Spec((1, 20))}, ValueError, "bias must have shape (20,), got (1, 20)"),
    bad_linear({"ce_weight": Spec((8,))}, ValueError, "ce_weight must have shape (20,), got (8,)"),
    bad_linear(
        {"ce_weight": Spec((20,), "int32")}, TypeError, "ce_weight must be float32, bfloat16 or float16, got int32"
    ),
    bad_linear({"ce_weight": 1.0}, TypeError, "ce_weight must be a JAX or NumPy array, got float"),
    bad_linear({"weight": Spec((20,))}, ValueError, "weight must have shape (V, H), got (20,)"),
    bad_linear({"weight": Spec((1, 20, 8))}, ValueError, "weight must have shape (V, H), got (1, 20, 8)"),
    bad_linear(
        {"weight": Spec((8, 20))},
        ValueError,
        "weight must have shape (V, 8) to match x of shape (2, 3, 8), got (8, 20)",
    ),
    bad_linear({"weight": Spec((0, 8))}, ValueError, "weight must not be empty, got shape (0, 8)"),
    bad_linear(
        {"weight": Spec((20, 0)), "x": Spec((2, 3, 0))}, ValueError, "weight must not be empty, got shape (20, 0)"
    ),
    bad_linear(
        {"labels": Spec((6,), jnp.int32)},
        ValueError,
        "labels must have shape (2, 3) to match x of shape (2, 3, 8), got (6,)",
    ),
    bad_linear(
        {"labels": Spec((2, 3, 1), jnp.int32)},
        ValueError,
        "labels must have shape (2, 3) to match x of shape (2, 3, 8), got (2, 3, 1)",
    ),
    bad_linear({"weight_layout": "vhw"}, ValueError, "weight_layout must be 'vh' or 'hv', got 'vhw'"),
    bad_linear({"weight_layout": None}, ValueError, "weight_layout must be 'vh' or 'hv', got None"),
    bad_linear(
        {"weight_layout": "hv", "weight": Spec((20,))},
        ValueError,
        "weight must have shape (8, V) with weight_layout='hv', got (20,)",
    ),
    bad_linear(
        {"weight_layout": "hv", "weight": Spec((20, 8))},
        ValueError,
        "weight must have shape (8, V) with weight_layout='hv', got (20, 8)",
    ),
    bad_linear({"use_token_scaling": 0}, TypeError, "use_token_scaling must be True or False, got 0"),
    bad_linear({"accum_dtype": "float33"}, TypeError, "accum_dtype must be a dtype or None, got 'float33'"),
    bad_linear({"accum_dtype": 32}, TypeError, "accum_dtype must be a dtype or None, got 32"),
    bad_linear({"accum_dtype": np.zeros(2)}, TypeError, "accum_dtype must be a dtype or None, got array([0., 0.])"),
    bad_linear(
        {"memory": "tiny"}, ValueError, "memory must be 'auto', 'speed', 'lean' or a number of bytes, got 'tiny'"
    ),
    bad_linear(
        {"memory": 1e9}, TypeError, "memory must be 'auto', 'speed', 'lean' or a number of bytes, got 1000000000.0"
    ),
    bad_linear({"memory": True}, TypeError, "memory must be 'auto', 'speed', 'lean' or a number of bytes, got True"),
    bad_linear({"memory": None}, TypeError, "memory must be 'auto', 'speed', 'lean' or a number of bytes, got None"),
]

TABLE = [*bad_options(cross_entropy), *bad_options(fused_linear_ce), *BAD_LOGITS, *BAD_LINEAR]


@pytest.mark.parametrize("trace", (False, True), ids=("eager", "traced"))
@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: f"{bad.function.__name__}: {bad.message}")
def test_bad_input(bad: Bad, trace: bool, nothing_runs: None) -> None:
    specs = GOOD[bad.function] | bad.changes
    wide = any(isinstance(spec, Spec) and spec.dtype == "float64" for spec in specs.values())
    with x64_by_config() if wide else contextlib.nullcontext():
        arguments = {name: spec.make() if isinstance(spec, Spec) else spec for name, spec in specs.items()}
        with pytest.raises(bad.error) as caught:
            call_or_trace(bad.function, arguments, trace)
    assert type(caught.value) is bad.error
    assert str(caught.value) == bad.message


@pytest.mark.parametrize("function", GOOD)
def test_what_the_table_changes_is_good_without_the_change(function: Callable[..., Any]) -> None:
    loss = function(**{name: spec.make() for name, spec in GOOD[function].items()})
    np.testing.assert_allclose(np.asarray(loss), np.log(20.0), rtol=1e-6)


@pytest.mark.parametrize("name", ("label_smoothing", "lse_square_scale", "logit_scale", "softcap", "ignore_index"))
@each_operation
def test_an_option_cannot_be_traced(operation: Operation, name: str) -> None:
    problem = operation.problem()

    def loss(option: Any) -> jax.Array:
        return operation.function(**problem.primals, labels=problem.labels, **{name: option})

    wanted = "an int" if name == "ignore_index" else "a Python number"
    with pytest.raises(TypeError, match=f"^{name} must be {wanted}, got .*Tracer"):
        jax.jit(loss).trace(1)


def test_arguments_after_bias_are_keyword_only() -> None:
    arrays = {name: spec.make() for name, spec in GOOD[fused_linear_ce].items()}
    with pytest.raises(TypeError, match="takes from 3 to 4 positional arguments but 5 were given"):
        fused_linear_ce(arrays["x"], arrays["weight"], arrays["labels"], None, None)  # type: ignore[misc]
