"""What holds for all connections together: who never reads, who never speaks. And WebSockets that bear such clients."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import cast

from uvicorn._types import ASGISendEvent
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState

from fumehood.gateway.protocol import Http

WRITE_STALL_S = 60.0
_log = logging.getLogger("uvicorn.error")


class WebSocket(WebSocketsSansIOProtocol):
    drained_count = 0

    def resume_writing(self) -> None:
        self.drained_count += 1
        super().resume_writing()

    async def send(self, message: ASGISendEvent) -> None:
        await super().send(message)
        if self.initial_response is not None and self.close_sent:
            self.handshake_complete = True  # denied, in full: uvicorn would log each as an error of the app

    def keepalive_timeout(self) -> None:
        if self.read_paused:  # the pong may lie behind messages that the app has not taken yet
            self.pong_timer, self.pending_ping_payload = None, None
            self.schedule_ping()
        else:
            super().keepalive_timeout()

    def handle_ping(self) -> None:
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()  # a client that reads nothing misses no pong; kept, they would fill the memory


@dataclass(frozen=True, slots=True)
class _Unsent:
    size_bytes: int
    drained_count: int
    since: float  # when some of it was last seen to go


async def sweep(state: ServerState, every_s: float) -> None:
    """One timer for all connections: arming one for each request would cost every request."""
    loop, stuck = asyncio.get_running_loop(), dict[Http | WebSocket, _Unsent]()
    while True:
        await asyncio.sleep(every_s)
        now, before, stuck = loop.time(), stuck, {}
        for connection in cast("list[Http | WebSocket]", list(state.connections)):
            try:
                if isinstance(connection, Http):
                    connection.check(now)
            except Exception:  # our bug must not end the sweep, which guards all the others
                _log.exception("a connection is dropped that could not be judged")
                connection.transport.abort()
            if size_bytes := connection.transport.get_write_buffer_size():
                stuck[connection] = unsent = _unsent(size_bytes, connection.drained_count, now, before.get(connection))
                if now - unsent.since > WRITE_STALL_S:
                    connection.transport.abort()


def _unsent(size_bytes: int, drained_count: int, now: float, before: _Unsent | None) -> _Unsent:
    """A buffer that is as full as before stood still, unless it was drained in between and filled again."""
    has_moved = before is None or size_bytes < before.size_bytes or drained_count > before.drained_count
    return _Unsent(size_bytes, drained_count, now if before is None or has_moved else before.since)
