"""``unisparse-flex speed MODEL``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..command_line import CommandLine
from ..nearly_all import NEARLY_ALL
from ..progress import Progress
from ..shares import say_share, say_tenths
from ..wrapping import wrap
from . import PROGRAM
from .arguments import typed_line
from .choices import TEXT_NAMES
from .failures import failures
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
    repeats_option,
    selector_of_command,
    shorten_end,
    split_outside_brackets,
    write_explain,
    write_results,
)
from .options import min_length_option, text_option, with_options

if TYPE_CHECKING:
    from ..evaluation import LoadedModel, LoadedRival

# `evaluation.RIVALS`, which needs torch.
RIVALS = (
    *("minference", "flex_prefill", "xattn", "flash_prefill", "spas_sage_attn", "flashinfer"),
)
REPEATS = {"cuda": 5, "cpu": 3}
# Where a difference cannot be told from noise, at least so many.
MORE_REPEATS = 10
SCOPES = ("layers", "model")
# Slowest over fastest of repeats, above which the machine was not idle.
MOST_SCATTER = 1.5
FOREIGN_RATES = (
    f"The cost model, which expected a gain, has another machine's rates: {PROGRAM} doctor "
    "--measure takes this one's."
)
FIRST_NOTE = (
    "first token: from the prompt to the logits of its last token, without a cache; the ways take "
    "turns, after two calls each that warm up. first call: the first of them, compilation "
    "included; a warm compilation cache makes it short."
)
COLUMNS_NOTE = (
    "over dense: the fastest dense run's time over this one's, in brackets where that cannot be "
    "told from noise: repeats of the two overlap, there is one of each, or a gain comes with at "
    f"least {NEARLY_ALL:.1%} of the blocks where dense attention reads no mask tensor that sparse "
    "attention does without. density: kept over visible blocks, "
    "mean over the calls that could be sparse, a dense one counted as all of its blocks, but for "
    "those that keep a whole narrow window. KL: of the "
    "next-token distribution after the prompt to the first dense run's, one position whose "
    "own block of rows is read densely; {quality} judges many."
)
RIVALS_NOTE = (
    "Packages of other work run with the settings that their authors publish, in layers compiled "
    "around them; how far their attention is off is the relative root mean square error to dense "
    "attention on the same tensors, mean over the calls."
)
INTERRUPTED = "Interrupted: times are of the repeats that were finished, and of no longer prompt."
DENSE_NOTE = (
    "Calls stay dense where the cost model predicts that to be faster; --min-length 0 makes every "
    "call sparse that can be."
)


def against_argument(_: click.Context, __: click.Parameter, text: str) -> tuple[str, ...]:
    """Packages of other work, by the names of their modules."""
    names = split_outside_brackets(text)
    for name in names:
        if name not in RIVALS:
            raise click.UsageError(f"--against must be of {', '.join(RIVALS)}, got {name!r}")
    return tuple(names)


@click.command(
    cls=KeepsCommand,
    epilog=f"""\b
