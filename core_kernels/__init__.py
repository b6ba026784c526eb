"""The one kernel set under both frontends: options, steps, plans, and a launch that fills buffers.

Knows torch tensors; knows no autograd and no JAX. Frontends use what is exported here and nothing below it.
"""

from core_kernels.labels import check_labels
from core_kernels.launch import launch
from core_kernels.notices import say_once
from core_kernels.options import OPTION_NAMES, Options
from core_kernels.plan import Plan, plan
from core_kernels.problem import Argument, Problem, linear_problem, logits_problem
from core_kernels.step import DIFFERENTIABLE, KEPT, SHARED, Buffer, Step, for_gradient

__all__ = [
    "DIFFERENTIABLE",
    "KEPT",
    "OPTION_NAMES",
    "SHARED",
    "Argument",
    "Buffer",
    "Options",
    "Plan",
    "Problem",
    "Step",
    "check_labels",
    "for_gradient",
    "launch",
    "linear_problem",
    "logits_problem",
    "plan",
    "say_once",
]
