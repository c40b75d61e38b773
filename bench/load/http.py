"""The generator's HTTP/1.1 client: keep-alive connections, httptools as the parser, nothing else on the hot path.

A general client costs about a millisecond of CPU for each request, which on two processors would be part of the figure.
Its own ceiling is measured in every run against /healthz and published beside the figures.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import httptools

IDLE_S = 2.0  # servers close what idles for longer (uvicorn: 5 s); a request that meets that close proves nothing about them
MAX_BODY = 64 << 20  # a server that sends more is broken, and the generator must not become the one that dies of it


class Gone(Exception):
    """The server closed or reset the connection before its answer was whole."""


@dataclass
class Reply:
    """`body` is whole, or for a stream what came so far."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: bytearray = field(default_factory=bytearray)

    def json(self) -> Any:
        return json.loads(self.body)


class Connection(asyncio.Protocol):
    """One request at a time. After abort() or Gone it is of no more use."""

    def __init__(self) -> None:
        self.open = False
        self.used_at = time.monotonic()
        self._transport: asyncio.Transport | None = None
        self._clear()

    def _clear(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._reply = Reply()
        self.done = False
        self._news = asyncio.Event()

    # -- asyncio.Protocol
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self.open = cast(asyncio.Transport, transport), True  # uvloop's is one by its methods only

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self._news.set()

    # -- httptools
    def on_header(self, name: bytes, value: bytes) -> None:
        self._reply.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._reply.status = self._parser.get_status_code()
        self._news.set()

    def on_body(self, data: bytes) -> None:
        self._reply.body += data
        self._news.set()
        if len(self._reply.body) > MAX_BODY:
            self.abort()

    def on_message_complete(self) -> None:
        self.done = True
        self.open &= self._parser.should_keep_alive()
        self._news.set()

    # -- requests
    def abort(self) -> None:
        """As a client that died: a reset, not a farewell."""
        self.open = False
        if self._transport:
            self._transport.abort()
        self._news.set()

    def send(self, head: bytes, body: bytes) -> None:
        self._clear()
        if self._transport is None or self._transport.is_closing():
            raise Gone("the connection was closed between two requests")
        self._transport.write(b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body))

    async def reply(self) -> Reply:
        async for _ in self.pieces():
            pass
        return self._reply

    async def pieces(self) -> AsyncIterator[Reply]:
        """The reply again each time when it has grown. Raises Gone."""
        while not self.done:
            if self._transport is None or self._transport.is_closing():
                raise Gone("the connection ended before the answer did")
            await self._news.wait()
            self._news.clear()
            yield self._reply


class Client:
    """As many connections as there are requests at once, each used again. `key` is sent with every request."""

    def __init__(self, host: str, port: int, key: str = "") -> None:
        self._address = (host, port)
        self._fixed = f"Host: {host}:{port}\r\n" + (f"Authorization: Bearer {key}\r\n" if key else "")
        self._idle: list[Connection] = []
        self.opened = 0

    async def take(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.open and time.monotonic() - connection.used_at < IDLE_S:
                return connection
            connection.abort()
        self.opened += 1
        return (await asyncio.get_running_loop().create_connection(Connection, *self._address))[1]

    def give(self, connection: Connection) -> None:
        if connection.open and connection.done:
            connection.used_at = time.monotonic()
            self._idle.append(connection)
        else:
            connection.abort()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().abort()

    def head(self, method: str, path: str, headers: Mapping[str, str]) -> bytes:
        extra = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"{method} {path} HTTP/1.1\r\n{self._fixed}{extra}".encode("latin-1")

    @asynccontextmanager
    async def sent(self, method: str, path: str, body: Any = None, **headers: str) -> AsyncGenerator[Connection]:
        """A connection on which the request is on its way; closed unless its answer was read to the end."""
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        kind = {} if body is None or isinstance(body, bytes) else {"Content-Type": "application/json"}
        connection = await self.take()
        try:
            connection.send(self.head(method, path, kind | {k.replace("_", "-"): v for k, v in headers.items()}), raw)
            yield connection
        except BaseException:
            connection.abort()
            raise
        finally:
            self.give(connection)

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """`body`: bytes are sent as they are, anything else as JSON. Raises Gone and OSError; never for a status."""
        async with self.sent(method, path, body, **headers) as connection:
            return await connection.reply()
