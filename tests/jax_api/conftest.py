"""What the tests of the JAX frontend watch: compilations, and the plans that are made and run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import pytest

from core_kernels import Plan
from jax_api import bridge


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Everything that JAX reports to trace, lower or compile while the test runs."""
    events: list[str] = []

    def listen(event: str, duration: float, **details: Any) -> None:
        if "compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Every plan that is run; results must be waited for before it is read."""
    plans: list[Plan] = []
    call = bridge.PlanCallback.__call__

    def spy(callback: bridge.PlanCallback, *arguments: Any) -> None:
        plans.append(callback.plan)
        call(callback, *arguments)

    monkeypatch.setattr(bridge.PlanCallback, "__call__", spy)
    return plans


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Every plan that is made, which is when a program is compiled for a platform."""
    made: list[Plan] = []
    plan = bridge.plan

    def spy(*arguments: Any) -> Plan:
        made.append(plan(*arguments))
        return made[-1]

    monkeypatch.setattr(bridge, "plan", spy)
    return made


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("a plan was run")

    monkeypatch.setattr(bridge.PlanCallback, "__call__", refuse)
