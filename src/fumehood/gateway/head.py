"""The head of one request, judged once it is complete: what would let two readers see two requests in it is refused."""

from __future__ import annotations

import logging

import httptools

from fumehood.gateway import refusal
from fumehood.gateway.refusal import Headers, Refusal

MAX_HEAD_BYTES = 32 << 10  # of target, names and values; trailers count too
MAX_HEADERS = 100


_log = logging.getLogger("uvicorn.error")


class Refused(Exception):
    """Raised in a callback of llhttp, which keeps it as the context of its own error."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.error.message)
        self.refusal = refusal


def why(e: httptools.HttpParserError) -> Refusal:
    """What a client is told of an error that llhttp raised."""
    cause = e.__context__
    if isinstance(cause, Refused):
        return cause.refusal
    if isinstance(e, httptools.HttpParserCallbackError) and not isinstance(cause, httptools.HttpParserError):
        _log.error("the head of a request could not be handled", exc_info=e)
    return refusal.MALFORMED


def wrong_with(version: str, target: bytes, headers: Headers, *, upgrades: bool) -> Refusal | None:
    """Why a head that llhttp took is refused all the same. Names are lower case; `upgrades` as llhttp sees it."""
    hosts, is_framed, is_coded = 0, False, False
    for name, value in headers:
        if name == b"host":
            hosts += 1
        elif name == b"content-length":
            is_framed = True
        elif name == b"transfer-encoding":
            is_framed = is_coded = True
            if value.lower() != b"chunked":
                return refusal.BAD_CODING
    if version not in ("1.1", "1.0"):
        return refusal.BAD_VERSION
    if hosts > 1 or (not hosts and version == "1.1"):
        return refusal.BAD_HOST
    if not target.startswith(b"/") and not _has_path(target):
        return refusal.BAD_TARGET
    if is_coded and version == "1.0":
        return refusal.MALFORMED
    return refusal.BAD_UPGRADE if upgrades and is_framed else None  # llhttp would take the body for the next request


def _has_path(target: bytes) -> bool:
    try:
        return (httptools.parse_url(target).path or b"").startswith(b"/")
    except httptools.HttpParserInvalidURLError:
        return False
