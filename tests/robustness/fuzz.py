"""`python -m tests.robustness.fuzz --cases 20000`: random calls of every entry of the public API.

Prints how many different ones ran, by entry, by what came of them and by what they hold. A failure
prints the smallest case that fails, to be pasted into a test.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator

import hypothesis
import torch
from hypothesis import HealthCheck

from .case_strategies import cases
from .cases import Case
from .entries import ENTRIES, Entry
from .ways import WAYS

ALL: dict[str, Entry] = {**ENTRIES, **WAYS}
# Those that trace something for every case get a twentieth of the cases of the others.
TRACED, TRACED_SHARE = ("branch", "exported"), 0.05


def fuzz(entry: str, count: int, seed: int) -> dict[Case, str]:
    """Runs an entry on ``count`` random cases; what came of each different one."""
    found: dict[Case, str] = {}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(cases())
    def run(case: Case) -> None:
        found[case] = ALL[entry](case)

    run()
    return found


def traits(case: Case) -> Iterator[str]:
    """What a case holds that a plain one does not, and its dtype and selector."""
    yield f"dtype {case.dtype}"
    yield f"selector {type(case.selector).__name__}"
    for name, content, layout in zip(
        ("query", "key", "value"), case.contents, case.layouts, strict=True
    ):
        if content != "normal":
            yield f"{name}: {content}"
        if layout != "contiguous":
            yield f"{name} laid out: {layout}"
    if case.sharing != "none":
        yield f"sharing: {case.sharing}"
    if case.mask is not None:
        yield f"mask: {case.mask.kind}"
    for holds, trait in (
        (case.is_causal, "causal"),
        (case.causal_lower_right, "causal, lower right"),
        (case.group > 1, "grouped heads"),
        (case.q_len == 1, "one query"),
        (case.kv_len == 1, "one key"),
        (case.q_len != case.kv_len, "as many queries as keys: no"),
        (case.batch * case.value_dim == 0, "zero-size"),
    ):
        if holds:
            yield trait
    if case.scale is not None:
        yield f"scale {case.scale}"


def _print(title: str, counts: Counter[str]) -> None:
    print(f"{title}:", flush=True)
    for name, count in sorted(counts.items()):
        print(f"  {count:6} {name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000, help="over all entries together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--entries", nargs="+", choices=ALL, default=list(ALL))
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    shares = {entry: TRACED_SHARE if entry in TRACED else 1.0 for entry in arguments.entries}
    each = arguments.cases / sum(shares.values())
    total, covered = 0, Counter[str]()
    for entry in arguments.entries:
        start = time.monotonic()
        found = fuzz(entry, math.ceil(each * shares[entry]), arguments.seed)
        total += len(found)
        covered.update(trait for case in found if case.fault is None for trait in traits(case))
        seconds = time.monotonic() - start
        _print(f"{entry}: {len(found)} cases in {seconds:.0f} s", Counter(found.values()))
    _print("of all without a fault", covered)
    print(f"{total} different cases, seed {arguments.seed}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
