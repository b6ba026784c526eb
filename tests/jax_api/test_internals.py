"""Each corner of JAX that may move, tried on its own, so that what fails after an upgrade says what has moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_api import internals
from jax_api.internals import Primitive, ad, batching
from tests.jax_api.problems import assert_same_bits

VALUES = np.array([[1.0, -2.0, 3.0], [0.5, 4.0, -1.5]], np.float32)


def mesh(axis_type: AxisType = AxisType.Auto, **sizes: int) -> Mesh:
    """A mesh of the first devices: of one, unless ``sizes`` say otherwise."""
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(axis_type,) * len(sizes))


def inside(function: Callable[..., Any], *specs: PartitionSpec, check_vma: bool = True) -> Callable[..., Any]:
    """``function`` in ``shard_map`` over one device, on axes ``dp`` and ``tp``; its result is put together again."""
    out_specs = PartitionSpec(("dp", "tp")) if check_vma else PartitionSpec()
    return jax.shard_map(function, mesh=mesh(dp=1, tp=1), in_specs=specs, out_specs=out_specs, check_vma=check_vma)


DP, TP, SAME = PartitionSpec("dp"), PartitionSpec("tp"), PartitionSpec()


# ---- axes over which arrays vary


def test_varying_axes_inside_shard_map() -> None:
    seen = []

    def body(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        seen.append([internals.varying_axes(*arrays) for arrays in ((a,), (b,), (c,), (a, b), (a, c), ())])
        return internals.vary_over(a, frozenset({"dp", "tp"}))

    inside(body, DP, TP, SAME)(VALUES, VALUES, VALUES)
    dp, tp = frozenset({"dp"}), frozenset({"tp"})
    assert seen[-1] == [dp, tp, frozenset(), dp | tp, dp, frozenset()]


@pytest.mark.parametrize("array", (VALUES, jnp.asarray(VALUES)), ids=("numpy", "jax"))
def test_nothing_varies_outside_shard_map(array: Any) -> None:
    assert internals.varying_axes(array) == frozenset()
    jax.jit(lambda traced: internals.varying_axes(traced) == frozenset() or 1 / 0)(array)


def test_nothing_is_known_to_vary_unchecked() -> None:
    seen = []

    def body(a: jax.Array) -> jax.Array:
        seen.append(internals.varying_axes(a))
        return a

    inside(body, DP, check_vma=False)(VALUES)
    assert set(seen) == {frozenset()}


def test_vary_over_adds_axes_and_its_transpose_sums() -> None:
    seen = []

    def body(a: jax.Array, b: jax.Array) -> jax.Array:
        varied = internals.vary_over(a, frozenset({"dp", "tp"}))
        seen.append(internals.varying_axes(varied))
        by_a = jax.grad(lambda a: (internals.vary_over(a, frozenset({"dp", "tp"})) * b).sum())(a)
        seen.append(internals.varying_axes(by_a))
        return internals.vary_over(by_a, frozenset({"dp", "tp"}))

    got = inside(body, SAME, PartitionSpec(("dp", "tp")))(VALUES, 2 * VALUES)
    assert seen[-2:] == [frozenset({"dp", "tp"}), frozenset()]  # summed, so the same everywhere
    assert_same_bits(got, jnp.asarray(2 * VALUES))


def test_vary_over_nothing_new_is_the_array_itself() -> None:
    array = jnp.asarray(VALUES)
    assert internals.vary_over(array, frozenset()) is array
    assert internals.unify(array)[0] is array
    assert internals.unify() == []


def test_unify_makes_all_vary_alike() -> None:
    seen = []

    def body(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        a, b, c = internals.unify(a, b, c)
        seen.append([internals.varying_axes(array) for array in (a, b, c)])
        return a + b * c

    got = inside(body, DP, TP, SAME)(VALUES, VALUES, VALUES)
    assert seen[-1] == 3 * [frozenset({"dp", "tp"})]
    assert_same_bits(got, jnp.asarray(VALUES + VALUES * VALUES))


# ---- types


def test_a_result_type_has_its_shape_and_dtype_and_varies_as_its_operands() -> None:
    seen = []

    def body(a: jax.Array) -> jax.Array:
        seen.append((internals.result_type((jax.typeof(a),), (4,), "int32"), jax.typeof(a)))
        return internals.vary_over(a, frozenset({"dp", "tp"}))

    inside(body, DP)(VALUES)
    made, like = seen[-1]
    assert (made.shape, made.dtype, made.weak_type) == ((4,), jnp.int32, False)
    assert made.manual_axis_type.varying == like.manual_axis_type.varying == frozenset({"dp"})
    assert made.sharding.spec == PartitionSpec(None)

    weak = internals.result_type((jax.typeof(2.0),), (), jnp.bfloat16)
    assert (weak.shape, weak.dtype, weak.weak_type) == ((), jnp.bfloat16, False)


@pytest.mark.parametrize(("dtype", "tangent"), ((jnp.float32, jnp.float32), (jnp.int32, jax.dtypes.float0)))
def test_a_tangent_of_zero(dtype: Any, tangent: Any) -> None:
    zero = internals.tangent_zero(jnp.ones((2, 3), dtype))
    assert isinstance(zero, internals.SymbolicZero)
    assert (zero.aval.shape, zero.aval.dtype) == ((2, 3), tangent)


def test_a_custom_jvp_is_told_of_symbolic_zeros() -> None:
    seen: list[dict[str, bool]] = []

    @jax.custom_jvp
    def function(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"product": arrays["a"] * arrays["b"], "index": jnp.int32(3)}

    def rule(primals: Any, tangents: Any) -> Any:
        seen.append({name: isinstance(t, internals.SymbolicZero) for name, t in tangents[0].items()})
        outputs = function(primals[0])
        product = tangents[0]["a"] * primals[0]["b"]
        return outputs, {"product": product, "index": internals.tangent_zero(outputs["index"])}

    function.defjvp(rule, symbolic_zeros=True)
    by_a = jax.grad(lambda a: function({"a": a, "b": jnp.float32(5.0)})["product"])(jnp.float32(2.0))
    assert (float(by_a), seen) == (5.0, [{"a": False, "b": True}])


# ---- shardings


def test_no_dimension_is_sharded_on_one_device() -> None:
    array = jnp.asarray(VALUES)
    whole = jax.device_put(array, NamedSharding(mesh(dp=1), DP))
    for given in (VALUES, array, whole, 3.0, None, [1.0]):
        assert internals.sharded_dimensions(given) == ()
    traced = []
    jax.jit(lambda a: traced.append(internals.sharded_dimensions(a)) or a)(whole)
    assert traced == [()]


def test_sharded_dimensions_of_a_traced_array_with_explicit_axes() -> None:
    """Axes of one device spread nothing."""
    explicit = jax.sharding.AbstractMesh((2, 1), ("dp", "one"), axis_types=2 * (AxisType.Explicit,))
    seen = []

    def body(a: jax.Array) -> jax.Array:
        seen.append(internals.sharded_dimensions(a))
        seen.append(tuple(jax.typeof(internals.without_sharding(a)).sharding.spec))
        return a

    for spec in (PartitionSpec(), PartitionSpec("dp"), PartitionSpec(None, ("one", "dp")), PartitionSpec("one")):
        array = jax.ShapeDtypeStruct((4, 6), jnp.float32, sharding=NamedSharding(explicit, spec))
        jax.jit(body).trace(array)
    assert seen[::2] == [(), (0,), (1,), ()]
    assert all(axes == () or set(axes) == {None} for axes in seen[1::2])


def test_manual_axes_are_those_of_shard_map() -> None:
    seen = [internals.manual_axes()]
    inside(lambda a: seen.append(internals.manual_axes()) or a, PartitionSpec(("dp", "tp")))(VALUES)
    assert (seen[0], seen[-1]) == (frozenset(), frozenset({"dp", "tp"}))


def test_nothing_is_sharded_inside_shard_map() -> None:
    seen = []

    def body(a: jax.Array) -> jax.Array:
        seen.append(internals.sharded_dimensions(a))
        return internals.vary_over(a, frozenset({"dp", "tp"}))

    inside(body, DP)(VALUES)
    assert set(seen) == {()}


# ---- a primitive of our own, registered as the losses' are


@pytest.fixture
def scaled() -> Iterator[tuple[Callable[..., Any], list[Any]]]:
    """``scaled(a, b, factor=)`` answers with ``factor * a`` and ``b``; and what its rules were told."""
    told: list[Any] = []
    primitive = Primitive("toy_scaled")
    primitive.multiple_results = True
    compiled: dict[float, Any] = {}

    @primitive.def_abstract_eval
    def types(a: Any, b: Any, factor: float) -> list[Any]:
        return [internals.result_type((a, b), a.shape, a.dtype), internals.result_type((a, b), b.shape, b.dtype)]

    @primitive.def_impl
    def evaluate(*operands: jax.Array, factor: float) -> Any:
        if factor not in compiled:
            compiled[factor] = jax.jit(lambda *operands: primitive.bind(*operands, factor=factor))
        with jax.disable_jit(False):
            return compiled[factor](*operands)

    def lowering(context: Any, operand_types: Any, *, factor: float) -> Any:
        told.append((internals.platforms_of(context), internals.replicas_of(context), len(operand_types)))
        return lambda a, b: (factor * a, b)

    def batch(arrays: Any, dims: Any, *, factor: float) -> Any:
        told.append(dims)
        fronts = [a if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(arrays, dims, strict=True)]
        return primitive.bind(*fronts, factor=factor), [None if d is None else 0 for d in dims]

    internals.lower_as(primitive, lowering)
    batching.primitive_batchers[primitive] = batch
    yield lambda a, b, factor=3.0: tuple(primitive.bind(a, b, factor=factor)), told


@pytest.mark.parametrize("way", ("eager", "jit", "without jit"))
def test_a_primitive_is_evaluated_as_it_is_lowered(scaled: Any, way: str) -> None:
    function, told = scaled
    a, b = jnp.asarray(VALUES), jnp.arange(3)
    if way == "without jit":
        with jax.disable_jit():
            got = function(a, b)
    else:
        got = (jax.jit(function) if way == "jit" else function)(a, b)
    assert_same_bits(got, (3.0 * a, b))
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    assert told == [((platform,), 1, 2)]


def test_a_lowering_is_told_its_platforms(scaled: Any) -> None:
    function, told = scaled
    traced = jax.jit(function).trace(jnp.asarray(VALUES), jnp.arange(3))
    assert told == []  # nothing is lowered until the program is
    for platforms in (("tpu",), ("cpu",), ("cpu", "tpu")):
        traced.lower(lowering_platforms=platforms)
    assert [platforms for platforms, _, _ in told] == [("tpu",), ("cpu",), ("cpu", "tpu")]


def test_a_lowering_inside_shard_map_has_one_replica(scaled: Any) -> None:
    function, told = scaled

    def body(a: jax.Array, b: jax.Array) -> jax.Array:
        return function(*internals.unify(a, b))[0]

    got = jax.jit(inside(body, DP, TP))(VALUES, VALUES)
    assert_same_bits(got, jnp.asarray(3.0 * VALUES))
    assert {replicas for _, replicas, _ in told} == {1}


def test_a_lowering_is_told_of_an_abstract_mesh_of_several_devices(scaled: Any) -> None:
    """No such devices are needed to lower a program for them."""
    function, told = scaled
    wide = jax.sharding.AbstractMesh((4, 2), ("dp", "tp"))
    array = jax.ShapeDtypeStruct((4, 3), jnp.float32, sharding=NamedSharding(wide, DP))
    jax.jit(lambda a: function(a, a)[0]).trace(array).lower(lowering_platforms=("cpu",))
    assert told == [(("cpu",), 8, 2)]


def test_a_batching_rule_is_told_what_is_mapped(scaled: Any) -> None:
    function, told = scaled
    a, b = jnp.asarray(VALUES), jnp.arange(3)
    mapped = jax.vmap(function, in_axes=(1, None), out_axes=(1, None))
    for transform in (lambda f: f, jax.jit):
        assert_same_bits(transform(mapped)(a, b), (3.0 * a, b))
    assert [dims for dims in told if None in dims] == [(1, None)] * 2


@pytest.fixture
def halved() -> Iterator[Callable[[jax.Array, jax.Array], jax.Array]]:
    """Linear in its second operand, and there only to be transposed, as the tangent of a loss is."""
    primitive = Primitive("toy_halved")

    @primitive.def_abstract_eval
    def result(like: Any, tangent: Any) -> Any:
        return internals.result_type((like, tangent), tangent.shape, tangent.dtype)

    def transpose(cotangent: Any, like: Any, tangent: Any) -> Any:
        assert ad.is_undefined_primal(tangent) and not ad.is_undefined_primal(like)
        if isinstance(cotangent, ad.Zero):
            return [None, ad.Zero(tangent.aval)]
        return [None, 0.5 * like * cotangent]

    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("only its transpose exists")

    ad.primitive_transposes[primitive] = transpose
    ad.primitive_jvps[primitive] = refuse
    primitive.def_impl(refuse)
    internals.lower_as(primitive, refuse)
    yield primitive.bind


@pytest.mark.parametrize("transform", (lambda f: f, jax.jit), ids=("eager", "jit"))
def test_a_tangent_that_exists_only_to_be_transposed(halved: Any, transform: Callable[..., Any]) -> None:
    @jax.custom_jvp
    def function(a: jax.Array) -> jax.Array:
        return 0.25 * a**2

    function.defjvp(lambda primals, tangents: (function(*primals), halved(*primals, *tangents)))
    array = jnp.asarray(VALUES)
    by_a = transform(jax.grad(lambda a: (-1.7 * function(a)).sum()))(array)
    np.testing.assert_allclose(by_a, -1.7 * 0.5 * VALUES, rtol=1e-6)
    with pytest.raises(NotImplementedError, match="only its transpose exists"):
        transform(lambda a: jax.jvp(function, (a,), (a,)))(array)
    with pytest.raises(NotImplementedError, match="only its transpose exists"):
        transform(lambda a: jax.jvp(lambda a: jax.jvp(function, (a,), (a,)), (a,), (a,)))(array)


# ---- buffers


@pytest.mark.parametrize("recordable", (False, True))
def test_a_buffer_callback_hands_out_buffers_and_no_copies(recordable: bool) -> None:
    """What torch writes into an output is what JAX reads, and what it reads is where JAX keeps its array."""
    seen: list[int] = []

    def fill(context: Any, outputs: Any, *inputs: Any) -> None:
        source, target, scratch = (torch.from_dlpack(buffer) for buffer in (*inputs, *outputs))
        seen.append(source.data_ptr())
        on_cpu = source.device.type == "cpu"
        assert (int(inputs[0].__dlpack_device__()[0]) == 1) == on_cpu
        stream = None if on_cpu else torch.cuda.ExternalStream(context.stream, device=source.device)
        with torch.cuda.stream(stream):
            scratch.copy_(source)
            target.T.copy_(scratch).mul_(2)

    shapes = (jax.ShapeDtypeStruct((3, 2), jnp.float32), jax.ShapeDtypeStruct((2, 3), jnp.float32))
    callback = internals.buffer_callback(fill, shapes, command_buffer_compatible=recordable)
    array = jax.block_until_ready(jnp.asarray(VALUES))
    target, scratch = jax.block_until_ready(jax.jit(lambda a: tuple(callback(a)))(array))
    assert_same_bits((target, scratch), (2 * array.T, array))
    assert seen == [array.unsafe_buffer_pointer()]


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32), ids=lambda d: d.__name__)
def test_a_buffer_has_the_dtype_that_torch_calls_the_same(dtype: Any) -> None:
    seen = []

    def fill(context: Any, outputs: Any, *inputs: Any) -> None:
        seen.extend(torch.from_dlpack(buffer).dtype for buffer in (*inputs, *outputs))

    shape = jax.ShapeDtypeStruct((4,), dtype)
    callback = internals.buffer_callback(fill, (shape,), command_buffer_compatible=False)
    jax.block_until_ready(jax.jit(lambda a: callback(a))(jnp.ones(4, dtype)))
    assert seen == [getattr(torch, jnp.dtype(dtype).name)] * 2


def test_an_error_in_a_buffer_callback_reaches_the_caller() -> None:
    def fail(context: Any, outputs: Any, *inputs: Any) -> None:
        raise ZeroDivisionError("on purpose")

    shape = jax.ShapeDtypeStruct((4,), jnp.float32)
    callback = internals.buffer_callback(fail, (shape,), command_buffer_compatible=False)
    with pytest.raises(jax.errors.JaxRuntimeError, match="on purpose"):
        jax.block_until_ready(jax.jit(lambda a: callback(a))(jnp.ones(4)))
