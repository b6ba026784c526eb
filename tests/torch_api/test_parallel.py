"""Vocabs sharded over processes, and batches over ranks, against one process. Checks run on two and on four, and on two
GPUs where there are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tests.core_kernels.problems import HIDDEN, IGNORE
from tests.support import interpreting, on_gpu
from tests.torch_api.calls import METRICS, assert_all_close, random_arguments
from tests.torch_api.process import Check, on_every_rank
from torch_api import FusedLinearCrossEntropyLoss, cross_entropy, fused_linear_cross_entropy, parallel

VOCAB = 72  # divides by 2 and 4
ALL: dict[str, Any] = {"label_smoothing": 0.1, "lse_square_scale": 0.05, "softcap": 6.0, "logit_scale": 0.8}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "none"},
    {"reduction": "sum", **ALL},
    {"num_items_in_batch": 11},
    {**ALL, "ce_weight": True},
    {"reduction": "none", **ALL, "ce_weight": True, "use_token_scaling": True},
]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


@pytest.mark.parametrize("world", (2,) if interpreting() else (2, 4))  # interpreted they take long
def test_on_processes(world: int) -> None:
    on_every_rank(world, CHECKS)


@pytest.mark.skipif(not on_gpu() or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_gpus() -> None:
    on_every_rank(2, CHECKS, "cuda")


def make_mesh(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    """Of all ranks in a row, or of this shape."""
    return init_device_mesh(torch.get_default_device().type, shape or (dist.get_world_size(),), mesh_dim_names=names)


# ---- the same on every rank


def problem(
    vocab: int = VOCAB, dtype: torch.dtype = torch.float32, leading: tuple[int, ...] = (3, 5)
) -> dict[str, Tensor]:
    """The same on every rank; the first and the last token are ignored."""
    arguments = random_arguments(fused_linear_cross_entropy, torch.get_default_device(), leading, vocab, vocab)
    del arguments["ce_weight"]
    return {name: t.detach().to(dtype if t.is_floating_point() else t.dtype) for name, t in arguments.items()}


def options_of(options: dict[str, Any], vocab: int) -> dict[str, Any]:
    weight = {"ce_weight": torch.linspace(0.5, 2.0, vocab)} if options.get("ce_weight") else {}
    return METRICS | options | weight


def run(
    tensors: dict[str, Any], wanted: tuple[str, ...] = ("input", "weight", "bias"), **options: Any
) -> dict[str, Any]:
    """Every result, and the gradients of a loss that weighs them unevenly."""
    leaves = {
        name: t.detach().clone().requires_grad_(name in wanted) for name, t in tensors.items() if name != "target"
    }
    output = fused_linear_cross_entropy(**leaves, target=tensors["target"], **options)
    upstream = torch.linspace(-1.0, 2.0, output.loss.numel()).view(output.loss.shape)
    answers = torch.autograd.grad(output.loss, [leaves[name] for name in wanted], upstream) if wanted else ()
    return vars(output) | {f"grad_{name}": gradient for name, gradient in zip(wanted, answers, strict=True)}


def mine(tensor: Tensor) -> Tensor:
    """This rank's shard of the vocab."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def assert_as_whole(got: dict[str, Any], whole: dict[str, Any], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert got.keys() == whole.keys()
    for name, value in got.items():
        want = mine(whole[name]) if name in ("grad_weight", "grad_bias") else whole[name]
        if name in ("predicted_tokens", "num_valid", "num_correct", "token_accuracy"):
            assert torch.equal(value, want), name
        elif value is not None or want is not None:
            torch.testing.assert_close(value, want, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def sharded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {name: mine(tensors[name]) for name in ("weight", "bias") if name in tensors}


# ---- a group


@check
def a_sharded_call_is_the_whole_one() -> None:
    tensors = problem()
    for options in OPTIONS:
        chosen = options_of(options, VOCAB)
        got = run(sharded(tensors), **chosen, process_group=dist.group.WORLD)
        assert_as_whole(got, run(tensors, **chosen))


@check
def without_a_bias() -> None:
    tensors = {name: tensor for name, tensor in problem().items() if name != "bias"}
    wanted = ("input", "weight")
    got = run(sharded(tensors), wanted, **METRICS, process_group=dist.group.WORLD)
    assert_as_whole(got, run(tensors, wanted, **METRICS))


@check
def the_lowest_class_wins_a_tie_across_ranks() -> None:
    """Integers, so that equal logits are equal to the last bit."""
    tensors = problem()
    for name in ("input", "weight", "bias"):
        tensors[name] = tensors[name].round().clamp(-2, 2)
    tensors["weight"][[7, 30, 50, 71]] = 3.0 * torch.ones(HIDDEN)
    tensors["bias"][[7, 30, 50, 71]] = 500.0
    tensors["target"][1] = torch.tensor([7, 30, 50, 71, 7])
    got = run(sharded(tensors), **METRICS, process_group=dist.group.WORLD)
    assert_as_whole(got, run(tensors, **METRICS))
    assert (got["predicted_tokens"][1] == 7).all() and got["num_correct"] >= 2


@check
def in_bfloat16() -> None:
    tensors = problem(dtype=torch.bfloat16)
    padded = {name: nn.functional.pad(tensors[name], (0, -HIDDEN % 8)) for name in ("input", "weight")}
    for own in (tensors, tensors | padded):  # whose rows a GPU reads by elements, and in blocks
        got = run(sharded(own), **METRICS, process_group=dist.group.WORLD)
        whole = run(own, **METRICS)
        assert got["grad_input"].dtype == torch.bfloat16
        scale = float(whole["grad_input"].float().abs().max())  # each rank's part of the input's gradient is rounded
        assert_as_whole(got, whole, rtol=2**-6, atol=2**-7 * scale)


@check
def only_what_is_wanted_crosses_the_wire() -> None:
    """Forward one collective of a few numbers per token; backward one of the input's size, where that is wanted."""
    sent: list[tuple[str, int]] = []

    def recorded(name: str, collective: Callable[..., Any], which: int) -> Callable[..., Any]:
        def call(*tensors: Tensor, group: Any) -> Any:
            sent.append((name, tensors[which].numel()))
            return collective(*tensors, group=group)

        return call

    tensors = sharded(problem())
    tokens = tensors["target"].numel()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parallel, "_all_gather", recorded("gather", parallel._all_gather, 1))
        patched.setattr(dist, "all_reduce", recorded("reduce", dist.all_reduce, 0))
        run(tensors, (), reduction="none", return_counts=True, process_group=dist.group.WORLD)
        assert sent == [("gather", 4 * tokens)]
        sent.clear()
        run(tensors, ("weight", "bias"), return_z_loss=True, process_group=dist.group.WORLD)
        assert sent == [("gather", 3 * tokens)]
        sent.clear()
        run(tensors, **METRICS, **ALL, process_group=dist.group.WORLD)
        assert sent == [("gather", 5 * tokens), ("reduce", tokens * HIDDEN)]


