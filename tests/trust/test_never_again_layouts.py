"""Line 2: the gradients of inputs that lie in memory in other ways, under an upstream gradient that is not 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from torch import Tensor

from tests.parity import frontends
from tests.parity.cases import Case, make_inputs
from tests.trust.never_again import (
    LINEAR,
    LOGITS,
    Way,
    agree,
    check,
    distinct,
    in_every_linear_way,
    jax_vjp,
    per_token_in_every_way,
    results_of,
    scheduled,
    with_arrays,
)


def column_major(array: Tensor) -> Tensor:
    return array.T.contiguous().T


def sliced(array: Tensor) -> Tensor:
    """Every other row and column of a larger one, from the second on, whose others are NaN."""
    whole = torch.full([2 * size + 1 for size in array.shape], float("nan"), dtype=array.dtype)
    view = whole[tuple(slice(1, None, 2) for _ in array.shape)]
    return view.copy_(array)


def rows_expanded(array: Tensor) -> Tensor:
    return array[:1].clone().expand(array.shape)


def columns_expanded(array: Tensor) -> Tensor:
    return array[:, :1].clone().expand(array.shape)


LAYOUTS = (column_major, sliced, rows_expanded, columns_expanded)
in_every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
of_a_projection = pytest.mark.parametrize("way", distinct(*LINEAR), ids=str)
of_logits = pytest.mark.parametrize("way", distinct(*LOGITS), ids=str)


def with_upstream(way: Way, name: str, **changes: Any) -> Case:
    """An upstream gradient for each token, of which two are 0; one of 1.7 where there can be but one.

    The z-loss has a gradient by ``x`` also where all classes are the same, and softmax has none.
    """
    reduction = "mean" if way.schedule == "ahead" else "none"
    return way.case(name, **changes, options={"reduction": reduction, "lse_square_scale": 0.1})


@of_a_projection
@in_every_layout
@pytest.mark.parametrize("name", ["x", "weight"])
def test_2_gradients_of_a_projection_in_torch(way: Way, layout: Callable[[Tensor], Tensor], name: str) -> None:
    case = with_upstream(way, f"{name}_{layout.__name__}")
    inputs = make_inputs(case)
    for array in inputs.arrays.values():  # so that logits which are equal come out equal in any order of summation
        array.mul_(4).round_().div_(4)
    agree("torch", way, case, with_arrays(inputs, **{name: layout(inputs.arrays[name])}))


@of_logits
@in_every_layout
def test_2_gradients_of_logits_in_torch(way: Way, layout: Callable[[Tensor], Tensor]) -> None:
    case = with_upstream(way, f"logits_{layout.__name__}")
    inputs = make_inputs(case)
    agree("torch", way, case, with_arrays(inputs, logits=layout(inputs.arrays["logits"])))


@pytest.mark.parametrize("way", [way for way in LINEAR if way.schedule == "slabs"], ids=str)
@pytest.mark.parametrize(
    "layout", [sliced, lambda bias: bias[:1].clone().expand(bias.shape)], ids=["sliced", "expanded"]
)
def test_2_gradients_of_a_strided_bias_in_torch(way: Way, layout: Callable[[Tensor], Tensor]) -> None:
    case = with_upstream(way, "bias", bias=True)
    inputs = make_inputs(case)
    agree("torch", way, case, with_arrays(inputs, bias=layout(inputs.arrays["bias"])))


@pytest.mark.parametrize("way", distinct(*LOGITS, *LINEAR), ids=str)
def test_2_gradients_of_a_batch_without_its_last_position_in_torch(way: Way) -> None:
    """``hidden[:, :-1]`` and ``logits[:, :-1]``, as language models have them: the leading dimensions do not merge."""
    case = with_upstream(way, "shifted", leading=(2, 3))
    inputs = make_inputs(case)
    name = "x" if way.operation == "linear" else "logits"
    array = inputs.arrays[name]
    longer = torch.full((2, 4, array.shape[-1]), float("nan"), dtype=array.dtype)
    longer[:, :-1] = array
    agree("torch", way, case, with_arrays(inputs, **{name: longer[:, :-1]}))


@in_every_linear_way
def test_2_gradients_of_a_transposed_weight(way: Way, frontend: str) -> None:
    """``(hidden, vocab)`` in memory: a Flax kernel. Its rows are aligned in one vocab, and not in the other."""
    for vocab in (72, 69):
        agree(frontend, way, with_upstream(way, f"transposed_{vocab}", vocab=vocab, layout="transposed_weight"))


# ---- in JAX an array that is a view only becomes one inside a program, where the compiler chooses how it lies

VIEWS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {  # what is passed in, and what is made of it
    "transposed": (lambda a: a.T, lambda a: a.T),
    "sliced": (lambda a: jnp.repeat(jnp.repeat(a, 2, 0), 2, 1), lambda a: a[1::2, ::2]),
    "reversed": (lambda a: a[::-1, ::-1], lambda a: jax.lax.rev(a, (0, 1))),
}


@pytest.mark.parametrize("way", distinct(LOGITS[1], *LINEAR), ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_2_gradients_of_views_in_jax(way: Way, view: str) -> None:
    case = with_upstream(way, f"views_{view}")
    inputs = make_inputs(case)
    before, after = VIEWS[view]

    @jax.jit
    def run(sources: dict[str, Any], upstream: Any) -> Any:
        out, pullback = jax_vjp(case, inputs, {name: after(source) for name, source in sources.items()})
        return out, pullback(upstream)

    with scheduled(way):
        sources = {name: before(array) for name, array in frontends.to_jax_arrays(case, inputs).items()}
        ours = results_of(*run(sources, frontends.to_jax(inputs.upstream)))
    check("jax", case, inputs, ours)


@per_token_in_every_way
def test_2_gradients_under_an_expanded_upstream(way: Way, frontend: str) -> None:
    """``loss.sum() * -1.7`` of losses per token: an upstream gradient of stride 0."""
    case = way.case("expanded_upstream", options={"reduction": "none"})
    inputs = make_inputs(case)
    inputs = type(inputs)(inputs.arrays, inputs.labels, None, torch.tensor(-1.7).expand(inputs.labels.shape))
    agree(frontend, way, case, inputs)
