"""Line 6: batches of few tokens or none, vocabs of one class, and labels that are no class."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch import Tensor

import jax_api
import torch_api
from core_kernels import Options, Step, launch, plan
from tests.core_kernels.problems import (
    ENGINES,
    Tensors,
    buffers_of,
    differentiable,
    linear,
    logits,
    outputs_of,
    saved_of,
)
from tests.parity import frontends
from tests.parity.cases import METRICS, Case, Inputs, make_inputs
from tests.support import on_gpu, suite_device
from tests.trust.never_again import (
    LINEAR,
    LOGITS,
    Way,
    agree,
    check,
    in_every_way,
    results_of,
    scheduled,
    torch_leaves,
)


def rows_of(case: Case, inputs: Inputs) -> Tensor:
    return inputs.arrays["x" if case.operation == "linear" else "logits"]


@in_every_way
def test_6_all_labels_ignored_is_zero_throughout(way: Way, frontend: str) -> None:
    """Though no row is a number: loss, accuracy and gradients are 0 and never 0/0."""
    case = way.case("all_ignored", class_weight=True, data="all_ignored", options={"lse_square_scale": 0.1})
    inputs = make_inputs(case)
    rows_of(case, inputs).fill_(float("nan"))
    ours = agree(frontend, way, case, inputs)
    assert not any(values.any() for name, values in ours.items() if name != "predicted_tokens")


@in_every_way
def test_6_an_empty_batch_is_zero_and_has_gradients(way: Way, frontend: str) -> None:
    ours = agree(frontend, way, way.case("empty", leading=(0,)))
    assert float(ours["loss"]) == 0.0
    assert not any(values.any() for name, values in ours.items() if name.startswith("grad_"))


@in_every_way
def test_6_one_token(way: Way, frontend: str) -> None:
    ours = agree(frontend, way, way.case("one_token", leading=(1,), options={"lse_square_scale": 0.1}))
    assert ours["num_valid"] == 1


@in_every_way
def test_6_a_vocab_of_one_class(way: Way, frontend: str) -> None:
    """Nothing to choose from: only the z-loss has a loss and a gradient."""
    case = way.case("vocab_of_one", vocab=1, options={"lse_square_scale": 0.1})
    ours = agree(frontend, way, case)
    assert (ours["predicted_tokens"][1:-1] == 0).all() and ours["token_accuracy"] == 1
    assert ours["loss"] == ours["z_loss"] > 0


@in_every_way
def test_6_one_class_is_the_label_of_every_token(way: Way, frontend: str) -> None:
    """One row of the weight's gradient takes a part of each token."""
    case = way.case("one_class", leading=(12,))
    inputs = make_inputs(case)
    agree(frontend, way, case, replace(inputs, labels=torch.where(inputs.labels >= 0, 57, inputs.labels)))


@in_every_way
def test_6_labels_of_int32(way: Way, frontend: str) -> None:
    agree(frontend, way, way.case("int32", label_dtype=torch.int32))


@in_every_way
@pytest.mark.parametrize("ignore_index", [17, 300])
def test_6_ignore_index_inside_the_vocab_and_outside(way: Way, frontend: str, ignore_index: int) -> None:
    """Inside it is a class that is never a label; a number beyond the vocab is read nowhere as one."""
    case = way.case("ignore_index", options={"ignore_index": ignore_index})
    inputs = make_inputs(case)
    inputs.labels[3] = ignore_index
    ours = agree(frontend, way, case, inputs)
    assert ours["num_valid"] == 4
    assert not ours["grad_x" if way.operation == "linear" else "grad_logits"][[0, 3, -1]].any()


# ---- labels elsewhere


@pytest.mark.parametrize("way", [LOGITS[0], LINEAR[0]], ids=str)
def test_6_labels_on_another_device_are_refused_in_torch(way: Way) -> None:
    case = way.case("elsewhere")
    inputs = make_inputs(case)
    elsewhere = replace(inputs, labels=inputs.labels if on_gpu() else inputs.labels.to("meta"))
    arrays = torch_leaves(inputs)
    with pytest.raises(ValueError, match="target must be on the device of input"):
        if way.operation == "logits":
            torch_api.cross_entropy(arrays["logits"], elsewhere.labels)
        else:
            torch_api.fused_linear_cross_entropy(arrays["x"], arrays["weight"], elsewhere.labels)


@pytest.mark.skipif(not on_gpu(), reason="JAX has one device here")
@pytest.mark.parametrize("way", [LOGITS[0], LINEAR[0]], ids=str)
def test_6_labels_on_another_device_are_refused_in_jax(way: Way) -> None:
    case = way.case("elsewhere")
    inputs = make_inputs(case)
    arrays = jax.device_put(frontends.to_jax_arrays(case, inputs), jax.devices()[0])
    labels = jax.device_put(inputs.labels.int().numpy(), jax.devices("cpu")[0])
    with pytest.raises(ValueError, match="device"):
        call_jax(case, inputs, arrays, labels)


# ---- labels that are no class


def call_jax(case: Case, inputs: Inputs, arrays: dict[str, Any], labels: Any) -> Any:
    """As ``frontends.call_jax``, with labels that may be traced, and then are not checked."""
    if case.operation == "logits":
        return jax_api.cross_entropy(arrays["logits"], labels, **case.options, **METRICS)
    return jax_api.fused_linear_ce(arrays["x"], arrays["weight"], labels, memory=case.memory, **case.options, **METRICS)


