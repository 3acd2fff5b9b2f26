from collections.abc import Iterator

import pytest

from .interpreter import Kernels, interpreted


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    with interpreted() as copies:
        yield copies
