"""On CUDA: `doctor` finds the kernels that run here, and its compiled call is right."""

from __future__ import annotations

import pytest
import torch

from unisparse_flex.block_masks.kernels import operator
from unisparse_flex.doctor import Status, examine
from unisparse_flex.doctor.compile_check import NAME

pytestmark = pytest.mark.gpu


def test_this_machine_has_no_problem_and_its_kernels_are_named() -> None:
    found = {finding.name: finding for finding in examine().findings}
    assert found[NAME].status is Status.OK, found[NAME].detail
    assert "FlexAttention" in found["backend"].detail
    assert "C++ compiler" not in found
    capable = torch.cuda.get_device_capability() >= operator.LEAST_CAPABILITY
    assert ("Triton scores" in found["selection kernels"].detail) == capable
