"""One thing that was looked at, what was found, and its fix."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """What a finding means."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What was looked at, a few words.
        status: ``"ok"``; ``"note"`` where everything runs but something could run faster or an
            optional package is absent; ``"problem"`` where something does not work.
        detail: What was found.
        fix: What to do about it; empty where nothing need or can be done.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""

    def __post_init__(self) -> None:
        if self.status is Status.PROBLEM and not self.fix:
            raise ValueError(f"fix must be given for a problem, got none for {self.name!r}")
