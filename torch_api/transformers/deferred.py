"""Logits that are not computed unless somebody looks: the head's product with what a model does to it afterwards."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from torch_api.functional import fused_linear_cross_entropy
from torch_api.transformers.calls import SUPPORTED, CrossEntropyCall, name_of
from torch_api.transformers.labels import Labels, plain
from torch_api.transformers.session import Session

Project = Callable[[Tensor, Tensor, Tensor | None], Any]


@contextmanager
def intercepted(head: nn.Module, project: Project) -> Iterator[None]:
    """Within it ``head(hidden)`` is ``project(hidden, weight, bias)``, if all the head does is a linear layer.

    The head's own ``forward`` and hooks run, and hand over the weight that they use.
    """

    def wrap(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0].as_subclass(_HeadInput)
        hidden.project = project
        return (hidden, *args[1:])

    handle = head.register_forward_pre_hook(wrap)
    try:
        yield
    finally:
        handle.remove()


class _HeadInput(Tensor):
    """Hidden states on their way through the head to its linear layer."""

    project: Project

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            hidden = tree_map_only(_HeadInput, lambda t: t.as_subclass(Tensor), (args, kwargs or {}))
        if func is F.linear and isinstance(args[0], _HeadInput):
            return args[0].project(*_linear(*hidden[0], **hidden[1]))
        return func(*hidden[0], **hidden[1])


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


@dataclass(frozen=True)
class _Projection:
    """The linear layer that was not run, and the circumstances in which it would have been."""

    head: nn.Module
    session: Session
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    autocast: torch.dtype | None
    versions: tuple[int, ...]

    def run(self, compute: Project, hidden: Tensor) -> Any:
        """``compute(hidden, weight, bias)``, within the head's forward if its weight is whole nowhere else."""
        with torch.autocast(hidden.device.type, self.autocast, enabled=self.autocast is not None):
            if self.weight.untyped_storage().size() == 0 < self.weight.numel():  # FSDP has freed it
                if not self.session.open:  # to gather it again, all ranks would have to look
                    raise RuntimeError(_LATE.format("is sharded again", "before the backward pass"))
                with intercepted(self.head, compute):
                    return self.head(hidden)
            if _versions(self.weight, self.bias) != self.versions:
                raise RuntimeError(_LATE.format("has been changed since", "before the optimizer's step"))
            return compute(hidden, self.weight, self.bias)


_LATE = (
    "these logits were left out, and the weight that they need {}: look at them {}, or disable(model) before it runs"
)


def defer(head: nn.Module, session: Session) -> Project:
    """What :func:`intercepted` needs so that `head` returns deferred logits, if they can be what a loss is fused with."""

    def project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        kind = hidden.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        alike = autocast is not None or hidden.dtype == weight.dtype
        if not (alike and hidden.dtype in SUPPORTED and weight.dtype in SUPPORTED and type(weight) in _PLAIN):
            return F.linear(hidden, weight, bias)
        projection = _Projection(head, session, hidden, weight, bias, autocast, _versions(weight, bias))
        shape = (*hidden.shape[:-1], weight.shape[0])
        return _Logits(projection, None, shape, autocast or hidden.dtype, hidden).tensor()

    return project


_PLAIN = (Tensor, nn.Parameter)


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(t._version for t in tensors if t is not None and not t.is_inference())