Examples:
  {PROGRAM} speed smollm2 --lengths 4096,8192
  {PROGRAM} speed ./my-model --text a.txt --quality fast,balanced""",
)
@model_argument_of_command
@with_options(
    text_option,
    lengths_option,
    click.option(
        "--quality",
        default="balanced",
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
        help=f"Packages of other work that are installed here, to run the model's attention by: "
        f"{', '.join(RIVALS)}.",
    ),
    click.option(
        "--compile",
        "compile_scope",
        type=click.Choice(SCOPES),
        default="layers",
        show_default=True,
        help="Compile each layer by itself, or the model as a whole, for which Hugging Face's "
        "models build a mask tensor.",
    ),
    repeats_option(
        "Timed calls of each way, of which the median counts.  [default: 5 on CUDA, 3 on the CPU]"
    ),
    min_length_option(),
    *PLACE_OPTIONS,
    *OUTPUT_OPTIONS,
)
@click.pass_obj
def speed(
    command: list[str],
    /,
    model: str,
    text: str,
    lengths: tuple[int, ...],
    quality: tuple[str, ...],
    selector: str | None,
    against: tuple[str, ...],
    compile_scope: Any,
    repeats: int | None,
    min_length: int | None,
    allow_download: bool,
    device: str | None,
    dense_layers: tuple[int, ...],
    backend: str,
    as_json: bool,
    output: Path | None,
    html: Path | None,
    quiet: bool,
) -> int:
    """Time the first token of MODEL: dense eager, dense compiled and sparse compiled.

    With --against also by packages of other work. Exits with 1 where no way could be timed.

    On a CPU it takes minutes: two ways are compiled, and by default the prompt is read 15 times
    (twice to warm up each of the three ways, then --repeats times). Shorter --lengths or
    --repeats 1 take less; Ctrl-C prints what was timed so far.
    """
    check_before_loading(
        model, lengths, [text], layers=dense_layers, device=device, backend=backend
    )
    dial = create_dial(quality, selector)
    from ..clock import CpuWatch
    from ..evaluation import Sparsity, SpeedInterrupted, measure_speed
    from ..passes.decision import find_rates
    from ..reports import render_speed
    from .models import load_model
    from .saved import merge_saved

    contents = read_texts([text], lengths)
    found_rivals, rivals = find_rivals(against)
    rows: list[dict[str, Any]] = []
    watch = CpuWatch()
    with Progress("speed", shown=not quiet) as progress:
        progress.show(f"load {model}")
        loaded = load_model(model, allow_download=allow_download, device=device)
        given: Any = {"min_length": min_length, "dense_layers": dense_layers, "backend": backend}
        merged = merge_saved(loaded.model, device=device, **given)
        settings, sparsity = merged.dial(dial), Sparsity(**merged.sparsity)
        check_calibrations(loaded, settings, sparsity)
        prompts = create_prompts(loaded, contents, lengths)
        turns = REPEATS[loaded.device.type] if repeats is None else repeats
        progress.total = len(prompts) * (2 + len(settings) + len(rivals)) * (2 + turns)
        interrupted: list[str] = []
        for prompt in prompts:
            try:
                with failures(f"time {model}"):
                    found = measure_speed(
                        loaded,
                        prompt,
                        settings,
                        compile_scope=compile_scope,
                        repeats=turns,
                        sparsity=sparsity,
                        rivals=rivals,
                        show=progress.advance,
                        watch=watch,
                    )
            except SpeedInterrupted as interruption:
                found = interruption.rows
                interrupted = [INTERRUPTED]
            rows += [row.to_json() for row in found]
            if interrupted:
                break
    line = typed_line(model)
    any_timed = any(row["ms"] is not None for row in rows)
    if interrupted and not any_timed:
        raise KeyboardInterrupt
    add_speedups(rows, masked=compile_scope == "model")

    def longer() -> int | None:
        return find_longer(loaded, text, contents[text], prompts[-1].tokens)

    by_cost = merged.sparsity.get("min_length") is None
    foreign = by_cost and bool(find_rates(loaded.device, loaded.dtype).way_out)
    busy = watch.say_busy(loaded.device)
    values = describe_run(command, "speed", model, loaded) | {
        "settings": {
            "text": text,
            "lengths": [prompt.tokens for prompt in prompts],
            "quality": list(settings),
            "selector": selector,
            "source": merged.source,
            "compile": compile_scope,
            "repeats": turns,
            **merged.sparsity,
        },
        "selectors": describe_all(settings, prompts[-1].tokens),
        "rows": rows,
        "against": found_rivals,
        "verdict": [*interrupted, *say_verdict(rows, line, selector, longer, foreign=foreign)],
        "notes": [
            *([busy] if busy is not None else []),
            FIRST_NOTE,
            COLUMNS_NOTE.format(quality=line.write("quality")),
            *([RIVALS_NOTE] if rivals else []),
            *([DENSE_NOTE] if merged.min_length is None else []),
        ],
    }
    write_results(
        values,
        format_speed(values),
        render_speed(values) if html else None,
        as_json=as_json,
        output=output,
        html=html,
        quiet=quiet,
    )
    if interrupted:
        raise KeyboardInterrupt
    return 0 if any_timed else 1


def add_speedups(rows: Sequence[dict[str, Any]], *, masked: bool = False) -> None:
    """Puts the fastest dense run's time over each row's own into the row, and if that says a thing.

    ``told_apart`` is ``None`` of dense runs and where there is no ratio.

    Args:
        rows: Of `measure_speed`.
        masked: Whether the compiled dense model reads a mask tensor in every call.
    """
    for row in rows:
        dense = [
            other
            for other in rows
            if other["tokens"] == row["tokens"] and other["setting"] is None and other["ms"]
        ]
        fastest = min(dense, key=lambda other: float(other["ms"]), default=None)
        row["speedup"] = fastest["ms"] / row["ms"] if fastest and row["ms"] else None
        known = fastest is not None and row["speedup"] is not None and row["setting"] is not None
        row["told_apart"] = _is_told_apart(row, fastest, masked) if known and fastest else None


def _is_told_apart(row: dict[str, Any], dense: dict[str, Any], masked: bool) -> bool:
    """Whether a run differs from a dense one by more than repeats of either differ."""
    own, other = row["times_ms"], dense["times_ms"]
    if min(len(own), len(other)) < 2:
        return False
    if row["speedup"] > 1.0:
        # What keeps every block computes what dense attention does, and selects besides; but a
        # mask tensor costs dense attention its fast kernels.
        drops = row["density"] is None or row["density"] < NEARLY_ALL
        has_cause = masked or row["windows"] > 0 or (row["sparse_calls"] > 0 and drops)
        return has_cause and max(own) < min(other)
    return min(own) > max(other)


def find_rivals(names: Sequence[str]) -> tuple[list[dict[str, Any]], list[LoadedRival]]:
    """Packages of other work: what the JSON says of each, and those that can be run."""
    from ..evaluation import RIVALS as ADAPTERS
    from ..evaluation import load_rival

    said, found = [], []
    for name in names:
        row: dict[str, Any] = {"name": name, "importable": True, "version": None, "settings": None}
        try:
            rival = load_rival(name)
        except Exception as error:  # whatever a package does where it is imported
            row |= {"importable": False, "status": f"not run: {shorten_end(str(error), 200)}"}
        else:
            note = ADAPTERS[name].note
            row |= {"version": rival.version, "settings": dict(rival.settings)}
            row["status"] = "run" + (f": {note}" if note else "")
            found.append(rival)
        said.append(row)
    return said, found


def say_verdict(
    rows: Sequence[dict[str, Any]],
    line: CommandLine,
    selector: str | None = None,
    longer: Callable[[], int | None] = lambda: None,
    *,
    foreign: bool = False,
) -> list[str]:
    """A sentence for each setting at the longest length.

    Args:
        rows: Of `measure_speed`, with their speedups.
        line: What commands in the sentences go on with.
        selector: Of ``--selector``.
        longer: Tokens of a longer prompt that could be read; ``None`` where none could.
        foreign: Whether the cost model decided, by another machine's rates.
    """
    longest = max(row["tokens"] for row in rows)
    sentences = []
    noise: list[dict[str, Any]] = []
    for row in rows:
        if row["tokens"] != longest or row["setting"] is None:
            continue
        start = f"At {longest} tokens {row['setting']}"
        explain = write_explain(line, row["setting"], selector, longest)
        if row["error"] is not None:
            sentences.append(f"{start} could not be timed: {row['error']}")
        elif not row["sparse_calls"]:
            sentences.append(f"{start} leaves every attention call dense; {explain} says why.")
            if row["told_apart"] and row["speedup"] > 1.0:
                sentences.append(
                    f"It {say_speed(row['speedup'])} the fastest dense run all the same, without "
                    "the mask tensor that dense attention reads there."
                )
        elif row["output_error"] is not None:
            speed = f"takes {row['ms']:.0f} ms"
            if row["speedup"] is not None:
                speed = _compare(row)
            sentences.append(f"{start} {speed}, its attention {_off(row)}.")
        elif row["speedup"] is None:
            sentences.append(f"{start} takes {row['ms']:.0f} ms; no dense run could be timed.")
        else:
            slower = row["told_apart"] and row["speedup"] < 1.0
            # More repeats do not make a gain of what drops nothing.
            all_kept = not row["told_apart"] and row["density"] >= NEARLY_ALL
            sentences.append(
                f"{start} {_compare(row)}, with {say_share(row['density'])} of the blocks"
                + (f"; {explain} says why." if slower or all_kept else ".")
            )
            if slower and foreign:
                sentences.append(FOREIGN_RATES)
            if row["windows"] and row["told_apart"] and row["speedup"] > 1.0:
                sentences.append(
                    f"Of {row['sparse_calls']} sparse calls {row['windows']} keep a whole sliding "
                    "window and drop nothing: those gain where dense attention reads a mask tensor."
                )
            noise += [] if row["told_apart"] or all_kept else [row]
    if noise:
        repeats = max(len(row["times_ms"]) for row in noise)
        sentences.append(_say_how_to_tell(line, longest, repeats, longer()))
    scatter = max(
        (max(row["times_ms"]) / min(row["times_ms"]) for row in rows if row["times_ms"]),
        default=1.0,
    )
    if scatter > MOST_SCATTER:
        sentences.append(
            f"Times of one way differ by up to {scatter:.1f} times: something else ran here, or "
            "the prompt is short; do not rely on them."
        )
    return sentences


def _say_how_to_tell(line: CommandLine, tokens: int, repeats: int, longer: int | None) -> str:
    """What to run where a difference cannot be told from noise.

    Args:
        line: The options of this run.
        tokens: Of the prompt.
        repeats: That were timed.
        longer: Tokens of a longer prompt, if there could be one.
    """
    more = line.write(
        "speed",
        tokens=str(tokens) if "--tokens" in line.options else None,
        repeats=str(max(MORE_REPEATS, 2 * repeats)),
    )
    said = f"{more} repeats more often, which tells smaller differences from noise"
    if longer is not None:
        said += (
            f"; {line.write('speed', tokens=str(longer))} reads a longer prompt, of which sparse "
            "attention gains more"
        )
    return f"{said}."


def find_longer(loaded: LoadedModel, text: str, content: str, tokens: int) -> int | None:
    """Twice the tokens, or the model's context if that is less; ``None`` where that is no more.

    Args:
        loaded: The model.
        text: A file, or the name of an installed text, all of which are long.
        content: Of the file.
        tokens: Of the longest prompt so far.
    """
    from ..evaluation import encode_start
    from .models import context_length

    longer = min(2 * tokens, context_length(loaded.model) or 2 * tokens)
    if text not in TEXT_NAMES:
        longer = len(encode_start(loaded.tokenizer, content, longer))
    return longer if longer > tokens else None


def _off(row: dict[str, Any]) -> str:
    """How far the attention of other work is off."""
    mean, worst = row["output_error"], row["worst_output_error"]
    return f"{mean:.1%} off dense attention, at worst {worst:.1%}"


def _compare(row: dict[str, Any]) -> str:
    if not row["told_apart"]:
        return "shows no difference to the fastest dense run that can be told from noise"
    return f"{say_speed(row['speedup'])} the fastest dense run"


def say_speed(speedup: float) -> str:
    """How a run compares with another, before the other's name."""
    if speedup >= 1.0:
        return f"brings the first token {speedup:.2f} times as fast as"
    return f"is slower: its first token takes {1 / speedup:.2f} times as long as that of"


