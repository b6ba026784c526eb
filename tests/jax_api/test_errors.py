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

from jax_api import bridge, cross_entropy, fused_linear_ce
from tests.jax_api.problems import (
    IGNORED,
    VOCAB,
    Arrays,
    Operation,
    assert_as_expected,
    assert_same_bits,
    each_operation,
    kernels_run,
    x64_by_config,
)


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
    flags = ("return_z_loss", "return_token_accuracy", "return_predicted_tokens", "check_labels")
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

BAD_LINEAR = [
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


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("a plan was run")

    monkeypatch.setattr(bridge, "run", refuse)


def call_or_trace(call: Callable[..., Any], arguments: dict[str, Any], trace: bool) -> None:
    """Call plainly, or trace with every JAX array an argument of the program, without compiling or running it."""
    if not trace:
        call(**arguments)
        return
    arrays = {name: value for name, value in arguments.items() if isinstance(value, jax.Array)}
    static = {name: value for name, value in arguments.items() if name not in arrays}
    jax.jit(lambda arrays: call(**arrays, **static)).trace(arrays)


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


@pytest.mark.skipif(kernels_run(), reason="the kernels run here")
@pytest.mark.parametrize("trace", (False, True), ids=("eager", "traced"))
@each_operation
def test_the_kernels_need_a_gpu(operation: Operation, trace: bool, nothing_runs: None) -> None:
    problem = operation.problem()
    with pytest.raises(ValueError) as caught:
        call_or_trace(operation.function, {**problem.primals, "labels": problem.labels, "engine": "triton"}, trace)
    assert str(caught.value) == (
        "engine='triton' needs a GPU, or TRITON_INTERPRET=1 set before Python starts; got arguments on cpu"
    )


@each_operation
def test_another_backend_is_refused(operation: Operation, nothing_runs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = operation.problem()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(NotImplementedError) as caught:
        call_or_trace(operation.function, {**problem.primals, "labels": problem.labels}, trace=True)
    assert str(caught.value) == "twinhead runs on JAX's CPU and GPU backends; this call is for the backend 'tpu'"


# ---- labels that are no class

BAD_LABELS = (VOCAB, VOCAB + 1000, 2**31 - 1, -1, -(2**31))
labels_are_read = pytest.mark.skipif(jax.default_backend() != "cpu", reason="labels on a GPU are not read back")


def loss_and_gradients(operation: Operation, arrays: Arrays, labels: Any, **options: Any) -> Any:
    """Value and gradients; a per-token loss is pulled back by uneven gradients from upstream."""
    problem = operation.problem((2, 3))
    fixed = {"labels": labels, operation.class_weight: problem.class_weight, **options}
    value, vjp = jax.vjp(lambda primals: operation.function(**primals, **fixed), arrays)
    return value, vjp(problem.upstream if value.ndim else jnp.float32(-1.7))[0]


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
        "check_labels=True needs labels whose values are known, and these are traced: call outside jit, or "
        "leave it off: a bad label then gives a NaN loss"
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

    upstream = problem.upstream if reduction == "none" else jnp.float32(-1.7)
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
