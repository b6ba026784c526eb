"""Runs a case through either frontend, and through the oracle; all answer in the same form."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.parity import oracle
from tests.parity.cases import METRICS, Case, Inputs

OUTPUTS = ("loss", "z_loss", "token_accuracy", "predicted_tokens", "num_valid", "num_correct")
Results = dict[str, np.ndarray]  # OUTPUTS, and grad_*, in the dtypes they came in


def run_torch(
    case: Case,
    inputs: Inputs,
    device: torch.device,
    wanted: Collection[str] | None = None,
    metrics: dict[str, bool] = METRICS,
) -> Results:
    """With gradients by the ``wanted`` inputs, or by all."""
    arrays = {k: to_device(v, device).requires_grad_(_is_wanted(k, wanted)) for k, v in inputs.arrays.items()}
    out = call_torch(case, inputs, arrays, metrics)
    results = {"loss": out} if isinstance(out, Tensor) else _present(out)
    if results["loss"].requires_grad:
        results["loss"].backward(inputs.upstream.to(device))
    gradients = {f"grad_{k}": v.grad for k, v in arrays.items() if v.requires_grad}
    return {k: to_numpy(v) for k, v in {**results, **gradients}.items()}


def call_torch(case: Case, inputs: Inputs, arrays: dict[str, Tensor], metrics: dict[str, bool] = METRICS) -> Any:
    """The case's loss and metrics, of ``arrays`` in place of those of the inputs, on their device."""
    import torch_api

    device = next(iter(arrays.values())).device
    labels = inputs.labels.to(device)
    class_weight = None if inputs.class_weight is None else to_device(inputs.class_weight, device)
    if case.operation == "linear":
        return torch_api.fused_linear_cross_entropy(
            arrays["x"],
            arrays["weight"],
            labels,
            arrays.get("bias"),
            class_weight,
            memory=case.memory,
            **case.options,
            **metrics,
        )
    return torch_api.cross_entropy(arrays["logits"], labels, class_weight, **case.options, **metrics)


def run_jax(
    case: Case,
    inputs: Inputs,
    wanted: Collection[str] | None = None,
    metrics: dict[str, bool] = METRICS,
    jit: bool = True,
) -> Results:
    """With gradients by the ``wanted`` inputs, or by all."""
    import jax

    def value_and_gradients(arrays: dict[str, Any], others: dict[str, Any], upstream: Any) -> Any:
        if not arrays:
            out = call_jax(case, inputs, others, metrics)
            return ({"loss": out} if isinstance(out, jax.Array) else _present(out)), {}

        def loss_and_results(arrays: dict[str, Any]) -> Any:
            out = call_jax(case, inputs, arrays | others, metrics)
            return (out, {"loss": out}) if isinstance(out, jax.Array) else (out.loss, _present(out))

        _, pullback, results = jax.vjp(loss_and_results, arrays, has_aux=True)
        return results, pullback(upstream)[0]

    arrays = to_jax_arrays(case, inputs)
    differentiated = {k: v for k, v in arrays.items() if _is_wanted(k, wanted)}
    others = {k: v for k, v in arrays.items() if k not in differentiated}
    run = jax.jit(value_and_gradients) if jit else value_and_gradients
    results, gradients = run(differentiated, others, to_jax(inputs.upstream))
    if "weight" in gradients and _hv(case):
        gradients["weight"] = gradients["weight"].T
    return {k: np.asarray(v) for k, v in {**results, **{f"grad_{k}": v for k, v in gradients.items()}}.items()}


def call_jax(case: Case, inputs: Inputs, arrays: dict[str, Any], metrics: dict[str, bool] = METRICS) -> Any:
    """The case's loss and metrics, of ``arrays`` in place of those of the inputs."""
    import jax.numpy as jnp

    import jax_api

    labels = jnp.asarray(inputs.labels.numpy())
    class_weight = None if inputs.class_weight is None else to_jax(inputs.class_weight)
    if case.operation == "linear":
        return jax_api.fused_linear_ce(
            arrays["x"],
            arrays["weight"],
            labels,
            arrays.get("bias"),
            ce_weight=class_weight,
            memory=case.memory,
            weight_layout="hv" if _hv(case) else "vh",
            **case.options,
            **metrics,
        )
    return jax_api.cross_entropy(arrays["logits"], labels, weight=class_weight, **case.options, **metrics)


def to_jax_arrays(case: Case, inputs: Inputs) -> dict[str, Any]:
    return {k: to_jax(v.T if k == "weight" and _hv(case) else v) for k, v in inputs.arrays.items()}


def _hv(case: Case) -> bool:
    return case.layout == "transposed_weight"


def run_oracle(case: Case, inputs: Inputs) -> Results:
    arrays = {k: v.double().numpy() for k, v in inputs.arrays.items()}
    class_weight = None if inputs.class_weight is None else inputs.class_weight.double().numpy()
    shared = {"class_weight": class_weight, "upstream": inputs.upstream.double().numpy(), **case.options}
    labels = inputs.labels.numpy()
    if case.operation == "linear":
        expected = oracle.fused_linear_ce(arrays["x"], arrays["weight"], labels, arrays.get("bias"), **shared)
    else:
        expected = oracle.cross_entropy(arrays["logits"], labels, **shared)
    return {
        **{name: getattr(expected, name) for name in OUTPUTS},
        **{f"grad_{k}": v for k, v in expected.gradients.items()},
    }


def _is_wanted(name: str, wanted: Collection[str] | None) -> bool:
    return wanted is None or name in wanted


def _present(out: Any) -> dict[str, Any]:
    return {name: getattr(out, name) for name in OUTPUTS if getattr(out, name) is not None}


def to_numpy(tensor: Tensor) -> np.ndarray:
    """As NumPy holds it: bf16, which NumPy does not have, as the float32 of the same value."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A leaf of its own with the strides kept, gaps and expanded dimensions included (``.to`` would pack them)."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if not tensor.numel():
        return tensor.detach().clone().to(device)
    storage = torch.as_strided(tensor.detach(), (extent,), (1,), tensor.storage_offset()).clone().to(device)
    return torch.as_strided(storage, tensor.shape, tensor.stride()).detach()


def to_jax(tensor: Tensor) -> Any:
    import jax.numpy as jnp

    array = jnp.asarray(to_numpy(tensor))
    return array.astype(jnp.bfloat16) if tensor.dtype == torch.bfloat16 else array
