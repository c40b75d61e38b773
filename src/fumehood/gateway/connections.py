"""What holds for all connections together: who never reads, who never speaks. And WebSockets that bear such clients."""

from __future__ import annotations

import asyncio
import logging

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState

from fumehood.gateway.protocol import Http

WRITE_STALL_S = 60.0
_log = logging.getLogger("uvicorn.error")


class WebSocket(WebSocketsSansIOProtocol):
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


async def sweep(state: ServerState, every_s: float) -> None:
    """One timer for all connections: arming one for each request would cost every request."""
    loop, unsent = asyncio.get_running_loop(), dict[asyncio.Transport, tuple[int, float]]()
    while True:
        await asyncio.sleep(every_s)
        now, before, unsent = loop.time(), unsent, {}
        for connection in list(state.connections):
            try:
                if isinstance(connection, Http):
                    connection.check(now)
            except Exception:  # our bug must not end the sweep, which guards all the others
                _log.exception("a connection is dropped that could not be judged")
                connection.transport.abort()
            transport = connection.transport
            if size_bytes := transport.get_write_buffer_size():
                unsent[transport] = stuck = _stuck(size_bytes, now, before.get(transport))
                if now - stuck[1] > WRITE_STALL_S:
                    transport.abort()


def _stuck(size_bytes: int, now: float, before: tuple[int, float] | None) -> tuple[int, float]:
    """Unsent bytes, and since when they have not become fewer."""
    return (size_bytes, before[1] if before and size_bytes >= before[0] else now)
