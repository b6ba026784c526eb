"""A process that has called the losses ends at once and in silence, whatever is still under way."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import jax
import pytest

import torch_api
from tests.jax_api import problems
from tests.support import interpreting, suite_device
from tests.torch_api.calls import gradients, random_arguments
from tests.trust.process import run

pytestmark = pytest.mark.skipif(interpreting(), reason="of processes, whatever runs in them: plain runs have it")

TOKENS, VOCAB = 5, 101
KEPT: list[Any] = []  # lives as long as the process


@pytest.mark.parametrize("frontends", (("torch",), ("jax",), ("torch", "jax")), ids=" ".join)
def test_a_process_ends(frontends: tuple[str, ...]) -> None:
    # Only what goes wrong is heard: XLA has more to say on a GPU.
    ended = run(leave, *frontends, TF_CPP_MIN_LOG_LEVEL="2")
    assert (ended.returncode, ended.stderr) == (0, ""), ended
    assert sorted(ended.stdout.split()) == sorted([*frontends, *(f"{name}-later" for name in frontends)])


def leave(*frontends: str) -> None:
    """With results that nobody waited for (on a CPU, XLA itself waits for calls into Python), and with threads: one
    that has called and waits for ever, and one that has yet to call.
    """
    warnings.simplefilter("ignore")  # of shapes that are small and odd here
    for frontend in frontends:
        call = CALLS[frontend]()
        call()
        print(frontend)
        has_called = threading.Event()  # a daemon that still computes is aborted, in plain torch and JAX too
        threading.Thread(target=call_and_wait, args=(call, has_called), daemon=True).start()
        threading.Thread(target=call_after_the_end, args=(call, f"{frontend}-later")).start()
        call()
        has_called.wait()


def call_and_wait(call: Any, has_called: threading.Event) -> None:
    call()
    has_called.set()
    threading.Event().wait()


def call_after_the_end(call: Any, said: str) -> None:
    """Python waits for this thread when the main one has nothing more to do."""
    threading.main_thread().join()
    call()
    print(f"{said}\n", end="", flush=True)  # at once, beside another thread


def torch_call() -> Any:
    arguments = random_arguments(torch_api.fused_linear_cross_entropy, suite_device(), (TOKENS,), vocab=VOCAB)

    def call() -> None:
        loss = torch_api.fused_linear_cross_entropy(**arguments)
        KEPT.append((loss, gradients(loss, arguments, retain_graph=True)))

    return call


def jax_call() -> Any:
    problem = problems.LINEAR.problem((TOKENS,), vocab=VOCAB)
    loss, _ = problems.LINEAR.losses(problem, **problems.OPTIONS)
    step = jax.jit(jax.value_and_grad(loss))
    jax.block_until_ready(step(problem.primals))

    def call() -> None:
        KEPT.extend(step(problem.primals) for _ in range(3))

    return call


CALLS = {"torch": torch_call, "jax": jax_call}
