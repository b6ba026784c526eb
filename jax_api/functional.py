"""Cross entropy and fused linear cross entropy as functions of JAX arrays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import core_kernels as core
from jax_api import bridge, internals, placement
from jax_api.loss import Axis, planned_loss
from jax_api.output import CrossEntropyOutput

LAYOUTS = ("vh", "hv")
ARRAYS = (jax.Array, np.ndarray, np.generic)


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    weight: jax.Array | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    logit_scale: float = 1.0,
    return_counts: bool = False,
    num_items_in_batch: int | jax.Array | None = None,
    where: jax.Array | None = None,
    engine: str = "auto",
    check_labels: bool = False,
    cuda_graph: bool = False,
) -> jax.Array | CrossEntropyOutput:
    r"""Cross entropy between logits and class indices, with predictions and accuracy from the same pass.

    With :math:`z = \text{logit\_scale} \cdot \text{logits}`, capped to
    :math:`\text{softcap} \tanh(z / \text{softcap})` if asked, :math:`\text{lse} = \log \sum_v e^{z_v}`, class weights
    :math:`w` and smoothing :math:`e`, a token's loss is

    .. math:: (1 - e)\, w_y (\text{lse} - z_y) + \tfrac{e}{V} \sum_v w_v (\text{lse} - z_v)
              + \text{lse\_square\_scale} \cdot \text{lse}^2

    All of it is computed in float32. Reverse-mode differentiable by ``logits``, once; works under ``jit``, ``vmap``,
    ``scan``, ``checkpoint``, ``shard_map`` and ``value_and_grad(has_aux=True)``.

    Args:
        logits: ``(..., V)``, float32, bfloat16 or float16.
        labels: class indices ``(...)``, int32 or int64.
        weight: class weights ``(V,)``, not differentiated.
        ignore_index: tokens with this label have loss 0, gradient 0 and prediction -1.
        reduction: ``"mean"`` (the token losses over the sum of the valid tokens' weights, the z-losses over their
            count), ``"sum"``, or ``"none"`` (one loss per token). Without a valid token the loss is 0.
        label_smoothing: :math:`e`, in [0, 1].
        lse_square_scale: factor of the z-loss.
        softcap: bound of the logits, greater than 0, or ``None``.
        return_z_loss: also return the z-loss, detached.
        return_token_accuracy: also return the share of valid tokens predicted right.
        return_predicted_tokens: also return the argmax per token, the lowest index on a tie.
        logit_scale: factor of the logits before the cap.
        return_counts: also return how many tokens are valid, and how many of them are predicted right, to be summed
            over batches or devices.
        num_items_in_batch: what ``"mean"`` divides by instead, if more than 0: the number of valid tokens of the whole
            batch, of which this call has a part. An int or a scalar.
        where: boolean mask in the labels' shape; tokens where it is false are ignored.
        engine: ``"triton"``, ``"torch"`` (plain operations), or ``"auto"``: the kernels wherever they run.
        check_labels: raise on a bad label; needs labels that nothing traces. On a CPU always done for those.
        cuda_graph: let XLA record the launches in its CUDA graphs and replay them without Python. XLA makes graphs of
            runs of five commands or more; ``jax.jit(..., compiler_options={"xla_gpu_graph_min_graph_size": 1})`` of
            any. Without effect on a CPU.

    Returns:
        The loss, float32; a :class:`CrossEntropyOutput` if any ``return_*`` flag is on.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or value; the message names it. At trace
            time, before anything runs.
        IndexError: a label is neither in ``[0, V)`` nor ``ignore_index``, where labels can be read. Where they cannot
            (under ``jit``, on a GPU) the token's loss is NaN and its gradient 0 instead.

    Example:
        >>> logits = jnp.array([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
        >>> out = cross_entropy(logits, jnp.array([0, 2]), return_predicted_tokens=True)
        >>> out.predicted_tokens
        Array([0, 1], dtype=int32)

    References:
        Online log-sum-exp: Milakov and Gimelshein, 2018, arXiv:1805.02867. Label smoothing: Szegedy et al., 2016,
        arXiv:1512.00567. z-loss: Chowdhery et al., 2022, arXiv:2204.02311. Softcap: Gemma Team, 2024,
        arXiv:2408.00118.
    """
    options = core.Options(
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        softcap=softcap,
        logit_scale=logit_scale,
        reduction=core.Options.reduction_over(num_items_in_batch, reduction, ARRAYS, "an array"),
        return_z_loss=return_z_loss,
        return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
        return_counts=return_counts,
        check_labels=check_labels,
    )
    logits, labels, weight = map(_array, (logits, labels, weight))
    problem = core.logits_problem(
        _argument("logits", logits), _argument("labels", labels), _optional_argument("weight", weight)
    )
    inputs = {"logits": logits, "labels": labels, "class_weight": weight}
    step = core.Step("loss", problem, options, engine, index_dtype=_index_dtype())
    return _run(bridge.Call(step, frozenset(), cuda_graph), inputs, where, None, num_items_in_batch)


def fused_linear_ce(
    x: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    bias: jax.Array | None = None,
    *,
    ce_weight: jax.Array | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: Any = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    logit_scale: float = 1.0,
    return_counts: bool = False,
    num_items_in_batch: int | jax.Array | None = None,
    where: jax.Array | None = None,
    weight_layout: str = "vh",
    vocab_axis: str | tuple[str, ...] | None = None,
    memory: str | int = "auto",
    engine: str = "auto",
    check_labels: bool = False,
    cuda_graph: bool = False,
) -> jax.Array | CrossEntropyOutput:
    r"""Cross entropy of ``x @ weight.T + bias`` without ever holding the logits.

    With :math:`z = \text{logit\_scale} \cdot (x W^\top + b)`, capped to
    :math:`\text{softcap} \tanh(z / \text{softcap})` if asked, :math:`\text{lse} = \log \sum_v e^{z_v}`, class weights
    :math:`w` and smoothing :math:`e`, a token's loss is

    .. math:: (1 - e)\, w_y (\text{lse} - z_y) + \tfrac{e}{V} \sum_v w_v (\text{lse} - z_v)
              + \text{lse\_square\_scale} \cdot \text{lse}^2

    Reverse-mode differentiable by ``x``, ``weight`` and ``bias``, once; what is not differentiated is not computed.
    Works under ``jit``, ``vmap`` (a batch over one weight is one call over more tokens), ``scan``, ``checkpoint``,
    ``shard_map`` and ``value_and_grad(has_aux=True)``.

    Args:
        x: hidden states ``(..., H)``, float32, bfloat16 or float16.
        weight: the head's weight, of the same dtype: ``(V, H)``, or ``(H, V)`` with ``weight_layout="hv"``.
        labels: class indices ``(...)``, int32 or int64.
        bias: ``(V,)``, of the same dtype.
        ce_weight: class weights ``(V,)``, not differentiated.
        ignore_index: tokens with this label have loss 0, gradient 0 and prediction -1, and their projection is skipped.
        lse_square_scale: factor of the z-loss.
        label_smoothing: :math:`e`, in [0, 1].
        reduction: ``"mean"`` (the token losses over the sum of the valid tokens' weights, the z-losses over their
            count), ``"sum"``, or ``"none"`` (one loss per token). Without a valid token the loss is 0.
        softcap: bound of the logits, greater than 0, or ``None``.
        return_z_loss: also return the z-loss, detached.
        accum_dtype: accepted for compatibility; accumulation is float32 in any case.
        use_token_scaling: multiply each token's loss by its own detached probability of the label.
        return_token_accuracy: also return the share of valid tokens predicted right.
        return_predicted_tokens: also return the argmax per token, the lowest index on a tie.
        logit_scale: factor of the logits before the cap.
        return_counts: also return how many tokens are valid, and how many of them are predicted right, to be summed
            over batches or devices.
        num_items_in_batch: what ``"mean"`` divides by instead, if more than 0: the number of valid tokens of the whole
            batch, of which this call has a part. An int or a scalar.
        where: boolean mask in the labels' shape; tokens where it is false are ignored.
        weight_layout: ``"vh"`` (an embedding table) or ``"hv"`` (the kernel of a Flax ``Dense``); neither is copied or
            transposed in memory, and the gradient has the same layout.
        vocab_axis: name of the mesh axis, inside ``jax.shard_map``, along which ``weight`` and ``bias`` are sharded in
            their vocab dimension (``ce_weight`` is whole). Labels and predictions are classes of the whole vocab, and
            every device of the axis gets the whole loss, by one small collective each way.
        memory: what the gradient may cost in scratch, on a GPU. ``"speed"``: one projection in all, with the
            exponentials of the logits kept in bfloat16, up to 4.7 GiB of them; of more, a chunk of tokens at a time,
            beside float32 gradients. ``"lean"``: statistics alone, and the logits again, a slice of the vocab at a
            time. ``"auto"``: the former up to 2 GiB, else the latter with larger slices. A number: at most so many
            bytes for the scratch of either pass. Inputs of float32 or float16, a bias and label smoothing always take
            the latter. The result is the same to rounding.
        engine: ``"triton"``, ``"torch"`` (plain operations), or ``"auto"``: the kernels wherever they run.
        check_labels: raise on a bad label; needs labels that nothing traces. On a CPU always done for those.
        cuda_graph: let XLA record the launches in its CUDA graphs and replay them without Python. XLA makes graphs of
            runs of five commands or more; ``jax.jit(..., compiler_options={"xla_gpu_graph_min_graph_size": 1})`` of
            any. Without effect on a CPU.

    Returns:
        The loss, float32; a :class:`CrossEntropyOutput` if any ``return_*`` flag is on.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or value; the message names it. At trace
            time, before anything runs.
        IndexError: a label is neither in ``[0, V)`` nor ``ignore_index``, where labels can be read. Where they cannot
            (under ``jit``, on a GPU) the token's loss is NaN and its gradient 0 instead.

    Example:
        >>> x, weight = jnp.ones((8, 16)), jnp.ones((100, 16))
        >>> loss, (grad_x, grad_weight) = jax.value_and_grad(fused_linear_ce, argnums=(0, 1))(
        ...     x, weight, jnp.arange(8)
        ... )
        >>> grad_weight.shape
        (100, 16)

    References:
        Projection and loss in one pass: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024,
        arXiv:2411.09009. Token scaling: Wu et al., "On the Generalization of SFT", 2025, arXiv:2508.05629.
    """
    if weight_layout not in LAYOUTS:
        raise ValueError(f"weight_layout must be 'vh' or 'hv', got {weight_layout!r}")
    if accum_dtype is not None:
        try:
            jnp.dtype(accum_dtype)
        except TypeError:
            raise TypeError(f"accum_dtype must be a dtype or None, got {accum_dtype!r}") from None
    options = core.Options(
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        softcap=softcap,
        logit_scale=logit_scale,
        reduction=core.Options.reduction_over(num_items_in_batch, reduction, ARRAYS, "an array"),
        use_token_scaling=use_token_scaling,
        return_z_loss=return_z_loss,
        return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
        return_counts=return_counts,
        check_labels=check_labels,
    )
    x, weight, labels, bias, ce_weight = map(_array, (x, weight, labels, bias, ce_weight))
    transposed = frozenset({"weight"} if weight_layout == "hv" else ())
    x_argument = _argument("x", x)
    problem = core.linear_problem(
        x_argument,
        _hv_argument("weight", weight, x_argument) if transposed else _argument("weight", weight),
        _argument("labels", labels),
        _optional_argument("bias", bias),
        _optional_argument("ce_weight", ce_weight),
        _shards(vocab_axis, weight),
    )
    inputs = {"x": x, "weight": weight, "labels": labels, "bias": bias, "class_weight": ce_weight}
    step = core.Step("loss", problem, options, engine, memory, _index_dtype())
    return _run(bridge.Call(step, transposed, cuda_graph), inputs, where, vocab_axis, num_items_in_batch)


def _array(value: Any) -> Any:
    """What a wrapper stands for, a Flax NNX ``Param`` for one; anything else as it is."""
    convert = None if isinstance(value, jax.Array) else getattr(value, "__jax_array__", None)
    return convert() if convert else value


def _argument(name: str, array: jax.Array) -> core.Argument:
    if not isinstance(array, ARRAYS):
        raise TypeError(f"{name} must be a JAX or NumPy array, got {type(array).__name__}")
    placement.require_whole(name, array)
    return core.Argument(name, tuple(array.shape), bridge.torch_dtype(array.dtype))


def _hv_argument(name: str, array: jax.Array, x: core.Argument) -> core.Argument:
    """A weight kept as ``(H, V)``, as the core sees it: ``(V, H)``. Its shape is checked here, as it was written."""
    argument = _argument(name, array)
    shape = argument.shape
    hidden = x.shape[-1] if x.shape else "H"
    if len(shape) != 2 or hidden not in ("H", shape[0]) or 0 in shape:
        raise ValueError(f"{name} must have shape ({hidden}, V) with weight_layout='hv', got {shape}")
    return replace(argument, shape=shape[::-1])


def _optional_argument(name: str, array: jax.Array | None) -> core.Argument | None:
    return None if array is None else _argument(name, array)


def _run(
    call: bridge.Call,
    inputs: dict[str, Any],
    where: jax.Array | None,
    vocab_axis: Axis,
    num_items: int | jax.Array | None,
) -> jax.Array | CrossEntropyOutput:
    problem, options = call.step.problem, call.step.options
    _check_narrowing(inputs["labels"], where, problem.vocab, options)
    arrays = {name: placement.whole(name, jnp.asarray(a)) for name, a in inputs.items() if a is not None}
    if where is not None:
        arrays["labels"] = _mask(arrays["labels"], where, options.ignore_index)
    _check_labels(arrays["labels"], problem.vocab, options)
    if vocab_axis is not None:
        arrays["first_class"] = (jax.lax.axis_index(vocab_axis) * problem.columns).astype(jnp.int32).reshape(1)

    arrays["labels"] = arrays["labels"].reshape(-1)
    for name in ("x", "logits"):
        if name in arrays:
            arrays[name] = arrays[name].reshape(problem.tokens, arrays[name].shape[-1])
    # Labels are checked by now, and a program is the same with and without, and in whatever shape the tokens come.
    problem_of_rows = replace(problem, leading=(problem.tokens,))
    step = replace(call.step, problem=problem_of_rows, options=replace(options, check_labels=False))
    call = replace(call, step=step)
    results = planned_loss(call, vocab_axis, arrays)
    shaped = {name: r.reshape(problem.leading) if r.ndim == 1 else r for name, r in results.items()}
    if num_items is not None:
        items = jnp.asarray(num_items, jnp.float32).reshape(())
        share = 1 / jnp.where(items <= 0, 1, items)  # of none: the loss is 0
        shaped |= {name: shaped[name] * share for name in ("loss", "z_loss") if name in shaped}
    output = CrossEntropyOutput(**shaped)
    return output if options.returns_output else output.loss


def _index_dtype() -> torch.dtype:
    return torch.int64 if jax.dtypes.canonicalize_dtype(np.int64) == np.int64 else torch.int32


def _shards(vocab_axis: Axis, weight: jax.Array) -> int | None:
    """Into how many shards the vocab is split; whether ``weight`` is one of them is checked where it can be."""
    if vocab_axis is None:
        return None
    axes = (vocab_axis,) if isinstance(vocab_axis, str) else vocab_axis
    if not isinstance(axes, tuple) or not axes or not all(isinstance(axis, str) for axis in axes):
        raise TypeError(f"vocab_axis must be None, a mesh axis' name or a tuple of them, got {vocab_axis!r}")
    if not internals.manual_axes().issuperset(axes):
        raise ValueError(
            f"vocab_axis must name a mesh axis inside jax.shard_map, got {vocab_axis!r}, which is not one here"
        )
    tracked = internals.varying_axes(jax.lax.axis_index(vocab_axis))  # nothing is under check_vma=False
    if tracked and not internals.varying_axes(weight).issuperset(axes):
        raise ValueError(
            f"weight must be sharded along vocab_axis={vocab_axis!r}, and is the same on all of it: give its vocab "
            f"dimension in_specs of PartitionSpec({vocab_axis!r}), or leave vocab_axis out"
        )
    return jax.lax.axis_size(vocab_axis)


def _mask(labels: jax.Array, where: jax.Array, ignore_index: int) -> jax.Array:
    argument = _argument("where", where)
    if argument.dtype != torch.bool:
        raise TypeError(f"where must be boolean, got {jnp.dtype(where.dtype).name}")
    if argument.shape != labels.shape:
        raise ValueError(f"where must have the shape of labels, {labels.shape}, got {argument.shape}")
    limits = jnp.iinfo(labels.dtype)
    if not limits.min <= ignore_index <= limits.max:
        raise ValueError(f"ignore_index must fit in the labels' {labels.dtype} when where is given, got {ignore_index}")
    return jnp.where(where, labels, ignore_index)


def _check_narrowing(labels: Any, where: Any, vocab: int, options: core.Options) -> None:
    """With x64 off JAX wraps NumPy's int64 to 32 bits, and so could make a class of a bad label."""
    if not isinstance(labels, (np.ndarray, np.generic)):
        return
    if where is not None and not isinstance(where, jax.core.Tracer) and np.shape(where) == labels.shape:
        labels = np.where(where, labels, 0)
    labels = np.asarray(labels)
    if np.array_equal(labels.astype(jax.dtypes.canonicalize_dtype(labels.dtype)), labels):
        return
    core.check_labels(torch.from_numpy(labels), vocab, options.ignore_index, "labels")
    raise ValueError(f"ignore_index={options.ignore_index} needs 64 bits: enable x64, or choose a smaller one")


def _check_labels(labels: jax.Array, vocab: int, options: core.Options) -> None:
    if isinstance(labels, jax.core.Tracer):
        if options.check_labels:
            raise ValueError(
                "check_labels=True needs labels whose values are known, and these are traced: call outside jit and "
                "other transformations, or leave it off: a bad label then gives a NaN loss"
            )
    elif options.check_labels or all(device.platform == "cpu" for device in labels.devices()):
        core.check_labels(torch.from_numpy(np.array(labels)), vocab, options.ignore_index, "labels")