def format_speed(values: dict[str, Any]) -> str:
    """The tables for a terminal of 80 columns."""
    lines = head_lines(values)
    for tokens in dict.fromkeys(row["tokens"] for row in values["rows"]):
        lines += ["", f"{tokens} tokens"]
        lines.append(_cells("run", "ms", "over dense", "density", "KL", "first call"))
        for row in values["rows"]:
            if row["tokens"] != tokens:
                continue
            noise = row["told_apart"] is False
            lines.append(
                _cells(
                    row["name"],
                    _number(row["ms"], "{:.1f}"),
                    _number(row["speedup"], "({:.2f}x)" if noise else "{:.2f}x"),
                    "–" if row["density"] is None else say_tenths(row["density"]),
                    _number(row["kl_last_token"], "{:.4f}"),
                    _number(row["first_call_seconds"], "{:.1f} s"),
                )
            )
            if row["output_error"] is not None:
                lines.append(f"    attention {_off(row)}")
            if row["error"] is not None:
                lines.append(wrap(f"    failed: {row['error']}", COLUMNS, indent=4))
    lines += [""]
    for each in values["against"]:
        known = f" {each['version']}" if each["version"] else ""
        lines.append(wrap(f"{each['name']}{known}: {each['status']}", COLUMNS))
    lines += [wrap(sentence, COLUMNS) for sentence in values["verdict"]]
    lines += [""]
    lines += [wrap(note, COLUMNS) for note in values["notes"]]
    return "\n".join(lines)


def _cells(name: str, *numbers: str) -> str:
    widths = (9, 11, 8, 8, 11)
    cells = (f"{number:>{width}}" for number, width in zip(numbers, widths, strict=True))
    return f"  {shorten_end(name, 30):30}" + "".join(cells)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
