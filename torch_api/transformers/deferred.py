"""Logits that are not computed unless somebody looks at them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from torch_api.functional import fused_linear_cross_entropy
from torch_api.transformers.calls import SUPPORTED, CrossEntropyCall, name_of
from torch_api.transformers.head import Linear, Projection
from torch_api.transformers.labels import Labels, plain
from torch_api.transformers.session import Session
from torch_api.transformers.steps import STEPS

# What is known of logits that are left out.
_FACTS = {
    "__hash__", "__len__", "_base", "_is_view", "_version", "device", "dim", "dtype", "element_size", "get_device",
    "grad_fn", "is_complex", "is_contiguous", "is_cpu", "is_cuda", "is_floating_point", "is_inference", "is_leaf",
    "is_meta", "is_mps", "is_nested", "is_quantized", "is_signed", "is_sparse", "is_xpu", "layout", "names", "ndim",
    "ndimension", "nelement", "numel", "register_hook", "requires_grad", "shape", "size", "stride",
}  # fmt: skip


def defer(head: nn.Module, session: Session) -> Linear:
    """The linear layer for `head` whose logits are deferred, wherever a loss can be fused with it."""

    def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        projection = Projection.of(head, session, hidden, weight, bias)
        alike = projection.autocast is not None or hidden.dtype == weight.dtype
        supported = hidden.dtype in SUPPORTED and weight.dtype in SUPPORTED and type(weight) in (Tensor, nn.Parameter)
        if not (alike and supported):
            return F.linear(hidden, weight, bias)
        session.deferred = True
        return Logits(projection, None, (*hidden.shape[:-1], len(weight)), projection.dtype, hidden).tensor()

    return linear


class Deferred(Tensor):
    """Logits that are computed when they are first looked at.

    Shape, dtype and device are known. Arithmetic that a fused loss understands is put off too, and a cross entropy is
    computed from the hidden states; for anything else the real logits are computed.
    """

    logits: Logits

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if name in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else kwargs.get("input")
        if isinstance(first, Deferred) and first.logits.value is None:
            if func is F.cross_entropy:
                call = CrossEntropyCall.of(args, kwargs)
                if call.fits(first):
                    return first.logits.loss(call)
            elif name in STEPS and args:
                changes = STEPS[name](first.logits, *args[1:], **kwargs)
                if changes is not None:
                    return first.logits.then(func, args[1:], kwargs, changes)
        return _look(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # What comes here was called from C++, below autograd, which uses the tensor's own `grad_fn`.
        def real(tensor: Deferred) -> Tensor:
            tensor.logits.warn(name_of(func))
            return tensor.logits.real(keep=False).detach()

        args, kwargs = tree_map_only(Deferred, real, (args, kwargs or {}))
        return func(*args, **kwargs)


@dataclass(eq=False)
class Logits:
    """What deferred logits are: a step from other such logits, or the head's product.

    They are ``post * tanh(scale * z)`` if capped, else ``scale * z``, of the product ``z`` of `rows` with the weight.
    """

    projection: Projection
    step: tuple[Logits, Callable[..., Tensor], tuple[Any, ...], dict[str, Any]] | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Tensor
    scale: float = 1.0
    capped: bool = False
    post: float = 1.0
    grad: bool = field(default_factory=torch.is_grad_enabled)
    children: weakref.WeakSet[Logits] = field(default_factory=weakref.WeakSet)
    value: Tensor | None = field(default=None, init=False)  # once they were looked at
    written: bool = field(default=False, init=False)

    def tensor(self) -> Deferred:
        return _Defer.apply(self, self.projection.hidden, self.projection.weight, self.projection.bias)

    def then(self, func: Callable[..., Tensor], args: Any, kwargs: Any, changes: dict[str, Any]) -> Deferred:
        changes = {"grad": self.grad and torch.is_grad_enabled(), **changes}
        child = replace(self, step=(self, func, args, kwargs), children=weakref.WeakSet(), **changes)
        self.children.add(child)
        return child.tensor()

    def loss(self, call: CrossEntropyCall) -> Tensor:
        """The cross entropy, from the hidden states."""
        session = self.projection.session
        scale, cap = (self.scale * self.post, self.post) if self.capped else (self.scale, None)

        def compute(**options: Any) -> Any:
            def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
                options.update(softcap=cap, logit_scale=scale, memory=session.settings.memory)
                return fused_linear_cross_entropy(hidden, weight, plain(call.target), bias, call.weight, **options)

            return self.projection.run(linear, self.rows)

        positions = call.target.positions if isinstance(call.target, Labels) else None
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            return session.loss(compute, positions, **call.options)

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

    def warn(self, name: str) -> None:
        self.projection.session.warn(
            f"`{name}` needs logits that were to be left out, so they are computed in full: the results are right and "
            "the memory is not saved."
        )

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


def _look(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call `func` with real logits."""
    name = name_of(func)
    seen: list[Deferred] = []

    def real(tensor: Deferred) -> Tensor:
        seen.append(tensor)
        return tensor.logits.real()

    args, kwargs = tree_map_only(Deferred, real, (args, kwargs))
    for tensor in seen:
        tensor.logits.warn(name)
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            tensor.logits.settle()
    result = func(*args, **kwargs)
    return next((t for t in seen if t.logits.value is result), result)  # what wrote to it returns it


class _Defer(torch.autograd.Function):
    """Gives deferred logits a place in the graph, for functions that take tensors without asking them."""

    @staticmethod
    def forward(ctx: Any, logits: Logits, *inputs: Tensor | None) -> Deferred:
        ctx.logits = logits
        device = logits.projection.hidden.device
        tensor = Tensor._make_wrapper_subclass(Deferred, logits.shape, dtype=logits.dtype, device=device)
        tensor.logits = logits
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, needed = ctx.logits, ctx.needs_input_grad[1:]
        if logits.written:
            raise RuntimeError("logits that were written to cannot be differentiated by a function that is not torch's")

        def linear(*inputs: Any) -> tuple[Tensor | None, ...]:
            leaves: Any = [
                t if t is None else t.detach().requires_grad_(n) for t, n in zip(inputs, needed, strict=True)
            ]
            wanted = [t for t, n in zip(leaves, needed, strict=True) if n]
            with torch.enable_grad():
                found = iter(torch.autograd.grad(logits.replay(F.linear(*leaves)), wanted, grad))
            return tuple(next(found) if n else None for n in needed)

        return None, *logits.projection.run(linear, logits.projection.hidden)
