"""Line 10: whoever gets a slower path than asked for is told so, once, and why; what is documented is done quietly."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from jax.sharding import PartitionSpec as P

import jax_api
import torch_api
from core_kernels.notices import say_once
from core_kernels.tiles import choose_tiles
from tests.parity import frontends
from tests.parity.cases import Case, Inputs, make_inputs
from tests.support import interpreting, on_gpu, suite_device
from tests.trust.never_again import (
    AHEAD,
    FRONTENDS,
    KEPT,
    LINEAR,
    LOGITS,
    SLABS,
    Way,
    distinct,
    jax_vjp,
    scheduled,
    torch_leaves,
)

SPEED = Way("linear", torch.bfloat16, "speed", "whole")
in_both_frontends = pytest.mark.parametrize("frontend", FRONTENDS)
kernels_only = pytest.mark.skipif(not (interpreting() or on_gpu()), reason="only the kernels have a faster path")


@contextmanager
def said() -> Iterator[list[str]]:
    """What the library says within, however often: nothing of it has been said before."""
    say_once.cache_clear()
    sentences: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield sentences
        sentences += [str(warning.message) for warning in caught if "twinhead" in str(warning.message)]
    say_once.cache_clear()


def step(frontend: str, case: Case, inputs: Inputs) -> None:
    """A loss and its gradients by everything."""
    if frontend == "torch":
        frontends.call_torch(case, inputs, torch_leaves(inputs)).loss.sum().backward()
    else:
        _, pullback = jax_vjp(case, inputs, frontends.to_jax_arrays(case, inputs))
        jax.block_until_ready(pullback(jnp.ones_like(frontends.to_jax(inputs.upstream))))


def steps(frontend: str, way: Way, case: Case) -> list[str]:
    """What is said of two steps, the second over more tokens."""
    with said() as sentences, scheduled(way):
        for tokens in (5, 7):
            step(frontend, longer := replace(case, leading=(tokens,)), make_inputs(longer))
    return sentences


UNMET: dict[str, tuple[Way, dict[str, Any], str]] = {
    "float32": (SLABS[1], {}, "the inputs are float32, and not bfloat16"),
    "float16": (Way("linear", torch.float16, "speed", "whole"), {}, "the inputs are float16, and not bfloat16"),
    "bias": (SPEED, {"bias": True}, "there is a bias"),
    "smoothing": (SPEED, {"options": {"label_smoothing": 0.1}}, "there is label smoothing"),
}


@kernels_only
@in_both_frontends
@pytest.mark.parametrize("name", UNMET)
def test_10_speed_that_cannot_be_met_says_so_once_and_why(name: str, frontend: str) -> None:
    way, changes, why = UNMET[name]
    (sentence,) = steps(frontend, way, way.case(f"unmet_{name}", **changes))
    assert "memory='speed'" in sentence and "projects them again" in sentence and sentence.count(f"because {why}") == 1


@kernels_only
@in_both_frontends
def test_10_speed_for_too_many_tokens_of_no_reduction_says_so_once(frontend: str) -> None:
    """Gradients ahead need one upstream gradient; with a reduction they are taken, and nothing is said."""
    sentences = []
    for options in ({"reduction": "none"}, {"reduction": "mean"}):
        case = AHEAD.case("too_many", leading=(7,), options=options)
        with said() as found, scheduled(AHEAD if options["reduction"] == "mean" else replace(AHEAD, met=False)):
            step(frontend, case, make_inputs(case))
        sentences.append(found)
    assert ["because there are too many for reduction='none'" in s for s in sentences[0]] == [True]
    assert sentences[1] == []


@kernels_only
@in_both_frontends
def test_10_speed_of_a_mapped_call_says_so_once(frontend: str) -> None:
    case = KEPT.case("mapped")
    inputs = make_inputs(case)
    x, weight = inputs.arrays["x"].view(1, *inputs.arrays["x"].shape), inputs.arrays["weight"]
    with said() as sentences, scheduled(SPEED):
        for rows in (x, x[:, :5]):
            labels = inputs.labels[: rows.shape[1]][None]
            if frontend == "torch":
                mapped = torch.func.vmap(
                    torch.func.grad(lambda x, y, w: torch_api.fused_linear_cross_entropy(x, w, y, memory="speed")),
                    (0, 0, None),
                )
                mapped(rows.to(suite_device()), labels.to(suite_device()), weight.to(suite_device()))
            else:
                mapped_jax = jax.vmap(
                    jax.grad(lambda x, y, w: jax_api.fused_linear_ce(x, w, y, memory="speed")), (0, 0, None)
                )
                arguments = frontends.to_jax(rows), jnp.asarray(labels.numpy()), frontends.to_jax(weight)
                jax.block_until_ready(jax.jit(mapped_jax)(*arguments))
    (sentence,) = sentences
    assert "because the call is mapped" in sentence


@kernels_only
def test_10_speed_over_a_sharded_vocab_says_so_once() -> None:
    case = KEPT.case("sharded")
    inputs = make_inputs(case)
    mesh = jax.make_mesh((1,), ("vocab",))

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(), P("vocab"), P()), out_specs=P())
    def loss(x: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
        return jax_api.fused_linear_ce(x, weight, labels, vocab_axis="vocab", memory="speed")

    arrays = frontends.to_jax_arrays(case, inputs)
    placed = [
        jax.device_put(array, jax.NamedSharding(mesh, spec))
        for array, spec in ((arrays["x"], P()), (arrays["weight"], P("vocab")), (inputs.labels.numpy(), P()))
    ]
    with said() as sentences, scheduled(SPEED):
        jax.block_until_ready(jax.grad(loss)(*placed))
    (sentence,) = sentences
    assert "because the vocab is sharded" in sentence


@kernels_only
@in_both_frontends
@pytest.mark.parametrize("name", ["odd_hidden", "sliced"])
def test_10_a_weight_that_is_read_by_elements_says_so_once(name: str, frontend: str) -> None:
    hidden = 23 if name == "odd_hidden" else 24 if frontend == "torch" else 25  # a compiled program says it once
    case = KEPT.case("by_elements", hidden=hidden, layout="sliced" if name == "sliced" else "contiguous")
    (sentence,) = steps(frontend, KEPT, case)
    assert "the weight is read by elements and not in blocks, which is slower" in sentence
    assert "contiguous" in sentence and "16 bytes" in sentence


def batch_of_logits(cut: bool) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(2, 5, 101, device=suite_device())
    logits = logits[:, :-1] if cut else logits
    return logits, torch.zeros(logits.shape[:-1], dtype=torch.int64, device=suite_device())


def test_10_logits_that_are_copied_say_so_once() -> None:
    """The slice that shifts a batch's logits costs all their memory again: shifting the labels does not."""
    with said() as sentences:
        for _ in range(2):
            torch_api.cross_entropy(*batch_of_logits(cut=True))
    (sentence,) = sentences
    assert "cross_entropy copies its input" in sentence and "shift the labels" in sentence


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda logits: logits,
    "one_sequence": lambda logits: logits[:1, :-1],
    "every_other": lambda logits: logits[:, ::5],
    "fewer_classes": lambda logits: logits[..., 3:50],
    "flat": lambda logits: logits[0, 1:],
    "one_token": lambda logits: logits[1, 2],
    "classes_apart": lambda logits: logits.movedim(-1, 0).contiguous().movedim(0, -1),
    "none": lambda logits: logits[:, :0],
}


