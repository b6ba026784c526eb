"""An enabled model: its class with a forward pass whose head defers the logits where there are labels."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, make_dataclass, replace
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from torch_api.transformers.deferred import defer
from torch_api.transformers.head import intercepted
from torch_api.transformers.labels import Labels
from torch_api.transformers.session import Session, Settings

FLAGS = ("return_token_accuracy", "return_predicted_tokens", "use_token_scaling")  # that a single call may set
METRICS = ("token_accuracy", "num_correct", "num_valid", "predicted_tokens")  # in the order in which outputs have them


@dataclass
class Fusion:
    """What an enabled model carries: its settings, and whether it has warned."""

    settings: Settings
    warned: bool = field(default=False, init=False)

    @torch.compiler.disable(recursive=False)
    def forward(self, model: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's `forward`, and with labels its metrics."""
        flags = {name: kwargs.pop(name, None) for name in FLAGS}
        settings = replace(self.settings, **{name: flag for name, flag in flags.items() if flag is not None})
        kwargs.pop("skip_logits", None)  # trainers say it to Liger-Kernel's models; here they are always put off
        kwargs = {**dict(zip(_names(model.__class__), args, strict=False)), **kwargs}
        labels = [name for name in ("labels", "shift_labels") if isinstance(kwargs.get(name), Tensor)]
        head = model.get_output_embeddings()
        if not labels or head is None:
            return forward(model, **kwargs)
        session = Session(settings, self.warn)
        shape = kwargs[labels[-1]].shape
        if not settings.plain:
            kwargs |= {name: Labels.track(kwargs[name], session) for name in labels}
        with intercepted(head, defer(head, session)):
            outputs = forward(model, **kwargs)
        session.open = False
        if not session.deferred:
            self.warn(
                f"the head, a {type(head).__name__}, did not run as a linear layer of plain tensors in 32 or 16 bits, "
                "so the logits are computed in full: the results are right and the memory is not saved."
            )
        return _with(outputs, session.metrics(shape))

    def warn(self, sentence: str) -> None:
        if not self.warned:
            self.warned = True
            warnings.warn(f"{sentence} This is said once.", stacklevel=6)  # of whoever looked


@cache
def _names(model_class: Any) -> tuple[str, ...]:
    """What a forward pass calls its arguments, in their order."""
    return tuple(inspect.signature(model_class.forward).parameters)[1:]


@cache
def fused_class(model_class: Any) -> Any:
    """The class with a forward pass that is run by the :class:`Fusion` of its instance, if it has one."""

    @wraps(model_class.forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        fusion = self.__dict__.get("_fusion")
        if fusion is None:
            return model_class.forward(self, *args, **kwargs)
        return fusion.forward(self, model_class.forward, args, kwargs)

    def reduce(self: PreTrainedModel, protocol: int) -> Any:
        return _blank, (model_class,), self.__getstate__()

    names = {name: getattr(model_class, name) for name in ("__doc__", "__module__", "__qualname__")}
    members = {"forward": forward, "__reduce_ex__": reduce, "_plain_class": model_class}
    return type(model_class.__name__, (model_class,), names | members)


def _blank(model_class: Any) -> PreTrainedModel:
    fused = fused_class(model_class)
    return fused.__new__(fused)


@torch.compiler.disable
def _with(outputs: Any, metrics: dict[str, Tensor]) -> Any:
    """The outputs and the metrics: in a tuple they come last, whatever else there is."""
    if not metrics:
        return outputs
    metrics = {name: metrics[name] for name in METRICS if name in metrics}
    if isinstance(outputs, tuple):
        return outputs + tuple(metrics.values())
    output_class: Any = type(outputs)
    return _output_class(output_class)(**outputs, **metrics)


@cache
def _output_class(output_class: Any) -> Any:
    """The class with fields for the metrics: what distributed wrappers take apart and put together has to have them."""
    names = {name: getattr(output_class, name) for name in ("__doc__", "__module__")}
    own = {f.name for f in fields(output_class)}
    added = [(name, Tensor | None, None) for name in METRICS if name not in own]
    return make_dataclass(output_class.__name__, added, bases=(output_class,), namespace=names)
