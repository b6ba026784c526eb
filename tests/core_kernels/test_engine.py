"""Which engine runs: decided by name, device and environment alone."""

from __future__ import annotations

import pytest
import torch

from core_kernels.engine import choose_engine, interpreting

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ON = ("1", "true", "TRUE", "on", "yes", "y")
OFF = (None, "", "0", "false", "off", "no")


def set_interpreter(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", value)


@pytest.mark.parametrize("value", ON + OFF)
def test_the_environment_says_whether_kernels_are_interpreted(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    set_interpreter(monkeypatch, value)
    assert interpreting() == (value in ON)


@pytest.mark.parametrize(
    ("engine", "device", "interpreter", "chosen"),
    [
        ("auto", CPU, "0", "torch"),
        ("auto", CPU, "1", "triton"),
        ("auto", CUDA, "0", "triton"),
        ("auto", CUDA, "1", "triton"),
        ("torch", CPU, "0", "torch"),
        ("torch", CPU, "1", "torch"),
        ("torch", CUDA, "0", "torch"),
        ("torch", CUDA, "1", "torch"),
        ("triton", CPU, "1", "triton"),
        ("triton", CUDA, "0", "triton"),
        ("triton", CUDA, "1", "triton"),
    ],
)
def test_the_engine_that_runs(
    monkeypatch: pytest.MonkeyPatch, engine: str, device: torch.device, interpreter: str, chosen: str
) -> None:
    set_interpreter(monkeypatch, interpreter)
    assert choose_engine(engine, device) == chosen


@pytest.mark.parametrize("interpreter", OFF)
def test_kernels_need_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch, interpreter: str | None) -> None:
    set_interpreter(monkeypatch, interpreter)
    with pytest.raises(ValueError, match=r"^engine='triton' needs a GPU, or TRITON_INTERPRET=1 .* arguments on cpu$"):
        choose_engine("triton", CPU)
