"""Connect RPC with the JSON codec: frames, errors, deadlines. Everything that is decoded here is hostile input.

A stream's frame is a flag byte, a big-endian length of four bytes, and a JSON object. The last one of an answer has END set
and says in its object whether the stream failed: the HTTP status is 200 before that can be known.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, cast

from fumehood.agent import wire
from fumehood.errors import FumehoodError, InvalidTransition, SandboxGone

from .answers import GONE, status_of

UNARY, STREAM = "application/json", "application/connect+json"
MAX_FRAME_BYTES = 4 << 20
MAX_DEADLINE_MS = 10**10  # the protocol's own bound: ten digits
_HEAD = struct.Struct(">BI")
_COMPRESSED, _END = 1, 2

STATUSES: Mapping[str, int] = {
    "canceled": 499,
    "unknown": 500,
    "invalid_argument": 400,
    "deadline_exceeded": 504,
    "not_found": 404,
    "already_exists": 409,
    "permission_denied": 403,
    "resource_exhausted": 429,
    "failed_precondition": 400,
    "aborted": 409,
    "out_of_range": 400,
    "unimplemented": 501,
    "internal": 500,
    "unavailable": 503,
    "data_loss": 500,
    "unauthenticated": 401,
}
# The status that answers.py gives one of our errors -> the code.
_BY_STATUS: Mapping[int, str] = {
    400: "invalid_argument",
    401: "unauthenticated",
    403: "permission_denied",
    404: "not_found",
    409: "already_exists",
    429: "resource_exhausted",
    501: "unimplemented",
    502: "unavailable",
    503: "unavailable",
    504: "unavailable",
    507: "resource_exhausted",
}


class Fault(Exception):
    """An answer of the protocol: `code` is one of STATUSES."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message

    def to_dict(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message}


def fault_of(e: FumehoodError) -> Fault:
    """What a client of this protocol is told for one of our errors."""
    if isinstance(e, SandboxGone | InvalidTransition):
        return Fault("unavailable", GONE)
    return Fault(_BY_STATUS.get(status_of(e), "internal"), e.message)


def encode(message: Mapping[str, Any], flags: int = 0) -> bytes:
    payload = json.dumps(message, separators=(",", ":")).encode()
    return _HEAD.pack(flags, len(payload)) + payload


def encode_end(fault: Fault | None = None) -> bytes:
    return encode({"error": fault.to_dict()} if fault else {}, _END)


def parse(payload: bytes) -> dict[str, Any]:
    """One message. Raises Fault. Counted before it is parsed: JSON can take thirty times its bytes (H15)."""
    if wire.json_items(payload) > wire.MAX_JSON_ITEMS:
        raise Fault("resource_exhausted", f"a message may have {wire.MAX_JSON_ITEMS} values")
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError):
        raise Fault("invalid_argument", "the message is not JSON") from None
    if not isinstance(value, dict):
        raise Fault("invalid_argument", "the message is not a JSON object")
    return wire.table(value)  # pyright: ignore[reportUnknownArgumentType]


def tables(value: object) -> list[dict[str, Any]]:
    """The objects of a JSON array, of which the guest chose the type and the members."""
    return [wire.table(item) for item in cast("list[object]", value)] if isinstance(value, list) else []


class Decoder:
    """Bytes in, messages out. Holds at most one unfinished frame; a length over the cap is refused unread."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.ended = False

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Raises Fault, after which the stream is of no more use."""
        self._buffer += data
        messages: list[dict[str, Any]] = []
        start = 0
        while len(self._buffer) - start >= _HEAD.size:
            flags, length = _HEAD.unpack_from(self._buffer, start)
            self._check(flags, length)
            stop = start + _HEAD.size + length
            if len(self._buffer) < stop:
                break
            payload = bytes(self._buffer[start + _HEAD.size : stop])
            start = stop
            if flags & _END:
                self.ended = True
            else:
                messages.append(parse(payload))
        del self._buffer[:start]
        return messages

    def _check(self, flags: int, length: int) -> None:
        if self.ended:
            raise Fault("invalid_argument", "a frame came after the end of the stream")
        if flags & _COMPRESSED:
            raise Fault("unimplemented", "compressed frames are not accepted")
        if flags & ~_END:
            raise Fault("invalid_argument", f"unknown flags {flags:#x}")
        if length > MAX_FRAME_BYTES:
            raise Fault("resource_exhausted", f"a frame of {length} bytes is over {MAX_FRAME_BYTES}")

    def finish(self) -> None:
        """No more bytes will come. Raises Fault when they stopped inside a frame."""
        if self._buffer:
            raise Fault("invalid_argument", "the body ends inside a frame")


def deadline_s(header: str | None) -> float | None:
    """Seconds, from connect-timeout-ms. None: no limit. Raises Fault."""
    if header is None or header == "":
        return None
    if not (header.isascii() and header.isdigit()) or len(header) > 11 or int(header) > MAX_DEADLINE_MS:
        raise Fault("invalid_argument", "connect-timeout-ms must be a number of milliseconds")
    return int(header) / 1e3


def text(message: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """A string member; absent or null is `default`, or a Fault where there is none."""
    value = message.get(name)
    value = default if value is None else value
    if not isinstance(value, str) or "\0" in value:
        raise Fault("invalid_argument", f"{name!r} must be text")
    return value


def flag(message: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = message.get(name)
    if not isinstance(value, bool | None):
        raise Fault("invalid_argument", f"{name!r} must be true or false")
    return default if value is None else value


def number(message: Mapping[str, Any], name: str, default: int = 0) -> int:
    """A natural number below 2**32, which proto3's JSON may also send as text."""
    value = message.get(name, default)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 10:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 32:
        raise Fault("invalid_argument", f"{name!r} must be a whole number from 0 to {(1 << 32) - 1}")
    return value
