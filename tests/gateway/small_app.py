"""An ASGI app with the answers that a server can go wrong with, served on a socket of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from fuzz_sockets import connect

from fumehood.config import Config
from fumehood.gateway.server import address_of, bind, serve

CLIENT_S = 10.0  # a client in these tests never waits longer
Message = dict[str, Any]
Receive, Send = Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]


@dataclass
class App:
    """One method for each path; any other path is /healthz. `gone` counts the requests whose client went away."""

    release: asyncio.Event = field(default_factory=asyncio.Event)
    held: int = 0
    gone: int = 0
    scopes: list[Message] = field(default_factory=list)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        if scope["type"] == "websocket":
            return await self._websocket(scope, receive, send)
        answer = getattr(self, "_" + scope["path"].strip("/"), self._healthz)
        await answer(receive, send)

    async def _healthz(self, receive: Receive, send: Send) -> None:
        await _answer(send, b'{"status":"ok"}')

    async def _echo(self, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone += 1
                return
            body, more = body + message["body"], message["more_body"]
        await _answer(send, body)

    async def _patient(self, receive: Receive, send: Send) -> None:
        self.scopes[-1]["fumehood.pause_s"] = 60.0
        await self._echo(receive, send)

    async def _late(self, receive: Receive, send: Send) -> None:
        """Asks for the body only once released."""
        await self.release.wait()
        await self._echo(receive, send)

    async def _hold(self, receive: Receive, send: Send) -> None:
        """Answers once released; meanwhile it listens whether its client is there."""
        self.held += 1
        leaving = asyncio.ensure_future(self._leaving(receive))
        releasing = asyncio.ensure_future(self.release.wait())
        await asyncio.wait((leaving, releasing), return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        releasing.cancel()
        if not (leaving.done() and not leaving.cancelled()):
            await _answer(send, b"held")

    async def _leaving(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone += 1

    async def _stream(self, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in (b"one", b"two", b""):
            await send({"type": "http.response.body", "body": piece, "more_body": bool(piece)})

    async def _big(self, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        leaving = asyncio.ensure_future(self._leaving(receive))
        while not leaving.done():
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        await leaving

    async def _boom(self, receive: Receive, send: Send) -> None:
        raise RuntimeError("the secret of the traceback")

    async def _cut(self, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    async def _websocket(self, scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        if scope["path"] == "/denied":
            await send({"type": "websocket.http.response.start", "status": 401, "headers": []})
            return await send({"type": "websocket.http.response.body", "body": b"no"})
        await send({"type": "websocket.accept"})
        if scope["path"] == "/late":
            await self.release.wait()
        while scope["path"] == "/push":
            await send({"type": "websocket.send", "bytes": bytes(1 << 20)})
        try:
            while (message := await receive())["type"] == "websocket.receive":
                await send({"type": "websocket.send", "text": message.get("text") or str(len(message["bytes"]))})
        finally:
            self.gone += 1


async def _answer(send: Send, body: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Client:
    """One connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> Client:
        self.writer.write(data)
        await self.writer.drain()
        return self

    async def until(self, mark: bytes) -> bytes:
        async with asyncio.timeout(CLIENT_S):
            return await self.reader.readuntil(mark)

    async def rest(self) -> bytes:
        """All until the server closes."""
        async with asyncio.timeout(CLIENT_S):
            return await self.reader.read()

    async def close(self) -> None:
        self.writer.transport.abort()
        await asyncio.gather(self.writer.wait_closed(), return_exceptions=True)


@dataclass
class Served:
    app: App
    address: str
    loop: asyncio.AbstractEventLoop
    stopping: asyncio.Event
    serving: asyncio.Future[None]
    clients: list[Client] = field(default_factory=list)

    async def client(self) -> Client:
        self.clients.append(Client(*await connect(self.address)))
        return self.clients[-1]

    async def ask(self, data: bytes) -> bytes:
        """What comes back until the server closes."""
        return await (await (await self.client()).send(data)).rest()

    async def hold(self, more: bytes = b"") -> Client:
        """A request that is held, and what follows it on its connection."""
        client = await (await self.client()).send(b"GET /hold HTTP/1.1\r\nHost: here\r\n\r\n" + more)
        await until(lambda: self.app.held > 0)
        return client

    def release(self) -> None:
        self.loop.call_soon_threadsafe(self.app.release.set)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.stopping.set)


async def until(done: Callable[[], bool]) -> None:
    for _ in range(round(CLIENT_S * 100)):
        if done():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come about")


async def _at_once() -> None: ...


@contextmanager
def _uvloop() -> Generator[asyncio.AbstractEventLoop]:
    """As in production, and in a thread of its own, so that neither side waits for the other's turn."""
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@asynccontextmanager
async def served(
    home: Path, listen: str = "127.0.0.1:0", *, drained: Callable[[], Awaitable[None]] = _at_once, **settings: Any
) -> AsyncGenerator[Served]:
    app, sock, stopping = App(), bind(listen), asyncio.Event()
    config = Config(state_dir=home, run_dir=home, **settings)
    with _uvloop() as loop:
        serving = asyncio.run_coroutine_threadsafe(serve(app, sock, config, stopping=stopping, drained=drained), loop)
        server = Served(app, address_of(sock, listen), loop, stopping, asyncio.wrap_future(serving))
        try:
            yield server
        finally:
            for client in server.clients:
                await client.close()
            server.stop()
            async with asyncio.timeout(2 * CLIENT_S):
                await server.serving