ENDS = (-(2**31), -101, -1, 69, 70, 2**31 - 1)  # around [0, 69) and -100, and the ends of 32 bits
FAR_ENDS = (-(2**63), -(2**32) + 5, 2**32 + 5, 2**63 - 1)  # two of which are classes in 32 bits


@in_every_way
def test_6_labels_out_of_range_at_both_ends_are_nan_without_a_gradient(way: Way, frontend: str) -> None:
    """Where they are not read. On a CPU torch reads them: an ``IndexError`` names each and its place."""
    case = way.case("out_of_range", leading=(17,), label_dtype=torch.int32 if frontend == "jax" else torch.int64)
    inputs = make_inputs(case)
    bad = [*ENDS, *FAR_ENDS] if frontend == "torch" else [*ENDS]
    inputs.labels[2 : 2 + len(bad)] = torch.tensor(bad, dtype=inputs.labels.dtype)
    if frontend == "torch" and not on_gpu():
        for at, label in enumerate(bad):
            one = inputs.labels.clone()
            one[2:-1] = 5
            one[at + 2] = label
            with pytest.raises(IndexError, match=rf"target\[{at + 2}\] = {label} is out of range"):
                frontends.call_torch(case, replace(inputs, labels=one), torch_leaves(inputs))
        return

    @jax.jit
    def differentiate(arrays: dict[str, Any], labels: Any, upstream: Any) -> Any:
        def loss(arrays: dict[str, Any]) -> Any:
            out = call_jax(case, inputs, arrays, labels)
            return out.loss, out

        _, pullback, out = jax.vjp(loss, arrays, has_aux=True)
        return out, pullback(upstream)[0]

    with scheduled(way):
        if frontend == "torch":
            ours = frontends.run_torch(case, inputs, suite_device())
        else:
            arrays = frontends.to_jax_arrays(case, inputs)
            ours = results_of(*differentiate(arrays, inputs.labels.numpy(), frontends.to_jax(inputs.upstream)))
    check(frontend, case, inputs, ours)
    assert np.isnan(ours["loss"])


MARGIN = 256  # elements that belong to nobody, before each tensor and after


class Guarded:
    """Tensors in the middle of larger ones, whose margins must stay as they are; those of inputs are NaN."""

    def __init__(self) -> None:
        self.margins: dict[str, tuple[Tensor, Tensor]] = {}

    def within_margins(self, name: str, tensor: Tensor) -> Tensor:
        fill = float("nan") if tensor.is_floating_point() else 7
        whole = torch.full((tensor.numel() + 2 * MARGIN,), fill, dtype=tensor.dtype, device=tensor.device)
        whole[MARGIN:-MARGIN] = tensor.reshape(-1)
        self.margins[name] = whole, whole.clone()
        return whole[MARGIN:-MARGIN].view(tensor.shape)

    def check(self) -> None:
        for name, (whole, before) in self.margins.items():
            for margin in (slice(None, MARGIN), slice(-MARGIN, None)):
                same = (whole[margin] == before[margin]) | (whole[margin].isnan() & before[margin].isnan())
                assert same.all(), f"written past the end of {name}"


def launch_guarded(step: Step, tensors: Tensors, engine: str) -> Tensors:
    device = tensors["labels"].device
    planned = plan(replace(step, engine=engine), device)
    guarded = Guarded()
    buffers = {b.name: torch.full(b.shape, -77, dtype=b.dtype, device=device) for b in buffers_of(planned)}
    given = {name: guarded.within_margins(name, tensor) for name, tensor in buffers.items()}
    inputs = {name: guarded.within_margins(f"input {name}", tensors[name]) for name in step.inputs}
    launch(planned, given | inputs)
    guarded.check()
    return given


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", [*LOGITS, *LINEAR], ids=str)
def test_6_no_label_makes_a_kernel_read_or_write_out_of_bounds(way: Way, engine: str) -> None:
    """Every tensor has margins, NaN or to be left alone, and labels point into them: nothing comes of either.

    Both frontends launch no other kernels than these.
    """
    options = {"reduction": "mean" if way.schedule == "ahead" else "none", "lse_square_scale": 0.01}
    case = way.case("guarded", leading=(17,), class_weight=True, options=options)
    inputs = make_inputs(case)
    inputs.labels[2:12] = torch.tensor([*ENDS, *FAR_ENDS])
    problem = (
        logits(17, case.vocab, case.dtype)
        if way.operation == "logits"
        else linear(17, case.hidden, case.vocab, case.dtype, bias=False)
    )
    schedule = {"kept": {"keep": True}, "ahead": {"ahead": ("x", "weight")}}.get(way.schedule, {})
    loss = Step("loss", problem, Options(**METRICS, **options), memory=way.memory, **schedule)
    tensors = {name: array.to(suite_device()) for name, array in inputs.arrays.items()}
    tensors |= {"labels": inputs.labels.to(suite_device()), "grad_loss": inputs.upstream.reshape(-1).to(suite_device())}
    tensors["class_weight"] = inputs.class_weight.to(suite_device())
    with scheduled(way):
        buffers = launch_guarded(loss, tensors, engine)
        gradient = loss.gradient(differentiable(problem))
        found = launch_guarded(gradient, tensors | saved_of(loss, buffers), engine)
    answers = outputs_of(loss, buffers) | outputs_of(gradient, found)
    shapes = frontends.run_oracle(case, inputs)
    ours = {name: frontends.to_numpy(tensor).reshape(shapes[name].shape) for name, tensor in answers.items()}
    check("core", case, inputs, ours)
