"""Properties of both losses over the whole space of options, shapes, strides, dtypes and data (``problems.SPACE``).

Values against the float64 oracle, torch's bits against JAX's, and what must not change a result. The relations are
tested in torch: JAX has the same bits. By default a few examples, the same on every run; the long run is by hand, and
makes more than 20,000 cases:

    HYPOTHESIS_PROFILE=long python -m pytest tests/trust/test_properties.py --timeout=0 -n 2 \\
        --hypothesis-show-statistics

``--hypothesis-profile=long`` does as well. A failure prints a ``Problem(...)`` to put in an ``@example``.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.parity.cases import Inputs
from tests.parity.closeness import check_same_bits
from tests.parity.frontends import Results, run_jax, run_torch
from tests.support import suite_device
from tests.trust.closeness import check, expected_of, margins_of, sum_of_margins, with_metrics
from tests.trust.problems import SHIFT, Problem, make_inputs, problems

DEVICE = suite_device()
SLICED = (129, 65, 127, 193, 257)  # on a CPU more than one slice, with the least memory
BATCHES = ((3,), (1,), (2,), (9,), (31,), (32,), (33,), (41,), (65,))
TINY = 2.0**-100  # a gradient below may be a multiple of a denormal number, which is rounded
# Equal terms, whose float32 sum errs one way; and a token scale of 1e-16, the exponential of a rounded difference.
EQUAL_ROWS = Problem(
    "equal_rows",
    "linear",
    (65,),
    hidden=65,
    vocab=7,
    options={"reduction": "sum", "lse_square_scale": 0.1, "softcap": 50.0},
    bias=True,
    upstream=100.0,
    seed=3736,
    exact=False,
    magnitude=2.0**-12,
    masked="first",
    rows_layout="expanded",
    wanted=("x", "bias"),
)
UNLIKELY_LABEL = Problem(
    "unlikely_label",
    "linear",
    (1,),
    hidden=31,
    vocab=7,
    options={"logit_scale": 4.0, "use_token_scaling": True},
    seed=13118,
    tied=True,
    wanted=("x", "weight"),
)
INTEGERS = ("predicted_tokens", "num_valid", "num_correct", "token_accuracy")


def cases(share: float = 1.0) -> Any:
    """This share of the profile's examples."""
    return settings(max_examples=math.ceil(share * settings().max_examples))


def drawn(problem: Problem) -> tuple[Problem, Inputs]:
    """A problem with its data, where "least" memory is the number of bytes that the error for too few asks for."""
    inputs = make_inputs(problem)
    if problem.memory != "least":
        return problem, inputs
    problem = replace(problem, memory=1)
    try:
        run_torch(problem, inputs, DEVICE, ())
    except ValueError as error:
        found = re.fullmatch(r"memory=1 bytes are too few: this call needs at least (\d+)", str(error))
        assert found, error
        return replace(problem, memory=int(found[1])), inputs
    assert not inputs.labels.numel(), "a step without memory"
    return problem, inputs


def known(problem: Problem, inputs: Inputs) -> tuple[Results, dict[str, np.ndarray], Results]:
    """The oracle's answer and its margins, and ours with everything, which is within them."""
    expected = expected_of(problem, inputs)
    margins = margins_of(problem, inputs, expected, DEVICE)
    ours = run_torch(problem, inputs, DEVICE)
    expected = with_metrics(problem, inputs, expected, ours["predicted_tokens"])
    check("torch", problem, ours, expected, margins)
    return expected, margins, ours


def rows_of(problem: Problem, inputs: Inputs, at: Tensor | slice) -> tuple[Problem, Inputs]:
    """The problem of some of the tokens, where they have one dimension."""
    arrays = {k: v[at] if k == problem.rows else v for k, v in inputs.arrays.items()}
    upstream = inputs.upstream[at] if inputs.upstream.dim() else inputs.upstream
    labels = inputs.labels[at]
    return replace(problem, leading=tuple(labels.shape)), Inputs(arrays, labels, inputs.class_weight, upstream)


@cases()
@given(problems())
@example(EQUAL_ROWS)
@example(UNLIKELY_LABEL)
def test_equals_the_oracle(problem: Problem) -> None:
    """All results; and any of the metrics, with any of the gradients, gives what all of them together give."""
    problem, inputs = drawn(problem)
    expected, margins, everything = known(problem, inputs)
    ours = run_torch(problem, inputs, DEVICE, problem.wanted, problem.metrics)
    asked = {"loss", *(name.removeprefix("return_") for name in problem.metrics)}
    asked = asked - {"counts"} | ({"num_valid", "num_correct"} if "counts" in asked else set())
    assert ours.keys() == asked | {f"grad_{name}" for name in problem.wanted}
    check("torch", problem, ours, expected, margins)
    check_same_bits({k: ours[k] for k in asked & {*INTEGERS}}, {k: everything[k] for k in asked & {*INTEGERS}})


