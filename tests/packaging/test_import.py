"""Importing the library where torch lacks a private name that it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from unisparse_flex.private_names import WORKING_TORCH

ROOT = Path(__file__).parents[2]
NAME, PART = "torch._subclasses.fake_tensor", "is_fake"


def import_after(lines: str) -> str:
    """The last line of what a failing import says."""
    code = f"import torch\n{lines}\nimport unisparse_flex"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_a_torch_without_a_needed_name_is_told_which_versions_work() -> None:
    message = import_after(f"import sys, {NAME}; del sys.modules['{NAME}'].{PART}")
    assert message.startswith("ImportError: unisparse_flex needs private names that torch ")
    assert f"{NAME}.{PART}" in message
    assert message.endswith(WORKING_TORCH)


def test_another_failure_stays_what_it_is() -> None:
    message = import_after("import sys; sys.modules['sympy'] = None")
    assert "sympy" in message
    assert "private names" not in message
