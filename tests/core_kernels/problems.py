"""Problems and their tensors as a frontend would hand them to the core: planned, allocated, poisoned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from core_kernels import Argument, Buffer, Options, Plan, Problem, Step, launch, linear_problem, logits_problem, plan
from core_kernels.engine import choose_engine
from core_kernels.plan import LINE
from core_kernels.tiles import choose_tiles
from tests.support import suite_device

Tensors = dict[str, Tensor]

# No multiple of a tile, wherever the suite runs; the vocab and the hidden size span two.
TILE = choose_tiles(suite_device(), torch.float32, None).project
TOKENS, HIDDEN, VOCAB = 7, TILE.k + 4, TILE.n + 37
IGNORE = -100
POISON = -77

PLAIN = Options()
# Every buffer that an option can add.
EVERYTHING = Options(
    label_smoothing=0.1,
    lse_square_scale=0.05,
    softcap=4.0,
    logit_scale=0.5,
    return_z_loss=True,
    return_token_accuracy=True,
    return_predicted_tokens=True,
)

# Plain torch everywhere, and the kernels wherever they run.
ENGINES = sorted({"torch", choose_engine("auto", suite_device())})
every_engine = pytest.mark.parametrize("engine", ENGINES)


def linear(
    tokens: int = TOKENS,
    hidden: int = HIDDEN,
    vocab: int = VOCAB,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    class_weight: bool = True,
) -> Problem:
    return linear_problem(
        Argument("x", (tokens, hidden), dtype),
        Argument("weight", (vocab, hidden), dtype),
        Argument("labels", (tokens,), torch.int64),
        Argument("bias", (vocab,), dtype) if bias else None,
        Argument("class_weight", (vocab,), torch.float32) if class_weight else None,
    )


def logits(
    tokens: int = TOKENS, vocab: int = VOCAB, dtype: torch.dtype = torch.float32, class_weight: bool = True
) -> Problem:
    return logits_problem(
        Argument("logits", (tokens, vocab), dtype),
        Argument("labels", (tokens,), torch.int64),
        Argument("class_weight", (vocab,), torch.float32) if class_weight else None,
    )


def differentiable(problem: Problem) -> tuple[str, ...]:
    return ("logits",) if problem.hidden is None else ("x", "weight", "bias") if problem.has_bias else ("x", "weight")


def random_inputs(loss: Step, device: torch.device, seed: int = 0) -> Tensors:
    """Every input of a loss, and the upstream gradient; the first and the last token are ignored."""
    problem = loss.problem
    n, v, h = problem.tokens, problem.vocab, problem.hidden or 0
    generator = torch.Generator().manual_seed(seed)
    upstreams = n if loss.options.per_token else math.prod(problem.groups)
    inputs = {
        "logits": 2.0 * torch.randn(n, v, generator=generator).to(problem.dtype),
        "x": torch.randn(n, h, generator=generator).to(problem.dtype),
        "weight": 0.5 * torch.randn(v, h, generator=generator).to(problem.dtype),
        "bias": torch.randn(v, generator=generator).to(problem.dtype),
        "labels": torch.randint(0, v, (n,), generator=generator),
        "class_weight": torch.rand(v, generator=generator) + 0.5,
        "grad_loss": torch.rand(upstreams, generator=generator) + 0.2,
    }
    inputs["labels"][:1] = IGNORE
    inputs["labels"][-1:] = IGNORE
    return {name: inputs[name].to(device) for name in (*loss.inputs, "grad_loss")}


def in_lines(nbytes: int) -> int:
    """What so many bytes take of a workspace."""
    return math.ceil(nbytes / LINE) * LINE


def buffers_of(planned: Plan) -> tuple[Buffer, ...]:
    """All that a launch fills, each on its own."""
    return planned.step.results + planned.workspace


def poisoned(planned: Plan, device: torch.device, poison: float = float("nan")) -> Tensors:
    """Every buffer of the plan, full of ``poison``, or of ``POISON`` where it holds integers."""
    return {
        buffer.name: torch.full(
            buffer.shape, poison if buffer.dtype.is_floating_point else POISON, dtype=buffer.dtype, device=device
        )
        for buffer in buffers_of(planned)
    }


def run(step: Step, tensors: Tensors, poison: float = float("nan")) -> Tensors:
    """Plan ``step`` and launch it with nothing but what it names; answers its buffers, poisoned before."""
    device = tensors["labels"].device
    planned = plan(step, device)
    buffers = poisoned(planned, device, poison)
    launch(planned, {name: tensors[name] for name in step.inputs} | buffers)
    return buffers


def outputs_of(step: Step, buffers: Tensors) -> Tensors:
    return {buffer.name: buffers[buffer.name] for buffer in step.outputs}


def saved_of(step: Step, buffers: Tensors) -> Tensors:
    return {buffer.name: buffers[buffer.name] for buffer in step.saved}


def differentiate(loss: Step, inputs: Tensors, poison: float = float("nan")) -> tuple[Tensors, Tensors, Tensors]:
    """Launch a loss and its gradient by all that has one; answers the outputs, what was saved, and the gradients."""
    buffers = run(loss, inputs, poison)
    outputs, saved = outputs_of(loss, buffers), saved_of(loss, buffers)
    gradient = loss.gradient(differentiable(loss.problem))
    return outputs, saved, outputs_of(gradient, run(gradient, inputs | saved, poison))


# ---- the vocab in shards


def sharded(loss: Step, shards: int) -> Step:
    """The step of one of ``shards`` shards of the vocab."""
    columns = loss.problem.vocab // shards
    return replace(loss, kind="shard", problem=replace(loss.problem, columns=columns, shards=shards))


def shard_inputs(inputs: Tensors, shards: int) -> list[Tensors]:
    """The inputs of each shard: its rows of ``weight`` and ``bias``, the number of its first class, all else whole."""
    columns = len(inputs["weight"]) // shards
    return [
        inputs
        | {name: inputs[name][first : first + columns] for name in ("weight", "bias") if name in inputs}
        | {"first_class": torch.tensor([first], dtype=torch.int32, device=inputs["labels"].device)}
        for first in range(0, shards * columns, columns)
    ]


def combine(loss: Step, inputs: Tensors, shards: int, poison: float = float("nan")) -> Tensors:
    """Launch every shard, and combine what they know; answers the buffers of the combination."""
    shard = sharded(loss, shards)
    statistics = [run(shard, own, poison)["shard_statistics"] for own in shard_inputs(inputs, shards)]
    return run(shard.of_kind("combine"), inputs | {"shard_statistics": torch.stack(statistics)}, poison)


def differentiate_sharded(
    loss: Step, inputs: Tensors, shards: int, poison: float = float("nan")
) -> tuple[Tensors, Tensors, list[Tensors]]:
    """As ``differentiate``, with the gradients of each shard."""
    buffers = combine(loss, inputs, shards, poison)
    outputs, saved = outputs_of(loss, buffers), saved_of(loss, buffers)
    gradient = sharded(loss, shards).gradient(differentiable(loss.problem))
    gradients = [outputs_of(gradient, run(gradient, own | saved, poison)) for own in shard_inputs(inputs, shards)]
    return outputs, saved, gradients


def gathered(gradients: list[Tensors]) -> Tensors:
    """The gradients of all shards, as of a whole vocab."""
    whole = {"grad_x": torch.stack([gradient["grad_x"] for gradient in gradients]).sum(0)}
    for name in gradients[0].keys() - {"grad_x"}:
        whole[name] = torch.cat([gradient[name] for gradient in gradients])
    return whole


# ---- what tensors hold


class Recorder(Mapping[str, Tensor]):
    """Tensors, and the names under which they were asked for."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        self.taken: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        self.taken.add(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def assert_uses_every_tensor(step: Step, tensors: Tensors, unread: Iterable[str] = ()) -> Tensors:
    """Launch ``step``, which must look at all that its plan names but for ``unread``; answers its buffers."""
    device = tensors["labels"].device
    planned = plan(step, device)
    buffers = poisoned(planned, device)
    recorder = Recorder({name: tensors[name] for name in step.inputs} | buffers)
    with pytest.MonkeyPatch.context() as patch:  # a record is looked up by all, and launched without a look at any
        patch.setattr("core_kernels.triton_engine.run_recorded", lambda operation, *others: operation(*others))
        launch(planned, recorder)
    assert recorder.taken | {"labels"} == {*step.inputs, *buffers} - {*unread}  # those tell the device, too
    return buffers


def assert_same_bits(actual: Tensors, wanted: Tensors) -> None:
    assert actual.keys() == wanted.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), wanted[name].reshape(-1).view(torch.uint8)), name


def assert_close(actual: Tensors, wanted: Tensors, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Equal to float32 rounding; integers exactly."""
    assert actual.keys() == wanted.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(
            tensor, wanted[name], rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_filled(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        poison = tensor.isnan() if tensor.is_floating_point() else tensor == POISON
        assert not poison.any(), f"{name} was filled in part: {tensor}"
