"""What is said where an array is spread over devices in a way that the loss does not serve."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_api import cross_entropy, fused_linear_ce
from tests.jax_api.problems import assert_close, eager_and_jit, eagerly
from tests.jax_api.sharded import (
    differentiate,
    make_mesh,
    need_devices,
    on_4_and_8,
    over_vocab,
    place,
    random_problem,
    shard_map,
)

need_devices()

PROBLEM = random_problem()
ARGUMENTS = {**PROBLEM.primals, "labels": PROBLEM.labels, "ce_weight": PROBLEM.class_weight}
REST = {name: array for name, array in ARGUMENTS.items() if name != "x"}
HOW = "inside jax.shard_map, over the tokens, or with vocab_axis= over the vocab"

axis_types = pytest.mark.parametrize("axis_type", (AxisType.Auto, AxisType.Explicit), ids=("auto", "explicit"))


def sharded_message(name: str, dimension: int = 0) -> str:
    return (
        rf"^{name} is sharded over devices in dimension {dimension}: outside jax\.shard_map each device would "
        rf"gather it and compute the whole loss\. Call the loss {HOW}"
    )


# ---- vocab_axis


@eager_and_jit
@pytest.mark.parametrize("axis", ("tp", ("dp", "tp")), ids=str)
def test_a_weight_that_is_the_same_along_vocab_axis(axis: Any, transform: Callable[..., Any]) -> None:
    def body(primals: Any, labels: jax.Array) -> jax.Array:
        return fused_linear_ce(**primals, labels=labels, vocab_axis=axis)

    specs = {"x": P(), "weight": P("dp"), "bias": P("dp")}
    run = shard_map(body, make_mesh(dp=2, tp=2), (specs, P()))
    with pytest.raises(ValueError, match=r"^weight must be sharded along vocab_axis="):
        transform(run)(PROBLEM.primals, PROBLEM.labels)


@pytest.mark.parametrize("axis", ("vp", ("tp", "vp")), ids=str)
def test_no_mesh_axis_of_that_name(axis: Any) -> None:
    def body(primals: Any, labels: jax.Array) -> jax.Array:
        return fused_linear_ce(**primals, labels=labels, vocab_axis=axis)

    specs = {"x": P(), "weight": P("tp"), "bias": P("tp")}
    with pytest.raises(ValueError, match=r"^vocab_axis must name a mesh axis inside jax\.shard_map, got .*'vp'"):
        jax.jit(shard_map(body, make_mesh(tp=4), (specs, P())))(PROBLEM.primals, PROBLEM.labels)


def test_vocab_axis_outside_shard_map() -> None:
    with pytest.raises(ValueError, match=r"^vocab_axis must name a mesh axis inside jax\.shard_map, got 'tp'"):
        fused_linear_ce(**ARGUMENTS, vocab_axis="tp")


def test_the_axis_of_a_vmap_is_no_mesh_axis() -> None:
    mapped = jax.vmap(lambda x: fused_linear_ce(x, **{**REST, "vocab_axis": "v"}), axis_name="v")
    with pytest.raises(ValueError, match=r"^vocab_axis must name a mesh axis inside jax\.shard_map, got 'v'"):
        mapped(PROBLEM.primals["x"][None])


@pytest.mark.parametrize("name", ("bias", "ce_weight"))
def test_an_array_of_the_wrong_part_of_the_vocab(name: str) -> None:
    """The bias is sharded as the weight is, and class weights are whole."""
    specs = {"x": P(), "weight": P("tp"), "bias": P("tp"), "labels": P(), "ce_weight": P()}
    specs[name] = P() if name == "bias" else P("tp")
    run = shard_map(lambda arguments: fused_linear_ce(**arguments, vocab_axis="tp"), make_mesh(tp=4), (specs,))
    with pytest.raises(ValueError, match=rf"^{name} must have shape \("):
        jax.jit(run)(ARGUMENTS)


# ---- outside shard_map


@axis_types
@on_4_and_8
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_sharded_array(name: str, devices: int, axis_type: AxisType) -> None:
    sharded = place(ARGUMENTS[name], make_mesh(axis_type, tp=devices), "tp")
    with pytest.raises(ValueError, match=sharded_message(name)):
        fused_linear_ce(**ARGUMENTS | {name: sharded})
    with pytest.raises(ValueError, match=sharded_message(name)):
        jax.grad(lambda x: fused_linear_ce(**ARGUMENTS | {name: sharded} | ({} if name == "x" else {"x": x})))(
            PROBLEM.primals["x"]
        )


def test_sharded_logits() -> None:
    logits = place(jnp.ones((3, 8)), make_mesh(tp=4), None, "tp")
    with pytest.raises(ValueError, match=sharded_message("logits", 1)):
        cross_entropy(logits, jnp.zeros(3, jnp.int32))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_explicitly_sharded_tracer(name: str) -> None:
    sharded = place(ARGUMENTS[name], make_mesh(AxisType.Explicit, tp=4), "tp")
    with pytest.raises(ValueError, match=sharded_message(name)):
        jax.jit(lambda arguments: fused_linear_ce(**arguments))(ARGUMENTS | {name: sharded})


@axis_types
def test_a_sharded_batch_that_is_mapped(axis_type: AxisType) -> None:
    """Each entry is whole, and the batch is not."""
    mesh = make_mesh(axis_type, tp=4)
    batch, labels = jnp.ones((4, 3, PROBLEM.primals["x"].shape[-1])), jnp.zeros((4, 3), jnp.int32)
    batch, labels = place(batch, mesh, "tp"), place(labels, mesh, "tp")
    weight = place(PROBLEM.primals["weight"], mesh)
    mapped = jax.vmap(fused_linear_ce, (0, None, 0))
    for run in (mapped, jax.jit(mapped)) if axis_type == AxisType.Explicit else (mapped,):
        with pytest.raises(ValueError, match=sharded_message("x")):
            run(batch, weight, labels)


@pytest.mark.parametrize("differentiated", (False, True), ids=("value", "gradient"))
@pytest.mark.parametrize("name", ("x", "weight"))
@on_4_and_8
def test_an_automatically_sharded_tracer_is_right_and_warned_of(devices: int, name: str, differentiated: bool) -> None:
    mesh = make_mesh(tp=devices)
    primals = PROBLEM.primals | {name: place(PROBLEM.primals[name], mesh, "tp")}

    def loss(primals: Any) -> jax.Array:
        return fused_linear_ce(**primals, labels=PROBLEM.labels, engine="torch")

    run = jax.jit(jax.value_and_grad(loss) if differentiated else loss)
    with pytest.warns(UserWarning, match=rf"outside jax\.shard_map, .* each of the {devices} devices .* {HOW}"):
        got = jax.block_until_ready(run(primals))
    assert_close(got, run(PROBLEM.primals))
    with warnings.catch_warnings():  # said once, at compile time
        warnings.simplefilter("error")
        jax.block_until_ready(run(primals))


# ---- nothing to say


def test_no_warning_inside_shard_map() -> None:
    """Whose axes are all in the hands of the caller."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for transform in (eagerly, jax.jit):
            run = transform(over_vocab(make_mesh(dp=2, tp=4), PROBLEM.labels, engine="torch"))
            jax.block_until_ready(run(PROBLEM.primals))
        differentiate(over_vocab(make_mesh(tp=8), PROBLEM.labels, engine="torch"), PROBLEM.primals)


def test_no_warning_on_one_device() -> None:
    """Wherever it is."""
    arguments = jax.device_put(ARGUMENTS, jax.devices()[3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for transform in (eagerly, jax.jit):
            loss = transform(lambda arguments: fused_linear_ce(**arguments))(arguments)
            assert loss.devices() == {jax.devices()[3]}
        differentiate(
            lambda primals: fused_linear_ce(**primals, labels=arguments["labels"]),
            {name: arguments[name] for name in PROBLEM.primals},
        )


def test_an_axis_left_to_jax_is_warned_of() -> None:
    """Its devices each compute the whole of what one device along ``tp`` has."""

    def body(primals: Any, labels: jax.Array) -> jax.Array:
        return fused_linear_ce(**primals, labels=labels, vocab_axis="tp", engine="torch")

    specs = {"x": P(), "weight": P("tp"), "bias": P("tp")}
    run = jax.jit(shard_map(body, make_mesh(dp=2, tp=4), (specs, P()), axis_names={"tp"}))
    with pytest.warns(UserWarning, match="each of the 2 devices"):
        got = jax.block_until_ready(run(PROBLEM.primals, PROBLEM.labels))
    assert_close(got, fused_linear_ce(**PROBLEM.primals, labels=PROBLEM.labels))
