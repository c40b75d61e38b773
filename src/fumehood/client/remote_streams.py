"""The streams of a sandbox behind a server: sockets, downloads, uploads and lists, all as the frames of agent/wire.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, Any

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from fumehood.agent import wire
from fumehood.client import answers
from fumehood.errors import Unsupported

if TYPE_CHECKING:
    from fumehood.client.remote_link import RemoteLink

_BATCH = 500  # entries in a frame, as the agent has them
_AHEAD = 8  # chunks of an upload that wait for the network


class RemoteStream:
    """What all of them share. One reader at a time: a second one waits for its turn, as threads of a caller may."""

    def __init__(self, link: RemoteLink) -> None:
        self._link, self.ok = link, dict[str, Any]()
        self._ended, self._reading = False, asyncio.Lock()

    async def start(self) -> None: ...

    def __aiter__(self) -> AsyncIterator[wire.Frame]:
        return self

    async def __anext__(self) -> wire.Frame:
        async with self._reading:
            frame = None if self._ended else await self._next()
        if frame is None:
            await self.cancel()
            raise StopAsyncIteration
        return frame

    async def _next(self) -> wire.Frame | None:
        """None when it ended well; `ok` is set then."""
        raise NotImplementedError

    async def result(self) -> dict[str, Any]:
        async for _ in self:
            pass
        return self.ok

    async def send(self, data: bytes) -> None:
        raise Unsupported("this stream takes no input", remediation="read it")

    async def close_input(self) -> None:
        raise Unsupported("this stream takes no input", remediation="read it")

    async def cancel(self) -> None:
        self._ended = True


class Socket(RemoteStream):
    """A verb socket of the HTTP API. Closing it stops the following; a program goes on."""

    def __init__(
        self, link: RemoteLink, path: str, *, query: dict[str, Any] | None = None, first: dict[str, Any] | None = None
    ) -> None:
        super().__init__(link)
        self._path, self._query, self._first = path, query, first
        self._socket: ClientConnection

    async def start(self) -> None:
        self._socket = await self._link.server.socket(self._link.base + self._path, self._query)
        self._link.sockets.add(self)
        if self._first is not None:
            await self._send(json.dumps(self._first))

    async def _next(self) -> wire.Frame | None:
        try:
            message = await self._socket.recv()
        except ConnectionClosed as e:
            if self._ended:
                return None
            raise self._broken(e) from None
        if isinstance(message, bytes):
            return wire.Frame(0, wire.DATA, message or bytes([wire.STDOUT]))
        return self._event(answers.parsed(self._link.server.url, message.encode()))

    def _event(self, message: dict[str, Any]) -> wire.Frame | None:
        if "problem" in message:
            self._ended = True
            raise answers.problem_from(self._link.server.url, wire.table(message["problem"]))
        if "end" in message:
            self._ended, self.ok = True, wire.table(message["end"])
            return None
        return wire.Frame(0, wire.EVENT, json.dumps(message.get("event")).encode())

    async def send(self, data: bytes) -> None:
        for start in range(0, len(data), wire.CHUNK_BYTES):
            await self._send(bytes([wire.STDIN]) + data[start : start + wire.CHUNK_BYTES])

    async def close_input(self) -> None:
        await self._send('{"close_input": true}')

    async def _send(self, message: str | bytes) -> None:
        try:
            await self._socket.send(message)
        except ConnectionClosed as e:
            if not self._ended:  # as on the wire: what a program that has ended no longer reads is dropped
                raise self._broken(e) from None

    def _broken(self, error: ConnectionClosed) -> Exception:
        return answers.unreachable(self._link.server.url, f"the stream broke: {error}")

    async def cancel(self) -> None:
        await super().cancel()
        self._link.sockets.discard(self)
        await self._socket.close()


class Download(RemoteStream):
    def __init__(self, link: RemoteLink, query: dict[str, Any]) -> None:
        super().__init__(link)
        self._chunks, self._size = self._body(query), 0

    async def _body(self, query: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        async with self._link.server.stream("GET", self._link.base + "/files", query=query) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _next(self) -> wire.Frame | None:
        async for chunk in self._chunks:
            self._size += len(chunk)
            return wire.Frame(0, wire.DATA, bytes([wire.FILE]) + chunk)
        self.ok = {"size": self._size}
        return None

    async def cancel(self) -> None:
        await super().cancel()
        await self._chunks.aclose()


class Upload(RemoteStream):
    """The request runs beside its caller, who sends at the pace of the network: `_AHEAD` chunks wait, no more."""

    def __init__(self, link: RemoteLink, query: dict[str, Any]) -> None:
        super().__init__(link)
        self._waiting: asyncio.Queue[bytes | None] = asyncio.Queue(_AHEAD)
        self._request = asyncio.create_task(link.server.put(link.base + "/files", query, self._body()))

    async def _body(self) -> AsyncGenerator[bytes, None]:
        while (chunk := await self._waiting.get()) is not None:
            yield chunk

    async def _next(self) -> wire.Frame | None:
        self.ok = {"entry": await self._request}
        return None

    async def send(self, data: bytes) -> None:
        for start in range(0, len(data), wire.CHUNK_BYTES):
            await self._put(data[start : start + wire.CHUNK_BYTES])

    async def close_input(self) -> None:
        await self._put(None)

    async def _put(self, chunk: bytes | None) -> None:
        """An answer before the end is a refusal, which result() raises; nobody takes what is sent after it."""
        putting = asyncio.create_task(self._waiting.put(chunk))
        await asyncio.wait({putting, self._request}, return_when=asyncio.FIRST_COMPLETED)
        putting.cancel()

    async def cancel(self) -> None:
        await super().cancel()
        if not self._request.done():
            self._request.cancel()
            await asyncio.wait({self._request})


class Listing(RemoteStream):
    def __init__(self, link: RemoteLink, query: dict[str, Any]) -> None:
        super().__init__(link)
        self._query, self._entries = query, list[Any]()

    async def start(self) -> None:
        entries: list[Any] | None = (await self._link.ask("GET", "/files/list", query=self._query)).get("entries")
        self._entries = entries or []
        self.ok = {"count": len(self._entries)}

    async def _next(self) -> wire.Frame | None:
        batch, self._entries = self._entries[:_BATCH], self._entries[_BATCH:]
        return wire.Frame(0, wire.EVENT, json.dumps({"type": "entries", "entries": batch}).encode()) if batch else None
