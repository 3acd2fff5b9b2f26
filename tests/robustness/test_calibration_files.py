"""A calibration file is data: any bytes give a calibration or one clear ValueError."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unisparse_flex import Calibration, UniSparse
from unisparse_flex.calibration import MAX_FILE_BYTES
from unisparse_flex.selectors import XAttention

VALID = Calibration(
    layers={
        "layers.0.attention": UniSparse(block_size=16, top_k=2),
        "layers.1.attention": "dense",
        "layers.2.attention": XAttention(head_top_p=(0.5, 0.75)),
    },
    quality="recall",
    target=0.9,
    reached=0.91,
    density=0.4,
    model="Transformer",
    unisparse_flex="0.1.0",
    torch="2.13.0",
)
VALUES: dict[str, Any] = json.loads(VALID.to_json())
TEXT = VALID.to_json().encode()

numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 2**63, 1e308, -0.0])
scalars = st.none() | st.booleans() | numbers | st.text(max_size=20)
documents = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(list(VALUES)) | st.text(max_size=8), inner, max_size=6)
    ),
    max_leaves=20,
)
selector_texts = st.sampled_from(
    [
        "UniSparse()",
        "UniSparse(top_p=1e999)",
        "UniSparse(top_k=10**9)",
        "UniSparse(block_size=2**40)",
        "UniSparse(top_p=0.9 if True else 0.1)",
        "UniSparse(top_p=(lambda: 0.9)())",
        "UniSparse(top_p=__import__('os').system('false'))",
        "UniSparse(top_p=UniSparse())",
        "UniSparse(head_thresholds=(0.1,) * 10**9)",
        "UniSparse(block_size=" + "9" * 5000 + ")",
        "DenseSpan(selector=DenseSpan(selector=UniSparse(), tokens='0:3'), tokens='1:2')",
        "DenseSpan(selector=" * 200 + "UniSparse()",
        "XAttention(head_top_p=())",
        "UniSparse(" + "top_p=0.5," * 300 + ")",
        "UniSparse(top_p=0.5)\x00",
        "UniSparse(top_p=0.5) ",
        "StreamingLLM(sink_tokens={})",
        "StreamingLLM(sink_tokens={[]: 1})",
        "\ud800",
    ]
) | st.text(max_size=60)


@st.composite
def changed(draw: st.DrawFn) -> bytes:
    """A valid file with some keys replaced, dropped, added or given twice."""
    values = {**VALUES, "layers": dict(VALUES["layers"])}
    for _ in range(draw(st.integers(1, 3))):
        change = draw(st.sampled_from(["value", "drop", "add", "layer", "setting"]))
        if change == "value":
            values[draw(st.sampled_from(list(VALUES)))] = draw(documents)
        elif change == "drop":
            values.pop(draw(st.sampled_from(list(VALUES))), None)
        elif change == "add":
            values[draw(st.text(max_size=10))] = draw(scalars)
        elif isinstance(values.get("layers"), dict):
            setting = draw(selector_texts) if change == "setting" else draw(documents)
            values["layers"][draw(st.text(max_size=10))] = setting
    return json.dumps(values).encode()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A valid file with bytes replaced, inserted or cut off."""
    text = bytearray(TEXT)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        text[at : at + draw(st.integers(0, 12))] = draw(st.binary(max_size=6))
    return bytes(text)


nested = st.builds(
    lambda depth, pair: (pair[0] * depth + pair[1] * depth).encode(),
    st.sampled_from([10, 900, 1100, 50_000]),
    st.sampled_from([("[", "]"), ('{"layers":', "}"), ("[", ""), ('{"target":[', "]}")]),
)
files = st.one_of(
    changed(),
    damaged(),
    st.binary(max_size=200),
    documents.map(lambda d: json.dumps(d).encode()),
    nested,
)


def load(path: Path, data: bytes) -> Calibration | None:
    """The calibration, or ``None`` where the file is refused as the documentation says."""
    path.write_bytes(data)
    try:
        return Calibration.load(path)
    except ValueError as refused:
        error = refused
    assert type(error) is ValueError, repr(error)
    # Of a size that a person reads, whatever the file holds.
    assert len(str(error)) < 1200, len(str(error))
    assert re.search(
        rf"^{re.escape(str(path))}: .*(must|does not take|has no setting)", str(error), re.DOTALL
    )
    return None


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files)
def test_any_file_is_read_or_refused(tmp_path: Path, data: bytes) -> None:
    found = load(tmp_path / "any.json", data)
    if found is not None:
        # What is taken is what would be written.
        assert Calibration.from_json(found.to_json()) == found


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(selector_texts)
def test_any_text_of_a_selector_is_read_or_refused(tmp_path: Path, text: str) -> None:
    values = {**VALUES, "layers": {"layer": text}}
    found = load(tmp_path / "any.json", json.dumps(values).encode())
    assert found is None or list(found.layers) == ["layer"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TEXT.replace(b'"layers.1.attention"', b'"layers.0.attention"'), "must be given once, got"),
        (TEXT + b" " * MAX_FILE_BYTES, f"at most {MAX_FILE_BYTES} bytes"),
        (TEXT.decode().encode("utf-16"), "must be UTF-8"),
        (b"\xff" + TEXT, "must be UTF-8"),
        (b"\xef\xbb\xbf" + TEXT, "must be JSON"),
        (TEXT.replace(b"0.91", b"9" * 5000), "got one of 5000 digits"),
        (TEXT.replace(b"0.91", b"9" * 390), "reached must be a finite number"),
    ],
)
def test_the_message_names_what_is_wrong(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as raised:
        Calibration.load(path)
    assert "write a new file with unisparse_flex.calibrate" in str(raised.value)


def test_what_is_not_mutated_is_read(tmp_path: Path) -> None:
    assert load(tmp_path / "good.json", TEXT) == VALID
