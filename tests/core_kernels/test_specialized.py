"""The kernels for Hopper: they compile for it anywhere; on one, what they compute is what their likes compute."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from core_kernels import Options, Step, for_gradient, plan
from core_kernels.engine import interpreting
from core_kernels.tiles import INTERPRETED, PRODUCTS, Tile, Tiles, can_specialize, choose_tiles, measured
from tests.core_kernels.problems import EVERYTHING, differentiable, differentiate, linear, random_inputs
from tests.support import on_hopper

pytestmark = pytest.mark.skipif(interpreting(), reason="Gluon is compiled, and has no interpreter")

SHARED_BYTES = 227 * 1024  # of a multiprocessor, for one program
F32, I32, I64 = "*fp32", "*i32", "*i64"

PROJECTED = {
    "bias": "*bf16", "class_weight": "*bf16", "valid_tokens": I32, "valid_count": I32, "label_logit": F32,
    "tile_max": F32, "tile_sum": F32, "tile_smooth": F32, "tile_argmax": I32,
    "labels": I64, "first_class": I64, "lse_base": F32, "saved_log_sum": F32,
    "row_target": F32, "row_soft": F32, "row_uniform": F32, "logit_scale": "fp32", "softcap": "fp32",
}  # fmt: skip
SUMMED = {"label_rows": F32, "label_slot": I32, "valid_count": I32}
EVERY_OPTION = dict.fromkeys(("CLASS_WEIGHT", "SMOOTHING", "BIAS", "HAS_SCALE", "HAS_SOFTCAP"), True)


def described(rows: int, columns: int, dtype: str = "bf16") -> str:
    """The type of a descriptor's argument."""
    from core_kernels.kernels.hopper import BLOCK_LAYOUT, SUMS_LAYOUT

    layout = BLOCK_LAYOUT if dtype == "bf16" else SUMS_LAYOUT.value
    return f"tensordesc<{dtype}[{rows}, {columns}],{layout!r}>"


def tile_of(product: str, hidden: str) -> Tile:
    entry = next(entry for entry in measured() if entry.get("hidden") == hidden)
    return Tile(*entry["tiles"][product])


def weight_of(layout: str, columns: int, hidden: int) -> str:
    return described(columns, hidden) if layout == "vh" else described(hidden, columns)


