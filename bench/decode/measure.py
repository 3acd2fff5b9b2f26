"""Quality of decoding that reads a part of the cache, on real models and texts.

python -m bench.decode [--model smollm2] [--tokens 8192] [--texts prose,code] [--seeds 0,1]
    [--summaries unisparse,quest,...] [--units 32,128] [--shares 0.1,...] [--top-ps 0.95,...]
    [--prefills dense,sparse] [--tasks niah_single,...] [--samples 50] [--output FILE]
python -m bench.decode --model gemma3-270m --weights FILE.gguf --tokens 32768

The tokens after a prompt are decoded with teacher forcing: their KL is to prefill and decoding
that are both dense. Every row keeps units of keys for itself, one choice for the query heads of a
key head, by the library's rule whatever the summary. Tasks are those samples that dense decoding
solves. The last rows of a prompt are dense in either prefill. `bench/decode/summaries.py` says
what summaries are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from unisparse_flex.block_masks.pages import DecodeSelector
from unisparse_flex.evaluation import TASK_NAMES, TEXT_NAMES

from ..quality import MODELS, Subject, load
from ..record import FOLDER, Record, guarded, numbers
from .answers import Exam
from .attention import Setting
from .continuation import PREFILLS, Continuation
from .summaries import SUMMARIES

SHARES = (0.05, 0.1, 0.2)
TOP_PS = (0.8, 0.9, 0.95, 0.98)
Judge = Callable[[Setting], dict[str, Any]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=tuple(MODELS), default="smollm2")
    parser.add_argument("--weights", type=Path, help="a GGUF file, where no package holds them")
    parser.add_argument("--tokens", type=int, default=8192, help="of prompt and further tokens")
    parser.add_argument("--decoded", type=int, default=128, help="further tokens")
    parser.add_argument("--texts", default="prose,code,topics", help=f"of {','.join(TEXT_NAMES)}")
    parser.add_argument("--seeds", type=numbers(int), default=(0,), help="excerpts of each text")
    parser.add_argument("--prefills", default="dense", help=f"of {','.join(PREFILLS)}")
    parser.add_argument("--summaries", default=",".join(SUMMARIES))
    parser.add_argument("--units", type=numbers(int), default=(32, 64, 128))
    parser.add_argument("--shares", type=numbers(float), default=SHARES, help="for the first unit")
    parser.add_argument("--top-ps", type=numbers(float), default=(), help="for the first unit")
    parser.add_argument("--further", type=numbers(float), default=(0.1,), help="for other units")
    parser.add_argument(
        "--prompt-share",
        type=float,
        default=DecodeSelector().prompt_share,
        help="of the kept keys, that the end of the prompt chooses",
    )
    parser.add_argument("--tasks", default="", help=f"of {','.join(TASK_NAMES)}")
    parser.add_argument("--samples", type=int, default=50, help="samples of each task")
    parser.add_argument("--answer-tokens", type=int, help="of the longest answer, or the task's")
    parser.add_argument("--max-seconds", type=float, default=3000.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    try:
        settings = list_settings(
            options.summaries.split(","),
            options.units,
            options.shares,
            options.top_ps,
            options.further,
            options.prompt_share,
        )
        subject = load(options.model, options.weights)
    except ValueError as error:
        parser.error(str(error))
    loaded = subject.loaded
    default = FOLDER / f"decode-{subject.name}-{options.tokens}-{loaded.device.type}.json"
    record = Record.create(
        "bench.decode",
        loaded.device.type,
        options.output or default,
        options.max_seconds,
        model=subject.name,
        tokens=options.tokens,
        decoded=options.decoded,
        head_dim=loaded.model.config.head_dim,
        group=loaded.model.config.num_attention_heads // loaded.model.config.num_key_value_heads,
        dtype=str(loaded.dtype).removeprefix("torch."),
    )
    with record.stopping():
        for labels, judge in _judges(subject, options):
            for setting in settings:
                if record.stop_if_over():
                    return
                row = describe_setting(setting, loaded.model.config.head_dim) | labels
                record.add(row | (guarded(row, "judge", partial(judge, setting)) or {}))


def list_settings(
    summaries: Sequence[str],
    units: Sequence[int],
    shares: Sequence[float],
    top_ps: Sequence[float],
    further: Sequence[float],
    prompt_share: float = DecodeSelector().prompt_share,
) -> list[Setting]:
    """Dense decoding, and the points of every summary.

    Args:
        summaries: Of `SUMMARIES`.
        units: Keys of a unit.
        shares: Of the keys, for the first unit.
        top_ps: For the first unit.
        further: Shares for the other units.
        prompt_share: Of the kept keys, pinned by summaries that pin.

    Raises:
        ValueError: An unknown summary.
    """
    unknown = sorted(set(summaries) - set(SUMMARIES))
    if unknown:
        raise ValueError(f"summaries must be of {', '.join(SUMMARIES)}, got {', '.join(unknown)}")
    first, *others = units
    rules: list[dict[str, Any]] = [{"unit": first, "share": share} for share in shares]
    rules += [{"unit": first, "top_p": top_p} for top_p in top_ps]
    rules += [{"unit": unit, "share": share} for unit in others for share in further]
    options: dict[str, Any] = {"min_keys": 0, "prompt_share": prompt_share}
    selectors = [DecodeSelector(**options, **rule) for rule in rules]
    dense = Setting(summary=None, selector=DecodeSelector())
    return [dense, *(Setting(summary=n, selector=s) for n in summaries for s in selectors)]


def describe_setting(setting: Setting, head_dim: int) -> dict[str, Any]:
    """What a row says of its setting."""
    if setting.summary is None:
        return {"summary": "dense"}
    selector = setting.selector
    return {
        "summary": setting.summary,
        "unit": selector.unit,
        "share": selector.share,
        "top_p": None if selector.share is not None else selector.top_p,
        "memory": SUMMARIES[setting.summary].memory(selector.unit, head_dim),
        "selector": selector.text,
    }


def _judges(subject: Subject, options: Any) -> Iterator[tuple[dict[str, Any], Judge]]:
    """What judges a setting: every excerpt after every prefill, then every task."""
    kinds = options.prefills.split(",")
    for text in filter(None, options.texts.split(",")):
        for seed in options.seeds:
            read = Continuation.read(
                subject,
                text,
                seed,
                tokens=options.tokens,
                decoded=options.decoded,
                kinds=kinds,
            )
            for kind in kinds:
                yield {"text": text, "seed": seed, "prefill": kind}, read[kind].judge
    for task in filter(None, options.tasks.split(",")):
        for kind in kinds:
            exam = Exam.create(
                subject,
                task,
                kind=kind,
                tokens=options.tokens,
                samples=options.samples,
                answer_tokens=options.answer_tokens,
            )
            if exam.solved:
                yield {"task": task, "prefill": kind}, exam.judge


if __name__ == "__main__":
    main()
