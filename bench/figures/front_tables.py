"""The tables of the front page and of the pages beside it, from files in bench/results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from unisparse_flex.block_masks.selectors import QUALITIES
from unisparse_flex.passes.calls import decode_selector

from .. import markdown
from ..cost_decision import is_default, is_prompt
from .curves import place_of
from .front import (
    HEADS,
    NAMES,
    QUALITY,
    RANDOM,
    REAL,
    SETTINGS,
    SPEED,
    gpu_of,
    load,
    quality_points,
    real_prompts,
    span,
)
from .speed_plots import curves

TEXTS = ("prose", "code")
OURS = "unisparse-default"
# Those that the paper claims to be better than, then others.
CLAIMED = ("xattention", "flexprefill", "minference")
RIVALS = (*CLAIMED, "flashprefill", "streamingllm", "unisparse-paper")
TASKS = "quality-smollm2-8192-tasks.json"
PREFILL = "prefill-cuda-sm90-default.json"
MASKED = "masked-cuda-sm90-models.json"
DECISIONS = "cost-decision-cuda-sm90.json"
FOUR = "distributed-cuda-sm90-x4.json"
LENGTHS = (32768, 131072)
FORCED = (0.35, 0.1)
GEMMA, SMOLLM2 = "command-speed-gemma3-270m-cuda.json", "command-speed-smollm2-cuda.json"
WINDOWS = "command-speed-gemma3-270m-windows-cuda.json"
COVERAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
# What the modes of docs/coverage.md are called at the head of a column.
MODES = {
    "forward": "eager",
    "compiled forward": "compiled",
    "forward, right padding": "right padding",
    "forward, left padding": "left padding",
    "compiled forward, right padding": "compiled, padded",
    "generate, DynamicCache": "generate",
    "generate, StaticCache": "static cache",
    "generate, padded batch": "padded batch",
    "beam search": "beam search",
    "chunked prefill": "chunked prefill",
    "export": "export",
}


def dial_table() -> str:
    """What each word of the dial keeps and costs, on two models and two texts."""
    columns = {"quality": '`"{}"`', "threshold": "{:g}"}
    cells: dict[str, list[str | None]] = {word: [] for word in QUALITIES}
    for name, title in QUALITY.items():
        result = load(name)
        for text in TEXTS:
            columns[f"{title.replace(' tokens', '')}, {text}"] = "{}"
            points = quality_points(result, OURS, text)
            for word, threshold in QUALITIES.items():
                cells[word].append(_point_of(points, threshold))
    return _page([columns, [[word, QUALITIES[word], *cells[word]] for word in QUALITIES]])


def claims_table() -> str:
    """What the paper claims beside what is measured here."""
    rows = [_accuracy(), *_speed_claims(), *_rivals()]
    return _with_files(("the paper", "here", "measured on"), rows)


def speed_table() -> str:
    """Times of attention and of whole models on GPUs, each line with what it was measured on."""
    heads = ("measured", "GPU", "tokens", "weights: kept", "over dense")
    return _with_files(heads, [*_attention_rows(), *_model_rows(), *_losing_rows()])


def gain_list() -> str:
    """How much faster, in three lines: those of `speed_table` that matter most."""
    result, real = load(SPEED), real_prompts()
    filled, wide = real["llama3-8b"], real["gemma3-270m"]
    lines = [
        f"**How much faster?** On an {gpu_of(result)} at the default setting, choosing the blocks "
        "included, over the fastest dense kernel:",
        "",
        f"- attention on real prompts: {_times(filled)} with SmolLM2's queries and keys in heads "
        f"of Llama-3.1-8B's shape ({filled[0]['tokens']} tokens, "
        f"{span(row['density'] for row in filled)} of the blocks kept), {_times(wide)} with the "
        f"wide heads of Gemma 3 270M ({wide[0]['tokens']} tokens, "
        f"{span(row['density'] for row in wide)});",
    ]
    for density, why in zip(FORCED, (", about what the default keeps of those", ""), strict=True):
        attention, tokens = _speedups(result, density), _prefills(density)
        lines.append(
            f"- on random inputs with Llama-3.1-8B's heads, {density:.0%} kept{why}: attention "
            + ", ".join(f"{attention[length]:.2f}x at {length} tokens" for length in LENGTHS)
            + "; a whole 8B model's first token "
            + ", ".join(f"{tokens[length]:.2f}x" for length in LENGTHS)
            + (";" if density != FORCED[-1] else ".")
        )
    return "\n".join(lines) + "\n"


def coverage_table() -> str:
    """A tick for every model family and mode of docs/coverage.md that runs sparse."""
    found: dict[str, dict[str, str]] = {}
    family = ""
    for line in COVERAGE.read_text().partition("## Masks")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[2].isdigit():
            family = cells[0] or family
            found.setdefault(family, {})[cells[1]] = _tick(cells[2], cells[3])
    columns = {"family": "{}", **dict.fromkeys(MODES.values(), "{}")}
    rows = [[name, *(modes.get(mode) for mode in MODES)] for name, modes in found.items()]
    return _page([columns, rows])


def _tick(sparse: str, dense: str) -> str:
    """Whether the calls of the prompt run sparse: all, some or none; decoding is dense."""
    others = [cell for cell in dense.split(", ") if not cell.endswith("FEW_QUERIES")]
    if sparse == "0":
        return "no"
    return "✓" if others in ([], ["0"]) else "in part"


def _point_of(points: Sequence[tuple[float, float, str]], threshold: float) -> str | None:
    for density, kl, setting in points:
        if getattr(decode_selector(setting), "threshold", None) == threshold:
            return f"{density:.0%}, KL {kl:.3f}"
    return None


def _accuracy() -> list[str]:
    rows = [row for row in load(TASKS)["rows"] if "task_scores" in row]
    [row] = [row for row in rows if row["selector"] == OURS and _is_default(row["parameters"])]
    scores, dense = row["task_scores"], row["dense_scores"]
    parts = [scores[task] / dense[task] for task in scores]
    ratio = mean(scores.values()) / mean(dense.values())
    ratios = [
        _mean_row(result, text)["perplexity_ratio"]
        for result in map(load, QUALITY)
        for text in TEXTS
    ]
    return [
        "at least 99% of full attention's accuracy",
        f"{ratio:.0%} on {len(parts)} needle tasks ({min(parts):.0%} to {max(parts):.0%} by task), "
        f"perplexity {min(ratios):.3f} to {max(ratios):.3f} times dense's",
        f"SmolLM2-135M at 8192, {row['samples']} samples a task; perplexity also Gemma 3 270M at "
        "32768; real",
        ", ".join(map(_file, (TASKS, *QUALITY))),
    ]


def _mean_row(result: dict[str, Any], text: str) -> dict[str, float]:
    rows = [
        row
        for row in result["rows"]
        if row["selector"] == OURS and row.get("text") == text and _is_default(row["parameters"])
    ]
    return {"perplexity_ratio": mean(row["perplexity_ratio"] for row in rows)}


def _is_default(setting: str) -> bool:
    return getattr(decode_selector(setting), "threshold", None) == QUALITIES["balanced"]


def _speed_claims() -> Iterator[list[str]]:
    for name, rows in real_prompts().items():
        flash = _ends([row["flash_speedup"] for row in rows])
        yield [
            "attention up to 2.61x as fast as FlashAttention" if name == next(iter(HEADS)) else "",
            f"{flash} over PyTorch's FlashAttention 2, {_times(rows)} over the fastest dense "
            "kernel",
            f"{HEADS[name][0]} at {rows[0]['tokens']}, {gpu_of(load(REAL))}; real, "
            f"{span(row['density'] for row in rows)} kept",
            _file(REAL),
        ]
    result = load(SPEED)
    forced = {density: _speedups(result, density)[LENGTHS[1]] for density in FORCED}
    yield [
        "",
        " and ".join(f"{x:.2f}x at {density:.0%}" for density, x in forced.items())
        + " over the fastest dense kernel",
        f"Llama-3.1-8B's heads at {LENGTHS[1]}, {gpu_of(result)}; random, forced",
        _file(SPEED),
    ]


def _times(rows: Sequence[dict[str, Any]]) -> str:
    return _ends([row["speedup"] for row in rows])


def _ends(speedups: Sequence[float]) -> str:
    """From the least to the most."""
    return " to ".join(f"{end:.2f}x" for end in (min(speedups), max(speedups)))


def _rivals() -> Iterator[list[str]]:
    claim = "more accurate at less cost than XAttention, FlexPrefill and MInference"
    for name, title in QUALITY.items():
        result = load(name)
        for text in TEXTS:
            found = {rival: density_ratios(result, rival, text) for rival in RIVALS}
            parts = [f"{NAMES[rival]} {_span(ratios)}" for rival, ratios in found.items() if ratios]
            yield [
                claim,
                f"blocks kept over theirs, at equal KL: {', '.join(parts)}",
                f"{title.replace(' tokens', '')}, {text}; real",
                _file(name),
            ]
            claim = ""


def _span(ratios: Sequence[float]) -> str:
    ends = dict.fromkeys(f"{end:.2f}" for end in (min(ratios), max(ratios)))
    return " to ".join(ends)


def density_ratios(result: dict[str, Any], rival: str, text: str) -> list[float]:
    """Of the rival's points, the density that ours needs for their KL over theirs."""
    ours = [(density, kl) for density, kl, _ in quality_points(result, OURS, text)]
    found = []
    for density, kl, _ in quality_points(result, rival, text):
        own = place_of(ours, kl)
        if own is not None:
            found.append(own / density)
    return found


