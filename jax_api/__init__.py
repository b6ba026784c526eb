"""Twinhead for JAX: cross entropy, and the last linear layer fused with it, with predictions and accuracy."""

try:
    import jax as _jax  # noqa: F401
except ImportError as error:
    raise ImportError("jax_api needs JAX, which is an extra: pip install 'twinhead[jax]'") from error

from jax_api.functional import cross_entropy, fused_linear_ce
from jax_api.output import CrossEntropyOutput

__all__ = ["CrossEntropyOutput", "cross_entropy", "fused_linear_ce"]
