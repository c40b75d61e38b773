"""The framing of Connect: whatever arrives, messages or a Fault, and bounded memory."""

from __future__ import annotations

import json
import struct
from typing import Any

import httpx
import pytest
from e2b_code_interpreter import Sandbox
from e2b_server import Server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fumehood.gateway.e2b.connect import (
    MAX_FRAME_BYTES,
    STATUSES,
    Decoder,
    Fault,
    deadline_s,
    encode,
    encode_end,
    flag,
    number,
    parse,
    text,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=8
)
INNER = st.dictionaries(st.sampled_from(["pid", "tag", "cmd", "args", "size", "process"]), VALUES)
NEARLY = st.dictionaries(
    st.sampled_from(["process", "pid", "input", "path", "pty", "start", "data", "source", "destination", "depth", "signal"]),
    VALUES | INNER,
)
MESSAGES = st.dictionaries(st.text(), VALUES, max_size=5)
PATHS = ["Start", "Connect", "List", "SendInput", "StreamInput", "CloseStdin", "SendSignal", "Update"]
STREAMED = ("Start", "Connect", "StreamInput")
FILES = ["Stat", "ListDir", "MakeDir", "Move", "CreateWatcher", "GetWatcherEvents", "RemoveWatcher"]


@given(st.lists(MESSAGES, max_size=5), st.data())
def test_messages_arrive_whole_however_their_bytes_are_cut(messages: list[dict[str, Any]], data: st.DataObject) -> None:
    raw, decoder, found = b"".join(map(encode, messages)) + encode_end(), Decoder(), list[dict[str, Any]]()
    while raw:
        size = data.draw(st.integers(1, len(raw)))
        found += decoder.feed(raw[:size])
        raw = raw[size:]
    decoder.finish()
    assert found == messages and decoder.ended


@given(st.lists(st.binary(max_size=64), max_size=20))
def test_garbage_is_a_fault_or_waits_for_more_and_is_never_kept_beyond_a_frame(pieces: list[bytes]) -> None:
    decoder, fed = Decoder(), 0
    try:
        for piece in pieces:
            fed += len(piece)
            decoder.feed(piece)
        decoder.finish()
    except Fault as e:
        assert e.code in STATUSES
    assert len(decoder._buffer) <= min(fed, MAX_FRAME_BYTES + 5)


@pytest.mark.parametrize("length", [MAX_FRAME_BYTES + 1, (1 << 32) - 1])
def test_a_length_over_the_cap_is_refused_before_its_bytes_come(length: int) -> None:
    with pytest.raises(Fault, match="is over") as refused:
        Decoder().feed(struct.pack(">BI", 0, length))
    assert refused.value.code == "resource_exhausted"


@pytest.mark.parametrize("flags", [1, 3, 4, 0x80, 0xFF])
def test_compressed_and_unknown_frames_are_refused(flags: int) -> None:
    with pytest.raises(Fault):
        Decoder().feed(struct.pack(">BI", flags, 2) + b"{}")


@pytest.mark.parametrize("payload", [b"", b"[]", b"1", b"{", b"\xff", b"[" * 200_000, b"{" * 50_000, b"[1," * 500_000, b"nul"])
def test_what_is_no_object_is_refused_whatever_its_depth_h15(payload: bytes) -> None:
    with pytest.raises(Fault):
        parse(payload)


def test_nothing_follows_the_end() -> None:
    decoder = Decoder()
    decoder.feed(encode_end())
    with pytest.raises(Fault, match="after the end"):
        decoder.feed(encode({}))


@given(st.text(max_size=14))
def test_a_deadline_is_a_number_or_a_fault(header: str) -> None:
    try:
        seconds = deadline_s(header)
    except Fault as e:
        assert e.code == "invalid_argument"
    else:
        assert seconds is None or 0 <= seconds <= 10**7


@given(MESSAGES, st.text())
def test_members_have_their_type_or_are_a_fault(message: dict[str, Any], name: str) -> None:
    readers = [
        (str, lambda: text(message, name, "")),
        (bool, lambda: flag(message, name)),
        (int, lambda: number(message, name)),
    ]
    for kind, read in readers:
        try:
            assert isinstance(read(), kind)
        except Fault as e:
            assert e.code == "invalid_argument"


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PATHS + FILES), MESSAGES | NEARLY, st.integers(0, 3))
def test_no_message_is_an_internal_error_and_the_server_goes_on(
    box: Sandbox, server: Server, method: str, message: dict[str, Any], cut: int
) -> None:
    streamed = method in STREAMED
    service = "process.Process" if method in PATHS else "filesystem.Filesystem"
    raw = encode(message) if streamed else json.dumps(message).encode()
    headers = {
        "E2b-Sandbox-Id": box.sandbox_id,
        "E2b-Sandbox-Port": "49983",
        "X-Access-Token": box._envd_access_token or "",
        "Content-Type": "application/connect+json" if streamed else "application/json",
        "Connect-Timeout-Ms": "300",
    }
    with httpx.Client(timeout=10) as client:
        answer = client.post(f"{server.url}/{service}/{method}", content=raw[: len(raw) - cut], headers=headers)
        assert answer.status_code in (200, 400, 403, 404, 409, 429)
        assert b'"internal"' not in answer.content, (answer.content, message)
        health = client.get(server.url + "/health", headers=headers)
    assert health.status_code == 204
