"""Vocabulary-parallel: the weight and the bias sharded along a mesh axis, everything else whole on each device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_api import fused_linear_ce
from tests.jax_api.problems import (
    HIDDEN,
    IGNORED,
    LINEAR,
    METRICS,
    UPSTREAM,
    Problem,
    as_numpy,
    assert_close,
    assert_same_bits,
    eagerly,
    x64_by_config,
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
    on_4_and_8,
    on_4_checked_and_8_not,
    over_vocab,
    random_problem,
    shard_map,
)

need_devices()

PROBLEM = random_problem()
WHERE = jnp.arange(TOKENS) % 3 != 1
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"lse_square_scale": 0.02},
    "softcap": {"softcap": 6.0},
    "scale": {"logit_scale": 0.8},
    "class_weight": {"ce_weight": PROBLEM.class_weight},
    "token_scaling": {"use_token_scaling": True},
    "where": {"where": WHERE},
}
EVERYTHING: dict[str, Any] = {name: value for options in OPTIONS.values() for name, value in options.items()}

SOME_OPTIONS = {"label_smoothing": 0.1, "lse_square_scale": 0.02}

every_reduction = pytest.mark.parametrize("reduction", ("mean", "sum", "none"))


def upstream_of(reduction: str) -> Any:
    return PROBLEM.upstream if reduction == "none" else UPSTREAM


def assert_sharded_as_whole(
    devices: int,
    problem: Problem = PROBLEM,
    *,
    check_vma: bool = True,
    transform: Callable[..., Any] = jax.jit,
    **options: Any,
) -> Any:
    """Answers the output and the gradients."""
    upstream = upstream_of(options.get("reduction", "mean"))
    loss = over_vocab(make_mesh(tp=devices), problem.labels, check_vma=check_vma, **METRICS, **options)
    got = differentiate(loss, problem.primals, upstream, transform)
    assert_as_whole(got, problem, upstream, **options)
    return got


# ---- options and reductions


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option(options: dict[str, Any]) -> None:
    assert_sharded_as_whole(4, **options)


@checked_and_not
@on_4_and_8
def test_everything_at_once(devices: int, check_vma: bool) -> None:
    assert_sharded_as_whole(devices, check_vma=check_vma, **EVERYTHING)


@on_4_checked_and_8_not
@pytest.mark.parametrize("reduction", ("sum", "none"))
def test_everything_at_once_not_averaged(reduction: str, devices: int, check_vma: bool) -> None:
    assert_sharded_as_whole(devices, check_vma=check_vma, reduction=reduction, **EVERYTHING)


@pytest.mark.parametrize(("reduction", "check_vma"), (("mean", True), ("none", False)))
def test_eagerly(reduction: str, check_vma: bool) -> None:
    assert_sharded_as_whole(4, check_vma=check_vma, transform=eagerly, reduction=reduction)


def test_a_shard_of_several_ragged_tiles() -> None:
    assert_sharded_as_whole(4, random_problem(vocab=4 * 70), **SOME_OPTIONS)


def test_without_bias() -> None:
    x_and_weight = {name: PROBLEM.primals[name] for name in ("x", "weight")}
    assert_sharded_as_whole(4, replace(PROBLEM, primals=x_and_weight), label_smoothing=0.1)


def test_leading_dimensions() -> None:
    problem = random_problem((2, 8))
    loss = over_vocab(make_mesh(tp=4), problem.labels, reduction="none", **METRICS)
    got = differentiate(loss, problem.primals, problem.upstream)
    assert_as_whole(got, problem, problem.upstream, reduction="none")


@checked_and_not
def test_a_weight_kept_as_hv(check_vma: bool) -> None:
    arguments = {"labels": PROBLEM.labels, "check_vma": check_vma, **METRICS}
    transposed = PROBLEM.primals | {"weight": PROBLEM.primals["weight"].T}
    loss = over_vocab(make_mesh(tp=4), weight_layout="hv", **arguments)
    output, gradients = differentiate(loss, transposed)
    assert gradients["weight"].shape == (HIDDEN, VOCAB)
    assert_as_whole((output, gradients | {"weight": gradients["weight"].T}), PROBLEM)


@pytest.mark.parametrize("names", (("x",), ("weight",), ("x", "bias")), ids=" and ".join)
def test_a_subset_of_gradients(names: tuple[str, ...]) -> None:
    loss = over_vocab(make_mesh(tp=4), PROBLEM.labels)
    wanted = {name: PROBLEM.primals[name] for name in names}
    _, gradients = differentiate(lambda wanted: loss(PROBLEM.primals | wanted), wanted)
    want = LINEAR.expected(PROBLEM, class_weight=None, upstream=UPSTREAM).gradients
    assert_gradients(gradients, {name: want[name] for name in names})


@pytest.mark.parametrize("memory", ("lean", "speed"))
def test_memory_modes(memory: str) -> None:
    loss = over_vocab(make_mesh(tp=4), PROBLEM.labels, memory=memory, **METRICS)
    assert_as_whole(differentiate(loss, PROBLEM.primals), PROBLEM)


def test_metrics_are_detached() -> None:
    loss = over_vocab(make_mesh(tp=4), PROBLEM.labels, lse_square_scale=0.02, **METRICS)

    def metrics(primals: Any) -> jax.Array:
        out = loss(primals)
        return out.z_loss + out.token_accuracy

    gradients = jax.block_until_ready(jax.jit(jax.grad(metrics))(PROBLEM.primals))
    assert not any(np.any(as_numpy(gradient)) for gradient in gradients.values())


def test_a_weight_of_one_shard_is_whole() -> None:
    assert_sharded_as_whole(1, **EVERYTHING)


# ---- predictions


def tied(pattern: str) -> Problem:
    """Products of small integers are exact, so the equal shards of ``pattern`` tie; the others, of zeros, are below."""
    rng = np.random.default_rng(3)
    columns = VOCAB // len(pattern)
    block = rng.integers(-2, 3, (columns, HIDDEN)).astype(np.float32)
    block[:2] = rng.choice([-2.0, 2.0], HIDDEN) * [[1], [-1]]  # one of the two is not negative
    primals = {
        "x": rng.integers(1, 3, (TOKENS, HIDDEN)).astype(np.float32) * rng.choice([-1, 1], (TOKENS, 1)),
        "weight": np.concatenate([block if letter == "a" else 0 * block for letter in pattern]),
        "bias": np.repeat([1.0 if letter == "a" else 0.0 for letter in pattern], columns).astype(np.float32),
    }
    return replace(PROBLEM, primals={name: jnp.asarray(array, jnp.float32) for name, array in primals.items()})


@pytest.mark.parametrize("pattern", ("zaaz", "aaaaaaaa"))
def test_the_lowest_class_of_the_whole_vocab_wins_a_tie(pattern: str) -> None:
    problem = tied(pattern)
    logits = as_numpy(problem.primals["x"]) @ as_numpy(problem.primals["weight"]).T + as_numpy(problem.primals["bias"])
    lowest = logits.argmax(1)  # NumPy's is the lowest index
    assert ((logits == logits.max(1, keepdims=True)).sum(1) >= pattern.count("a")).all()
    assert (lowest // (VOCAB // len(pattern)) == pattern.index("a")).all()
    problem = replace(problem, labels=jnp.where(problem.labels == IGNORED, IGNORED, jnp.asarray(lowest, jnp.int32)))

    output, _ = assert_sharded_as_whole(len(pattern), problem)
    np.testing.assert_array_equal(output.predicted_tokens[1:-1], lowest[1:-1])
    assert output.predicted_tokens[0] == output.predicted_tokens[-1] == -1
    assert output.token_accuracy == 1.0


def test_predictions_are_int32() -> None:
    loss = over_vocab(make_mesh(tp=4), PROBLEM.labels, **METRICS)
    output = jax.block_until_ready(jax.jit(loss)(PROBLEM.primals))
    assert output.predicted_tokens.dtype == jnp.int32


def test_predictions_are_int64_if_x64_is_enabled() -> None:
    with x64_by_config():
        labels = jnp.asarray(as_numpy(PROBLEM.labels), jnp.int64)
        loss = over_vocab(make_mesh(tp=4), labels, **METRICS)
        output = jax.block_until_ready(jax.jit(loss)(PROBLEM.primals))
    assert output.predicted_tokens.dtype == jnp.int64
    want = LINEAR.expected(PROBLEM, class_weight=None)
    np.testing.assert_array_equal(output.predicted_tokens, want.predicted_tokens)


# ---- values that are not finite, and tokens that do not count


def test_a_row_of_nan() -> None:
    x = PROBLEM.primals["x"].at[3].set(jnp.nan)
    problem = replace(PROBLEM, primals=PROBLEM.primals | {"x": x})
    output, gradients = assert_sharded_as_whole(4, problem, reduction="none")
    assert np.flatnonzero(np.isnan(output.loss)).tolist() == [3]
    assert output.predicted_tokens[3] == 0
    assert np.flatnonzero(np.isnan(gradients["x"]).any(axis=1)).tolist() == [3]


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_a_bias_that_is_not_finite_is_the_prediction(bad: float) -> None:
    """Of a class of the last shard but one."""
    bias = PROBLEM.primals["bias"].at[VOCAB - VOCAB // 4 - 3].set(bad)
    problem = replace(PROBLEM, primals=PROBLEM.primals | {"bias": bias})
    loss = over_vocab(make_mesh(tp=4), problem.labels, reduction="none", **METRICS)
    output = jax.block_until_ready(jax.jit(loss)(problem.primals))
    whole = fused_linear_ce(**problem.primals, labels=problem.labels, reduction="none", **METRICS)
    assert_close(output, whole)
    assert set(output.predicted_tokens[1:-1].tolist()) == {VOCAB - VOCAB // 4 - 3}
    assert np.isnan(output.loss[1:-1]).all()


@pytest.mark.parametrize("shards", ((0,), (0, 1, 3)), ids=str)
def test_shards_of_masked_classes(shards: tuple[int, ...]) -> None:
    """All their logits are -inf: a probability of 0, without a gradient."""
    columns = VOCAB // 4
    masked = jnp.isin(jnp.arange(VOCAB) // columns, jnp.asarray(shards))
    bias = jnp.where(masked, -jnp.inf, PROBLEM.primals["bias"])
    labels = jnp.where(PROBLEM.labels == IGNORED, IGNORED, 2 * columns + PROBLEM.labels % columns)
    problem = replace(PROBLEM, primals=PROBLEM.primals | {"bias": bias}, labels=labels)
    output, gradients = assert_sharded_as_whole(4, problem, lse_square_scale=0.02)
    assert np.isfinite(output.loss)
    assert not np.any(as_numpy(gradients["weight"])[np.asarray(masked)])


@every_reduction
def test_bad_labels_are_nan_without_gradient(reduction: str) -> None:
    bad = jnp.asarray([4, 5, 6])
    problem = replace(PROBLEM, labels=PROBLEM.labels.at[bad].set(jnp.asarray([VOCAB, -1, 2**31 - 1], jnp.int32)))
    output, gradients = assert_sharded_as_whole(4, problem, reduction=reduction, **SOME_OPTIONS)
    assert np.isnan(output.loss).sum() == (3 if reduction == "none" else 1)
    assert output.predicted_tokens[bad].tolist() == [-1, -1, -1]
    assert not np.any(as_numpy(gradients["x"])[bad])
    assert np.any(as_numpy(gradients["x"])[3])


@every_reduction
def test_no_valid_token_gives_zeros(reduction: str) -> None:
    problem = replace(PROBLEM, labels=jnp.full_like(PROBLEM.labels, IGNORED))
    output, gradients = assert_sharded_as_whole(4, problem, reduction=reduction, **SOME_OPTIONS)
    assert output.predicted_tokens.tolist() == [-1] * TOKENS
    for array in (output.loss, output.z_loss, output.token_accuracy, *gradients.values()):
        assert not np.any(as_numpy(array))  # NaN would count


def test_tokens_that_are_gathered_along_the_vocabs_axis() -> None:
    """As sequence parallelism has them: to JAX they vary along the axis, though they are the same on all of it."""

    def body(primals: Any, labels: jax.Array, class_weight: jax.Array) -> Any:
        arrays = {**primals, "labels": labels, "ce_weight": class_weight}
        arrays |= {name: jax.lax.all_gather(arrays[name], "tp", tiled=True) for name in ("x", "labels", "ce_weight")}
        out = fused_linear_ce(**arrays, vocab_axis="tp", **METRICS)
        mean = lambda a: jax.lax.pmean(a.astype(jnp.float32), "tp").astype(a.dtype)  # noqa: E731
        return jax.tree.map(mean, out)

    specs = ({"x": P("tp"), "weight": P("tp"), "bias": P("tp")}, P("tp"), P("tp"))
    run = shard_map(body, make_mesh(tp=4), specs)
    got = differentiate(lambda primals: run(primals, PROBLEM.labels, PROBLEM.class_weight), PROBLEM.primals)
    assert_as_whole(got, PROBLEM, ce_weight=PROBLEM.class_weight)


@checked_and_not
def test_no_tokens(check_vma: bool) -> None:
    primals = PROBLEM.primals | {"x": jnp.zeros((0, HIDDEN))}
    loss = over_vocab(make_mesh(tp=4), jnp.zeros(0, jnp.int32), check_vma=check_vma, **METRICS)
    # not under jit: XLA:CPU refuses a compiled shard_map that reads several arrays, all of them empty, whatever it does
    output, gradients = differentiate(loss, primals, transform=eagerly)
    assert output.loss == 0 and output.predicted_tokens.shape == (0,)
    assert gradients["weight"].shape == (VOCAB, HIDDEN) and not np.any(as_numpy(gradients["weight"]))


# ---- bfloat16


@on_4_checked_and_8_not
def test_bfloat16(devices: int, check_vma: bool) -> None:
    problem = random_problem(dtype=jnp.bfloat16)
    loss = over_vocab(make_mesh(tp=devices), problem.labels, check_vma=check_vma, **SOME_OPTIONS, **METRICS)
    output, gradients = differentiate(loss, problem.primals)
    whole = fused_linear_ce(**problem.primals, labels=problem.labels, **SOME_OPTIONS, **METRICS)
    assert_close(output, whole)
    assert_same_bits(output.predicted_tokens, whole.predicted_tokens)
    want = LINEAR.expected(problem, class_weight=None, upstream=UPSTREAM, **SOME_OPTIONS)
    for name, gradient in gradients.items():
        assert gradient.dtype == jnp.bfloat16
        rounding = 2**-7 * np.abs(want.gradients[name]).max()  # each shard's part of x's gradient is rounded
        np.testing.assert_allclose(as_numpy(gradient), want.gradients[name], rtol=2**-7, atol=rounding)