def _attention_rows() -> Iterator[list[str]]:
    gpu = gpu_of(load(REAL))
    for name, rows in real_prompts().items():
        left = ", dense unless `min_length=0`" if rows[0]["decision"] == "dense" else ""
        yield [
            f"attention, {HEADS[name][0]}, all {rows[0]['layers']} calls{left}",
            gpu,
            str(rows[0]["tokens"]),
            "real, free: "
            + ", ".join(f"{row['density']:.0%} ({row['text']})" for row in reversed(rows)),
            ", ".join(f"{row['speedup']:.2f}x" for row in reversed(rows)),
            _file(REAL),
        ]
    result = load(SPEED)
    for density in FORCED:
        speedups = _speedups(result, density)
        yield [
            "attention, Llama-3.1-8B's heads",
            gpu_of(result),
            ", ".join(map(str, LENGTHS)),
            f"random, forced: {density:.0%}",
            ", ".join(f"{speedups[length]:.2f}x" for length in LENGTHS),
            _file(SPEED),
        ]


def _speedups(result: dict[str, Any], density: float | None) -> dict[int, float]:
    [curve] = [each for each in curves(result, RANDOM, SETTINGS) if each.density == density]
    return dict(curve.points)


def _prefills(density: float) -> dict[int, float]:
    """How much earlier the first token of the whole model comes, by tokens."""
    rows = [row for row in load(PREFILL)["rows"] if row["variant"] == "sparse"]
    return {row["tokens"]: row["speedup"] for row in rows if row["density"] == density}