@dataclass(eq=False)
class _Logits:
    """A state of deferred logits: a step from its parent's, or the head's product.

    ``post * tanh(scale * z)`` if capped, else ``scale * z``, of the product ``z`` of `rows` with the head's weight.
    """

    projection: _Projection
    step: tuple[_Logits, Callable[..., Tensor], tuple[Any, ...], dict[str, Any]] | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Tensor | None  # None where only the real logits will do
    scale: float = 1.0
    capped: bool = False
    post: float = 1.0
    grad: bool = field(default_factory=torch.is_grad_enabled)
    children: weakref.WeakSet[_Logits] = field(default_factory=weakref.WeakSet)
    value: Tensor | None = field(default=None, init=False)
    written: bool = field(default=False, init=False)

    def tensor(self) -> Deferred:
        projection = self.projection
        return _Defer.apply(self, projection.hidden, projection.weight, projection.bias)

    def real(self, keep: bool = True) -> Tensor:
        """The logits, exactly as the model would have computed them."""
        if self.value is not None:
            return self.value
        with torch.set_grad_enabled(self.grad):
            if self.step is None:
                value = self.projection.run(F.linear, self.projection.hidden)
            else:
                parent, func, args, kwargs = self.step
                value = func(parent.real(keep), *args, **kwargs)
        if keep:
            self.value = value
        return value

    def replay(self, product: Tensor) -> Tensor:
        """What the steps make of the head's product."""
        if self.step is None:
            return product
        parent, func, args, kwargs = self.step
        return func(parent.replay(product), *args, **kwargs)

    def settle(self) -> None:
        """Compute what was made of these logits, before they are written to."""
        self.written = True
        for child in self.children:
            child.real()
            child.settle()

    def then(
        self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], **changes: Any
    ) -> Deferred:
        changes = {"grad": self.grad and torch.is_grad_enabled(), **changes}
        child = replace(self, step=(self, func, args, kwargs), children=weakref.WeakSet(), **changes)
        self.children.add(child)
        return child.tensor()

    def loss(self, call: CrossEntropyCall) -> Tensor:
        positions = call.target.positions if isinstance(call.target, Labels) else None
        capped = {"logit_scale": self.scale * self.post, "softcap": self.post} if self.capped else {}
        arithmetic = capped or {"logit_scale": self.scale}

        def compute(**options: Any) -> Any:
            def fused(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
                memory = self.projection.session.settings.memory
                options.update(arithmetic, ce_weight=call.weight, memory=memory)
                return fused_linear_cross_entropy(hidden, weight, plain(call.target), bias, **options)

            return self.projection.run(fused, self.rows)

        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            return self.projection.session.loss(compute, positions, **call.options)


class Deferred(Tensor):
    """Logits that are computed when they are first looked at.

    Shape, dtype and device are known. Arithmetic that a fused loss understands is put off too; a cross entropy is
    computed from the hidden states; for anything else the real logits are computed.
    """

    state: _Logits

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if name in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else kwargs.get("input")
        if isinstance(first, Deferred) and first.state.rows is not None and first.state.value is None:
            if func is F.cross_entropy:
                call = CrossEntropyCall.of(args, kwargs)
                if call.fits(first):
                    return first.state.loss(call)
            elif name in _STEPS and args:
                changes = _STEPS[name](first.state, *args[1:], **kwargs)
                if changes is not None:
                    return first.state.then(func, args[1:], kwargs, **changes)
        return _look(func, args, kwargs, writes=name.endswith("_") and not name.endswith("__") or name in _WRITES)

    @classmethod
    def __torch_dispatch__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What comes here was called from C++, below autograd, which has the tensor's own `grad_fn`.
        real = tree_map_only(Deferred, lambda t: t.state.real(keep=False).detach(), (args, kwargs or {}))
        return func(*real[0], **real[1])


Changes = dict[str, Any] | None  # of a state by a step; None if it is none that a loss can be fused with


def _times(state: _Logits, factor: Any, **options: Any) -> Changes:
    if options or isinstance(factor, bool) or not isinstance(factor, (int, float)):
        return None
    if not (math.isfinite(factor) and factor) or (state.capped and factor < 0):
        return None
    return {"post": state.post * factor} if state.capped else {"scale": state.scale * factor}


def _over(state: _Logits, divisor: Any, **options: Any) -> Changes:
    number = isinstance(divisor, (int, float)) and divisor
    return _times(state, 1.0 / divisor if number else None, **options)


def _tanh(state: _Logits) -> Changes:
    return None if state.capped else {"capped": True}


def _same(state: _Logits, **options: Any) -> Changes:
    return {}


def _float(state: _Logits, **options: Any) -> Changes:
    return {"dtype": torch.float32}


def _to(state: _Logits, *args: Any, **kwargs: Any) -> Changes:
    if (args and type(args[0]) not in (torch.dtype, torch.device, str, int)) or "other" in kwargs:
        return None
    device, dtype, *_ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
    stays = device is None or device == state.rows.device
    return {"dtype": dtype or state.dtype} if stays and (dtype is None or dtype in SUPPORTED) else None


def _detach(state: _Logits) -> Changes:
    return {"grad": False}


def _reshape(name: str, state: _Logits, *args: Any, **kwargs: Any) -> Changes:
    shape = getattr(torch.empty(state.shape, dtype=torch.bool, device="meta"), name)(*args, **kwargs).shape
    if not shape or shape[-1] != state.shape[-1]:
        return None
    return {"shape": tuple(shape), "rows": state.rows.reshape(*shape[:-1], state.rows.shape[-1])}


def _index(state: _Logits, index: Any) -> Changes:
    """An index of the tokens: whole rows are taken, the vocab is left alone."""
    *tokens, vocab = state.shape
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(p, bool) or not isinstance(p, (int, slice, list, Tensor, type(...))) for p in parts):
        return None
    dims = [p.dim() if isinstance(p, Tensor) and p.dtype == torch.bool else int(p is not ...) for p in parts]
    holes = [i for i, p in enumerate(parts) if p is ...]
    if len(holes) > 1 or sum(dims) > len(tokens) + 1:
        return None
    if (holes or sum(dims) == len(tokens) + 1) and parts[-1] is not ...:  # then it is of the vocab
        last = parts.pop()
        if not isinstance(last, slice) or last.indices(vocab) != (0, vocab, 1):
            return None
        dims.pop()
    for i in holes:
        parts[i : i + 1] = [slice(None)] * (len(tokens) - sum(dims))
    rows = state.rows[tuple(parts)]
    return {"shape": (*rows.shape[:-1], vocab), "rows": rows}


