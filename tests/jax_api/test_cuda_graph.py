"""``cuda_graph=True``: XLA records the launches and replays them without Python."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch

from core_kernels import Options, Plan, Step, logits_problem, plan
from core_kernels.problem import Argument
from jax_api import bridge
from tests.jax_api.problems import (
    METRICS,
    OPTIONS,
    Arrays,
    Operation,
    assert_same_bits,
    each_operation,
    with_output_as_auxiliary,
)
from tests.support import on_gpu

needs_gpu = pytest.mark.skipif(not on_gpu(), reason="graphs are a GPU's")
ANY_GRAPH = {"xla_gpu_graph_min_graph_size": 1} if on_gpu() else {}
WARM_UP, REPEATS = 4, 10
SEEDS = (0, 1, 2, 0, 1, 2) if on_gpu() else (0, 1)


def step_of(operation: Operation, cuda_graph: bool, **jit: Any) -> Callable[[Arrays, jax.Array], Any]:
    """Loss, metrics and gradients, compiled."""

    def run(primals: Arrays, labels: jax.Array) -> Any:
        loss = lambda p: operation.function(**p, labels=labels, cuda_graph=cuda_graph, **METRICS, **OPTIONS)  # noqa: E731
        return jax.value_and_grad(with_output_as_auxiliary(loss), has_aux=True)(primals)

    return jax.jit(run, compiler_options=ANY_GRAPH, **jit)


def fresh(operation: Operation, seed: int) -> tuple[Arrays, jax.Array]:
    problem = operation.problem(seed=seed)
    return jax.tree.map(jnp.array, problem.primals), jnp.array(problem.labels)


@each_operation
def test_a_graph_changes_no_bit(operation: Operation) -> None:
    """Whatever arrays it is replayed on: other values, elsewhere in memory, several alive at once."""
    plain, recorded = step_of(operation, False), step_of(operation, True)
    alive = []
    for seed in SEEDS:
        arguments = fresh(operation, seed)
        alive.append((arguments, recorded(*arguments)))
    for (arguments, got), seed in zip(alive, SEEDS, strict=True):
        assert_same_bits(got, plain(*arguments))
        assert_same_bits(got, plain(*fresh(operation, seed)))


@each_operation
def test_a_graph_over_donated_arrays_changes_no_bit(operation: Operation) -> None:
    plain, recorded = step_of(operation, False), step_of(operation, True, donate_argnums=0)
    for seed in SEEDS:
        primals, labels = fresh(operation, seed)
        got = recorded(primals, labels)
        assert all(array.is_deleted() for array in primals.values())
        assert_same_bits(got, plain(*fresh(operation, seed)))


@pytest.mark.parametrize("spelled", ("eager", "vmap", "checkpoint"))
@each_operation
def test_other_spellings_with_a_graph_change_no_bit(operation: Operation, spelled: str) -> None:
    problem = operation.problem((2, 3))

    def gradients(cuda_graph: bool) -> Any:
        def losses(primals: Arrays) -> jax.Array:
            loss = lambda p, labels: operation.function(**p, labels=labels, cuda_graph=cuda_graph, **OPTIONS)  # noqa: E731
            if spelled == "vmap":
                axes = {name: 0 if name == operation.rows else None for name in primals}
                return jax.vmap(loss, (axes, 0))(primals, problem.labels)
            wrapped = jax.checkpoint(loss) if spelled == "checkpoint" else loss
            return wrapped(primals, problem.labels)

        run = jax.value_and_grad(lambda p: (losses(p) * jnp.array([1.5, -2.0])).sum())
        return (run if spelled == "eager" else jax.jit(run, compiler_options=ANY_GRAPH))(problem.primals)

    want = gradients(False)
    assert_same_bits(gradients(True), want)


@needs_gpu
@pytest.mark.parametrize("cuda_graph", (False, True))
@each_operation
def test_a_recorded_step_makes_no_call_to_python(operation: Operation, cuda_graph: bool, launches: list[Plan]) -> None:
    step = step_of(operation, cuda_graph)
    arguments = fresh(operation, 0)
    first = jax.block_until_ready(step(*arguments))
    assert [plan.step.kind for plan in launches][:2] == ["loss", "gradient"]
    for _ in range(WARM_UP):
        jax.block_until_ready(step(*arguments))
    launches.clear()
    for _ in range(REPEATS):  # each step's results are gone by the next, so it has the same buffers
        jax.block_until_ready(step(*arguments))
    assert len(launches) == (0 if cuda_graph else 2 * REPEATS)
    assert_same_bits(step(*arguments), first)


# ---- the guard: neither compiling nor loading a kernel may happen while XLA records


@pytest.fixture
def callback() -> Iterator[Callable[[], None]]:
    """A launch over buffers on the CPU, as XLA makes it; its result is checked each time."""
    tokens, vocab = 3, 5
    arguments = (Argument("logits", (tokens, vocab), torch.float32), Argument("labels", (tokens,), torch.int32))
    step = Step("loss", logits_problem(*arguments, None), Options())
    made = bridge.PlanCallback(plan(step, torch.device("cpu")), frozenset())
    logits = torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([-100, 1, 4], dtype=torch.int32)
    want = torch.nn.functional.cross_entropy(logits, labels.long())

    def run() -> None:
        outputs = [torch.full(buffer.shape, 7, dtype=buffer.dtype) for buffer in made.plan.allocations]
        made(None, outputs, logits, labels)
        torch.testing.assert_close(outputs[0], want)

    yield run


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """``[whether XLA records, on which GPU]``, as the callback sees it: there need be no GPU."""
    state: list[Any] = [True, 0]

    @contextlib.contextmanager
    def stream(context: Any, buffer: Any) -> Iterator[Any]:
        yield state[1]

    monkeypatch.setattr(bridge, "_xla_stream", stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state[0])
    return state


REFUSED = "XLA records twinhead's kernels before it has run them: use cuda_graph=False"


def test_recording_before_the_first_run_is_refused(callback: Callable[[], None], capturing: list[Any]) -> None:
    for _ in range(2):  # nothing was run, so it stays refused
        with pytest.raises(RuntimeError) as caught:
            callback()
        assert str(caught.value) == REFUSED
    capturing[0] = False
    callback()
    capturing[0] = True
    callback()


def test_each_gpu_has_a_first_run_of_its_own(callback: Callable[[], None], capturing: list[Any]) -> None:
    capturing[0] = False
    callback()
    capturing[:] = [True, 1]
    with pytest.raises(RuntimeError) as caught:
        callback()
    assert str(caught.value) == REFUSED
    capturing[:] = [True, 0]
    callback()


def test_a_run_that_failed_is_no_first_run(
    callback: Callable[[], None], capturing: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise ZeroDivisionError

    capturing[0] = False
    with monkeypatch.context() as patched:
        patched.setattr(bridge, "launch", fail)
        with pytest.raises(ZeroDivisionError):
            callback()
    capturing[0] = True
    with pytest.raises(RuntimeError) as caught:
        callback()
    assert str(caught.value) == REFUSED


def test_a_cpu_records_nothing(callback: Callable[[], None], capturing: list[Any]) -> None:
    capturing[:] = [True, None]
    callback()
    callback()