def _losing_rows() -> Iterator[list[str]]:
    """The two prompts that the default slows down most where the cost model lets it."""
    result = load(DECISIONS)
    rows = [row for row in result["rows"] if not row["layers"] and is_prompt(row)]
    rows = [row for row in rows if is_default(row) and row["decision"] == "sparse"]
    worst = sorted(rows, key=lambda row: row["ratio"], reverse=True)[:2]
    yield [
        "attention, Llama-3.1-8B's heads, launched from Python, no FlashAttention-4",
        gpu_of(result),
        ", ".join(str(row["tokens"]) for row in worst),
        "random, free: " + ", ".join(f"{row['density']:.0%}" for row in worst),
        ", ".join(f"{1 / row['ratio']:.2f}x" for row in worst),
        _file(DECISIONS),
    ]


def _command_rows() -> Iterator[list[str]]:
    """First tokens of whole models with real weights, as the command `speed` times them."""
    for name, title in (
        (SMOLLM2, "first token, SmolLM2-135M: every call stays dense"),
        (GEMMA, "first token, Gemma 3 270M: its windows need no mask tensor"),
        (WINDOWS, "the same, its other layers dense"),
    ):
        result = load(name)
        [row] = [row for row in result["rows"] if row["run"] == "sparse compiled"]
        kept = "all" if row["density"] in (None, 1.0) else f"{row['density']:.0%}"
        yield [
            title,
            str(result["device"]["name"]).removeprefix("NVIDIA "),
            str(row["tokens"]),
            f"real, free: {kept}",
            f"{row['speedup']:.2f}x",
            _file(name),
        ]


def _model_rows() -> Iterator[list[str]]:
    yield from _command_rows()
    for density in FORCED:
        speedups = _prefills(density)
        yield [
            "first token, Llama-3.1-8B's shape",
            gpu_of(load(PREFILL)),
            ", ".join(map(str, speedups)),
            f"random, forced: {density:.0%}",
            ", ".join(f"{speedup:.2f}x" for speedup in speedups.values()),
            _file(PREFILL),
        ]
    cases = [row for row in load(MASKED)["rows"] if row.get("case") == "none" and "ms" in row]
    times = {(row["mode"], row["variant"]): row for row in cases}
    free = times["eager", "default"]
    yield [
        "the same, 4 layers, uncompiled",
        gpu_of(load(MASKED)),
        str(free["tokens"]),
        f"random, free: {free['density']:.0%}",
        f"{times['eager', 'dense']['ms'] / free['ms']:.2f}x",
        _file(MASKED),
    ]
    model = [row for row in load(FOUR)["rows"] if row["part"] == "context_model" and "ms" in row]
    seconds = {row["variant"]: row["ms"] / 1e3 for row in model}
    yield [
        f"the same: {seconds['sparse']:.0f} s, not {seconds['dense']:.0f} s",
        f"four {gpu_of(load(FOUR))}",
        str(model[0]["tokens"]),
        "random, forced: 10%",
        f"{seconds['dense'] / seconds['sparse']:.2f}x",
        _file(FOUR),
    ]


def _with_files(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, and below it which files each line is from: the last cell of a row."""
    lines: dict[str, list[int]] = {}
    for number, row in enumerate(rows, 1):
        lines.setdefault(row[-1], []).append(number)
    named = [f"{files} (line {_numbers(found)})" for files, found in lines.items()]
    table = markdown.table(dict.fromkeys(heads, "{}"), [row[:-1] for row in rows])
    return f"{table}\n\nFrom `bench/results`: {'; '.join(named)}.\n"


def _numbers(lines: Sequence[int]) -> str:
    first, last = lines[0], lines[-1]
    return f"{first}" if first == last else f"{first} to {last}"


def _file(name: str) -> str:
    return f"`{name.removesuffix('.json')}`"


def _page(table: Sequence[Any]) -> str:
    columns, rows = table
    return markdown.table(columns, rows) + "\n"