_RESHAPES = ("flatten", "reshape", "squeeze", "unsqueeze", "view")
_STEPS: dict[str, Callable[..., Changes]] = {
    "__getitem__": _index,
    "clone": _same,
    "contiguous": _same,
    "detach": _detach,
    "div": _over,
    "float": _float,
    "mul": _times,
    "tanh": _tanh,
    "to": _to,
    **{name: partial(_reshape, name) for name in _RESHAPES},
}
# What is known without the logits.
_FACTS = {
    "__hash__", "__len__", "_base", "_is_view", "_version", "device", "dim", "dtype", "element_size", "get_device", "grad_fn", "is_complex",
    "is_contiguous", "is_cpu", "is_cuda", "is_floating_point", "is_inference", "is_leaf", "is_meta", "is_mps",
    "is_nested", "is_quantized", "is_signed", "is_sparse", "is_xpu", "layout", "names", "ndim", "ndimension", "nelement",
    "numel", "register_hook", "requires_grad", "shape", "size", "stride",
}  # fmt: skip
_WRITES = {"__iadd__", "__imul__", "__isub__", "__itruediv__", "__setitem__"}


class _Defer(torch.autograd.Function):
    """Gives deferred logits their place in the graph, for what differentiates them without asking."""

    @staticmethod
    def forward(ctx: Any, state: _Logits, *inputs: Tensor | None) -> Tensor:
        ctx.state = state
        device = state.projection.hidden.device
        tensor = Tensor._make_wrapper_subclass(Deferred, state.shape, dtype=state.dtype, device=device)
        tensor.state = state
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        state, needed = ctx.state, ctx.needs_input_grad[1:]
        if state.written:
            raise RuntimeError("logits that were written to cannot be differentiated by a function that is not torch's")

        def gradients(*inputs: Tensor | None) -> Any:
            leaves = [None if t is None else t.detach().requires_grad_(n) for t, n in zip(inputs, needed, strict=True)]
            with torch.enable_grad():
                logits = state.replay(F.linear(*leaves))
            found = iter(torch.autograd.grad(logits, [t for t in leaves if t is not None and t.requires_grad], grad))
            return tuple(next(found) if n else None for n in needed)

        return None, *state.projection.run(gradients, state.projection.hidden)


def _look(func: Callable[..., Any], args: Any, kwargs: Any, writes: bool) -> Any:
    """Call `func` with real logits; what is written to is no longer the head's product."""
    seen: list[Deferred] = []

    def real(tensor: Deferred) -> Tensor:
        seen.append(tensor)
        return tensor.state.real()

    real_args, real_kwargs = tree_map_only(Deferred, real, (args, kwargs))
    for tensor in seen:
        tensor.state.projection.session.warn(name_of(func))
    if writes:
        for tensor in seen:
            tensor.state.settle()
    result = func(*real_args, **real_kwargs)
    return next((t for t in seen if t.state.value is result), result)
