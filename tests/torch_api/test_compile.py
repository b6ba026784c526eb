"""To the compiler a launch is one opaque operator: no graph break, one graph for all lengths, the bits of eager."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from tests.core_kernels.problems import HIDDEN, IGNORE, VOCAB
from tests.support import interpreting, on_gpu
from tests.torch_api.calls import (
    METRICS,
    OPTIONS,
    REDUCTIONS,
    Arguments,
    Loss,
    assert_all_same_bits,
    assert_same_bits,
    every_loss,
    every_reduction,
    fresh_leaves,
    gradients,
    leaves_of,
    random_arguments,
    record_launches,
    upstream_like,
)
from torch_api import CrossEntropyOutput, FusedLinearCrossEntropyLoss, cross_entropy, fused_linear_cross_entropy
from torch_api.operator import gradient_step, step_of_kind


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any]) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    """``function`` as one graph, forward and backward traced ahead of time; and how often that was done."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True), counter


def result_and_gradients(function: Callable[..., Any], arguments: Arguments) -> dict[str, Tensor]:
    output = function(arguments)
    results = {"loss": output} if isinstance(output, Tensor) else vars(output)
    answers = gradients(results["loss"], arguments)
    return {k: v for k, v in results.items() if v is not None} | {f"grad_{k}": v for k, v in answers.items()}


# ---- compiled is eager


@pytest.mark.parametrize("options", ({}, OPTIONS, OPTIONS | METRICS), ids=("plain", "options", "metrics"))
@every_reduction
@every_loss
def test_compiled_equals_eager(device: torch.device, loss_fn: Loss, reduction: str, options: dict[str, Any]) -> None:
    def call(arguments: Arguments) -> Any:
        return loss_fn(**arguments, reduction=reduction, **options)

    arguments = random_arguments(loss_fn, device, (2, 4))
    run, _ = compiled(call)
    assert_all_same_bits(result_and_gradients(run, arguments), result_and_gradients(call, arguments))


@pytest.mark.parametrize("num_items", (9, torch.tensor(9)), ids=("int", "tensor"))
def test_compiled_over_the_items_of_a_batch(device: torch.device, num_items: int | Tensor) -> None:
    def call(arguments: Arguments) -> Any:
        return fused_linear_cross_entropy(**arguments, num_items_in_batch=num_items)

    arguments = random_arguments(fused_linear_cross_entropy, device)
    run, _ = compiled(call)
    assert_all_same_bits(result_and_gradients(run, arguments), result_and_gradients(call, arguments))


@every_loss
def test_one_graph_serves_every_length(device: torch.device, loss_fn: Loss) -> None:
    """The second length makes the graph that serves all that follow."""

    def call(arguments: Arguments) -> Any:
        return loss_fn(**arguments, **METRICS)

    run, counter = compiled(call)
    for tokens in (9, 12, 33, 5, 64, 7):
        arguments = random_arguments(loss_fn, device, (tokens,), seed=tokens)
        assert_all_same_bits(result_and_gradients(run, arguments), result_and_gradients(call, arguments))
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("name", "values"),
    (
        ("ignore_index", (IGNORE, 3, 5)),
        ("label_smoothing", (0.0, 0.1, 0.2)),
        ("lse_square_scale", (1e-2, 2e-2, 3e-2)),
        ("softcap", (5.0, 6.0, 7.0)),
        ("logit_scale", (1.0, 0.5, 0.25)),
        ("reduction", REDUCTIONS),
        ("memory", ("auto", 10**6, 2 * 10**6)),
    ),
)
def test_an_option_may_change(device: torch.device, name: str, values: tuple[Any, ...]) -> None:
    """The compiler makes a variable of a number that it sees change; to the loss it stays a constant."""

    def call(arguments: Arguments, value: Any) -> Tensor:
        return fused_linear_cross_entropy(**arguments, **{name: value})

    run, _ = compiled(call)
    arguments = random_arguments(fused_linear_cross_entropy, device)
    arguments["target"].clamp_(min=0)
    for value in values:
        losses = [function(arguments, value) for function in (run, call)]
        assert_same_bits(*losses)
        assert_all_same_bits(*(gradients(loss, arguments) for loss in losses))


