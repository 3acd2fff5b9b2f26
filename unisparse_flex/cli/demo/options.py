"""Every knob of the demo, validated."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..choices import BUNDLED_CONTEXT, SELECTOR_NAMES

if TYPE_CHECKING:
    from ...evaluation import TextName
    from ...selectors import Selector

SHORTEST_PROMPT = 512
DEFAULT_MIN_LENGTH = 4096
STDOUT = Path("-")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoOptions:
    """What one run of the demo does.

    Attributes:
        tokens: Length of the prompt, 512 to the model's context of 8192.
        text: Which text surrounds the needle.
        depth: Where the needle goes, 0 (start) to 1 (end).
        seed: Picks the needle and the excerpt.
        selector: A name in `SELECTOR_NAMES`.
        top_p: Share of a row's estimated attention mass to keep; ``None`` is the selector's own
            rule.
        block_size: Tokens per block.
        min_length: Fewest keys for which attention is sparse; ``None`` is 4096, or ``tokens``
            where that is less.
        compile: Compile the optimized model; otherwise it runs eagerly.
        compile_dense: Time a compiled dense model too; ``None`` does so only on CUDA, because
            on CPU eager mode is the faster dense baseline.
        repeats: Timed prefills of each model, in turn; ``None`` is 5 on CUDA and 1 on CPU.
        output: Folder of the figure and of the JSON file.
        json: Path of the JSON file; ``None`` is ``output / "demo.json"``.
        quiet: Print only the paths of the files written.
    """

    tokens: int = BUNDLED_CONTEXT
    text: TextName = "prose"
    depth: float = 0.35
    seed: int = 0
    selector: str = "default"
    top_p: float | None = None
    block_size: int = 128
    min_length: int | None = None
    compile: bool = True
    compile_dense: bool | None = None
    repeats: int | None = None
    output: Path = Path("demo-output")
    json: Path | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        check_ranges(**asdict(self))
        self.build_selector()

    def build_selector(self) -> Selector:
        """Returns the selector that the options ask for."""
        from ..selectors import NAMED

        selector = NAMED[self.selector]
        size = self.block_size
        fits: dict[str, Any] = {
            "block_size": size,
            "c_q": min(selector.c_q, size),
            "c_k": min(selector.c_k, size),
        }
        if self.top_p is None:
            return replace(selector, **fits)
        return replace(selector, **fits, top_p=self.top_p, threshold=None, threshold_blocks=None)

    @property
    def effective_min_length(self) -> int:
        """The ``min_length`` that `optimize` is given."""
        if self.min_length is not None:
            return self.min_length
        return min(DEFAULT_MIN_LENGTH, self.tokens)

    @property
    def json_path(self) -> Path:
        """Where the JSON file goes."""
        return self.json if self.json is not None else self.output / "demo.json"

    @property
    def figure_path(self) -> Path:
        """Where the figure goes."""
        return self.output / "selected-blocks.png"


def check_ranges(
    *,
    tokens: int,
    depth: float,
    seed: int,
    repeats: int | None,
    min_length: int | None,
    selector: str,
    **_: Any,
) -> None:
    """Raises where an option of `DemoOptions` is out of range; needs no torch.

    Raises:
        ValueError: One is, as the message says.
    """
    if not SHORTEST_PROMPT <= tokens <= BUNDLED_CONTEXT:
        raise ValueError(
            f"tokens must be in [{SHORTEST_PROMPT}, {BUNDLED_CONTEXT}] (the model's context), "
            f"got {tokens}"
        )
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must be in [0, 1], got {depth}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if repeats is not None and repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if min_length is not None and min_length > tokens:
        raise ValueError(
            f"min_length must be at most tokens ({tokens}), got {min_length}; "
            "a longer one leaves every layer dense"
        )
    if selector not in SELECTOR_NAMES:
        raise ValueError(f"selector must be one of {', '.join(SELECTOR_NAMES)}, got {selector!r}")
