"""Training tests use one thread: their images are so small that a second one only waits."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_fixed_conditions: None) -> None:
    torch.set_num_threads(1)