@cases(0.6)
@given(
    problems(layout=("contiguous", "transposed_weight"), rows_layout=("contiguous",)),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_jax_equals_the_oracle_with_the_bits_of_torch(problem: Problem, jit: bool, where: bool, seed: int) -> None:
    """Eagerly and under jit, and with ignored tokens as labels or behind a mask."""
    problem, inputs = drawn(problem)
    expected, margins, _ = known(problem, inputs)
    by_torch = run_torch(problem, inputs, DEVICE, problem.wanted, problem.metrics)
    asked, given_inputs = problem, inputs
    if where:
        generator = torch.Generator().manual_seed(seed)
        ignored = inputs.labels == problem.ignore_index
        behind = ignored & (torch.rand(ignored.shape, generator=generator) < 0.5)
        others = torch.randint(-3, problem.vocab + 3, ignored.shape, generator=generator, dtype=problem.label_dtype)
        given_inputs = replace(inputs, labels=torch.where(behind, others, inputs.labels))
        asked = replace(problem, options=problem.options | {"where": jnp.asarray(~behind.numpy())})
    by_jax = run_jax(asked, given_inputs, problem.wanted, problem.metrics, jit)
    check_same_bits(by_torch, by_jax)
    check("jax", problem, by_jax, expected, margins)


@cases(0.5)
@given(problems(operation=("linear",), memory=("least",), vocab=SLICED), st.sampled_from((0, 1_000, 30_000)))
def test_memory_changes_no_result(problem: Problem, more: int) -> None:
    """Nor does evaluation, which computes no gradient: its loss has the bits of lean training."""
    problem, inputs = drawn(problem)
    expected, margins, ours = known(problem, inputs)
    for memory in ("lean", "auto", "speed", problem.memory + more):
        other = run_torch(replace(problem, memory=memory), inputs, DEVICE)
        # Of numbers that are not exact, two largest that round alike may change places with the order of a sum.
        wanted = with_metrics(problem, inputs, expected, other["predicted_tokens"])
        check(f"memory={memory}", problem, other, wanted, margins)
        if problem.exact:
            check_same_bits({k: other[k] for k in INTEGERS}, {k: ours[k] for k in INTEGERS})
        if memory == "lean":
            evaluated = run_torch(replace(problem, memory="lean"), inputs, DEVICE, ())
            check_same_bits(evaluated, {k: other[k] for k in evaluated})


@cases()
@given(problems(dtype=(torch.float32, torch.bfloat16)), st.sampled_from((2.0, -4.0, 0.5, 2.0**20, 0.0)))
def test_gradients_are_linear_in_upstream_to_the_bit(problem: Problem, factor: float) -> None:
    """In a power of two, and in zero; what is denormal in float32 may be rounded. The loss does not see it."""
    problem, inputs = drawn(problem)
    expected = expected_of(problem, inputs)
    assume(all(np.abs(expected[k]).max(initial=0.0) < 2.0**80 for k in expected if k.startswith("grad_")))
    once = run_torch(problem, inputs, DEVICE, problem.wanted)
    scaled = run_torch(problem, replace(inputs, upstream=factor * inputs.upstream), DEVICE, problem.wanted)
    for key, value in scaled.items():
        if not key.startswith("grad_"):
            assert np.array_equal(value, once[key], equal_nan=True), key
            continue
        wanted = np.float32(factor) * once[key]
        tiny = (np.abs(once[key]) < TINY) & (np.abs(value) <= 2.0 * abs(factor) * TINY)
        assert np.array_equal(np.where(tiny, 0.0, value), np.where(tiny, 0.0, wanted)), key


@cases()
@given(problems(exact=(True,), lse_square_scale=(0.0,), softcap=(None,)), st.sampled_from((SHIFT, -SHIFT)))
def test_a_constant_added_to_all_logits_changes_nothing(problem: Problem, shift: float) -> None:
    problem = replace(problem, bias=problem.operation == "linear")
    problem, inputs = drawn(problem)
    expected, margins, _ = known(problem, inputs)
    name = "bias" if problem.bias else "logits"
    shifted = (inputs.arrays[name] + shift * problem.magnitude).to(problem.dtype)
    exact = shifted.double() == inputs.arrays[name].double() + shift * problem.magnitude
    assume(bool((exact | shifted.isnan()).all()))
    inputs = replace(inputs, arrays=inputs.arrays | {name: shifted})
    ours = run_torch(problem, inputs, DEVICE)
    of_shifted = margins_of(problem, inputs, expected, DEVICE)
    check("shifted", problem, ours, expected, {key: margins[key] + of_shifted[key] for key in margins})


@cases()
@given(problems(), st.integers(0, 2**32 - 1))
def test_classes_may_be_numbered_otherwise(problem: Problem, seed: int) -> None:
    """Gradients, and labels and predictions, are those of the other numbers; of equals the lowest is another."""
    problem, inputs = drawn(problem)
    expected, margins, ours = known(problem, inputs)
    old = torch.randperm(problem.vocab, generator=torch.Generator().manual_seed(seed))  # the old number of each new one
    new = old.argsort()
    ignore_index = problem.ignore_index
    if 0 <= ignore_index < problem.vocab:
        ignore_index = int(new[ignore_index])
    renumbered = replace(problem, options=problem.options | {"ignore_index": ignore_index})
    labels = torch.where(
        inputs.labels == problem.ignore_index, ignore_index, new[inputs.labels.long().clamp(0, problem.vocab - 1)]
    )
    moved = Inputs(
        {k: v[..., old] if k == "logits" else v if k == "x" else v[old] for k, v in inputs.arrays.items()},
        labels.to(problem.label_dtype),
        None if inputs.class_weight is None else inputs.class_weight[old],
        inputs.upstream,
    )
    theirs = run_torch(renumbered, moved, DEVICE)
    with_metrics(renumbered, moved, expected, theirs["predicted_tokens"])
    back = {key: value for key, value in theirs.items() if key not in INTEGERS}
    for key in back.keys() & {"grad_logits", "grad_weight", "grad_bias"}:
        back[key] = back[key].take(new.numpy(), axis=-1 if key == "grad_logits" else 0)
    check("renumbered", problem, back, expected, margins)
    assert np.array_equal(theirs["num_valid"], ours["num_valid"])


@cases()
@given(problems(leading=BATCHES, reduction=("sum", "mean", "none"), num_items_in_batch=(101,)), st.integers(0, 65))
def test_a_batch_is_the_sum_of_its_parts(problem: Problem, at: int) -> None:
    problem, inputs = drawn(problem)
    parts = [rows_of(problem, inputs, slice(None, at)), rows_of(problem, inputs, slice(at, None))]
    expected, margins, ours = known(problem, inputs)
    answers, rounded = [], [(expected, margins)]
    for part, part_inputs in parts:
        part_expected = expected_of(part, part_inputs)
        rounded.append((part_expected, margins_of(part, part_inputs, part_expected, DEVICE)))
        answers.append(run_torch(replace(part, memory="auto"), part_inputs, DEVICE))
    cut = {f"grad_{problem.rows}"} | ({"loss", "z_loss"} if problem.reduction == "none" else set())
    if problem.exact or problem.operation == "logits":
        predictions = np.concatenate([answer["predicted_tokens"] for answer in answers])
        assert np.array_equal(predictions, ours["predicted_tokens"])
    if problem.reduction != "none":
        assert sum(answer["num_valid"] for answer in answers) == ours["num_valid"]
    whole = {}
    for key in margins:
        first, second = (answer[key] for answer in answers)
        whole[key] = np.concatenate([first, second]) if key in cut else np.asarray(first + second)
    of_parts = sum_of_margins(problem, cut, rounded)
    check("in parts", problem, whole, expected, of_parts)


@cases()
@given(problems(leading=((0,), *BATCHES)), st.lists(st.integers(0, 65), min_size=1, max_size=40), st.booleans())
def test_ignored_rows_anywhere_change_nothing(problem: Problem, places: list[int], nan: bool) -> None:
    """Whatever they hold; and they get no gradient, no loss and no prediction."""
    problem, inputs = drawn(problem)
    expected, margins, _ = known(problem, inputs)
    tokens, more = problem.leading[0], len(places)
    order = torch.cat([torch.arange(tokens), torch.tensor(places).clamp(max=tokens) - 0.5]).argsort(stable=True)
    rows = inputs.arrays[problem.rows]
    poison = torch.full((more, rows.shape[-1]), float("nan") if nan else float("inf"), dtype=rows.dtype)
    arrays = inputs.arrays | {problem.rows: torch.cat([rows, poison])[order]}
    ignored = torch.full((more,), problem.ignore_index, dtype=problem.label_dtype)
    labels = torch.cat([inputs.labels.to(problem.label_dtype), ignored])[order]
    upstream = inputs.upstream
    if problem.reduction == "none":
        upstream = torch.cat([upstream, torch.ones(more)])[order]
    longer = replace(problem, leading=(tokens + more,), memory="auto")
    theirs = run_torch(longer, Inputs(arrays, labels, inputs.class_weight, upstream), DEVICE)
    back, added = order.argsort()[:tokens].numpy(), order.argsort()[tokens:].numpy()
    per_token = {f"grad_{problem.rows}", "predicted_tokens"}
    if problem.reduction == "none":
        per_token |= {*INTEGERS, "loss", "z_loss"}
    for key in per_token:
        assert (theirs[key][added] == (-1 if key == "predicted_tokens" else 0)).all(), key
    theirs = {key: value[back] if key in per_token else value for key, value in theirs.items()}
    if not (problem.exact or problem.operation == "logits"):
        expected = with_metrics(problem, inputs, expected, theirs["predicted_tokens"])
    check("with ignored rows", problem, theirs, expected, margins)
