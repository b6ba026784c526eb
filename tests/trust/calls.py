"""Calls of both frontends that are repeated under a fault, each with inputs of its own, and what they answer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tests.parity import framework, frontends
from tests.parity.cases import CASES, Case, make_inputs
from tests.parity.closeness import check_results
from tests.support import suite_device

NAMES = ("linear-ties_none", "linear-all_options_of_linear", "logits-ties_none", "logits-everything_mean")


@dataclass(frozen=True)
class Call:
    """A case through one frontend, forward and backward."""

    frontend: str
    case: Case

    def run(self) -> frontends.Results:
        inputs = make_inputs(self.case)
        if self.frontend == "jax":
            return frontends.run_jax(self.case, inputs)
        return frontends.run_torch(self.case, inputs, suite_device())

    def check(self, results: frontends.Results) -> None:
        """As the oracle says, within what plain torch itself gets."""
        inputs = make_inputs(self.case)
        plain = framework.run(self.case, inputs, suite_device())
        check_results(self.frontend, self.case, results, frontends.run_oracle(self.case, inputs), plain)


# Few tokens, for many threads have their turns under the interpreter.
SMALL = [replace(case, leading=(11,), hidden=24) for case in CASES if case.name in NAMES]
CALLS = [Call(frontend, case) for frontend in ("torch", "jax") for case in SMALL]


def assert_same_bits(got: frontends.Results, wanted: frontends.Results, what: str) -> None:
    assert got.keys() == wanted.keys()
    for name, array in got.items():
        assert array.dtype == wanted[name].dtype, f"{what}: {name}"
        assert np.array_equal(array, wanted[name], equal_nan=True), f"{what}: {name} differs"
