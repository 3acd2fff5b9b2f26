"""Lines of output broken to a width: commands stay whole, with arguments on lines of their own."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence

from .command_line import FLAGS, PROGRAM, SHARED_OPTIONS, SPEED_OPTIONS

# In place of a space at which no line is broken.
HELD = "\0"
# As a shell reads it.
WORD = r"""(?:'[^']*'|"[^"]*"|[^\s'"])+"""
_TAKE_VALUES = "|".join([*(o for o in (*SHARED_OPTIONS, *SPEED_OPTIONS) if o not in FLAGS), "--kl"])
# What `CommandLine` writes, and what stands after "run: ", to its end.
_OWN_LINE = re.compile(
    rf"(?<=\brun: )[^;]+;?"
    rf"|\b{PROGRAM} (?:(?:explain|quality|speed) {WORD}|calibrate {WORD} {WORD}(?= --))"
    rf"(?: (?:{_TAKE_VALUES}) {WORD}| (?:{'|'.join(FLAGS)})\S*)*"
)
_SHORT = re.compile(rf"\b(?:{PROGRAM} [\w-]+(?: --[\w-]+)*|pip install (?:--[\w-]+ )*\S+)")


def wrap(text: str, columns: int, whole: Sequence[str] = (), *, indent: int = 2) -> str:
    """A line on as many as it takes; one that fits stays.

    Args:
        text: A line.
        columns: The width; only what must stay whole is longer.
        whole: What else than commands stays on one line.
        indent: Of the lines after the first.
    """
    if len(text) <= columns:
        return text
    for part in sorted(whole, key=len, reverse=True):
        text = text.replace(part, _hold(part)) if " " in part else text
    lines: list[str] = []
    for part, stands_alone in _parts(text):
        before = " " * indent if lines else ""
        if stands_alone:
            lines.append(before + part)
        else:
            held = _SHORT.sub(lambda found: _hold(found[0]), part)
            lines += textwrap.wrap(
                held,
                columns,
                initial_indent=before,
                subsequent_indent=" " * indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines).replace(HELD, " ")


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """Each command that gets a line, and what stands between them; whether it is one."""
    end = 0
    for found in _OWN_LINE.finditer(text):
        between = text[end : found.start()].rstrip()
        if between := between.lstrip() if end else between:
            yield between, False
        yield found[0].rstrip(), True
        end = found.end()
    if rest := text[end:].lstrip():
        yield rest, False


def _hold(part: str) -> str:
    return part.replace(" ", HELD)