def projecting(tile: Tile, layout: str, stored: str) -> dict[str, str]:
    rows = tile.m // tile.parts
    blocks = {"weight": weight_of(layout, tile.n, tile.k), stored: described(rows, tile.n // 2)}
    return PROJECTED | blocks | dict.fromkeys(("x", "packed_x"), described(rows, tile.k))


def summing(tile: Tile, layout: str, product: str) -> dict[str, str]:
    rows = tile.m // tile.parts
    sums = described(rows, tile.n // 4, "fp32")
    if product == "grad_x":
        operands = {"matrix": described(rows, tile.k), "weight": weight_of(layout, tile.k, tile.n)}
        return SUMMED | operands | {"rows": sums}
    operands = {"matrix": described(tile.k, rows), "packed_x": described(tile.k, tile.n)}
    out = sums if layout == "sums" else weight_of(layout, rows, tile.n // 2)
    return SUMMED | operands | {"grad_weight": out}


# Kernel, product, layout of the weight, and the flags that are on.
KERNELS = [
    ("project_statistics", "keep", "vh", {"KEEP": True}),
    ("project_statistics", "keep", "vh", {"KEEP": True, "LARGEST": True, "HAS_SCALE": True}),
    ("project_statistics", "keep", "hv", {"KEEP": True, "ARGMAX": True, "HAS_SOFTCAP": True}),
    ("project_statistics", "project", "vh", {"ARGMAX": True, **EVERY_OPTION}),
    ("slab_gradient", "slab", "vh", {}),
    ("slab_gradient", "slab", "hv", {"SHARDED": True, "Z_LOSS": True, **EVERY_OPTION}),
    ("weight_gradient", "grad_weight", "vh", {"LABELS": True}),
    ("weight_gradient", "grad_weight", "hv", {"OVERLAP": True}),
    ("weight_gradient", "grad_weight", "sums", {"ADD": True}),
    ("input_gradient", "grad_x", "vh", {"SPLIT": True}),
    ("input_gradient", "grad_x", "hv", {"ADD": True, "OVERLAP": True}),
]


@pytest.mark.skipif(not can_specialize(), reason="this Triton is too old")
@pytest.mark.parametrize("hidden", ["long", "short"])
@pytest.mark.parametrize(("name", "product", "layout", "flags"), KERNELS)
def test_every_kernel_compiles_for_hopper_and_fits(
    name: str, product: str, layout: str, flags: dict[str, bool], hidden: str
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from core_kernels.kernels import specialized

    kernel, tile = getattr(specialized, name), tile_of(product, hidden)
    assert tile.specialized
    if product.startswith("grad"):
        tensors = summing(tile, layout, product)
    else:
        tensors = projecting(tile, layout, "exponentials" if product == "keep" else "slab")
    if flags.get("LARGEST"):  # of exponentials, with their dtype
        tensors |= {"tile_max": "*bf16"}
    fixed: dict[str, Any] = {
        "LAYOUT": layout, "M": tile.m, "N": tile.n, "K": tile.k, "GROUP": tile.group,
        "STAGES": tile.stages, "PARTS": tile.parts,
    }  # fmt: skip
    fixed |= {flag: flags.get(flag, False) for flag in kernel.arg_names if flag.isupper() and flag not in (*fixed, "H")}
    unused = {"exponentials"} - tensors.keys()
    unused |= set() if fixed.get("LABELS") else {"label_rows", "label_slot"}
    fixed |= dict.fromkeys(unused & set(kernel.arg_names))
    signature = {name: "constexpr" if name in fixed else tensors.get(name, "i32") for name in kernel.arg_names}
    source = GluonASTSource(kernel, signature, fixed)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tile.warps})
    assert compiled.metadata.shared <= SHARED_BYTES
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]


def test_rows_that_no_slab_fills_whole_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^slab\.m must be a multiple of grad_weight\.k"):
        replace(INTERPRETED, slab=replace(INTERPRETED.slab, m=48))


CASES = {
    "plain": (Options(), False),
    "mean, metrics": (Options(return_predicted_tokens=True, return_token_accuracy=True), False),
    "every option": (replace(EVERYTHING, reduction="mean"), True),
}


@pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("memory", ["speed", "lean", 16 * 2**20])
@pytest.mark.parametrize("hidden", [200, 1032])
def test_results_are_those_of_the_kernels_that_triton_pipelines(
    case: str, memory: str | int, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a rounding of bfloat16, for exponentials and parts are not summed in one order; and predictions are equal."""
    options, everything = CASES[case]
    problem = linear(700, hidden, 5003, torch.bfloat16, everything, everything)
    device = torch.device("cuda")
    step = Step("loss", problem, options, memory=memory)
    most, kept, many = for_gradient(step, differentiable(problem), device)
    loss = kept if problem.tokens <= most else many
    inputs = random_inputs(loss, device)
    tiles = choose_tiles(device, torch.bfloat16, hidden)
    pipelined = replace(tiles, **{name: getattr(tiles, name).pipelined for name in PRODUCTS})
    found, expected = (results_with(each, loss, inputs, monkeypatch) for each in (tiles, pipelined))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if value.dtype.is_floating_point:
            difference = (value.double() - expected[name].double()).norm()
            assert difference <= 2**-9 * expected[name].double().norm(), name
        else:
            assert torch.equal(value, expected[name]), name


def results_with(
    tiles: Tiles, loss: Step, inputs: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(sys.modules["core_kernels.plan"], "choose_tiles", lambda *_: tiles)
    plan.cache_clear()
    outputs, _, gradients = differentiate(loss, inputs)
    plan.cache_clear()
    return outputs | gradients
