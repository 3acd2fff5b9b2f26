"""On CUDA: `calibrate` reaches its target, and `optimize` runs what it found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.api.models import Transformer, create, embeddings
from unisparse_flex import UniSparse, calibrate, optimize
from unisparse_flex.passes import DenseReason
from unisparse_flex.reports import record_attention

pytestmark = pytest.mark.gpu

LADDER = tuple(
    UniSparse.paper(c_q=16, c_k=128, sampled_queries=4, threshold=t, top_p=0.4)
    for t in (0.2, 0.1, 0.05, 0.02, 0.005)
)


@pytest.mark.parametrize("options", [{}, {"per_head": True}], ids=["per layer", "per head"])
def test_recall_is_reached_and_what_was_found_runs(options: dict[str, Any]) -> None:
    x = embeddings(2048).cuda()
    model = create(Transformer).cuda()
    found = calibrate(model, [x], recall=0.9, ladder=LADDER, min_length=0, **options)
    assert found.reached >= 0.9
    optimize(model, found, min_length=0)
    with torch.no_grad(), record_attention(model) as records:
        model(x)
    # A layer that no setting of the ladder satisfies stays dense by the calibration's own word.
    assert all(r.density is not None or r.reason is DenseReason.EXCLUDED for r in records)
    assert any(r.density is not None for r in records)