def test_an_option_of_a_module_may_change(device: torch.device) -> None:
    loss_fn = FusedLinearCrossEntropyLoss()
    arguments = random_arguments(fused_linear_cross_entropy, device)
    run, _ = compiled(lambda: loss_fn(arguments["weight"], arguments["input"], arguments["target"]))
    for loss_fn.label_smoothing in (0.0, 0.1, 0.2):
        assert_same_bits(run(), loss_fn(arguments["weight"], arguments["input"], arguments["target"]))


def test_other_counts_of_items_are_one_graph(device: torch.device) -> None:
    run, counter = compiled(lambda arguments, items: fused_linear_cross_entropy(**arguments, num_items_in_batch=items))
    arguments = random_arguments(fused_linear_cross_entropy, device)
    for items in (3, 5, 9, 12):
        wanted = fused_linear_cross_entropy(**arguments, num_items_in_batch=items)
        torch.testing.assert_close(run(arguments, items), wanted)
    assert counter.frame_count == 2


@every_loss
def test_every_size_may_be_dynamic(device: torch.device, loss_fn: Loss) -> None:
    """Those of the weight are constants of a graph all the same: other ones make another graph."""

    def call(arguments: Arguments) -> Any:
        return loss_fn(**arguments, **OPTIONS, **METRICS)

    run = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens, vocab in ((5, VOCAB), (1, VOCAB), (0, VOCAB), (8, VOCAB + 1), (8, VOCAB + 2)):
        arguments = random_arguments(loss_fn, device, (tokens,), vocab=vocab)
        assert_all_same_bits(result_and_gradients(run, arguments), result_and_gradients(call, arguments))


@every_loss
def test_gradients_by_torch_func_are_compiled(device: torch.device, loss_fn: Loss) -> None:
    arguments = random_arguments(loss_fn, device)
    leaves = {name: tensor.detach() for name, tensor in leaves_of(arguments).items()}
    rest = {name: tensor for name, tensor in arguments.items() if name not in leaves}
    by_leaves = torch.func.grad_and_value(lambda leaves: 0.7 * loss_fn(**leaves, **rest, **OPTIONS))
    run, _ = compiled(by_leaves)
    (ours, loss), (wanted, wanted_loss) = run(leaves), by_leaves(leaves)
    assert_same_bits(loss, wanted_loss)
    assert_all_same_bits(ours, wanted)


