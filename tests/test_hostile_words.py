"""What a guest that was taken over says at the beginning, and of itself, is not kept and has bounds (H15, H16)."""

from __future__ import annotations

import asyncio
import json
import socket
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from fumehood.agent import wire
from fumehood.errors import SetupFailed
from fumehood.execution import Capture, Sinks
from fumehood.model import Limits, SandboxSpec
from fumehood.runtime.fake import FakeRuntime
from fumehood.runtime.link import Link
from fumehood.supervisor import Supervisor
from service.opened import config


async def linked(hello: dict[str, Any]) -> Link:
    """One to which that was said."""
    ours, theirs = socket.socketpair()
    link = Link(*await asyncio.open_unix_connection(sock=ours))
    said = asyncio.create_task(asyncio.to_thread(theirs.sendall, wire.encode_json(0, wire.HELLO, hello)))
    try:
        await link.start(10)
        return link
    except BaseException:
        await link.aclose()
        raise
    finally:
        await said
        theirs.close()


async def test_a_hello_of_a_hundred_thousand_names_is_not_kept_for_the_life_of_the_link() -> None:
    hello = {"generation": wire.GENERATION, **{f"name {n}": n for n in range(100_000)}}
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        link = await linked(hello)
        assert tracemalloc.get_traced_memory()[0] - before < 1 << 20
    finally:
        tracemalloc.stop()
    await link.aclose()


async def test_why_a_set_up_failed_is_told_in_few_words() -> None:
    with pytest.raises(SetupFailed) as e:
        await linked({"setup_failed": {"step": "x" * 100_000, "message": "y" * 100_000}})
    assert len(e.value.message) < 200 and len(e.value.cause) < 5_000


@pytest.mark.parametrize("number", [int("9" * 4000), True, -(1 << 60)])
async def test_a_number_that_no_other_language_reads_is_none(number: int) -> None:
    capture, link = Capture(Limits(), Sinks()), Link.__new__(Link)
    for event in ({"type": "count", "execution_count": number}, {"type": "started", "pid": number}):
        capture.take(wire.Frame(1, wire.EVENT, json.dumps(event).encode()), link)
    assert capture.execution_count is None and capture.pid is None


async def test_a_machine_that_comes_when_its_sandbox_was_just_killed_ends_too(tmp_path: Path) -> None:
    """A guest that breaks the protocol is killed at a moment of its choice, between a rollback's last look and its swap too."""
    supervisor = Supervisor(config(tmp_path, "fake"), {"fake": FakeRuntime})
    try:
        live = await supervisor.create(SandboxSpec(), "fake")
        handle = await supervisor.runtime("fake").start(SandboxSpec(), "another", live.note)
        link = Link(*await handle.connect())
        await link.start(10)
        await live.kill("it broke the protocol")
        await live.replace(handle, link, "rolled back")
        async with asyncio.timeout(10):
            await live.wait_dead()
    finally:
        await supervisor.aclose()
