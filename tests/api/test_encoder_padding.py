"""Padded rows of torch's encoders are those of the plain module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unisparse_flex import UniSparse, explain, optimize, restore

EVERYTHING = UniSparse(block_size=16, top_p=1.0)
X = torch.randn((3, 96, 32), generator=torch.Generator().manual_seed(0))

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]


class Around(nn.Module):
    """A model of one's own around an encoder."""

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, src: Tensor, **options: Any) -> Tensor:
        out: Tensor = self.encoder(src, **options)
        return out


def create(norm: bool, **options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32) if norm else None).eval()


def padding(kind: str) -> Tensor:
    """True where a key is padding: nothing, some and most of a row, on the right or the left."""
    hidden = torch.arange(96) >= torch.tensor([[96], [70], [11]])
    if kind == "left":
        hidden = hidden.flip(1)
    if kind == "float":
        return torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    return hidden


@pytest.mark.parametrize("around", [False, True], ids=["root", "inside"])
@pytest.mark.parametrize("norm", [False, True], ids=["no norm", "norm"])
@pytest.mark.parametrize("kind", ["right", "left", "float"])
def test_padded_rows_are_those_of_the_plain_module(kind: str, norm: bool, around: bool) -> None:
    encoder = create(norm)
    model: nn.Module = Around(encoder) if around else encoder
    hidden = padding(kind)
    with torch.no_grad():
        plain = model(X, src_key_padding_mask=hidden)
        optimize(model, EVERYTHING, min_length=0)
        found = model(X, src_key_padding_mask=hidden)
        calls = explain(model, X, src_key_padding_mask=hidden).calls
        assert [call.decision for call in calls] == ["sparse", "sparse"]
        torch.testing.assert_close(found, plain)
        if kind == "right" and not norm:
            assert (found[hidden] == 0).all()
        optimize(model)
        torch.testing.assert_close(model(X, src_key_padding_mask=hidden), plain)
        restore(model)
        torch.testing.assert_close(model(X, src_key_padding_mask=hidden), plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    "case",
    ["gradients", "training", "norm_first", "no fast path", "no nested tensors", "causal mask"],
)
def test_padded_rows_stay_where_the_plain_module_computes_them(case: str) -> None:
    encoder = create(norm=False, norm_first=case == "norm_first")
    options: dict[str, Any] = {"src_key_padding_mask": padding("right")}
    if case == "training":
        encoder.train()
    if case == "no nested tensors":
        encoder.use_nested_tensor = False
    if case == "causal mask":
        options["mask"] = torch.ones(96, 96).triu(1).bool()
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(case != "no fast path")
    try:
        with torch.set_grad_enabled(case in ("gradients", "training")):
            plain = encoder(X, **options)
            found = optimize(encoder, EVERYTHING, min_length=0)(X, **options)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert (plain[padding("right")] != 0).any()
    torch.testing.assert_close(found, plain)


def test_a_compiled_encoder_has_the_rows_of_a_compiled_plain_one() -> None:
    encoder, hidden = create(norm=False), padding("right")
    with torch.no_grad():
        plain = torch.compile(encoder, backend="eager")(X, src_key_padding_mask=hidden)
        torch._dynamo.reset()
        model = optimize(encoder, EVERYTHING, min_length=0)
        found = torch.compile(model, backend="eager")(X, src_key_padding_mask=hidden)
    torch.testing.assert_close(found, plain)
