"""The one kernel set under both frontends: options, plans, and a launch that fills buffers.

Knows torch tensors; knows no autograd and no JAX. Frontends use what is exported here and nothing below it.
"""

from core_kernels.labels import check_labels
from core_kernels.launch import launch
from core_kernels.options import OPTION_NAMES, Options
from core_kernels.plan import Buffer, Plan, plan_backward, plan_forward
from core_kernels.problem import Argument, Problem, linear_problem, logits_problem

__all__ = [
    "OPTION_NAMES",
    "Argument",
    "Buffer",
    "Options",
    "Plan",
    "Problem",
    "check_labels",
    "launch",
    "linear_problem",
    "logits_problem",
    "plan_backward",
    "plan_forward",
]
