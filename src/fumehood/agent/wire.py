"""Frames between host and agent: the only thing that crosses the boundary.

A frame is `>IIB` (payload length, stream id, kind) and the payload. Both sides treat the other as hostile: kinds are a
closed set, payloads are capped, JSON must be an object. Streams are opened by the host only, ids ever growing.

| kind   | payload          | direction    | meaning                                                                 |
|--------|------------------|--------------|-------------------------------------------------------------------------|
| HELLO  | JSON, stream 0   | both, first  | {"generation": n, ...}; the lower generation wins                       |
| OPEN   | JSON             | host->agent  | {"verb": ..., arguments}: starts a stream                               |
| DATA   | channel + bytes  | both         | channel byte: 0 stdin or file bytes, 1 stdout, 2 stderr, 3 terminal     |
| EVENT  | JSON             | agent->host  | {"type": ...}: something happened on the stream                         |
| END    | JSON             | agent->host  | {"ok": {...}} or {"error": {"code", "message"}}: the stream's last frame |
| CLOSE  | empty            | host->agent  | end of input on the stream (stdin, upload)                              |
| CANCEL | empty            | host->agent  | the host no longer follows the stream; a process it started goes on     |
"""

from __future__ import annotations

import json
import struct
from typing import Any, NamedTuple, cast

GENERATION = 3
HELLO, OPEN, DATA, EVENT, END, CLOSE, CANCEL = range(7)
STDIN, STDOUT, STDERR, TERMINAL = range(4)
FILE = STDIN
_HEADER = struct.Struct(">IIB")
HEADER_BYTES = _HEADER.size
MAX_PAYLOAD_BYTES = 16 << 20
CHUNK_BYTES = 64 << 10  # what a sender of DATA aims at, so that streams interleave
# Parsed JSON can take thirty times its bytes, and seconds: what is cheap to count is bounded before it is parsed (H15).
MAX_JSON_ITEMS = 400_000
_EMPTY_KINDS = (CLOSE, CANCEL)


class BadFrame(ValueError):
    """The peer broke the protocol."""


def json_items(text: bytes) -> int:
    """An upper bound of the values in a JSON text, counted without parsing it."""
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def table(value: object) -> dict[str, Any]:
    """`value` if it is a JSON object, else an empty one: for members of a frame, of which the peer chose the type."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


class Frame(NamedTuple):
    stream: int
    kind: int
    payload: bytes

    def json(self) -> dict[str, Any]:
        if json_items(self.payload) > MAX_JSON_ITEMS:
            raise BadFrame(f"payload has more than {MAX_JSON_ITEMS} values")
        try:
            value = json.loads(self.payload)
        except (ValueError, RecursionError) as e:
            raise BadFrame(f"payload is not JSON: {e}") from None
        if not isinstance(value, dict):
            raise BadFrame("payload is not a JSON object")
        return table(value)  # pyright: ignore[reportUnknownArgumentType]


def encode(stream: int, kind: int, payload: bytes = b"") -> bytes:
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise BadFrame(f"payload of {len(payload)} bytes is over {MAX_PAYLOAD_BYTES}")
    return _HEADER.pack(len(payload), stream, kind) + payload


def encode_json(stream: int, kind: int, value: dict[str, Any]) -> bytes:
    # ensure_ascii keeps lone surrogates (non-UTF-8 file names, surrogateescape) as \udcXX escapes.
    return encode(stream, kind, json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode())


GREETING = encode_json(0, HELLO, {"generation": GENERATION})  # what a host says first


def parse_header(header: bytes) -> tuple[int, int, int]:
    """(length, stream, kind), checked. Raises BadFrame before a byte of the payload is buffered."""
    length, stream, kind = _HEADER.unpack(header)
    if length > MAX_PAYLOAD_BYTES:
        raise BadFrame(f"payload of {length} bytes is over {MAX_PAYLOAD_BYTES}")
    if kind > CANCEL:
        raise BadFrame(f"unknown frame kind {kind}")
    if (kind == HELLO) != (stream == 0):
        raise BadFrame("stream 0 carries HELLO and nothing else")
    if (kind in _EMPTY_KINDS and length) or (kind == DATA and not length):
        raise BadFrame(f"a frame of kind {kind} can't have {length} bytes")
    return length, stream, kind


class Decoder:
    """Bytes in, frames out; holds at most one unfinished frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        self._buffer += data
        frames: list[Frame] = []
        start = 0
        while len(self._buffer) - start >= HEADER_BYTES:
            length, stream, kind = parse_header(bytes(self._buffer[start : start + HEADER_BYTES]))
            end = start + HEADER_BYTES + length
            if len(self._buffer) < end:
                break
            frames.append(Frame(stream, kind, bytes(self._buffer[start + HEADER_BYTES : end])))
            start = end
        del self._buffer[:start]
        return frames
