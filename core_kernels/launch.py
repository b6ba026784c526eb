"""The core's entry point: run a plan over tensors that the caller provides.

Nothing here waits for a GPU or raises on data, and the kernels allocate nothing (plain torch operations, asked for by
``engine="torch"``, have temporaries): buffers go in, and come back filled.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType

from torch import Tensor

from core_kernels.plan import Plan


def launch(plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Fill every buffer that ``plan`` lists, reading the inputs that it names, on the current stream.

    Args:
        plan: of a step, for the device that holds the tensors.
        tensors: every input and buffer by name. Tokens are one dimension: ``x (N, H)``, ``labels (N,)``; on a shard
            of the vocab ``first_class (1,)`` is the number of its first class, int32; ``shard_statistics`` to combine
            are ``(shards, rows, N)``. ``x``, ``logits`` and ``weight`` may have any strides, other inputs are
            contiguous. Buffers are contiguous; ``grad_weight`` may be a transposed view of a contiguous buffer. The
            workspace comes in one, as the plan's ``allocations`` have it, or each of its buffers by name.
    """
    if plan.problem.tokens == 0:
        for buffer in plan.step.results:
            tensors[buffer.name].zero_()
        return
    if not plan.outputs:
        return  # no gradient is wanted
    engine = _engine(plan.engine)
    operations = engine.LOGITS if plan.problem.hidden is None else engine.LINEAR
    engine.run(operations[plan.step.kind], plan, tensors)


@functools.lru_cache
def _engine(name: str) -> ModuleType:
    """Imported when first used: the Triton engine needs Triton, which not every machine has."""
    if name == "torch":
        from core_kernels import torch_engine

        return torch_engine
    from core_kernels import triton_engine

    return triton_engine