@check
def compiled_as_one_graph() -> None:
    tensors = sharded(problem())

    def call(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return fused_linear_cross_entropy(x, weight, target, bias, **ALL, process_group=dist.group.WORLD)

    def gradients(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [tensors[name].detach().clone().requires_grad_() for name in ("input", "weight", "bias")]
        loss = function(*leaves, tensors["target"])
        return [loss.detach(), *torch.autograd.grad(0.7 * loss, leaves)]

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(gradients(compiled), gradients(call), strict=True):
        assert torch.equal(ours, eager)


@check
def differentiated_and_mapped_by_torch_func() -> None:
    tensors = problem()
    own, group = sharded(tensors), dist.group.WORLD

    def losses(call: Callable[..., Tensor], x: Tensor) -> Tensor:
        mapped = torch.func.vmap(call)(x, tensors["target"])
        return (mapped * torch.tensor([1.5, -2.0, 0.5])).sum()

    def by_shard(x: Tensor, target: Tensor) -> Tensor:
        return fused_linear_cross_entropy(x, own["weight"], target, own["bias"], process_group=group)

    def by_whole(x: Tensor, target: Tensor) -> Tensor:
        return fused_linear_cross_entropy(x, tensors["weight"], target, tensors["bias"])

    got = torch.func.grad(lambda x: losses(by_shard, x))(tensors["input"])
    want = torch.func.grad(lambda x: losses(by_whole, x))(tensors["input"])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@check
def a_second_derivative_raises() -> None:
    own = {name: t.requires_grad_(t.is_floating_point()) for name, t in sharded(problem()).items()}
    loss = fused_linear_cross_entropy(**own, process_group=dist.group.WORLD)
    (first,) = torch.autograd.grad(loss, own["input"], create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative of twinhead's losses is not supported"):
        first.sum().backward()


@check
def a_bad_label_is_noticed_on_every_rank() -> None:
    tensors = sharded(problem())
    tensors["target"][1, 2] = VOCAB
    if tensors["target"].is_cuda:  # which nobody waits for
        assert run(tensors, **METRICS, process_group=dist.group.WORLD)["loss"].isnan()
        return
    with pytest.raises(IndexError, match=rf"target\[1, 2\] = {VOCAB} is out of range"):
        run(tensors, process_group=dist.group.WORLD)


@check
def a_module_has_a_group() -> None:
    tensors = problem()
    own = sharded(tensors)
    module = FusedLinearCrossEntropyLoss(process_group=dist.group.WORLD, **METRICS)
    for one in (module, copy.deepcopy(module)):
        assert one.process_group is dist.group.WORLD
        output = one(own["weight"], own["input"], own["target"], own["bias"])
        assert_as_whole(vars(output), vars(FusedLinearCrossEntropyLoss(**METRICS)(
            tensors["weight"], tensors["input"], tensors["target"], tensors["bias"])))  # fmt: skip


@check
def vocab_and_tokens_over_a_mesh() -> None:
    """Two ranks share a vocab; pairs of them have tokens of their own, and add up what they find."""
    mesh = make_mesh(dist.get_world_size() // 2, 2, names=("data", "vocab"))
    tensors = problem(leading=(8,))
    own = dict(tensors)
    rows, part = mesh.get_local_rank("data"), mesh.get_local_rank("vocab")
    for name in ("input", "target"):
        own[name] = tensors[name].chunk(mesh["data"].size())[rows]
    for name in ("weight", "bias"):
        own[name] = tensors[name].chunk(2)[part]
    items = (own["target"] != IGNORE).sum()
    dist.all_reduce(items, group=mesh.get_group("data"))
    leaves = {name: own[name].clone().requires_grad_() for name in ("input", "weight", "bias")}
    output = fused_linear_cross_entropy(
        **leaves,
        target=own["target"],
        num_items_in_batch=items,
        process_group=mesh.get_group("vocab"),
        return_counts=True,
    )
    output.loss.backward()
    found = [output.loss.detach(), output.num_valid, output.num_correct, leaves["weight"].grad]
    for tensor in found:
        dist.all_reduce(tensor, group=mesh.get_group("data"))
    whole = run(tensors, **METRICS) | {}
    scaled = whole["grad_weight"] / torch.linspace(-1.0, 2.0, 1)
    torch.testing.assert_close(found[0], whole["loss"].detach(), rtol=1e-5, atol=1e-6)
    assert (found[1], found[2]) == (whole["num_valid"], whole["num_correct"])
    torch.testing.assert_close(found[3], scaled.chunk(2)[part], rtol=1e-5, atol=1e-6)


@check
def a_shard_is_a_matrix() -> None:
    tensors = problem()
    for bad in (torch.tensor(1.0), tensors["bias"]):
        with pytest.raises(ValueError, match=r"^weight must have shape \(V, H\), got \("):
            run(tensors | {"weight": bad}, process_group=dist.group.WORLD)


@check
def a_group_is_a_group() -> None:
    first = dist.new_group([0])
    if dist.get_rank() > 0:
        with pytest.raises(ValueError, match="process_group must have this rank in it"):
            run(problem(), process_group=first)
    else:
        assert_all_close(run(problem(), process_group=first, return_counts=True), run(problem(), return_counts=True))


# ---- DTensors


@check
def a_dtensor_weight_says_how_it_is_sharded() -> None:
    mesh = make_mesh()
    for vocab in (VOCAB, 71, 69):  # the last ranks have fewer classes
        for options in OPTIONS[:3]:
            tensors, chosen = problem(vocab), options_of(options, vocab)
            own = tensors | {name: distribute_tensor(tensors[name], mesh, [Shard(0)]) for name in ("weight", "bias")}
            got = run(own, **chosen)
            for name in ("grad_weight", "grad_bias"):
                assert isinstance(got[name], DTensor) and got[name].placements == (Shard(0),)
                got[name] = got[name].to_local()
            assert_as_whole(got, run(tensors, **chosen))


@check
def replicated_dtensors_are_whole() -> None:
    mesh = make_mesh()
    tensors = problem()
    names = ("input", "weight", "bias", "target")
    replicated = {name: distribute_tensor(tensors[name], mesh, [Replicate()]) for name in names}
    got = run(replicated, **METRICS)
    assert all(isinstance(got[f"grad_{name}"], DTensor) for name in ("input", "weight", "bias"))
    got = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in got.items()}
    assert_all_close(got, run(tensors, **METRICS))

    own = replicated | {name: distribute_tensor(tensors[name], mesh, [Shard(0)]) for name in ("weight", "bias")}
    got = run(own, **METRICS)
    assert got["grad_input"].placements == (Replicate(),)
    got = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in got.items()}
    assert_all_close(got, run(tensors, **METRICS))


@check
def items_may_be_a_dtensor() -> None:
    mesh = make_mesh()
    tensors = problem()
    own = tensors | {name: distribute_tensor(tensors[name], mesh, [Shard(0)]) for name in ("weight", "bias")}
    items = (distribute_tensor(tensors["target"].view(-1), mesh, [Shard(0)]) != IGNORE).sum()
    got = run(own, ("input",), num_items_in_batch=items, **METRICS)
    assert_all_close(got, run(tensors, ("input",), **METRICS))


@check
def other_layouts_are_refused_by_name() -> None:
    world = dist.get_world_size()
    mesh, plane = make_mesh(), make_mesh(world // 2, 2)
    tensors = problem()
    x, weight, bias, target = (tensors[name] for name in ("input", "weight", "bias", "target"))
    good = distribute_tensor(weight, mesh, [Shard(0)])

    def refused(message: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            fused_linear_cross_entropy(*arguments, **options)

    for bad in (
        distribute_tensor(weight, mesh, [Shard(1)]),
        DTensor.from_local(weight, mesh, [Partial()]),
        distribute_tensor(weight, plane, [Replicate(), Shard(0)]),
    ):
        refused(r"^weight must be a DTensor with placements \(Shard\(0\),\) or \(Replicate\(\),\)", x, bad, target)
    refused(r"^input must be a DTensor on weight's mesh", distribute_tensor(x, mesh, [Shard(0)]), good, target)
    refused(r"^target must be a DTensor on weight's mesh", x, good, distribute_tensor(target, mesh, [Shard(0)]))
    refused(r"^bias must be a DTensor on weight's mesh", x, good, target, distribute_tensor(bias, mesh, [Replicate()]))
    refused(r"^bias must have shape \(", x, good, target, bias)
    refused("^process_group must be left out", x, good, target, process_group=dist.group.WORLD)
    few = distribute_tensor(weight[: world - 1], mesh, [Shard(0)])
    refused(f"^weight must have a row for each of {world} ranks at least, got {world - 1} rows", x, few, target)
    refused("^input must be a plain tensor here", distribute_tensor(x, mesh, [Replicate()]), weight, target)
    logits = distribute_tensor(torch.randn(3, VOCAB), mesh, [Shard(1)])
    with pytest.raises(ValueError, match=r"^input must be a plain tensor here, got a DTensor"):
        cross_entropy(logits, torch.zeros(3, dtype=torch.long))


# ---- wrapped models


class Model(nn.Module):
    """A head with its loss inside, so that wrappers see its weight used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB)
        self.loss_fn = FusedLinearCrossEntropyLoss()

    def forward(self, x: Tensor, target: Tensor, items: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return self.loss_fn(self.head.weight, hidden, target, self.head.bias, num_items_in_batch=items)


def trained(model: nn.Module, scale: float, x: Tensor, target: Tensor, items: Tensor) -> dict[str, Tensor]:
    (scale * model(x, target, items)).backward()
    whole = lambda t: t.full_tensor() if isinstance(t, DTensor) else t  # noqa: E731
    return {name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters()}


@check
def ddp_and_fsdp2_average_what_unequal_ranks_add_up() -> None:
    world = dist.get_world_size()
    tensors = problem(leading=(4 * world,))
    tensors["target"][:5] = IGNORE  # the first rank has no valid token
    items = (tensors["target"] != IGNORE).sum()
    whole = trained(Model(), 1.0, tensors["input"], tensors["target"], items)
    x, target = mine(tensors["input"]), mine(tensors["target"])
    mesh = make_mesh()
    for wrap in (DistributedDataParallel, lambda model: fully_shard(model, mesh=mesh)):
        got = trained(wrap(Model()), float(world), x, target, items)  # both average over ranks
        assert_all_close(got, whole)