@pytest.mark.parametrize("name", VIEWS)
def test_10_logits_that_are_not_copied_say_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = VIEWS[name](batch_of_logits(cut=False)[0])
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=suite_device())
    read: list[int] = []
    launch = torch_api.operator.launch_plan
    monkeypatch.setattr(
        "torch_api.operator.launch_plan", lambda plan, t: (read.append(t["logits"].data_ptr()), launch(plan, t))
    )
    with said() as sentences:
        torch_api.cross_entropy(logits, labels)
    assert sentences == []
    assert read == [logits.data_ptr()] or not logits.numel()


def test_10_tiles_of_another_gpu_say_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core_kernels.tiles.interpreting", lambda: False)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: types.SimpleNamespace(multi_processor_count=108))
    found = {}
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _, capability=capability: capability)
        with said() as sentences:
            for dtype in (torch.bfloat16, torch.float32):
                choose_tiles.__wrapped__(torch.device("cuda"), dtype, 4096)
        found[capability] = sentences
    (sentence,) = found[8, 0]
    assert "measured on other GPUs" in sentence and "benchmarks/tune.py" in sentence
    assert found[9, 0] == []


def test_10_a_jax_program_that_repeats_the_loss_on_each_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside ``shard_map``, as if there were two devices: ``tests/jax_api/test_sharded_errors.py`` has them."""
    monkeypatch.setattr("jax_api.internals.replicas_of", lambda _: 2)
    case = LOGITS[0].case("replicas")
    inputs = make_inputs(case)
    run = jax.jit(lambda arrays: frontends.call_jax(case, inputs, arrays).loss)
    arrays = frontends.to_jax_arrays(case, inputs)
    with said() as sentences:
        for _ in range(2):
            jax.block_until_ready(run(arrays))
    (sentence,) = sentences
    assert "each of the 2 devices of this program computes the whole loss" in sentence and "shard_map" in sentence


def test_10_a_model_whose_logits_are_needed_says_so_once(device: torch.device) -> None:
    """And one whose head is not run as a linear layer: the loss is right, and no memory is saved."""
    pytest.importorskip("transformers")
    from tests.transformers.models import make, make_batch

    enabled, _ = make("LlamaForCausalLM", device)
    batch = make_batch(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            enabled(**batch).logits.argmax(-1)
    assert ["computed in full" in str(warning.message) for warning in caught] == [True]

    other, _ = make("LlamaForCausalLM", device)
    other.double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            other(**batch)
    assert ["in 32 or 16 bits, so the logits are computed in full" in str(w.message) for w in caught] == [True]


@in_both_frontends
@pytest.mark.parametrize("way", distinct(*LOGITS, *(way for way in LINEAR if way.schedule != "whole")), ids=str)
def test_10_what_is_met_or_documented_says_nothing(way: Way, frontend: str) -> None:
    """``"lean"``, ``"speed"`` in bf16, ``"auto"`` in any dtype; and on a CPU the engine that runs there."""
    assert steps(frontend, way, way.case("met")) == []
    if way.schedule == "slabs":
        automatic = replace(way, memory="auto", schedule="whole")
        case = automatic.case("automatic", bias=True, options={"label_smoothing": 0.1})
        assert steps(frontend, automatic, case) == []


@in_both_frontends
def test_10_on_a_cpu_memory_has_no_faster_path_to_say_anything_of(frontend: str) -> None:
    """Nor where the engine of plain torch operations is asked for, on any device."""
    case = SLABS[1].case("on_a_cpu", bias=True, hidden=23)
    inputs = make_inputs(case)
    arrays = torch_leaves(inputs) if frontend == "torch" else frontends.to_jax_arrays(case, inputs)
    with said() as sentences:
        if frontend == "torch":
            torch_api.fused_linear_cross_entropy(
                arrays["x"], arrays["weight"], inputs.labels.to(suite_device()), memory="speed", engine="torch"
            ).backward()
        else:
            jax.grad(
                lambda x: jax_api.fused_linear_ce(
                    x, arrays["weight"], jnp.asarray(inputs.labels.numpy()), memory="speed", engine="torch"
                )
            )(arrays["x"])
    assert sentences == []
