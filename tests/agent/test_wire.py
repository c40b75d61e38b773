"""The decoder is fuzzed (H16: frames are hostile input) and real traffic is held against the frozen schema."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fumehood.agent import wire

from .session_driver import Zygote

SCHEMA = Path(wire.__file__).parent / "schema.3.json"
PAGE = Path(__file__).parents[2] / "docs" / "wire.md"
ids = st.integers(1, 2**32 - 1)
frames = st.one_of(
    st.tuples(ids, st.just(wire.DATA), st.binary(min_size=1, max_size=300)),
    st.tuples(ids, st.sampled_from([wire.OPEN, wire.EVENT, wire.END]), st.binary(max_size=300)),
    st.tuples(ids, st.sampled_from([wire.CLOSE, wire.CANCEL]), st.just(b"")),
    st.tuples(st.just(0), st.just(wire.HELLO), st.binary(max_size=50)),
)


def valid(part: str, value: Any) -> bool:
    schema = json.loads(SCHEMA.read_text())
    return jsonschema_rs.is_valid({"$defs": schema["$defs"], "$ref": f"#/$defs/{part}"}, value)


def fed(data: bytes, cuts: list[int]) -> list[wire.Frame]:
    decoder, found, start = wire.Decoder(), [], 0
    for end in [*sorted(c % (len(data) + 1) for c in cuts), len(data)]:
        found += decoder.feed(data[start:end])
        start = end
    return found


@given(st.lists(frames, max_size=12), st.lists(st.integers(0, 10_000), max_size=20))
def test_frames_come_out_as_they_went_in_wherever_the_bytes_are_split(sent: list[Any], cuts: list[int]):
    assert fed(b"".join(wire.encode(*f) for f in sent), cuts) == [wire.Frame(*f) for f in sent]


@given(st.lists(frames, max_size=4), st.binary(max_size=200), st.lists(st.integers(0, 10_000), max_size=8))
def test_hostile_bytes_raise_bad_frame_or_nothing(sent: list[Any], junk: bytes, cuts: list[int]):
    try:
        found = fed(b"".join(wire.encode(*f) for f in sent) + junk, cuts)
    except wire.BadFrame:
        return
    assert found[: len(sent)] == [wire.Frame(*f) for f in sent]


@given(st.binary(min_size=wire.HEADER_BYTES, max_size=wire.HEADER_BYTES))
@settings(max_examples=500)
def test_a_header_is_refused_or_within_every_bound(header: bytes):
    try:
        length, stream, kind = wire.parse_header(header)
    except wire.BadFrame:
        return
    assert 0 <= length <= wire.MAX_PAYLOAD_BYTES and kind <= wire.CANCEL and (stream == 0) == (kind == wire.HELLO)


@given(st.integers(0, 2**32 - 1), ids, st.integers(0, 255))
@settings(max_examples=500)
def test_a_refused_header_is_refused_before_any_of_its_payload_is_there(length: int, stream: int, kind: int):
    decoder = wire.Decoder()
    header = length.to_bytes(4, "big") + stream.to_bytes(4, "big") + bytes([kind])
    bad = length > wire.MAX_PAYLOAD_BYTES or kind > wire.CANCEL or kind == wire.HELLO
    bad = bad or (kind in (wire.CLOSE, wire.CANCEL) and length > 0) or (kind == wire.DATA and length == 0)
    if bad:
        with pytest.raises(wire.BadFrame):
            decoder.feed(header)
    else:
        assert decoder.feed(header) == ([] if length else [wire.Frame(stream, kind, b"")])


@given(st.lists(frames, min_size=1, max_size=12), st.integers(1, 64))
def test_a_decoder_holds_no_more_than_one_unfinished_frame(sent: list[Any], step: int):
    decoder, data = wire.Decoder(), b"".join(wire.encode(*f) for f in sent)
    for start in range(0, len(data), step):
        decoder.feed(data[start : start + step])
        assert len(decoder._buffer) < wire.HEADER_BYTES + max(len(f[2]) for f in sent)
    assert not decoder._buffer


@given(st.binary(max_size=100) | st.text().map(str.encode) | st.integers(1, 3000).map(lambda n: b"[" * 100 * n))
@settings(max_examples=200, deadline=None)
def test_a_payload_is_a_json_object_or_a_bad_frame(payload: bytes):
    with contextlib.suppress(wire.BadFrame):
        assert isinstance(wire.Frame(1, wire.EVENT, payload).json(), dict)


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none() | st.lists(st.text()), max_size=5))
def test_json_survives_the_trip_lone_surrogates_too(value: dict[str, Any]):
    value["name"] = b"\xff.txt".decode(errors="surrogateescape")
    (frame,) = wire.Decoder().feed(wire.encode_json(7, wire.OPEN, value))
    assert frame.json() == value


def test_a_payload_over_the_limit_is_not_encoded():
    with pytest.raises(wire.BadFrame):
        wire.encode(1, wire.OPEN, bytes(wire.MAX_PAYLOAD_BYTES + 1))


# The schema.


def test_generation_3_is_frozen():
    """Change the generation, not this digest."""
    assert wire.GENERATION == 3
    canonical = json.dumps(json.loads(SCHEMA.read_text()), sort_keys=True).encode()
    assert hashlib.sha256(canonical).hexdigest() == "9900ad733ef9039a1c6781eae5fb88ee65eef575cbff5c61a8542262b086b62d"


def test_every_verb_of_the_page_is_in_the_schema_and_no_other():
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    on_page = {verb for row in rows for verb in re.findall(r"`([a-z.]+)`", row)}
    assert on_page == set(json.loads(SCHEMA.read_text())["$defs"]["open"]["properties"]["verb"]["enum"])


@pytest.mark.parametrize("language", ["python", "bash"])
def test_what_a_session_really_sends_is_valid(tmp_path: Path, language: str):
    zygote = Zygote([])
    client = zygote.session(tmp_path, language)
    for code in ("[1, {'a': None}]", "1 / 0", "exit(2)", "exit 3", "echo hi", "print(1)"):
        answer = client.run(code, {"A": "b"})
        assert valid("end", answer.end)
        assert answer.events and all(valid("event", e) for e in answer.events), answer.events
    end = client.request({"verb": "checkpoint"}).end
    assert valid("end", end) and valid("end", client.request({"verb": "nothing"}).end)
    client.close()
    zygote.close()


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("hello", {"generation": 3, "agent": "0.1.0", "python": "3.11.7", "languages": ["python"]}),
        ("open", {"verb": "exec.start", "argv": ["ls"], "env": {}, "stdin": False, "pty": {"rows": 24, "cols": 80}}),
        ("open", {"verb": "context.run", "language": "python", "code": "1", "env": {"A": "b"}}),
        ("open", {"verb": "files.move", "source": "a", "destination": "b"}),
        ("open", {"verb": "bind", "env": {}, "hostname": "a", "limits": {"memory_bytes": 1, "pids": 1, "disk_bytes": 1}}),
        ("event", {"type": "account", "oom_kills": 0, "pids_refused": 0, "disk_full": False, "disk_used_bytes": 0}),
        ("end", {"ok": {}}),
        ("end", {"error": {"code": "file_error", "message": "no", "errno": "ENOENT"}}),
    ],
)
def test_what_the_page_shows_is_valid(part: str, value: dict[str, Any]):
    assert valid(part, value)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("hello", {}),
        ("open", {"verb": "no"}),
        ("open", {"verb": "exec.start"}),
        ("open", {"verb": "exec.signal", "pid": 5}),
        ("open", {"verb": "context.run", "code": 1}),
        ("open", {"verb": "ping", "extra": 1}),
        ("open", {"verb": "bind", "env": {"A=B": "x"}}),
        ("open", {"verb": "bind", "limits": {"cpus": 1}}),
        ("event", {"type": "no"}),
        ("event", {"type": "result", "is_main_result": True, "data": {}}),
        ("end", {}),
        ("end", {"ok": {}, "error": {"code": "invalid", "message": ""}}),
        ("end", {"error": {"code": "other", "message": ""}}),
    ],
)
def test_what_breaks_the_contract_is_not_valid(part: str, value: dict[str, Any]):
    assert not valid(part, value)
