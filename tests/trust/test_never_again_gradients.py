"""Lines 3 to 5: gradients of what is trained and of nothing else, as often as asked, under any upstream gradient."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import torch

from tests.parity import frontends
from tests.parity.cases import Case, Inputs, make_inputs
from tests.support import suite_device
from tests.trust.never_again import (
    AHEAD,
    KEPT,
    LOGITS,
    SLABS,
    Way,
    agree,
    check,
    in_every_linear_way,
    in_every_way,
    in_ways,
    jax_vjp,
    per_token_in_every_way,
    results_of,
    scheduled,
    torch_leaves,
)

# ---- line 3


def differentiate(frontend: str, case: Case, inputs: Inputs, wanted: tuple[str, ...]) -> Any:
    """Results with the gradients by the ``wanted`` arrays alone: the others are frozen."""
    if frontend == "torch":
        arrays = torch_leaves(inputs, wanted)
        out = frontends.call_torch(case, inputs, arrays)
        out.loss.backward(inputs.upstream.to(suite_device()))
        assert all(array.grad is None for name, array in arrays.items() if name not in wanted)
        return results_of(out, {name: arrays[name].grad for name in wanted})
    arrays = frontends.to_jax_arrays(case, inputs)

    @jax.jit
    def run(trained: dict[str, Any], frozen: dict[str, Any], upstream: Any) -> Any:
        out, pullback = jax_vjp(case, inputs, trained, frozen)
        return out, pullback(upstream)

    trained = {name: arrays.pop(name) for name in wanted}
    return results_of(*run(trained, arrays, frontends.to_jax(inputs.upstream)))


@in_every_linear_way
@pytest.mark.parametrize("wanted", [("weight",), ("x",)], ids=["frozen_input", "frozen_head"])
def test_3_what_is_trained_has_its_gradient_beside_what_is_frozen(
    way: Way, frontend: str, wanted: tuple[str, ...]
) -> None:
    case = way.case("frozen")
    inputs = make_inputs(case)
    with scheduled(way) as plans:
        ours = differentiate(frontend, case, inputs, wanted)
    check(frontend, case, inputs, ours)
    assert [planned.step.wanted for planned in plans] == [(), wanted]
    assert plans[0].step.ahead in ((), wanted)  # what is frozen costs nothing


@in_ways(*SLABS)
@pytest.mark.parametrize("wanted", [("bias",), ("weight", "bias"), ("x", "bias")], ids="+".join)
def test_3_a_trained_bias_has_its_gradient_beside_what_is_frozen(
    way: Way, frontend: str, wanted: tuple[str, ...]
) -> None:
    case = way.case("frozen_bias", bias=True, options={"label_smoothing": 0.1})
    inputs = make_inputs(case)
    with scheduled(way):
        ours = differentiate(frontend, case, inputs, wanted)
    check(frontend, case, inputs, ours)


@in_every_way
def test_3_an_evaluation_computes_no_gradient_and_keeps_nothing_for_one(way: Way, frontend: str) -> None:
    """Under ``no_grad`` and ``inference_mode``, and where nothing requires a gradient; in an undifferentiated call."""
    case = way.case("evaluation")
    inputs = make_inputs(case)
    contexts: list[AbstractContextManager] = [torch.no_grad(), torch.inference_mode(), torch.enable_grad()]
    outs = []
    with scheduled(way) as plans:
        if frontend == "torch":
            for trained, context in zip((None, None, ()), contexts, strict=True):
                with context:
                    outs.append(frontends.call_torch(case, inputs, torch_leaves(inputs, trained)))
            assert not any(out.loss.requires_grad for out in outs)
        else:
            outs = [jax.jit(lambda a: frontends.call_jax(case, inputs, a))(frontends.to_jax_arrays(case, inputs))]
            jax.block_until_ready(outs)
    assert [planned.step.kind for planned in plans] == ["loss"] * len(outs)
    assert not any(planned.step.keep or planned.step.ahead for planned in plans)
    for out in outs:
        check(frontend, case, inputs, results_of(out, {}))


# ---- line 4


@in_every_way
def test_4_a_second_backward_is_not_multiplied_twice(way: Way, frontend: str) -> None:
    """Under another upstream gradient, too: the first one's is in nothing that was saved."""
    case = way.case("twice")
    inputs = make_inputs(case)
    other = replace(inputs, upstream=torch.tensor(-0.3))
    with scheduled(way):
        if frontend == "torch":
            arrays = torch_leaves(inputs)
            out = frontends.call_torch(case, inputs, arrays)
            answers = [
                dict(zip(arrays, torch.autograd.grad(out.loss, [*arrays.values()], g, retain_graph=True), strict=True))
                for g in (i.upstream.to(suite_device()) for i in (inputs, other, inputs))
            ]
            out.loss.backward(inputs.upstream.to(suite_device()), retain_graph=True)
            out.loss.backward(inputs.upstream.to(suite_device()))
            for name, array in arrays.items():  # and what is added up is twice the gradient
                assert torch.equal(array.grad, answers[0][name] + answers[0][name]), name
        else:
            out, pullback = jax_vjp(case, inputs, frontends.to_jax_arrays(case, inputs))
            answers = [pullback(frontends.to_jax(i.upstream)) for i in (inputs, other, inputs)]
        first, second, again = (results_of(out, answer) for answer in answers)
    check(frontend, case, inputs, first)
    check(frontend, case, other, second)
    assert all(np.array_equal(again[name], value) for name, value in first.items())


