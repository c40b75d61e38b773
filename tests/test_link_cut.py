"""A link that is cut, because its sandbox was copied, is told from one whose sandbox ended; nobody waits on either."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest

from fumehood.agent import wire
from fumehood.errors import Detached, SandboxGone
from fumehood.runtime.link import Link

HELLO = wire.encode_json(0, wire.HELLO, {"generation": wire.GENERATION})


@pytest.fixture
async def ends() -> AsyncIterator[tuple[Link, socket.socket]]:
    """A link, and the agent's end of it."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(HELLO)
        link = Link(*await asyncio.open_unix_connection(sock=ours))
        await link.start(10)
        yield link, theirs
        await link.aclose()


async def test_who_follows_and_who_asks_is_told_to_ask_again(ends: tuple[Link, socket.socket]) -> None:
    link, _ = ends
    stream = await link.open("exec.start")
    following = asyncio.create_task(stream.result())
    await asyncio.sleep(0)
    link.detach("it was copied")
    for call in (lambda: following, lambda: link.open("ping"), lambda: link.call("ping"), lambda: stream.send(b"x")):
        with pytest.raises(Detached, match="it was copied") as e:
            await call()
        assert e.value.retryable and e.value.remediation


async def test_a_second_copy_before_the_next_link_changes_nothing(ends: tuple[Link, socket.socket]) -> None:
    link, _ = ends
    link.detach("first")
    link.detach("second")
    link.lose("closed")
    with pytest.raises(Detached, match="first"):
        await link.open("ping")


async def test_one_that_was_lost_before_stays_lost(ends: tuple[Link, socket.socket]) -> None:
    link, _ = ends
    link.lose("out of memory")
    link.detach("it was copied")
    with pytest.raises(SandboxGone, match="out of memory"):
        await link.open("ping")


async def test_what_a_machine_that_stands_still_does_not_read_holds_nobody_up(ends: tuple[Link, socket.socket]) -> None:
    link, theirs = ends
    stream = await link.open("files.write")
    sending = asyncio.create_task(stream.send(b"x" * (64 << 20)))
    await asyncio.sleep(0.05)
    assert not sending.done()
    link.detach("it was copied")
    async with asyncio.timeout(10):
        with pytest.raises(Detached):
            await sending
        await link.aclose()
    with contextlib.suppress(ConnectionResetError):
        while theirs.recv(1 << 20):
            pass
