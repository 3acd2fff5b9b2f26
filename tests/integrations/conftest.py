from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.integrations.generation import create
from tests.integrations.named import NAME
from unisparse_flex.integrations.transformers import register, unregister


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tensors so small that several threads are slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama() -> Iterator[Any]:
    """A tiny model under a registered name, whose rows look at few keys."""
    register(NAME)
    yield create("llama", sharpness=12)
    unregister(NAME)
