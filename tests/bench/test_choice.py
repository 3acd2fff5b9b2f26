"""Orders of keys, estimates and times of `bench.choice`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from bench.choice import curves, describe, estimates, orders, rounding, tasks, tiles
from bench.choice.choices import ORDERS, Choice
from bench.choice.curves import DEFAULT
from bench.choice.parts import BLOCK, Call, Part, Tile
from bench.choice.reading import Chooser, attend_window
from bench.choice.seconds import Clock, Shape
from unisparse_flex.evaluation import TaskSample
from unisparse_flex.selectors import DEFAULT_SELECTOR

TOKENS, SEGMENT = 1024, 256
SORTED = [name for name in ORDERS if not name.startswith(("heavy", "content2", "content4"))]


def make_call(tokens: int = TOKENS, width: int = 16) -> Call:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(2, 2, tokens, width, generator=draw) * 2
    key, value = torch.randn(2, 2, tokens, width, generator=draw)
    return Call(query=query, key=key, value=value, scale=width**-0.5)


def make_part(call: Call, first: int = 512) -> Part:
    return Part(query=call.query[:, :, first:], key=call.key, first=first, scale=call.scale)


def dense(call: Call) -> torch.Tensor:
    key, value = (tokens.repeat_interleave(2, 0) for tokens in (call.key, call.value))
    query = call.query.flatten(0, 1)
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=call.scale
    ).view_as(call.query)


def uncompiled_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any
) -> Any:
    return flex_attention(query, key, value, block_mask=mask)


def test_default_keeps_what_the_library_keeps() -> None:
    call, chooser = make_call(4096), Chooser()
    found = []
    chooser._apply = lambda *given: found.append(Chooser._apply(chooser, *given)) or found[-1]  # type: ignore[method-assign, func-returns-value]
    with chooser.set(Choice.parse("none/r4+p16"), DEFAULT_SELECTOR.threshold or 0.0):
        chooser.attend(call)
    kept = DEFAULT_SELECTOR.select(
        call.query.flatten(0, 1)[None], call.key[None], is_causal=True, scale=call.scale
    ).keep
    expected = kept[0].unflatten(0, (2, 2))
    for place, part in enumerate(found):
        blocks = part.shape[2]
        rows = expected[:, :, place * blocks : (place + 1) * blocks, : part.shape[-1]]
        assert torch.equal(part, rows)


@pytest.mark.parametrize(
    "name",
    [
        *(f"{name}@{SEGMENT}/r4+p16" for name in SORTED),
        "heavy1-content@512/v128x2^2",
        "heavy1-use@512+1/k128x4",
        "content4-weight,n@512/m32x4",
        "content:q@256/r4+v128x2^2",
        "natural:q@256+1/k128x4",
        "weight<1@256/r4+p16",
        "heavy128of4@512/r2+p16",
        "heavy128x1@384/r4+p16",
        "weight1?0.9@256/r4+p16#128x64",
        "none/r4+p16>r16:4~2",
        "none/r4+p16#128x64",
        "none/r2+v64x2^2#64x32",
        "content:q@512/r4+k128x2#128x64",
        "heavy1-use@512/r2+p16>r8:4#64x32",
    ],
)
def test_a_choice_that_keeps_everything_is_dense(name: str) -> None:
    call, chooser = make_call(), Chooser()
    with chooser.set(Choice.parse(name), 1e-12):
        found = chooser.attend(call)
    torch.testing.assert_close(found, dense(call), rtol=1e-4, atol=1e-5)
    # Smaller blocks hold less beyond the diagonal.
    assert 0.9 < float(chooser.densities[0]) < 1 + 1e-6


@pytest.mark.parametrize("name", [name for name in ORDERS if name != "none"])
def test_orders_hold_every_key_of_their_segments(name: str) -> None:
    kind = ORDERS[name]
    assert kind is not None
    call, segment = make_call(2048), 1024
    found = kind.order(call, segment, 0).unflatten(1, (-1, segment)).sort(-1).values
    assert torch.equal(found.flatten(1), torch.arange(2048).expand(2, -1))


def test_keys_after_the_last_whole_segment_have_no_place_in_an_order() -> None:
    kind = ORDERS["heavy128of4"]
    assert kind is not None
    found = kind.order(make_call(2560), 1024, 0)
    assert torch.equal(found.sort(-1).values, torch.arange(2048).expand(2, -1))


def test_a_row_of_every_fourth_block_is_the_last_of_it() -> None:
    assert make_part(make_call(2048), 1024).sampled(0.25).tolist() == [511, 1023]


class Letters:
    """A tokenizer of single characters."""

    eos_token_id = bos_token_id = 0

    def decode(self, ids: Any) -> str:
        return "".join(map(chr, ids))


def test_prompts_are_cut_between_needles() -> None:
    text = "magic 1234567. " + "a" * 700 + " magic 7654321. " + "b" * 700
    sample = TaskSample(
        name="niah_single",
        input_ids=torch.tensor([list(map(ord, text))]),
        answers=("7654321",),
        max_new_tokens=8,
    )
    found = tasks.cut(sample, Letters(), 1280)
    assert found.input_ids.shape == (1, 1280)
    left = Letters().decode(found.input_ids[0].tolist())
    assert left.startswith("magic 1234567. ")
    assert "magic 7654321. " in left
    with pytest.raises(ValueError, match="at most"):
        tasks.cut(sample, Letters(), 2048)


def test_all_rows_have_the_true_masses() -> None:
    part = make_part(make_call())
    found = estimates.combine([estimates.exact_rows(part, BLOCK)])
    logits = part.query @ part.key.mT[:, None] * part.scale
    hidden = torch.arange(TOKENS) > torch.arange(512, TOKENS)[:, None]
    true = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    blocks = true.unflatten(-1, (-1, BLOCK)).sum(-1).unflatten(-2, (-1, BLOCK)).mean(-2)
    torch.testing.assert_close(found, blocks)


@pytest.mark.parametrize("name", ["r4", "p16", "m32x2", "v128x4", "k128x4"])
@pytest.mark.parametrize("power", [1, 2])
def test_scores_of_rows_sum_to_one(name: str, power: int) -> None:
    choice = Choice.parse(f"none/{name}^{power}")
    found, rows = choice.score(make_part(make_call()), torch.tensor(0.01))
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2, 4))
    assert rows == choice.rows


def test_moments_are_exact_for_normal_keys() -> None:
    draw = torch.Generator().manual_seed(1)
    query = torch.randn(1, 1, BLOCK, 4, generator=draw)
    key = torch.randn(1, 200 * BLOCK, 4, generator=draw)
    key[:, : 100 * BLOCK] *= 0.1
    part = Part(query=query, key=key, first=199 * BLOCK, scale=1.0)
    size = 100 * BLOCK
    found = estimates.moments(part, rows=BLOCK, variance=True)
    blind = estimates.moments(part, rows=BLOCK, variance=False)
    true = estimates.exact_rows(part, BLOCK)
    halves = [masses[..., : size // BLOCK].sum(-1) for masses in (found, blind, true)]
    assert (halves[0] - halves[2]).abs().mean() < 0.3 * (halves[1] - halves[2]).abs().mean()


def test_refined_scores_are_exact_where_everything_is_refined() -> None:
    part = make_part(make_call())
    first = estimates.combine([estimates.pooled(part)])
    refined, share = estimates.refine(part, first, 16, torch.tensor(0.0))
    torch.testing.assert_close(refined, estimates.exact_rows(part, 16))
    assert share == 1


def test_halving_separates_what_lies_apart() -> None:
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 8, generator=draw) * 20
    labels = torch.arange(4).repeat(BLOCK)[torch.randperm(4 * BLOCK, generator=draw)]
    found = orders.halve(
        centres[labels][None] + torch.randn(1, 4 * BLOCK, 8, generator=draw), 4, BLOCK
    )
    groups = labels[found[0]].unflatten(0, (4, BLOCK))
    assert (groups == groups[:, :1]).all()


def test_windows_in_chunks_are_windows() -> None:
    call = make_call()
    query, key, value = call.query.flatten(0, 1)[None], call.key[None], call.value[None]
    found = attend_window(query, key, value, call.scale, 128)
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    expected = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=(distance >= 0) & (distance < 128),
        scale=call.scale,
        enable_gqa=True,
    )
    torch.testing.assert_close(found, expected)


def test_time_grows_with_rows_and_blocks_and_a_sorted_copy_costs() -> None:
    clock = Clock.of(Shape(q_heads=32, kv_heads=8, head_dim=128, tokens=32768))
    plain, by_content = Choice.parse("none/r4+p16"), Choice.parse("content@1024/r4+p16")
    usual = Tile()
    assert clock.choosing(plain, 4) < clock.choosing(plain, 16)
    assert clock.choosing(plain, 4) < clock.choosing(by_content, 4)
    assert clock.attending(0.1, usual) < clock.attending(0.2, usual)
    assert 0.9 < clock.attending(0.97, usual) / clock.dense < 1.6


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_blocks_of_any_size_are_causal_and_kept_as_often_as_is_said() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 512, 16, generator=draw)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    for tile in (Tile(), Tile(rows=128, keys=64), Tile(rows=64, keys=32)):
        mask, kept = tiles.random_blocks(2, 512, tile, 1.0, "cpu")
        found = uncompiled_attention(query, key, value, mask)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert 0.8 < kept <= 1
        assert tiles.random_blocks(2, 512, tile, 0.0, "cpu")[1] < 0.5


def test_attention_in_float32_is_dense_attention() -> None:
    transformers = pytest.importorskip("transformers")
    rounding.register()
    attend = transformers.AttentionInterface()[rounding.IN_FLOAT32]
    call = make_call()
    query, key, value = (
        t.flatten(0, -3)[None].bfloat16() for t in (call.query, call.key, call.value)
    )
    found, _ = attend(None, query, key, value, None, scaling=call.scale)
    assert found.dtype is torch.bfloat16
    exact = replace(call, query=query[0].float().view_as(call.query), key=key[0].float())
    expected = dense(replace(exact, value=value[0].float())).flatten(0, 1)
    torch.testing.assert_close(
        found[0].transpose(0, 1).float(), expected.bfloat16().float(), rtol=2**-7, atol=1e-3
    )


def make_result() -> dict[str, Any]:
    """Two excerpts; sorted keys need half the blocks, one of their points has one excerpt only."""
    rows = [
        {"choice": name, "threshold": t, "text": text, "seed": 0, "density": d, "kl": kl}
        for text in ("prose", "code")
        for name, part in ((DEFAULT, 1.0), ("weight1@1024/r4+p16", 0.5))
        for t, d, kl in ((0.003, 0.5 * part, 0.01), (0.006, 0.4 * part, 0.02))
    ]
    rows.append({**rows[-1], "threshold": 0.012, "kl": 0.03})
    heads = {"heads": 9, "kv_heads": 3, "head_dim": 64}
    named = {"model": "smollm2", "tokens": 8192, "judged": 1024, "device": "GPU"}
    return {
        **named,
        **heads,
        "command": ["python"],
        "rows": [{**row, "score_rows": 4.0625, "densities": [0.5, 0.3]} for row in rows],
    }


def test_curves_hold_points_of_all_excerpts_and_reach_a_kl_between_them() -> None:
    result = make_result()
    points = curves.curve(result, "weight1@1024/r4+p16")
    assert [(point.threshold, point.density) for point in points] == [(0.006, 0.2), (0.003, 0.25)]
    reached = curves.reach(points, 0.02**0.5 * 0.1)
    assert reached is not None
    assert reached.density == pytest.approx(0.225)
    assert curves.reach(points, 0.001) is None


def test_tables_compare_at_the_kl_of_the_default() -> None:
    text = describe(make_result(), "choice-x.json")
    assert "The default's KL: 0.0200." in text
    [line] = [
        line for line in text.split("\n") if line.startswith("| `weight1@1024/r4+p16` | 4.06")
    ]
    assert [cell.strip() for cell in line.split("|")][5] == "0.50"
    assert "| 0 | 0.50 | 0.50 |" in text


def test_excerpts_are_compared_one_by_one() -> None:
    result = make_result()
    result["rows"] = [row for row in result["rows"] if row["threshold"] < 0.01]
    for row in result["rows"]:
        if row["text"] == "code" and row["choice"] == DEFAULT:
            row["density"] *= 0.8
    found = curves.density_ratios(result, "weight1@1024/r4+p16", 1.0)
    assert found == pytest.approx([0.5, 0.625])


def test_several_excerpts_have_their_spread_and_true_masses_their_own_table() -> None:
    result = make_result()
    found = []
    for seed in (0, 1):
        for row in result["rows"]:
            if row["threshold"] < 0.01:
                ratio = 1.01 if seed else 0.99
                found.append({**row, "seed": seed, "perplexity_ratio": ratio})
                if row["choice"] == DEFAULT:
                    found.append({**found[-1], "choice": "none/r128", "kl": row["kl"] / 2})
    text = describe({**result, "rows": found}, "choice-x.json")
    assert "| `weight1@1024/r4+p16` | 0.500 ± 0.000 | 0.50, 0.50 | 4 |" in text
    assert "| `none/r4+p16` | 1.25 |  |" in text
    assert "| `none/r128` | 1.00 | 1.00 |" in text
    assert "| `none/r128` | 1.0000 (0.990, 1.010) | 1.0000 (0.990, 1.010) |" in text


def test_kl_of_rounding_is_told_by_excerpt() -> None:
    rows = [{"text": "code", "seed": 2, "kl": 0.0012, "perplexity_ratio": 1.0}]
    named = {"model": "smollm2", "tokens": 8192, "judged": 64, "device": "CPU"}
    text = describe({"part": "rounding", **named, "command": ["python"], "rows": rows}, "x")
    assert "| code | 2 | 0.0012 | 1.0000 |" in text


def test_an_order_in_some_layers_costs_as_much_of_its_time() -> None:
    result, name = make_result(), "weight1<1@1024/r4+p16"
    for row in result["rows"]:
        if row["choice"] != DEFAULT:
            row["choice"] = name
    reached = curves.reach(curves.curve(result, name), 0.015)
    assert reached is not None
    # Two layers, of which one is sorted.
    assert reached.sorted_share == 0.5
    clock = Clock.of(Shape(q_heads=32, kv_heads=8, head_dim=128, tokens=8192))
    none, half, all_ = (clock.choosing(Choice.parse(name), 4, share) for share in (0, 0.5, 1))
    assert half == pytest.approx((none + all_) / 2)
    assert none < all_


def test_scores_of_tasks_stand_beside_the_dense_ones_of_the_same_samples() -> None:
    rows = [
        {"task": task, "choice": choice, "threshold": None, "density": d, "scores": scores}
        for task, (dense, sparse) in {"a": ([1.0, 0.0], [1.0, 1.0]), "b": ([1.0], [0.0])}.items()
        for choice, d, scores in (("dense", 1.0, dense), (DEFAULT, 0.25, sparse))
    ]
    named = {"model": "smollm2", "tokens": 8064, "answer": 40, "device": "GPU"}
    text = describe({"part": "tasks", **named, "command": ["python"], "rows": rows}, "x")
    line = "| `none/r4+p16` |  | 0.250 | 1.000 | 0.000 | 0.667 | +0.000 ± 0.577 | 3 |"
    assert line in text


@pytest.mark.parametrize("name", ["unknown/r4", "none", "none/r4+", "none/x4"])
def test_other_names_are_no_choice(name: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        Choice.parse(name)