@pytest.mark.skipif(not (interpreting() or on_gpu()), reason="only the kernels have schedules")
@pytest.mark.parametrize("argnums", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize(("most_kept", "vocab"), [(2**32, VOCAB + 112), (0, VOCAB + 113)], ids=["kept", "ahead"])
def test_gradients_by_torch_func_are_scheduled_as_eager_ones(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, most_kept: int, vocab: int, argnums: tuple[int, ...]
) -> None:
    monkeypatch.setattr("core_kernels.step.MOST_SPEED_BYTES", most_kept)  # each with a vocab that no other test has
    torch.manual_seed(0)
    x, weight = (torch.randn(n, HIDDEN, device=device).bfloat16() for n in (9, vocab))
    labels = torch.randint(0, vocab, (9,), device=device)
    by = torch.func.grad(lambda x, w: fused_linear_cross_entropy(x, w, labels, memory="speed"), argnums)
    run, _ = compiled(by)
    launches = record_launches(monkeypatch)
    ours = run(x, weight)
    steps = [planned.step for planned in launches if planned.step.kind == "gradient"]
    assert all(bool(step.ahead) == (most_kept == 0) and step.keep == (most_kept > 0) for step in steps) and steps
    assert_all_same_bits(dict(enumerate(ours)), dict(enumerate(by(x, weight))))


def test_equal_calls_are_compiled_once(device: torch.device) -> None:
    run, counter = compiled(lambda arguments: fused_linear_cross_entropy(**arguments))
    for seed in range(3):
        run(random_arguments(fused_linear_cross_entropy, device, seed=seed))
    assert counter.frame_count == 1


class Model(nn.Module):
    """A little language model with its loss inside."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layer = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB)
        self.loss_fn = FusedLinearCrossEntropyLoss(return_token_accuracy=True, return_predicted_tokens=True)
        self.to(device)

    def forward(self, ids: Tensor, target: Tensor) -> Any:
        hidden = torch.tanh(self.layer(self.embed(ids)))
        return self.loss_fn(self.head.weight, hidden, target, self.head.bias)


def trained(model: Model, run: Callable[..., Any], tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    device = model.head.weight.device
    ids, target = (torch.randint(0, VOCAB, (2, tokens), generator=generator).to(device) for _ in range(2))
    target[0, 0] = target[1, -1] = IGNORE
    model.zero_grad()
    output = run(ids, target)
    (0.7 * output.loss).backward()
    answers = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return answers | {"loss": output.loss, "predicted": output.predicted_tokens, "accuracy": output.token_accuracy}


def test_a_model_is_compiled_with_its_loss(device: torch.device) -> None:
    model = Model(device)
    run, counter = compiled(model)
    for tokens in (5, 8, 11):
        assert_all_same_bits(trained(model, run, tokens), trained(model, model, tokens))
    assert counter.frame_count == 2


@pytest.mark.skipif(interpreting(), reason="inductor's half a minute shows nothing of interpreted kernels")
def test_inductor_compiles_a_model_with_its_loss(device: torch.device) -> None:
    model = Model(device)
    run = torch.compile(model, fullgraph=True)
    for tokens in (5, 8):
        ours, wanted = trained(model, run, tokens), trained(model, model, tokens)
        assert_same_bits(ours.pop("predicted"), wanted.pop("predicted"))
        for name, value in ours.items():  # what is around the loss is inductor's own arithmetic
            torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)


def test_no_gradient_no_gradient_step(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = record_launches(monkeypatch)
    run, _ = compiled(lambda arguments: fused_linear_cross_entropy(**arguments))
    arguments = random_arguments(fused_linear_cross_entropy, device)
    with torch.no_grad():
        run(arguments)
    assert [plan.step.kind for plan in launches] == ["loss"]
    run(fresh_leaves(arguments, ("bias",))).backward()
    assert [plan.step.kind for plan in launches] == ["loss", "loss", "gradient"]
    assert [buffer.name for buffer in launches[-1].outputs] == ["grad_bias"]


@pytest.mark.skipif(on_gpu(), reason="on a GPU a bad label must not make the host wait")
def test_a_bad_label_raises_from_a_compiled_call(device: torch.device) -> None:
    run, _ = compiled(lambda arguments: fused_linear_cross_entropy(**arguments))
    arguments = random_arguments(fused_linear_cross_entropy, device, (2, 4))
    arguments["target"][1, 2] = VOCAB
    with pytest.raises(IndexError, match=rf"target\[1, 2\] = {VOCAB} is out of range"):
        run(arguments)


# ---- other tracers


@pytest.mark.parametrize("mode", ("real", "fake", "symbolic"))
@every_loss
def test_make_fx_traces_a_step(device: torch.device, loss_fn: Loss, mode: str) -> None:
    arguments = random_arguments(loss_fn, device)
    names = list(leaves_of(arguments))
    upstream = upstream_like(arguments["target"].float())

    def step(upstream: Tensor, *tensors: Tensor) -> Any:
        own = dict(zip(arguments, (t.detach() for t in tensors), strict=True))
        for name in names:
            own[name].requires_grad_()
        loss = loss_fn(**own, reduction="none", **OPTIONS)
        return loss, *torch.autograd.grad(loss, [own[name] for name in names], upstream)

    tensors = [tensor.detach() for tensor in arguments.values()]
    graph = make_fx(step, tracing_mode=mode)(upstream, *tensors)
    assert [node.target for node in graph.graph.nodes].count(torch.ops.twinhead.launch.default) == 2
    other = [t.detach() for t in random_arguments(loss_fn, device, seed=5).values()]
    for ours, wanted in zip(graph(-upstream, *other), step(-upstream, *other), strict=True):
        assert_same_bits(ours, wanted)


def test_a_model_is_exported_with_its_loss(device: torch.device) -> None:
    model = Model(device)
    ids = torch.arange(12, device=device).view(2, 6)
    tokens = torch.export.Dim("tokens", min=2, max=512)
    program = torch.export.export(model, (ids, ids + 1), dynamic_shapes=({1: tokens}, {1: tokens}))
    longer = torch.arange(18, device=device).view(2, 9)
    ours, wanted = program.module()(longer, longer + 1), model(longer, longer + 1)
    assert_same_bits(ours.loss, wanted.loss)
    assert_same_bits(ours.predicted_tokens, wanted.predicted_tokens)

    file = io.BytesIO()
    torch.export.save(program, file)
    loaded = torch.export.load(file).module()(longer, longer + 1)
    assert type(loaded) is CrossEntropyOutput
    assert_same_bits(loaded.loss, ours.loss)


# ---- the operator


def operator_calls(loss_fn: Loss, device: torch.device) -> list[tuple[list[Tensor], str]]:
    """What a step passes to the operator, forward and backward; sharded, for a projection."""
    from torch_api import autograd, parallel

    calls: list[tuple[list[Tensor], str]] = []
    launch = torch.ops.twinhead.launch

    def record(inputs: list[Tensor], step: str) -> list[Tensor]:
        calls.append(([tensor.detach().clone() for tensor in inputs], step))
        return launch(inputs, step)

    arguments = random_arguments(loss_fn, device)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(autograd, "launch", record)
        output = loss_fn(**arguments, **OPTIONS, **METRICS)
        gradients(output.loss, arguments)
    if loss_fn is cross_entropy:
        return calls
    (inputs, step), (backward, _) = calls
    shard = parallel.Shard(None, 1, 0, VOCAB)
    sharded = step.replace('"shards": null', '"shards": 1')
    known = [*inputs, shard.first_class_on(device)], step_of_kind(sharded, "shard")
    statistics = launch(*known)[0][None]
    combined = [inputs[2].view(-1), inputs[4], statistics], step_of_kind(sharded, "combine")
    gradient = [*inputs, shard.first_class_on(device), *backward[len(inputs) :]], gradient_step(sharded, ("x", "bias"))
    return [*calls, known, combined, gradient]


@every_loss
def test_the_operator_passes_opcheck(device: torch.device, loss_fn: Loss) -> None:
    calls = operator_calls(loss_fn, device)
    assert len(calls) == (2 if loss_fn is cross_entropy else 5)
    for call in calls:
        checks = torch.library.opcheck(torch.ops.twinhead.launch, call)
        assert set(checks.values()) == {"SUCCESS"} and len(checks) >= 4


@every_loss
def test_meta_tensors_have_the_shapes_of_the_results(loss_fn: Loss) -> None:
    arguments = random_arguments(loss_fn, torch.device("cpu"), (3, 5))
    meta = {name: tensor.detach().to("meta") for name, tensor in arguments.items()}
    output = loss_fn(**meta, reduction="none", **METRICS)
    assert output.loss.is_meta
    wanted = loss_fn(**arguments, reduction="none", **METRICS)
    for name, value in vars(wanted).items():
        got = getattr(output, name)
        assert (got.shape, got.dtype) == (value.shape, value.dtype)
