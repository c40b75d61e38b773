"""HTTP/1.1 as strangers may send it: uvicorn's protocol on llhttp, with the bounds that it lacks.

llhttp refuses bare LF, folded headers, two Content-Lengths and a length beside Transfer-Encoding. Added here: the head is
judged (head.py), what the client owes has deadlines, trailers are dropped (uvicorn adds them to the headers of a request that
runs), pipelining has a bound, and a refusal never stands inside another answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, cast

import httptools
import uvicorn
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from fumehood.gateway import refusal
from fumehood.gateway.cycle import Cycle, ours
from fumehood.gateway.head import MAX_HEAD_BYTES, MAX_HEADERS, Refused, why, wrong_with
from fumehood.gateway.refusal import Refusal

MAX_PIPELINED = 8  # requests that wait for the answer before theirs; nobody needs more than one, each costs some KiB
KEEP_ALIVE_S = 10  # idle; more than the 4 s of our own client, which should be the one that closes
LINGER_S = 1.0  # a refused client may go on sending for so long: closed earlier, its kernel may drop the refusal unread
MAX_TURNED_AWAY = 128  # that linger at once; more are dropped without a word


@dataclass(slots=True)
class Places:
    """How many may be inside. `turned_away` are those that only wait for their refusal to be read."""

    max_connections: int
    header_timeout_s: float
    turned_away: int = 0


class _At(Enum):
    """Where in the client's bytes the connection is."""

    HEAD = auto()
    BODY = auto()
    BETWEEN = auto()
    DEAF = auto()  # what it sends is dropped; it ends with the answer to its last good request
    LINGER = auto()  # refused


_DEAF = (_At.DEAF, _At.LINGER)


class _Flow(FlowControl):
    def __init__(self, transport: asyncio.Transport, resumed: Callable[[], None]) -> None:
        super().__init__(transport)
        self._resumed = resumed

    def resume_reading(self) -> None:
        self._resumed()
        super().resume_reading()


