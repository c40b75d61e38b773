"""`fumehood serve`: the server, from its socket to its last sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import ipaddress
import logging
import os
import signal
import sys
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fumehood import __version__
from fumehood.cli import exits, reach, show
from fumehood.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    import socket

    from fumehood.config import Config
    from fumehood.gateway.auth import Authenticator
    from fumehood.gateway.door import Door
    from fumehood.model import Protection
    from fumehood.service import Service

_log = logging.getLogger("fumehood.serve")
Signals = tuple[asyncio.Event, asyncio.Event]  # set by the first, and by the second


def serve(
    listen: Annotated[str | None, typer.Option(help="HOST:PORT (port 0: any free one) or unix:/path.")] = None,
    tier: Annotated[str | None, typer.Option(help="The tier where a request names none.")] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Ask for no keys: on loopback or a Unix socket only.")] = False,
) -> None:
    """Serve sandboxes over HTTP: our own API, E2B's and MCP, on one port."""
    exits.drive(_serve(listen, tier, no_auth), run=_on_uvloop)


def _on_uvloop(work: Coroutine[Any, Any, int]) -> int:
    try:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(exits.until_terminated(work))
    except ModuleNotFoundError as missing:
        package = (missing.name or "a package").partition(".")[0]
        raise Unsupported(
            f"{package} is not installed",
            cause="the server needs it, by the extra fumehood[server]",
            remediation="in the checkout: pip install '.[server]'",
        ) from None
    finally:
        work.close()  # where it never began


async def _serve(listen: str | None, tier: str | None, no_auth: bool) -> int:
    from fumehood.gateway.app import create_app
    from fumehood.gateway.server import address_of, bind, raise_nofile
    from fumehood.service import Service

    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    config = _config(listen, tier)
    _refuse_open_doors(config, no_auth)
    raise_nofile()
    sock = bind(config.listen)
    with sock:
        async with await Service.open(config) as service:
            url, signals = address_of(sock, config.listen), _signals()
            with _announced(config, service, url, no_auth) as authenticate:
                await _until_stopped(service, sock, url, functools.partial(create_app, service, authenticate), signals)
    _say("stopped")
    return 0


def _config(listen: str | None, tier: str | None) -> Config:
    from fumehood.config import Config

    given = {name: value for name, value in (("listen", listen), ("tier", tier)) if value is not None}
    return dataclasses.replace(Config.load(), **given)


def _refuse_open_doors(config: Config, no_auth: bool) -> None:
    """Raises InvalidInput: beyond this machine nobody is served without a key, nor with one that can be guessed (H14)."""
    from fumehood.gateway.auth import check_strength

    if config.server_key:
        check_strength(config.server_key)
    if no_auth and not _is_here(config.listen):
        raise InvalidInput(
            f"--no-auth on {config.listen}",
            cause="without keys, whoever reaches the port is an admin",
            remediation="listen on 127.0.0.1 or unix:/path, or make keys with fumehood keys create",
        )


def _is_here(listen: str) -> bool:
    if listen.startswith("unix:"):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def _announced(config: Config, service: Service, url: str, no_auth: bool) -> Generator[Authenticator]:
    """Word for the command line of the same user; taken back while the store is still held."""
    from fumehood.gateway.auth import Authenticator, local_key

    key = "" if no_auth else local_key()
    keys = tuple(filter(None, (key, config.server_key)))
    word = reach.Announcement(config.state_dir, url, key)
    try:
        _welcome(service, url, config.state_dir / reach.FILE, no_auth)
        yield Authenticator(service, keys, open_here=no_auth)
    finally:
        word.remove()


def _welcome(service: Service, url: str, file: Path, no_auth: bool) -> None:
    _say(f"fumehood {__version__} serves on {url} (pid {os.getpid()})")
    if no_auth:
        _say("no key is asked for: whoever is on this machine is an admin")
    else:
        _say(f"key: {file}, where this user's commands find it; for others: fumehood keys create")
    if not _is_here(service.config.listen) and url.startswith("http:"):
        _say("warning: keys cross the network in the clear; put a TLS proxy before it (docs/operating.md)")
    _say(f"tier {service.tier.tier}: {service.tier.why}")
    _say(_enforced(service.protections()))
    if lost := service.store.recovered.sandboxes:
        _say(f"the last server was killed: {lost} sandbox(es) of it were ended")
    _say("Ctrl-C stops it")


def _enforced(protections: Sequence[Protection]) -> str:
    """`enforced: 20 protections; off: block-io (see fumehood doctor)`: by name only what is not as it should be."""
    by_state = defaultdict[str, list[str]](list)
    for protection in protections:
        by_state[str(protection.state)].append(protection.name)
    lacking = [f"{state}: {', '.join(by_state[state])}" for state in ("degraded", "off") if by_state[state]]
    return "; ".join([f"enforced: {len(by_state['enforced'])} protections", *lacking]) + " (see fumehood doctor)"


async def _until_stopped(
    service: Service, sock: socket.socket, url: str, make_app: Callable[[Any], Door], signals: Signals
) -> None:
    from fumehood.gateway.server import serve as serve_http

    stopping, hurry = signals

    async def drained() -> None:
        _say(f"draining: at most {service.config.grace_s:g} s; Ctrl-C again stops at once")
        await _drain(service, hurry)
        service.events.close()
        await sessions.aclose()  # while we answer: each ends its sandboxes as a client of ours

    async with contextlib.AsyncExitStack() as sessions:
        mcp = await sessions.enter_async_context(_mcp(service, url))
        await serve_http(make_app(mcp), sock, service.config, stopping=stopping, drained=drained)


async def _drain(service: Service, hurry: asyncio.Event) -> None:
    draining = asyncio.create_task(service.drain(service.config.grace_s))
    hurrying = asyncio.create_task(hurry.wait())
    await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
    hurrying.cancel()
    if draining.done():
        return draining.result()
    draining.cancel()
    await service.drain(0)


def _signals() -> Signals:
    first, second = asyncio.Event(), asyncio.Event()

    def signalled() -> None:
        (second if first.is_set() else first).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signalled)
    return first, second


@contextlib.asynccontextmanager
async def _mcp(service: Service, url: str) -> AsyncGenerator[Any]:
    """The MCP server is a caller of our own API, with the key that its client shows. None where its SDK is not installed."""
    try:
        from fumehood.mcp.server import http_app
    except ModuleNotFoundError:
        _log.warning("no MCP at /mcp; to have it, in the checkout: pip install '.[mcp]'")
        yield None
        return
    from fumehood.gateway.auth import shown

    app = http_app(lambda headers: {"url": url, "api_key": shown(headers)}, allowed_hosts=_hosts(service.config))
    async with app.run():
        yield app


def _hosts(config: Config) -> list[str]:
    """By which names clients reach this server, beside loopback's."""
    hosts = {config.listen.rpartition(":")[0], config.public_url.rpartition("//")[2].partition("/")[0].partition(":")[0]}
    return [host + end for host in sorted(hosts - {"", "unix"}) for end in ("", ":*")]


def _say(line: str) -> None:
    show.write(sys.stdout, line + "\n")
