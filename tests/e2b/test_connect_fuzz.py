"""The framing of Connect: whatever arrives, messages or a Fault, and bounded memory."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterator
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
    st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=5
)
BODIES = st.dictionaries(
    st.sampled_from(
        ["code", "language", "context_id", "env_vars", "cwd", "timeout", "memory", "network", "metadata", "envVars"]
    ),
    VALUES,
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


@given(st.lists(MESSAGES, max_size=5), st.lists(st.integers(1, 200), min_size=1, max_size=5))
def test_messages_arrive_whole_however_their_bytes_are_cut(messages: list[dict[str, Any]], sizes: list[int]) -> None:
    raw, decoder, found = b"".join(map(encode, messages)) + encode_end(), Decoder(), list[dict[str, Any]]()
    for size in itertools.cycle(sizes):
        found += decoder.feed(raw[:size])
        if not (raw := raw[size:]):
            break
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


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10) as client:
        yield client


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PATHS + FILES), MESSAGES | NEARLY, st.integers(0, 3))
def test_no_message_is_an_internal_error_and_the_server_goes_on(
    box: Sandbox, http: httpx.Client, method: str, message: dict[str, Any], cut: int
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
    answer = http.post(f"/{service}/{method}", content=raw[: len(raw) - cut], headers=headers)
    assert answer.status_code in (200, 400, 403, 404, 409, 429)
    assert b'"internal"' not in answer.content, (answer.content, message)
    assert http.get("/health", headers=headers).status_code == 204


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["execute", "contexts", "contexts/x/restart"]), BODIES | VALUES)
def test_no_body_to_the_interpreter_is_an_internal_error(box: Sandbox, http: httpx.Client, path: str, body: Any) -> None:
    if isinstance(body, dict):
        body = {"cwd": "/nowhere", **body}  # a box has room for so many contexts only
    headers = {
        "E2b-Sandbox-Id": box.sandbox_id,
        "E2b-Sandbox-Port": "49999",
        "E2B-Traffic-Access-Token": box.traffic_access_token or "",
    }
    answer = http.post("/" + path, content=json.dumps(body).encode(), headers=headers)
    assert answer.status_code in (200, 400, 404), (answer.status_code, answer.text, body)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["", "/s1/connect", "/s1/timeout", "/s1/pause", "/s1/network"]), BODIES | VALUES)
def test_no_body_to_the_control_api_is_an_internal_error(server: Server, http: httpx.Client, path: str, body: Any) -> None:
    if isinstance(body, dict) and not path:
        body = {**body, "templateID": "nothing"}
    method = "PUT" if path.endswith("network") else "POST"
    answer = http.request(method, "/v2/sandboxes" + path, content=json.dumps(body).encode(), headers=server.headers())
    assert answer.status_code in (400, 404), (answer.status_code, answer.text, body)
    assert answer.json()["code"] == answer.status_code
