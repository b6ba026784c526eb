"""Hypothesis profiles: ``ci``, small and the same on every run, and ``long``, by hand (see ``test_properties``)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

from tests.support import interpreting, on_gpu

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

# Interpreted kernels run for half a second, and compiled ones are compiled anew for most examples.
settings.register_profile(
    "ci",
    max_examples=10 if interpreting() or on_gpu() else 100,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # to shrink a failure takes minutes where kernels are interpreted
    suppress_health_check=SLOW,
)
settings.register_profile("long", max_examples=3000, deadline=None, suppress_health_check=SLOW, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
