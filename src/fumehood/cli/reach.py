"""Which server a verb talks to: the one that was named, else the one that `fumehood serve` left word of.

`state_dir/server.json` holds that server's address and a key of the user who runs it. The server keeps the file locked as
long as it lives, so that a file of a dead one is known as stale even when its pid or its port is somebody else's by now:
the key must not be shown to whoever took the port.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fumehood.errors import InvalidInput, ServerUnreachable

if TYPE_CHECKING:
    from fumehood.client.admin import Admin
    from fumehood.client.sandbox import AsyncSandbox

FILE = "server.json"
UrlOption = Annotated[str | None, typer.Option("--url", help="The server; default FUMEHOOD_URL, else the one that runs here.")]
KeyOption = Annotated[str | None, typer.Option("--api-key", help="Its key; default FUMEHOOD_API_KEY, which ps does not show.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@dataclass(frozen=True, slots=True)
class Address:
    url: str
    api_key: str


class Announcement:
    """The file of the running server, 0600 from its first byte. `remove()` at the end; a crash leaves it unlocked."""

    def __init__(self, state_dir: Path, url: str, api_key: str) -> None:
        self._path = state_dir / FILE
        part = state_dir / f".{FILE}.{os.getpid()}"
        part.unlink(missing_ok=True)
        self._fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        os.write(self._fd, json.dumps({"url": url, "api_key": api_key, "pid": os.getpid()}).encode() + b"\n")
        part.replace(self._path)

    def remove(self) -> None:
        """While the store is still held: no other server can have announced itself here."""
        self._path.unlink(missing_ok=True)
        os.close(self._fd)


def announced(state_dir: Path) -> Address | None:
    """The server that runs with this state directory; None when there is no file or its server is gone."""
    try:
        fd = os.open(state_dir / FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            found = json.loads(file.read(65_536))
            return Address(found["url"], found["api_key"])
    return None


async def find(url: str | None, api_key: str | None) -> Address | None:
    """Options beat the environment beats the local file. None: nothing was named and no server runs here."""
    from fumehood.config import Config

    config = Config.load()
    if url or config.url:
        return Address(url or config.url, config.api_key if api_key is None else api_key)
    here = announced(config.state_dir)
    if here is None or not await _answers(here):
        return None
    return here if api_key is None else Address(here.url, api_key)


async def _answers(server: Address) -> bool:
    from fumehood.client.admin import Admin

    async with Admin(server.url, timeout_s=5.0) as admin:
        try:
            return (await admin.get("/healthz")).get("status") == "ok"
        except ServerUnreachable:
            return False


async def server(url: str | None, api_key: str | None) -> Address:
    """Raises ServerUnreachable when there is none to be found."""
    found = await find(url, api_key)
    if found is None:
        cause = "neither --url nor FUMEHOOD_URL names one, and none runs with this user's state directory"
        remedy = "start one with fumehood serve; one of another user needs FUMEHOOD_URL and FUMEHOOD_API_KEY"
        raise ServerUnreachable("there is no server", cause=cause, remediation=remedy)
    return found


@asynccontextmanager
async def admin(url: str | None, api_key: str | None, *, timeout_s: float = 30.0) -> AsyncGenerator[Admin]:
    from fumehood.client.admin import Admin

    found = await server(url, api_key)
    async with Admin(found.url, found.api_key, timeout_s=timeout_s) as opened:
        yield opened


async def box(sandbox_id: str, url: str | None, api_key: str | None) -> AsyncSandbox:
    """A sandbox that lives in the server; closing it leaves it there."""
    from fumehood.client.sandbox import AsyncSandbox

    found = await server(url, api_key)
    return await AsyncSandbox.connect(sandbox_id, url=found.url, api_key=found.api_key)


async def transport(url: str | None, api_key: str | None, local: bool) -> dict[str, Any]:
    """Keyword arguments of AsyncSandbox: the server that was named or runs here, else this process."""
    if local and url:
        raise InvalidInput("--local and --url", cause="they exclude each other", remediation="give one of them")
    if local:
        from fumehood.config import Config

        return {"config": dataclasses.replace(Config.load(), url="")}
    found = await find(url, api_key)
    return {"url": found.url, "api_key": found.api_key} if found else {}
