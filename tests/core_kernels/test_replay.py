"""Launches replayed as a graph: when one is captured, what a driver may refuse, and that it has their bits."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch

import core_kernels.replay as module
from core_kernels import Options, Step, for_gradient, launch, plan
from core_kernels.engine import interpreting
from core_kernels.replay import MOST, remember, replay
from tests.core_kernels.problems import (
    PLAIN,
    POISON,
    assert_same_bits,
    differentiable,
    linear,
    logits,
    outputs_of,
    poisoned,
    random_inputs,
)

HERE, THERE, OURS = 5, 6, 7  # streams


class Driver:
    """As NVIDIA's: functions answer 0, or an error where they are to refuse, and hand out what they make."""

    def __init__(self, *refusing: str) -> None:
        self.refusing = refusing
        self.called: list[str] = []
        self.replayed: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return functools.partial(self.call, name)

    def call(self, name: str, *arguments: Any) -> int:
        self.called.append(name)
        if name in self.refusing:
            return 1
        if name == "cuStreamCreate":
            arguments[0]._obj.value = OURS
        if name == "cuGraphLaunch":
            self.replayed.append(arguments[1])
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return use(Driver(), monkeypatch)


def use(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setattr(module, "driver", lambda: driver)
    monkeypatch.setattr(module, "capturing_stream", functools.cache(module.capturing_stream.__wrapped__))
    monkeypatch.setattr(module, "_graphs", {})
    monkeypatch.setattr(module, "_seen", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return driver


def run(launches: Any, made: list[int], stream: int = HERE) -> None:
    """As a record is run: ``made`` are the streams of the launches that are made one by one."""
    if not replay(launches, stream):
        made.append(stream)
        remember(launches, made.append)


def test_launches_are_captured_the_second_time_and_replayed_from_the_third(driver: Driver) -> None:
    made: list[int] = []
    run("a", made)
    assert (made, driver.called) == ([HERE], [])
    run("a", made)
    assert made == [HERE, HERE, OURS]  # the last one captured, and not run
    run("a", made, THERE)
    run("a", made)
    assert len(made) == 3
    assert driver.replayed == [THERE, HERE]


def test_launches_at_other_addresses_have_graphs_of_their_own(driver: Driver) -> None:
    made: list[int] = []
    for launches in ("a", "b", "a", "b"):
        run(launches, made)
    assert made == [HERE, HERE, HERE, OURS, HERE, OURS]
    graphs = [id(module._graphs[name]) for name in ("a", "b")]
    assert len(set(graphs)) == 2


def test_where_too_many_take_turns_none_is_captured(driver: Driver) -> None:
    made: list[int] = []
    for _ in range(3):
        for launches in range(MOST + 1):
            run(launches, made)
    assert made == [HERE] * 3 * (MOST + 1)
    assert len(module._seen) == MOST


def test_of_many_graphs_the_oldest_goes(driver: Driver) -> None:
    made: list[int] = []
    for launches in range(MOST + 1):
        run(launches, made)
        run(launches, made)
    assert list(module._graphs) == list(range(1, MOST + 1))
    assert driver.called.count("cuGraphExecDestroy") == 1


@pytest.mark.parametrize(
    "refusing",
    ["cuStreamCreate", "cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags"],
)
def test_what_the_driver_refuses_is_launched_as_before(refusing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = use(Driver(refusing), monkeypatch)
    made: list[int] = []
    for _ in range(5):
        run("a", made)
    assert made.count(HERE) == 5
    assert driver.called.count(refusing) == 1
    assert not driver.replayed


def test_a_launch_that_cannot_be_captured_is_made_as_before(driver: Driver) -> None:
    made: list[int] = []

    def launch_here_alone(stream: int) -> None:
        if stream != HERE:
            raise RuntimeError("not while a stream is captured")

    for _ in range(4):
        assert not replay("a", HERE)
        made.append(HERE)
        remember("a", launch_here_alone)
    assert driver.called.count("cuStreamBeginCapture_v2") == driver.called.count("cuStreamEndCapture") == 1


def test_a_callers_own_capture_sees_launches(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    for _ in range(3):
        run("a", made)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(3):
        run("a", made)
        run("b", made)
    assert made[3:] == [HERE] * 6
    assert len(driver.replayed) == 1


def test_a_graph_that_fails_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    use(Driver("cuGraphLaunch"), monkeypatch)
    made: list[int] = []
    run("a", made)
    run("a", made)
    with pytest.raises(RuntimeError, match=r"^the CUDA driver could not launch a graph: error 1$"):
        run("a", made)


def test_without_a_driver_nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    use(Driver(), monkeypatch)
    monkeypatch.setattr(module, "driver", lambda: None)
    made: list[int] = []
    for _ in range(3):
        run("a", made)
    assert made == [HERE] * 3
    assert not module._seen


# ---- on a GPU

METRICS = Options(return_predicted_tokens=True, return_token_accuracy=True)
BF16 = linear(700, 136, 5003, torch.bfloat16, bias=False, class_weight=False)
STEPS = {
    "kept": Step("loss", BF16, METRICS, memory="speed"),
    "ahead": Step("loss", BF16, METRICS, memory="speed"),
    "slabs": Step("loss", BF16, METRICS, memory=4 * 2**20),
    "float32": Step("loss", linear(100, 64, 1000), PLAIN),
    "logits": Step("loss", logits(100, 1000, torch.bfloat16), PLAIN),
}


@pytest.mark.skipif(interpreting() or not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", STEPS)
def test_replayed_launches_have_the_bits_of_launches(
    name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Over inputs that change in place, with every buffer poisoned before each run."""
    monkeypatch.setattr(module, "_graphs", {})
    monkeypatch.setattr(module, "_seen", {})
    if name == "ahead":
        monkeypatch.setattr("core_kernels.step.MOST_SPEED_BYTES", 2**20)
        monkeypatch.setattr(sys.modules["core_kernels.plan"], "CHUNK_BYTES", 3 * 2**20)
        request.addfinalizer(plan.cache_clear)
    device, step = torch.device("cuda"), STEPS[name]
    wanted = differentiable(step.problem)
    most, few, many = for_gradient(step, wanted, device)
    loss = few if step.problem.tokens <= most else many
    gradient = loss.gradient(wanted)
    assert {"kept": loss.keep, "ahead": bool(loss.ahead)}.get(name, not (loss.keep or loss.ahead))
    inputs = random_inputs(loss, device)
    plans = plan(loss, device), plan(gradient, device)
    tensors = inputs | poisoned(plans[0], device) | poisoned(plans[1], device)
    saved = {buffer.name for buffer in loss.saved}

    def results(seed: int) -> dict[str, torch.Tensor]:
        for key, value in random_inputs(loss, device, seed).items():
            inputs[key].copy_(value)
        for planned in plans:
            for key in poisoned_names(planned) - (saved if planned is plans[1] else set()):
                tensors[key].fill_(float("nan") if tensors[key].is_floating_point() else POISON)
            launch(planned, {key: tensors[key] for key in (*planned.inputs, *poisoned_names(planned))})
        found = outputs_of(loss, tensors) | outputs_of(gradient, tensors)
        return {key: value.clone() for key, value in found.items()}

    launched = [results(seed) for seed in (1, 2, 3)]  # the first are recorded, and the second seen
    assert sum(graph is not None for graph in module._graphs.values()) == 2
    with monkeypatch.context() as patch:  # what is not replayed would be launched one by one
        patch.setattr("core_kernels.launching.Launch.again", None)
        replayed = [results(seed) for seed in (1, 2, 3)]
    for found, expected in zip(replayed, launched, strict=True):
        assert_same_bits(found, expected)


def poisoned_names(planned: Any) -> set[str]:
    return {buffer.name for buffer in planned.step.results + planned.workspace}
