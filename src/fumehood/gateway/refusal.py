"""What the server itself says, below any app: requests that it does not take, as problem documents (RFC 9457)."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus

from fumehood.errors import CapacityExceeded, FumehoodError, InvalidInput, Unsupported
from fumehood.gateway import problems

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Refusal:
    status: int
    error: FumehoodError
    retry_after_s: int | None = None

    def parts(self) -> tuple[Headers, bytes]:
        """Headers and body. The connection ends with it: what follows on it could no longer be told from this request."""
        request_id = secrets.token_hex(8)
        body = json.dumps(problems.form(self.error, self.status, request_id)).encode()
        headers = [
            (b"content-type", problems.MEDIA_TYPE.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", request_id.encode()),
            (b"connection", b"close"),
        ]
        if self.retry_after_s is not None:
            headers.append((b"retry-after", str(self.retry_after_s).encode()))
        return headers, body

    def response(self, common: Iterable[tuple[bytes, bytes]], *, to_head: bool = False) -> bytes:
        """The whole response, with the headers that all have in `common`."""
        headers, body = self.parts()
        lines = b"".join(b"%b: %b\r\n" % header for header in [*common, *headers])
        return b"HTTP/1.1 %d %b\r\n%b\r\n%b" % (
            self.status,
            HTTPStatus(self.status).phrase.encode(),
            lines,
            b"" if to_head else body,
        )


def _invalid(status: int, message: str, cause: str, remediation: str) -> Refusal:
    return Refusal(status, InvalidInput(message, cause=cause, remediation=remediation))


MALFORMED = _invalid(
    400,
    "the request is not HTTP/1.1",
    "its bytes break the protocol's grammar, or its length is given twice or in two ways",
    "send it with an HTTP client library, or look at the proxy in between",
)
BAD_HOST = _invalid(400, "the request names no host, or several", "HTTP/1.1 wants one Host header", "send exactly one")
BAD_TARGET = _invalid(400, "the request's target is no path", "only paths are served here: this is no proxy", "ask for /v1/...")
TOO_SLOW = _invalid(
    408, "the request came too slowly", "no more of it arrived in time", "send it without pauses; header_timeout_s is the bound"
)
HEAD_TOO_LARGE = _invalid(
    431, "the request's headers are too large", "over 32 KiB, or over 100 headers", "send less in headers; bodies may be large"
)
BAD_CODING = Refusal(
    501,
    Unsupported("this transfer coding is not served", cause="only chunked is", remediation="send it chunked or whole"),
)
BAD_UPGRADE = Refusal(
    501,
    Unsupported(
        "the connection can't be upgraded so",
        cause="the only upgrade is from a GET without a body, in ASCII, to a WebSocket",
        remediation="use HTTP/1.1 without Upgrade (Java's HttpClient: version(HTTP_1_1))",
    ),
)
BAD_VERSION = Refusal(
    505, Unsupported("this version of HTTP is not served", cause="HTTP/1.1 and HTTP/1.0 are", remediation="use HTTP/1.1")
)
CROWDED = Refusal(
    503,
    CapacityExceeded(
        "too many connections", cause="max_connections are open", remediation="come again soon, and keep connections open"
    ),
    retry_after_s=1,
)
FAILED = Refusal(
    500,
    FumehoodError(
        "the server failed to answer", cause="a bug of the server", remediation="report it; the server's log has the traceback"
    ),
)
