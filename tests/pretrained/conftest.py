from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from tests.support.hub_server import Hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture(scope="session")
def weights() -> dict[str, Tensor]:
    return {"w": torch.arange(20_000.0).reshape(100, 200) / 1000, "n": torch.tensor(7)}


@pytest.fixture(scope="session")
def data(weights: dict[str, Tensor]) -> bytes:
    """`weights` as a safetensors file."""
    return save(weights)
