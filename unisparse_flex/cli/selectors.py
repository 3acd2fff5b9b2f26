"""--selector on the command line."""

from __future__ import annotations

from ..block_masks.selectors import QUALITIES
from ..calibration import Calibration
from ..calibration_fit import describe_calibration
from ..passes.calls import NAMED_SELECTORS, read_selector
from ..selectors import Selector, selector_of_quality
from .failures import wrong_arguments, wrong_content

NAMED = NAMED_SELECTORS


def parse_selector(text: str) -> Selector | Calibration:
    """Reads a selector; nothing in the text is executed.

    Args:
        text: A name in `NAMED`, the path of a calibration (``*.json``), or a selector as it
            prints, such as ``"UniSparse(top_p=0.95)"``.
    """
    if text.endswith(".json"):
        with wrong_content("read the calibration"):
            return Calibration.load(text)
    with wrong_arguments():
        return read_selector(text)


def parse_quality(name: str) -> Selector:
    """Reads a setting of the dial: a word or a number."""
    return selector_of_quality(name if name in QUALITIES else float(name))


def describe(selector: Selector | Calibration, text: str, tokens: int) -> str:
    """A selector in words for reports.

    Args:
        selector: Which.
        text: What it is called.
        tokens: Of the longest prompt that it is used for.
    """
    if isinstance(selector, Selector):
        return selector.text
    return f"{text}: {describe_calibration(selector, tokens)}"