class Http(HttpToolsProtocol):
    def __init__(
        self,
        places: Places,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._parser = cast("httptools.HttpRequestParser", self.parser)  # uvicorn drops its own with the connection
        self._places = places
        self._turned_away = False
        self._running: Cycle | None = None  # `cycle` is the newest, which may still wait in the pipeline
        self._at, self._since = _At.HEAD, self.loop.time()
        self.drained_count = 0  # how often its client had read most of what was buffered
        self._is_silent = True  # nothing arrived yet
        self.url = b""
        self._head_bytes = 0
        self._raw_bytes = self._piece_bytes = 0  # llhttp keeps an unfinished header to itself, so its bytes are counted too

    # -- the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        inside = len(self.connections) - self._places.turned_away
        super().connection_made(transport)
        self.flow = _Flow(transport, self._touch)
        if inside >= self._places.max_connections:
            self._turned_away = True
            self._places.turned_away += 1
            self._say(refusal.CROWDED)
            if self._places.turned_away > MAX_TURNED_AWAY:
                transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._places.turned_away -= self._turned_away
        if self._running is not None and not self._running.response_complete:
            self._running.disconnect()  # uvicorn tells only the newest request, not the one that runs before it
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._at in _DEAF:
            return
        self._unset_keepalive_if_required()
        self._is_silent, self._piece_bytes = False, len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._upgrade()
        except httptools.HttpParserError as e:
            self._refuse(why(e))
        else:
            self._raw_bytes += len(data)
            if self._at is _At.HEAD and self._raw_bytes > MAX_HEAD_BYTES:
                self._refuse(refusal.HEAD_TOO_LARGE)

    def resume_writing(self) -> None:
        self.drained_count += 1
        super().resume_writing()

    def check(self, now: float) -> None:
        """Ends the connection if what its client owes is overdue. Called every now and then."""
        waited_s = now - self._since
        if self._at is _At.LINGER and waited_s > LINGER_S:
            self.transport.abort()
        elif self._at is _At.BETWEEN and not self._is_busy() and waited_s > KEEP_ALIVE_S:
            self.transport.close()
        elif self._at in (_At.HEAD, _At.BODY) and waited_s > self._may_wait_s() and not self._holds_client():
            self._refuse(refusal.TOO_SLOW)

    def _may_wait_s(self) -> float:
        """The app may give more time for a body that is written by hand (what is typed into a program)."""
        default_s = self._places.header_timeout_s
        return self.cycle.scope.get("fumehood.pause_s", default_s) if self._at is _At.BODY else default_s

    def _holds_client(self) -> bool:
        """The client waits for us: its bytes are not read, or it asked whether to send them."""
        expects = self._at is _At.BODY and self.cycle.waiting_for_100_continue and not self.cycle.response_complete
        return self.flow.read_paused or expects

    def _touch(self) -> None:
        if self._at in (_At.HEAD, _At.BODY):
            self._since = self.loop.time()

    def _is_busy(self) -> bool:
        return self._running is not None and not self._running.response_complete

    # -- the request

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise Refused(refusal.MALFORMED)
        super().on_message_begin()
        self._head_bytes = 0
        self._at, self._since = _At.HEAD, self.loop.time()
        self._raw_bytes = -self._piece_bytes  # of the piece in which it began, only the head's own count is exact

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._head_bytes += len(url)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise Refused(refusal.HEAD_TOO_LARGE)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES or len(self.headers) >= MAX_HEADERS:
            raise Refused(refusal.HEAD_TOO_LARGE)
        if self._at is _At.HEAD:  # else it is a trailer
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        version, upgrades = self._parser.get_http_version(), self._parser.should_upgrade()
        if wrong := wrong_with(version, self.url, self.headers, upgrades=upgrades):
            raise Refused(wrong)
        super().on_headers_complete()
        self._at, self._since = _At.BODY, self.loop.time()

    def on_body(self, body: bytes) -> None:
        if not self.cycle.response_complete:  # else it is dropped, for header_timeout_s in all
            self._since = self.loop.time()
        super().on_body(body)
        if self.pipeline and len(self.cycle.body) > HIGH_WATER_LIMIT + self._piece_bytes:
            raise Refused(refusal.MALFORMED)  # its turn has not come, and the request before it keeps the connection read

    def on_message_complete(self) -> None:
        self._at, self._since = _At.BETWEEN, self.loop.time()
        super().on_message_complete()

    def _upgrade(self) -> None:
        if not self._should_upgrade():  # such as curl --http2: answered as HTTP/1.1, and closed
            self._end_after_answers()
        elif self._is_busy() or not all(value.isascii() for _, value in self.headers):
            self._refuse(refusal.BAD_UPGRADE)  # websockets would answer other letters by a 500
        else:
            self.handle_websocket_upgrade()
            if not getattr(self.transport.get_protocol(), "handshake_initiated", True):
                self.transport.write(refusal.BAD_UPGRADE.response(self.server_state.default_headers))
                self.transport.close()

    # -- answers

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = ours(cycle)
        super()._start_asgi_task(self._running, app)

    def on_response_complete(self) -> None:
        if self._at is _At.BETWEEN:
            self._since = self.loop.time()
        super().on_response_complete()

    def _refuse(self, because: Refusal) -> None:
        """Answer what is being received by a refusal, unless that would stand inside or before another answer."""
        is_body = self._at is _At.BODY
        running = self._running
        if not is_body and not self._is_busy():
            self._say(because)
        elif running is None or not is_body:
            self._end_after_answers()
        elif self.cycle is not running:
            self.pipeline.popleft()
            self._end_after_answers()
        elif running.response_started:
            self.transport.close()
        else:
            running.disconnect()
            self._say(because)

    def _end_after_answers(self) -> None:
        self._at = _At.DEAF
        last = self.pipeline[0][0] if self.pipeline else self._running
        if last is not None:
            last.keep_alive = False

    def _say(self, because: Refusal) -> None:
        self._at, self._since = _At.LINGER, self.loop.time()
        if self._is_silent and because is refusal.TOO_SLOW:  # it never asked, so it is owed no answer
            self.transport.close()
        elif not self.transport.is_closing():
            to_head = bool(self.url) and self._parser.get_method() == b"HEAD"
            self.transport.write(because.response(self.server_state.default_headers, to_head=to_head))
            self.transport.write_eof()