@in_every_way
@pytest.mark.parametrize("differentiated", [True, False], ids=["training", "evaluation"])
def test_4_nothing_of_the_callers_is_overwritten(way: Way, frontend: str, differentiated: bool) -> None:
    """Neither logits nor activations, nor the rows of ignored tokens, which are no zeros after; nor what else is given,
    down to the upstream gradient. In torch no version is bumped either.
    """
    options = {"reduction": "mean" if way.schedule == "ahead" else "none"}
    case = way.case("overwritten", class_weight=True, options=options)
    inputs = make_inputs(case)
    inputs.labels[3] = case.ignore_index
    with scheduled(way):
        if frontend == "torch":
            given = torch_leaves(inputs, None if differentiated else ())
            arrays = {
                **given,
                "labels": inputs.labels.to(suite_device()),
                "upstream": inputs.upstream.to(suite_device()),
            }
            arrays["class_weight"] = inputs.class_weight.to(suite_device())
            before = {name: array.detach().clone() for name, array in arrays.items()}
            versions = {name: array._version for name, array in arrays.items()}
            mine = replace(inputs, labels=arrays["labels"], class_weight=arrays["class_weight"])
            with torch.set_grad_enabled(differentiated):
                out = call_as_given(case, mine, given)
            if differentiated:
                out.backward(arrays["upstream"])
            assert all(torch.equal(array.detach(), before[name]) for name, array in arrays.items())
            assert versions == {name: array._version for name, array in arrays.items()}
        else:
            arrays = frontends.to_jax_arrays(case, inputs)
            before = {name: np.array(array) for name, array in arrays.items()}
            upstream = frontends.to_jax(inputs.upstream)
            if differentiated:
                jax.block_until_ready(jax_vjp(case, inputs, arrays)[1](upstream))
            else:
                jax.block_until_ready(frontends.call_jax(case, inputs, arrays))
            assert all(np.array_equal(np.array(array), before[name]) for name, array in arrays.items())
            assert np.array_equal(np.array(upstream), inputs.upstream.numpy())


def call_as_given(case: Case, inputs: Inputs, arrays: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of the very tensors given, without a copy of any."""
    import torch_api

    if case.operation == "logits":
        return torch_api.cross_entropy(arrays["logits"], inputs.labels, inputs.class_weight, **case.options)
    return torch_api.fused_linear_cross_entropy(
        arrays["x"], arrays["weight"], inputs.labels, None, inputs.class_weight, memory=case.memory, **case.options
    )


# ---- line 5


@per_token_in_every_way
@pytest.mark.parametrize("first", [0.0, 1.0])
def test_5_each_token_has_its_own_upstream_gradient_whatever_the_first_is(
    way: Way, frontend: str, first: float
) -> None:
    """A kernel that looks at the first entry alone takes all for 0, or none to be there, or all to be 1."""
    case = way.case("first_upstream", options={"reduction": "none"})
    inputs = make_inputs(case)
    inputs.labels[0] = 3
    inputs.upstream[0] = first
    ours = agree(frontend, way, case, inputs)
    rows = ours["grad_x" if way.operation == "linear" else "grad_logits"]
    assert rows[0].any() == bool(first) and rows[1].any() and not rows[len(rows) // 2].any()


@in_ways(*LOGITS, *SLABS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_5_class_weights_with_smoothing_and_z_loss_together(way: Way, frontend: str, reduction: str) -> None:
    options = {"label_smoothing": 0.2, "lse_square_scale": 0.05, "reduction": reduction}
    agree(frontend, way, way.case("together", class_weight=True, options=options))


@in_ways(KEPT, AHEAD)
def test_5_class_weights_with_z_loss_without_smoothing(way: Way, frontend: str) -> None:
    """What schedules that take no smoothing can have of it."""
    agree(frontend, way, way.case("weights", class_weight=True, options={"lse_square_scale": 0.05}))


@in_every_linear_way
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_5_token_scaling_with_ignored_rows(way: Way, frontend: str, reduction: str) -> None:
    """The scale of an ignored row is no number, and the divisors are those of an unscaled mean."""
    if reduction == "none" and way is AHEAD:
        reduction = "sum"
    options = {"use_token_scaling": True, "lse_square_scale": 0.05, "reduction": reduction}
    case = way.case("scaled", class_weight=True, data="broken_ignored", leading=(22,), options=options)
    agree(frontend, way, case)
