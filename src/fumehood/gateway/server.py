"""Serves an ASGI app on a socket of ours: bound by us, swept for connections that owe something, drained before it closes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import resource
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import Any, cast

import uvicorn
from uvicorn._types import ASGI3Application
from uvicorn.server import ServerState

from fumehood.agent.wire import MAX_PAYLOAD_BYTES
from fumehood.config import Config
from fumehood.gateway.connections import WebSocket, sweep
from fumehood.gateway.listen import BACKLOG, address_of, bind
from fumehood.gateway.protocol import KEEP_ALIVE_S, Http, Places

__all__ = ["address_of", "bind", "raise_nofile", "serve"]

CLOSE_S = 3.0  # for responses in progress, once everything was told to end
_SWEEP_S = 1.0
_log = logging.getLogger("uvicorn.error")


def raise_nofile() -> int:
    """Raise the soft limit of open files (a sandbox takes about 11) to the hard one; returns it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


async def serve(
    app: Callable[..., Awaitable[None]],
    sock: socket.socket,
    config: Config,
    *,
    stopping: asyncio.Event,
    drained: Callable[[], Awaitable[None]],
) -> None:
    """Serve until `stopping`, then await `drained()` while still answering, then close `sock` and every connection.

    Raises what uvicorn or `drained` raises; closed it is in any case. Signals, lifespan and the log's set-up are the caller's.
    """
    server = _Server(_uvicorn(cast("ASGI3Application", app), config))
    every_s = min(_SWEEP_S, config.header_timeout_s / 4)
    with _without_noise(), _unix_path(sock):
        async with _swept(server.server_state, every_s), _served(server, sock) as serving:
            stop = asyncio.ensure_future(stopping.wait())
            try:
                await asyncio.wait((serving, stop), return_when=asyncio.FIRST_COMPLETED)
            finally:
                stop.cancel()
            if not serving.done():
                await drained()


@contextlib.asynccontextmanager
async def _swept(state: ServerState, every_s: float) -> AsyncGenerator[None]:
    sweeping = asyncio.ensure_future(sweep(state, every_s))
    try:
        yield
    finally:
        sweeping.cancel()
        await asyncio.wait((sweeping,))


@contextlib.asynccontextmanager
async def _served(server: uvicorn.Server, sock: socket.socket) -> AsyncGenerator[asyncio.Future[None]]:
    serving = asyncio.ensure_future(server.serve(sockets=[sock]))
    try:
        yield serving
    finally:
        server.should_exit = True
        await asyncio.wait((serving,), timeout=CLOSE_S)
        for connection in list(server.server_state.connections):
            connection.transport.abort()  # its app is told that the client went away
        await serving


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield  # the caller's handlers stay


def _uvicorn(app: ASGI3Application, config: Config) -> uvicorn.Config:
    places = Places(config.max_connections, config.header_timeout_s)
    return uvicorn.Config(
        app,
        interface="asgi3",
        http=cast("Any", functools.partial(Http, places)),
        ws=WebSocket,
        ws_max_size=MAX_PAYLOAD_BYTES + (64 << 10),
        ws_per_message_deflate=False,  # a message of 16 MiB would hold the one loop that everybody shares
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=round(CLOSE_S) + 2,  # after our own aborts: what then still runs is cancelled
    )


@contextlib.contextmanager
def _unix_path(sock: socket.socket) -> Generator[None]:
    """Removes the socket's file at the end, unless somebody put another in its place."""
    path = sock.getsockname() if sock.family == socket.AF_UNIX else None
    made = os.stat(path) if path else None
    try:
        yield
    finally:
        if path and made and os.path.lexists(path) and os.path.samestat(os.lstat(path), made):
            os.unlink(path)


@contextlib.contextmanager
def _without_noise() -> Generator[None]:
    """A stream that we break off because its sandbox was killed is no error of the app."""
    _log.addFilter(_is_news)
    try:
        yield
    finally:
        _log.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return record.msg != "ASGI callable returned without completing response."
