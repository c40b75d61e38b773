"""A server's lists, records and figures, for whoever holds no sandbox: the command line above all."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

from fumehood.client import answers
from fumehood.client.address import Address
from fumehood.client.server import ALIVE_S, Server, piece
from fumehood.client.sse import events

__all__ = ["Admin", "piece"]


class Admin:
    """Connections to a server: `http://`, `https://` or `unix:/path`. An async context manager.

    Every method raises what the server's answer says (Unauthenticated, Forbidden, NotFound, ...), else ServerUnreachable.
    """

    def __init__(self, url: str, api_key: str = "", *, timeout_s: float = 30.0) -> None:
        self.url, self._timeout_s = url, timeout_s
        self._server = Server(Address.read(url, api_key))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.aclose()

    async def get(self, path: str, **query: Any) -> Any:
        return await self.ask("GET", path, query=query)

    async def ask(self, method: str, path: str, *, query: dict[str, Any] | None = None, body: Any = None) -> Any:
        """The answer's JSON; None for an empty one."""
        data = await self._server.ask(method, path, query=query, body=body, answer_s=self._timeout_s)
        return answers.parsed(self.url, data) if data else None

    async def pages(self, path: str, field: str, limit: int, **query: Any) -> list[dict[str, Any]]:
        """At most `limit` items of a list that comes in pages."""
        return await self._server.pages(path, field, limit, query)

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator[AsyncIterator[dict[str, Any]]]:
        """What happens once this is entered, as it happens. Ends when the server does."""
        async with self._server.stream("GET", "/v1/events", answer_s=ALIVE_S) as chunks:
            first = await anext(chunks, b"")  # a comment, once the server has subscribed us: nothing is missed from here on

            async def all_chunks() -> AsyncIterator[bytes]:
                yield first
                async for chunk in chunks:
                    yield chunk

            yield (data async for _, data in events(self.url, all_chunks(), answers.MAX_ANSWER_BYTES))
