"""The head of one request, judged as it arrives: its size, and what would let two readers see two requests in it."""

from __future__ import annotations

import httptools

from fumehood.gateway import refusal
from fumehood.gateway.refusal import Refusal

MAX_HEAD_BYTES = 32 << 10
MAX_HEADERS = 100


class Refused(Exception):
    """Goes through llhttp, which keeps it as the context of its own error."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.error.message)
        self.refusal = refusal


class Head:
    """Target, names and values count, and so do trailers. Every method raises Refused."""

    def __init__(self) -> None:
        self.target = b""
        self._bytes = self._headers = self._hosts = 0
        self._framing = set[bytes]()

    def add_target(self, piece: bytes) -> None:
        self.target += piece
        self._count(len(piece))

    def add(self, name: bytes, value: bytes) -> None:
        self._headers += 1
        self._count(len(name) + len(value))
        name = name.lower()
        self._hosts += name == b"host"
        if name in (b"content-length", b"transfer-encoding"):
            self._framing.add(name)
            if name == b"transfer-encoding" and value.lower() != b"chunked":
                raise Refused(refusal.BAD_CODING)

    def add_trailer(self, name: bytes, value: bytes) -> None:
        self._headers += 1
        self._count(len(name) + len(value))

    def _count(self, size_bytes: int) -> None:
        self._bytes += size_bytes
        if self._bytes > MAX_HEAD_BYTES or self._headers > MAX_HEADERS:
            raise Refused(refusal.HEAD_TOO_LARGE)

    def end(self, version: str, *, upgrades: bool) -> None:
        if version not in ("1.1", "1.0"):
            raise Refused(refusal.BAD_VERSION)
        if self._hosts > 1 or (not self._hosts and version == "1.1"):
            raise Refused(refusal.BAD_HOST)
        if not _is_path(self.target):
            raise Refused(refusal.BAD_TARGET)
        if version == "1.0" and b"transfer-encoding" in self._framing:
            raise Refused(refusal.MALFORMED)
        if upgrades and self._framing:  # llhttp would take the body for the next request
            raise Refused(refusal.BAD_UPGRADE)


def _is_path(target: bytes) -> bool:
    if target.startswith(b"/"):
        return True
    try:
        return (httptools.parse_url(target).path or b"").startswith(b"/")
    except httptools.HttpParserInvalidURLError:
        return False
