"""One server over HTTP: requests, streamed answers and sockets on connections that are kept. Knows no sandbox.

httpcore, which httpx is made of: a request costs 0.4 ms of CPU in place of 0.65, of the 3 that a run may take in all.
No proxy, cookie or netrc of the environment is looked at: each could carry the key elsewhere.
"""

from __future__ import annotations

import json
import secrets
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import quote, urlencode

import httpcore
from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import InvalidStatus, WebSocketException

from fumehood.agent import wire
from fumehood.client import answers
from fumehood.client.address import Address
from fumehood.client.engine import Engine
from fumehood.errors import InvalidInput

CONNECT_S, ANSWER_S = 10.0, 60.0
ALIVE_S = 60.0  # a server that streams says something every 15 s
_PAGE = 100
_KEEP_S = 4.0  # less than uvicorn's 5, so that a kept connection is rarely closed under a request
_BROKEN = (httpcore.RemoteProtocolError, httpcore.ReadError, httpcore.WriteError)
_FAILED = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException)
# A run may be silent for a day; a host that is gone is noticed within a minute by the kernel's own probes.
_PROBES = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
]


class Server:
    """Belongs to the loop that it is first used in. Everything raises what the server's problem says, or ServerUnreachable."""

    def __init__(self, address: Address) -> None:
        self.address, self.url = address, address.url
        self._tls = ssl.create_default_context() if address.is_tls else None
        self._scheme, self._host = b"https" if address.is_tls else b"http", address.host.encode()
        self._pool = httpcore.AsyncConnectionPool(
            self._tls,
            max_connections=None,
            max_keepalive_connections=64,
            keepalive_expiry=_KEEP_S,
            uds=address.socket or None,
            socket_options=None if address.socket else _PROBES,
        )
        self._headers = [(b"host", address.authority.encode()), (b"user-agent", b"fumehood-python")]
        if address.api_key:
            self._headers.append((b"authorization", b"Bearer " + address.api_key.encode()))

    async def ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        once: bool = False,
        answer_s: float = ANSWER_S,
        limit_bytes: int = answers.MAX_ANSWER_BYTES,
    ) -> bytes:
        """The answer's body. `once`: an Idempotency-Key makes the one repetition after a lost connection safe."""
        async with self.stream(method, path, query=query, body=body, once=once, answer_s=answer_s) as chunks:
            return await self._whole(chunks, limit_bytes)

    async def json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        data = await self.ask(method, path, **request)
        return answers.parsed(self.url, data) if data else {}

    async def pages(self, path: str, field: str, limit: int, query: Mapping[str, Any]) -> list[dict[str, Any]]:
        """At most `limit` items of a list that comes in pages. A page without items is the last, whatever it says."""
        found: list[dict[str, Any]] = []
        after: str | None = ""
        while len(found) < limit and after is not None:
            wanted = {**query, "limit": min(_PAGE, limit - len(found)), "after": after or None}
            page = await self.json("GET", path, query=wanted)
            items: list[dict[str, Any]] = page.get(field) or []
            found += items
            after = page.get("next") if items else None
        return found[:limit]

    async def put(self, path: str, query: Mapping[str, Any], data: AsyncIterable[bytes]) -> dict[str, Any]:
        """A body that is sent as it comes. An error of `data` or a cancellation leaves it unfinished, so it does not count."""
        headers = [*self._headers, (b"transfer-encoding", b"chunked")]
        async with self._sent("PUT", self._target(path, query), headers, data, ANSWER_S, 1) as chunks:
            return answers.parsed(self.url, await self._whole(chunks, answers.MAX_ANSWER_BYTES))

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        once: bool = False,
        accept: bytes = b"*/*",
        answer_s: float = ANSWER_S,
    ) -> AsyncGenerator[AsyncIterator[bytes], None]:
        """Chunks as they come, never more than `answer_s` apart. Leaving early closes the connection."""
        content = b"" if body is None else _encoded(body)
        headers = [*self._headers, (b"accept", accept), (b"content-length", str(len(content)).encode())]
        if body is not None:
            headers.append((b"content-type", b"application/json"))
        if once:
            headers.append((b"idempotency-key", secrets.token_hex(16).encode()))
        tries = 2 if once or method == "GET" else 1
        async with self._sent(method, self._target(path, query), headers, content, answer_s, tries) as chunks:
            yield chunks

    @asynccontextmanager
    async def _sent(
        self,
        method: str,
        target: bytes,
        headers: list[tuple[bytes, bytes]],
        content: bytes | AsyncIterable[bytes],
        answer_s: float,
        tries: int,
    ) -> AsyncGenerator[AsyncIterator[bytes], None]:
        url = httpcore.URL(scheme=self._scheme, host=self._host, port=self.address.port, target=target)
        times = {"timeout": {"connect": CONNECT_S, "read": answer_s, "write": ANSWER_S, "pool": CONNECT_S}}
        request = httpcore.Request(method, url, headers=headers, content=content, extensions=times)
        with self._failures(answer_s):
            answer = await self._answered(request, tries)
        try:
            chunks = self._chunks(answer, answer_s)
            if answer.status >= 300:
                raise answers.problem(self.url, answer.status, await self._whole(chunks, answers.MAX_ANSWER_BYTES))
            yield chunks
        finally:
            await answer.aclose()

    @contextmanager
    def _failures(self, answer_s: float) -> Generator[None, None, None]:
        try:
            yield
        except httpcore.ReadTimeout:
            raise answers.unreachable(self.url, f"it said nothing for {answer_s:g} s") from None
        except _FAILED as e:
            raise answers.unreachable(self.url, str(e) or type(e).__name__) from None

    async def _chunks(self, answer: httpcore.Response, answer_s: float) -> AsyncIterator[bytes]:
        with self._failures(answer_s):
            async for chunk in answer.aiter_stream():
                yield chunk

    async def _answered(self, request: httpcore.Request, tries: int) -> httpcore.Response:
        """A connection that broke before the answer began may be one that had just been closed for its age."""
        while True:
            tries -= 1
            try:
                return await self._pool.handle_async_request(request)
            except _BROKEN:
                if not tries:
                    raise

    async def _whole(self, chunks: AsyncIterable[bytes], limit_bytes: int) -> bytes:
        data = bytearray()
        async for chunk in chunks:
            data += chunk
            if len(data) > limit_bytes:
                raise answers.not_ours(self.url, f"its answer has more than {limit_bytes} bytes")
        return bytes(data)

    async def socket(self, path: str, query: Mapping[str, Any] | None = None) -> ClientConnection:
        here, target = self.address, self._target(path, query).decode()
        options: dict[str, Any] = {
            "additional_headers": {"Authorization": f"Bearer {here.api_key}"} if here.api_key else {},
            "compression": None,
            "open_timeout": CONNECT_S,
            "close_timeout": 2.0,
            "max_size": wire.MAX_PAYLOAD_BYTES,
        }
        try:
            if here.socket:
                return await unix_connect(here.socket, f"ws://localhost{target}", **options)
            uri = f"ws{'s' if here.is_tls else ''}://{here.authority}{target}"
            # Host and port by name: a redirect to elsewhere is then refused.
            return await connect(uri, proxy=None, ssl=self._tls, host=here.host, port=here.port, **options)
        except InvalidStatus as e:
            raise answers.problem(self.url, e.response.status_code, bytes(e.response.body)) from None
        except (WebSocketException, OSError, ValueError) as e:  # TimeoutError is an OSError
            raise answers.unreachable(self.url, str(e) or f"no socket within {CONNECT_S:g} s") from None

    def _target(self, path: str, query: Mapping[str, Any] | None) -> bytes:
        text = self.address.prefix + path
        given = {k: str(v).lower() if isinstance(v, bool) else v for k, v in (query or {}).items() if v is not None}
        try:  # names that are not UTF-8 travel as the bytes that they are
            return (f"{text}?{urlencode(given, quote_via=quote, errors='surrogateescape')}" if given else text).encode()
        except UnicodeEncodeError as e:
            raise InvalidInput("text that can't be sent", cause=str(e), remediation="remove its lone surrogates") from None

    async def aclose(self) -> None:
        await self._pool.aclose()


def shared(engine: Engine, address: Address) -> Server:
    """The one of this process. In the engine's loop only."""
    return engine.shared(address, lambda: Server(address))


def piece(name: str) -> str:
    """An id as one part of a path, whatever is in it: the server is to say what is wrong with it, not a wrong route (H14)."""
    return quote(name, safe="", errors="surrogatepass").replace(".", "%2E") or "-"


def _encoded(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as e:
        raise InvalidInput("an argument that can't be sent as JSON", cause=str(e), remediation="pass plain values") from None
