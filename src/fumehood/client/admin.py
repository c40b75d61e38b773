"""A server's lists, records and figures, for whoever holds no sandbox: the command line above all."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any, Self
from urllib.parse import quote

import httpx

from fumehood import errors
from fumehood.errors import FumehoodError, InvalidInput, ServerUnreachable
from fumehood.model import MIB

MAX_ANSWER_BYTES = 64 * MIB
PAGE = 100
_BY_CODE = {c.code: c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, FumehoodError)}


class Admin:
    """One connection to a server: `http://`, `https://` or `unix:/path`. An async context manager.

    Every method raises what the server's answer says (Unauthenticated, Forbidden, NotFound, ...), else ServerUnreachable.
    """

    def __init__(self, url: str, api_key: str = "", *, timeout_s: float = 30.0) -> None:
        base, transport = _where(url)
        self.url = url
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # trust_env off: a proxy of the environment would be handed the key, and ~/.netrc could replace it.
        self._http = httpx.AsyncClient(
            base_url=base, transport=transport, headers=headers, timeout=timeout_s, follow_redirects=False, trust_env=False
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def get(self, path: str, **query: Any) -> Any:
        return await self.ask("GET", path, query=query)

    async def ask(self, method: str, path: str, *, query: dict[str, Any] | None = None, body: Any = None) -> Any:
        """The answer's JSON; None for an empty one."""
        parameters = {k: v for k, v in (query or {}).items() if v is not None}
        try:
            async with self._http.stream(method, path, params=parameters, json=body) as answer:
                data = await _bounded(answer)
        except httpx.HTTPError as e:
            raise unreachable(self.url, e) from None
        return _checked(self.url, answer, data)

    async def pages(self, path: str, field: str, limit: int, **query: Any) -> list[dict[str, Any]]:
        """At most `limit` items of a list that comes in pages."""
        found: list[dict[str, Any]] = []
        after: str | None = None
        while len(found) < limit:
            page = await self.get(path, **query, limit=min(PAGE, limit - len(found)), after=after)
            found += page[field]
            after = page.get("next")
            if not after:
                break
        return found

    async def events(self, *, everyone: bool = False) -> AsyncGenerator[dict[str, Any]]:
        """What happens from now on, as it happens. Ends when the server does."""
        query = {"all": "true"} if everyone else {}
        quiet_s = httpx.Timeout(30.0, read=60.0)  # the server sends a comment every 15 s
        try:
            async with self._http.stream("GET", "/v1/events", params=query, timeout=quiet_s) as answer:
                if answer.status_code != 200:
                    _checked(self.url, answer, await _bounded(answer))
                async for line in answer.aiter_lines():
                    if line.startswith("data:"):
                        yield json.loads(line[5:])
        except (httpx.HTTPError, ValueError) as e:
            raise unreachable(self.url, e) from None


def piece(name: str) -> str:
    """An id as one part of a path, whatever is in it: the server says what is wrong with it, not a wrong route."""
    return quote(name, safe="") or "-"


def unreachable(url: str, cause: Exception) -> ServerUnreachable:
    return ServerUnreachable(
        f"the server at {url} does not answer",
        cause=str(cause) or type(cause).__name__,
        remediation="see that it runs and that the address is right",
    )


def _where(url: str) -> tuple[str, httpx.AsyncBaseTransport | None]:
    if url.startswith("unix:/"):
        return "http://localhost", httpx.AsyncHTTPTransport(uds=url.removeprefix("unix:"))
    if not url.startswith(("http://", "https://")):
        raise InvalidInput(f"bad url {url!r}", cause="no known scheme", remediation="http://, https:// or unix:/path")
    return url.rstrip("/"), None


async def _bounded(answer: httpx.Response) -> bytes:
    data = bytearray()
    async for chunk in answer.aiter_bytes():
        data += chunk
        if len(data) > MAX_ANSWER_BYTES:
            raise httpx.ReadError(f"its answer has more than {MAX_ANSWER_BYTES} bytes")
    return bytes(data)


def _checked(url: str, answer: httpx.Response, data: bytes) -> Any:
    try:
        value = json.loads(data) if data else None
    except ValueError as e:
        raise unreachable(url, ValueError(f"status {answer.status_code}, and not JSON: {e}")) from None
    if answer.status_code < 400:
        return value
    raise _problem(url, answer.status_code, value)


def _problem(url: str, status: int, value: Any) -> FumehoodError:
    if not isinstance(value, dict) or "code" not in value:
        return unreachable(url, ValueError(f"status {status} without a problem that fumehood would send"))
    kind = _BY_CODE.get(str(value["code"]), FumehoodError)  # pyright: ignore[reportUnknownArgumentType]
    texts = {name: str(value.get(name) or "") for name in ("cause", "remediation")}  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    return kind(str(value.get("message") or value["code"]), **texts)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
