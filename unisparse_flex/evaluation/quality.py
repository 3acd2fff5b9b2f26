"""What sparse attention changes of a model's answers: one row for each text, length and setting.

Symbols: S prompt tokens, P judged positions, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..calibration import Calibration
from ..optimization import optimize, release_all
from ..selectors import Selector
from .answers import TOGETHER, Sample, score_samples
from .measure import compute_kl, compute_log_probs, compute_perplexity
from .model import LoadedModel
from .read_blocks import ReadBlocks, watch_blocks
from .ruler import TaskName, TaskSample, build_task, score

# More than any text needs for a token.
_CHARACTERS_PER_TOKEN = 64
# Whose keys and values are in memory at once while answers are generated.
_CACHED_TOKENS = 131072


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TextPrompt:
    """The first tokens of a text.

    Attributes:
        text: What the text is called.
        input_ids: [1, S] int64.
    """

    text: str
    input_ids: Tensor

    @property
    def tokens(self) -> int:
        """Length of the prompt."""
        return self.input_ids.shape[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sparsity:
    """How `optimize` makes a model sparse, beside the selector.

    Attributes:
        min_length: Fewest keys for which attention is sparse; ``None`` leaves it to the cost model.
        dense_layers: Layers that stay dense.
        backend: The kernel on CUDA.
    """

    min_length: int | None = 0
    dense_layers: tuple[int, ...] = ()
    backend: str = "auto"

    @contextmanager
    def applied(self, model: Any, selector: Selector | Calibration) -> Iterator[None]:
        """The model is sparse inside, and plain afterwards."""
        optimize(
            model,
            selector,
            min_length=self.min_length,
            dense_layers=self.dense_layers,
            backend=self.backend,
        )
        try:
            yield
        finally:
            release_all(model)


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRow:
    """A text read with one setting, beside the dense model's reading.

    Attributes:
        tokens: Length of the prompt.
        text: What the text is called.
        setting: What the setting is called.
        density: Kept over visible blocks, mean over the calls that choose; one that could be sparse
            but stays dense, by the settings or because that is predicted to be faster, counts as 1.
        sparse_calls: Attention calls that ran sparse.
        windows: Of those, calls that keep a whole sliding window; the density is of the others,
            where there are some.
        sparse_density: The density of the sparse calls alone.
        calls: Attention calls in all.
        judged: How many of the last positions are judged.
        kl: Mean KL(dense || sparse) of their next-token distributions, in nats.
        perplexity: Of the tokens after them.
        dense_perplexity: The same of the dense model.
        top1_agreement: Share of them whose likeliest next token is the dense model's.
    """

    tokens: int
    text: str
    setting: str
    density: float
    sparse_calls: int
    windows: int = 0
    sparse_density: float
    calls: int
    judged: int
    kl: float
    perplexity: float
    dense_perplexity: float
    top1_agreement: float

    @property
    def perplexity_ratio(self) -> float:
        """Sparse over dense."""
        return self.perplexity / self.dense_perplexity

    def to_json(self) -> dict[str, Any]:
        """The row as values that JSON holds."""
        return asdict(self) | {"perplexity_ratio": self.perplexity_ratio}


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRow:
    """The scores of one task with one setting, or of the dense model.

    Attributes:
        tokens: Length of the prompts with their answers, at most.
        task: Its name.
        setting: What the setting is called; ``None`` for the dense model.
        samples: How many were asked.
        score: Mean share of the right answers that the model gave.
        density: As in `QualityRow`; ``None`` for the dense model.
    """

    tokens: int
    task: str
    setting: str | None
    samples: int
    score: float
    density: float | None

    def to_json(self) -> dict[str, Any]:
        """The row as values that JSON holds."""
        return asdict(self)


def begin_ids(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before a text, where it does so."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer.encode("")[:1] == [begin] else []


def encode_start(tokenizer: Any, text: str, tokens: int) -> list[int]:
    """The first token ids of a text, at most ``tokens``, begun as the tokenizer begins a text."""
    ids = tokenizer.encode(
        text[: tokens * _CHARACTERS_PER_TOKEN], add_special_tokens=False, verbose=False
    )
    return [*begin_ids(tokenizer), *ids][:tokens]


def judge_texts(
    loaded: LoadedModel,
    prompts: Sequence[TextPrompt],
    settings: Mapping[str, Selector | Calibration],
    *,
    judged: int,
    sparsity: Sparsity | None = None,
    show: Callable[[str], None] = lambda step: None,
) -> Iterator[QualityRow]:
    """Reads each prompt densely and with each setting, and compares what the model predicts.

    Args:
        loaded: The model, plain; it is plain again after each row.
        prompts: What it reads.
        settings: Selectors, or calibrations, by what they are called.
        judged: How many of the last positions are judged, at most half of the prompt.
        sparsity: How the model is made sparse; every call that can be, by default.
        show: Told which reading comes next.

    Raises:
        ValueError: No attention call ran sparse, or the model predicts no numbers.
    """
    sparsity = Sparsity() if sparsity is None else sparsity
    for prompt in prompts:
        count = max(1, min(judged, prompt.tokens // 2))
        where = f"{prompt.tokens} tokens of {prompt.text}"
        show(f"dense, {where}")
        targets = prompt.input_ids[0, -count:]
        dense = _read(loaded.model, prompt.input_ids, count)
        if dense.isnan().any():
            raise ValueError(f"the model must predict numbers, got NaN after {where}")
        dense_perplexity = compute_perplexity(dense, targets)
        for name, selector in settings.items():
            show(f"{name}, {where}")
            with (
                sparsity.applied(loaded.model, selector),
                watch_blocks(loaded.model) as read,
            ):
                sparse = _read(loaded.model, prompt.input_ids, count)
            density, sparse_density = _densities(read)
            yield QualityRow(
                tokens=prompt.tokens,
                text=prompt.text,
                setting=name,
                density=density,
                sparse_density=sparse_density,
                sparse_calls=len(read.sparse),
                windows=read.windows,
                calls=len(read.records),
                judged=count,
                kl=compute_kl(dense, sparse),
                perplexity=compute_perplexity(sparse, targets),
                dense_perplexity=dense_perplexity,
                top1_agreement=float((dense.argmax(-1) == sparse.argmax(-1)).double().mean()),
            )


def draw_samples(
    loaded: LoadedModel,
    names: Sequence[TaskName],
    *,
    tokens: int,
    samples: int,
    haystacks: Sequence[str],
) -> dict[TaskName, list[TaskSample]]:
    """Draws samples of RULER's tasks, with room for the answer in ``tokens``.

    Args:
        loaded: The model that will be asked.
        names: The tasks.
        tokens: Most tokens of a prompt and its answer.
        samples: How many of each task; the n-th is the same at every call.
        haystacks: Texts that the needles lie in, in turn.

    Raises:
        ValueError: ``tokens`` are too few for a task.
    """
    tokenizer, begin = loaded.tokenizer, begin_ids(loaded.tokenizer)

    def draw(name: TaskName, room: int, seed: int) -> TaskSample:
        length = tokens - room - len(begin)
        if length < 1:
            raise ValueError(f"tokens must be at least {tokens + 1 - length} for task {name!r}")
        sample = build_task(
            name, tokenizer, tokens=length, seed=seed, haystack=haystacks[seed % len(haystacks)]
        )
        ids = torch.cat([torch.tensor([begin], dtype=torch.int64), sample.input_ids], dim=1)
        return TaskSample(
            name=name,
            input_ids=ids,
            answers=sample.answers,
            max_new_tokens=sample.max_new_tokens,
        )

    drawn = {}
    for name in names:
        room = draw(name, 0, 0).max_new_tokens
        drawn[name] = [draw(name, room, seed) for seed in range(samples)]
    return drawn


def score_tasks(
    loaded: LoadedModel,
    samples: Mapping[Any, Sequence[Sample]],
    settings: Mapping[str, Selector | Calibration],
    *,
    tokens: int,
    score: Callable[[Any, str], float] = score,
    sparsity: Sparsity | None = None,
    show: Callable[[str], None] = lambda step: None,
) -> Iterator[TaskRow]:
    """Scores the model's answers, dense and with each setting; answers are generated densely.

    Args:
        loaded: The model, plain; it is plain again after each row.
        samples: By task, from `draw_samples` or `cut_prompts`.
        settings: Selectors, or calibrations, by what they are called.
        tokens: What these were given.
        score: What an answer to a sample is worth; by default by RULER's rule.
        sparsity: See `judge_texts`.
        show: Told which task comes next.
    """
    sparsity = Sparsity() if sparsity is None else sparsity
    together = max(1, min(TOGETHER[loaded.device.type], _CACHED_TOKENS // tokens))
    for name, drawn in samples.items():
        where = f"{name} at {tokens} tokens"
        show(f"dense, {where}")
        row: Any = {"tokens": tokens, "task": name, "samples": len(drawn)}
        found = score_samples(loaded, drawn, score=score, together=together)
        yield TaskRow(**row, setting=None, score=found, density=None)
        for setting, selector in settings.items():
            show(f"{setting}, {where}")
            with (
                sparsity.applied(loaded.model, selector),
                watch_blocks(loaded.model) as read,
            ):
                found = score_samples(loaded, drawn, score=score, together=together)
            density, _ = _densities(read)
            yield TaskRow(**row, setting=setting, score=found, density=density)


def _densities(read: ReadBlocks) -> tuple[float, float]:
    """The density, and that of the sparse calls alone.

    Raises:
        ValueError: There are none; the reasons are in the text.
    """
    density, sparse_density = read.density, read.sparse_density
    if density is None or sparse_density is None:
        reasons = sorted({str(record.reason) for record in read.records})
        raise ValueError(
            f"no attention call ran sparse: {'; '.join(reasons)}"
            if reasons
            else "the model made no attention call that can be sparse (docs/coverage.md)"
        )
    return density, sparse_density


# Not in inference mode: there nothing tells whether a mask that was read has changed.
@torch.no_grad()
def _read(model: Any, input_ids: Tensor, judged: int) -> Tensor:
    """Log-probabilities [P, V] of the last ``judged`` tokens of the prompt."""
    accepted = inspect.signature(model.forward).parameters
    sparing = {"use_cache": False, "logits_to_keep": judged + 1}
    kept = {name: value for name, value in sparing.items() if name in accepted}
    logits = model(input_ids, **kept).logits[0, -(judged + 1) : -1]
    return compute_log_probs(logits)


def mean_by_setting(rows: Sequence[QualityRow], tokens: int) -> dict[str, dict[str, float]]:
    """Density, KL, perplexity ratio and agreement of each setting at a length, mean over texts.

    Of the ratios it is the geometric mean.
    """
    found: dict[str, dict[str, float]] = {}
    for setting in dict.fromkeys(row.setting for row in rows if row.tokens == tokens):
        of_it = [row for row in rows if row.setting == setting and row.tokens == tokens]
        found[setting] = {
            "density": sum(row.density for row in of_it) / len(of_it),
            "kl": sum(row.kl for row in of_it) / len(of_it),
            "perplexity_ratio": math.exp(
                sum(math.log(row.perplexity_ratio) for row in of_it) / len(of_it)
            ),
            "top1_agreement": sum(row.top1_agreement for row in of_it) / len(of_it),
        }
    return found
