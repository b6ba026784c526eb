"""The fused loss in any causal language model of Hugging Face's ``transformers``, by one call."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

import core_kernels as core
from torch_api.transformers.fusion import Fusion, fused_class
from torch_api.transformers.session import Settings

__all__ = ["disable", "enable"]

Model = TypeVar("Model", bound=nn.Module)


def enable(
    model: Model,
    *,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    memory: str | int = "auto",
) -> Model:
    """Fuse the loss of a causal language model with its head: in a forward pass with labels there are no logits.

    The model's code stays what it is. Its head returns logits that are not computed yet; scaling, a softcap, slices of
    the tokens and casts are put off with them, and the cross entropy at the end of the model's own loss is
    :func:`torch_api.fused_linear_cross_entropy` of the hidden states. Whatever else the model does with the logits gets
    them, computed there and then, and a warning that says so once. ``outputs.logits`` are computed when they are first
    looked at; they have to be before the weights change. Without labels, and in ``generate``, nothing is different.

    Args:
        model: a model of ``transformers`` with output embeddings, or one that ``peft`` has wrapped. It is changed in
            place. Enabling it again changes the settings.
        return_token_accuracy: add ``token_accuracy`` to the outputs, the share of valid labels predicted right.
        return_predicted_tokens: add ``predicted_tokens`` to them, in the labels' shape: ``predicted_tokens[b, t]`` is
            the prediction for ``labels[b, t]``, and -1 where there is none, as for the first token and ignored labels.
            Either flag adds ``num_correct`` and ``num_valid`` too, and can be given to a single call of the model.
        label_smoothing: of the loss, in [0, 1].
        lse_square_scale: factor of the z-loss.
        memory: scratch of the backward pass, as for :func:`torch_api.fused_linear_cross_entropy`.

    Returns:
        The model.

    Raises:
        TypeError: the model is none of ``transformers``, or a setting has the wrong type.
        ValueError: the model has no output embeddings, or a setting makes no sense.

    Example:
        >>> model = enable(LlamaForCausalLM(config), return_predicted_tokens=True)
        >>> outputs = model(input_ids=ids, labels=ids)
        >>> outputs.loss.backward()
        >>> outputs.predicted_tokens.shape == ids.shape
        True
    """
    core.Options(
        label_smoothing=label_smoothing,
        lse_square_scale=lse_square_scale,
        return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
    )  # raises on what makes no sense
    base = _base(model)
    head = base.get_output_embeddings()
    if head is None or isinstance(head, nn.ModuleList):
        found = "none" if head is None else f"a list of {len(head)}"
        raise ValueError(f"model must have one output embedding, got {type(base).__name__} with {found}")
    settings = Settings(return_token_accuracy, return_predicted_tokens, label_smoothing, lse_square_scale, memory)
    vars(base)["_fusion"] = Fusion(settings)
    if not hasattr(base, "_plain_class"):
        model_class: Any = type(base)
        base.__class__ = fused_class(model_class)
    return model


def disable(model: Model) -> Model:
    """Undo :func:`enable`: the model computes its logits and its loss itself again.

    Args:
        model: as for :func:`enable`; a model that is not enabled stays as it is.

    Returns:
        The model.

    Example:
        >>> model = disable(enable(model))
    """
    base = _base(model)
    vars(base).pop("_fusion", None)
    plain_class: Any = getattr(base, "_plain_class", None)
    if plain_class is not None and type(base) is fused_class(plain_class):  # and no class that was made from it
        base.__class__ = plain_class
    return model


def _base(model: Any) -> PreTrainedModel:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"model must be a model of transformers, or one in peft's wrapper, got {type(model).__name__}; "
            "enable the model before other wrappers get it"
        )
    return base
