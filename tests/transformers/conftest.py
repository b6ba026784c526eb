from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture
def batch(device: torch.device) -> dict[str, Tensor]:
    from tests.transformers.models import make_batch  # which needs transformers

    return make_batch(device)
