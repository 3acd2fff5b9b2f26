import os
from dataclasses import replace

import hypothesis
import pytest
import torch

from unisparse_flex.passes.decision import RATES, cost_forecast, found_rates

# Compilation makes the first example of a test far slower than the rest, so there is no deadline.
hypothesis.settings.register_profile("local", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
# Processes that test side by side share the cores.
PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, torch.get_num_threads() // PROCESSES))
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


# What torch and FlashAttention-4 say of themselves on every card of a kind.
CUDA_WARNINGS = (
    "ignore:TensorFloat32 tensor cores",
    r"ignore:\s*Online softmax",
    "ignore:The CUDA Graph is empty",
    "ignore:TypedStorage is deprecated",
    "ignore:.* is deprecated, use:DeprecationWarning",
)


@pytest.fixture(scope="session", autouse=True)
def shipped_rates():
    """Decisions by the rates that the project ships, whatever was measured on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(found_rates, "load_stored", lambda *_: ())
        yield


@pytest.fixture
def slow_kernels(monkeypatch):
    """Rates by which a call must drop three tenths of its blocks to gain."""
    slow = tuple(
        replace(
            rates,
            sparse_flop_rate=0.7 * rates.dense_flop_rate,
            sparse_exp_rate=0.7 * rates.dense_exp_rate,
        )
        for rates in RATES
    )
    monkeypatch.setattr(found_rates, "RATES", slow)
    caches = (found_rates._find_rates, cost_forecast.forecast, cost_forecast._break_even_length)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-coverage",
        action="store_true",
        help="write docs/coverage.md as the tests find it",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if not item.get_closest_marker("gpu"):
            continue
        if not torch.cuda.is_available():
            item.add_marker(skip)
        for warning in CUDA_WARNINGS:
            item.add_marker(pytest.mark.filterwarnings(warning))
