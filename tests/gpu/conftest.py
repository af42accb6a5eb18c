"""The device that these tests run on: a GPU if there is one, else the CPU with fewer members."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """ "cuda", or "cpu" if there is no GPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
