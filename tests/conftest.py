"""Fixtures shared by the whole suite, and the environment that JAX must find before it is imported."""

from __future__ import annotations

import os

# Torch and JAX share the GPU: without this JAX would take most of it at its first use.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import pytest
import torch

from tests import support


@pytest.fixture
def device() -> torch.device:
    return support.suite_device()
