"""Where a loss is compiled, and where it is not: the engine is chosen when a program is compiled, for its platform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from core_kernels import Plan
from tests.jax_api.problems import (
    LINEAR,
    OPTIONS,
    Operation,
    assert_close,
    assert_same_bits,
    each_operation,
    gradient,
    kernels_run,
)
from tests.support import interpreting

NEEDS_A_GPU = "engine='triton' needs a GPU, or TRITON_INTERPRET=1 set before Python starts; got arguments on cpu"


def unsupported(platforms: str) -> str:
    return (
        f"twinhead compiles for one platform of cpu, cuda, rocm, and this program is for {platforms}: use a loss in "
        "plain JAX there"
    )


DIFFERENTIATED: dict[str, Callable[[Any], Any]] = {"loss": lambda loss: loss, "gradient": gradient}
differentiated_or_not = pytest.mark.parametrize("differentiated", DIFFERENTIATED.values(), ids=DIFFERENTIATED)


@pytest.mark.parametrize("platforms", (("tpu",), ("cpu", "cuda"), ("cpu", "tpu")), ids=", ".join)
@differentiated_or_not
@each_operation
def test_another_platform_is_refused_when_compiled(
    operation: Operation, differentiated: Callable[[Any], Any], platforms: tuple[str, ...], nothing_runs: None
) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem)
    traced = jax.jit(differentiated(ours)).trace(problem.primals)
    with pytest.raises(NotImplementedError) as caught:
        traced.lower(lowering_platforms=platforms)
    assert str(caught.value) == unsupported(", ".join(platforms))


@differentiated_or_not
@each_operation
def test_the_program_decides_not_the_default_backend(
    operation: Operation, differentiated: Callable[[Any], Any], plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = operation.problem()
    ours, reference = operation.losses(problem, **OPTIONS)
    want = jax.jit(differentiated(reference))(problem.primals)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    traced = jax.jit(differentiated(ours)).trace(problem.primals)
    assert plans == []
    assert_close(traced.lower().compile()(problem.primals), want)
    assert len(plans) == (2 if differentiated is gradient else 1)


@differentiated_or_not
@each_operation
def test_arrays_on_a_cpu_are_computed_there(
    operation: Operation, differentiated: Callable[[Any], Any], plans: list[Plan]
) -> None:
    """Also where a GPU is the default."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        problem = operation.problem((5,))
        ours, reference = operation.losses(problem, **OPTIONS)
        got = jax.jit(differentiated(ours))(problem.primals)
        assert all(leaf.devices() == {cpu} for leaf in jax.tree.leaves(got))
        assert_close(got, jax.jit(differentiated(reference))(problem.primals))
    assert [plan.engine for plan in plans] == ["triton" if interpreting() else "torch"] * len(plans) != []


@pytest.mark.skipif(kernels_run(), reason="the kernels run here")
@pytest.mark.parametrize("how", ("called", "lowered", "differentiated"))
@each_operation
def test_the_kernels_need_a_gpu(operation: Operation, how: str, nothing_runs: None) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem, engine="triton")
    with pytest.raises(ValueError) as caught:
        if how == "called":
            ours(problem.primals)
        elif how == "lowered":
            jax.jit(ours).lower(problem.primals)
        else:
            gradient(ours)(problem.primals)
    assert str(caught.value) == NEEDS_A_GPU


@pytest.mark.skipif(kernels_run(), reason="the kernels run here")
@each_operation
def test_a_program_for_a_gpu_can_be_traced_without_one(operation: Operation, nothing_runs: None) -> None:
    problem = operation.problem()
    ours, _ = operation.losses(problem, engine="triton")
    traced = jax.jit(gradient(ours)).trace(problem.primals)
    assert [leaf.shape for leaf in jax.tree.leaves(traced.out_info)] == [
        array.shape for array in jax.tree.leaves(problem.primals)
    ]


@pytest.mark.parametrize("how", ("called", "lowered"))
def test_too_little_memory_is_an_error_of_the_call_that_is_compiled(how: str, nothing_runs: None) -> None:
    problem = LINEAR.problem()
    ours, _ = LINEAR.losses(problem, memory=3)
    traced = jax.jit(ours).trace(problem.primals)
    with pytest.raises(ValueError, match=r"^memory=3 bytes are too few: this call needs at least [1-9]\d+"):
        if how == "called":
            ours(problem.primals)
        else:
            traced.lower()


def vocab_axis_error(vocab_axis: Any) -> str:
    return f"vocab_axis must name a mesh axis inside jax.shard_map, got {vocab_axis!r}, which is not one here"


@pytest.mark.parametrize("vocab_axis", ("tp", ("dp", "tp")), ids=str)
@pytest.mark.parametrize("transform", (lambda f: f, jax.jit, jax.grad), ids=("eager", "jit", "grad"))
def test_a_vocab_axis_outside_shard_map_is_refused(transform: Any, vocab_axis: Any, nothing_runs: None) -> None:
    problem = LINEAR.problem()
    ours, _ = LINEAR.losses(problem, vocab_axis=vocab_axis)
    with pytest.raises(ValueError) as caught:
        transform(ours)(problem.primals)
    assert str(caught.value) == vocab_axis_error(vocab_axis)


@pytest.mark.parametrize("transform", (lambda f: f, jax.jit), ids=("eager", "jit"))
def test_a_mesh_of_one_device_spreads_nothing(transform: Any) -> None:
    """A program for a larger mesh runs on one device as it is, gradients too."""
    mesh = jax.make_mesh((1,), ("dp",))
    problem = LINEAR.problem((2, 3))
    ours, _ = LINEAR.losses(problem)
    want = jax.value_and_grad(ours)(problem.primals)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("dp"))
    placed, labels = jax.device_put((problem.primals, problem.labels), sharding)

    def loss(primals: Any, labels: jax.Array) -> jax.Array:
        return LINEAR.function(**primals, labels=labels, ce_weight=problem.class_weight)

    assert_same_bits(transform(jax.value_and_grad(loss))(placed, labels), want)
    mapped = jax.vmap(loss, ({"x": 0, "weight": None, "bias": None}, 0))
    total = lambda primals, labels: mapped(primals, labels).sum()  # noqa: E731
    placed = problem.primals | {"x": placed["x"]}
    assert_close(
        transform(jax.value_and_grad(total))(placed, labels), jax.value_and_grad(total)(problem.primals, problem.labels)
    )


@differentiated_or_not
@each_operation
def test_a_loss_cannot_be_exported(
    operation: Operation, differentiated: Callable[[Any], Any], nothing_runs: None
) -> None:
    """A program that calls back into this process means nothing in another."""
    problem = operation.problem()
    ours, _ = operation.losses(problem)
    with pytest.raises(NotImplementedError, match="callback"):
        jax.export.export(jax.jit(differentiated(ours)))(problem.primals)
    with pytest.raises(NotImplementedError) as caught:
        jax.export.export(jax.jit(differentiated(ours)), platforms=("tpu",))(problem.primals)
    assert str(caught.value) == unsupported("tpu")


def test_a_loss_that_is_not_run_is_compiled_for_no_platform(nothing_runs: None) -> None:
    """Shapes can be asked for anywhere."""
    problem = LINEAR.problem()
    ours, _ = LINEAR.losses(problem, engine="triton", reduction="none")
    assert jax.eval_shape(ours, problem.primals) == jax.ShapeDtypeStruct(problem.labels.shape, jnp.float32)
