"""The official SDKs, unmodified and asynchronous, against our server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from e2b_code_interpreter import AsyncSandbox
from e2b_server import Server

from e2b import (
    AsyncWatchHandle,
    CommandExitException,
    FilesystemEventType,
    NotFoundException,
    PtySize,
    SandboxException,
    SandboxQuery,
    SandboxState,
    TimeoutException,
)


@pytest.fixture
async def box(server: Server) -> AsyncIterator[AsyncSandbox]:
    sandbox = await AsyncSandbox.create(template="python", metadata={"of": "async"}, **server.options())
    yield sandbox
    await sandbox.kill()


async def test_code_keeps_state_streams_and_fails_as_it_does_in_a_notebook(box: AsyncSandbox) -> None:
    lines: list[str] = []
    await box.run_code("kept = 20")
    run = await box.run_code("print('said')\nkept * 2", on_stdout=lambda m: lines.append(m.line))
    assert (run.text, "".join(lines)) == ("40", "said\n")
    failed = await box.run_code("kept.nothing")
    assert failed.error is not None and failed.error.name == "AttributeError"
    assert (await box.run_code("import os\nos.environ['ONE']", envs={"ONE": "1"})).text == "1"


async def test_contexts_run_side_by_side_each_with_its_own_names(box: AsyncSandbox) -> None:
    contexts = [await box.create_code_context() for _ in range(3)]
    meet = """
        import os, time
        own = {n}
        open(f'/tmp/met{{own}}', 'w').close()
        until = time.monotonic() + 20
        while not all(os.path.exists(f'/tmp/met{{other}}') for other in range(3)) and time.monotonic() < until:
            time.sleep(0.01)
        own, time.monotonic() < until
    """
    runs = await asyncio.gather(*(box.run_code(meet.format(n=n), context=c) for n, c in enumerate(contexts)))
    assert [run.text for run in runs] == [f"({n}, True)" for n in range(3)]
    await box.remove_code_context(contexts[0])
    with pytest.raises(NotFoundException):
        await box.run_code("own", context=contexts[0])


async def test_a_run_that_its_client_gave_up_is_stopped(box: AsyncSandbox) -> None:
    with pytest.raises(TimeoutException):
        await box.run_code("import time\nbegun = 1\ntime.sleep(60)", timeout=0.3)
    assert (await box.run_code("begun")).text == "1"


async def test_commands_in_the_foreground_and_in_the_background(box: AsyncSandbox) -> None:
    assert (await box.commands.run("id -un")).stdout == "user\n"
    with pytest.raises(CommandExitException):
        await box.commands.run("false")
    started = await box.commands.run("cat", background=True, stdin=True)
    await box.commands.send_stdin(started.pid, "in")
    second = await box.commands.connect(started.pid)
    await box.commands.close_stdin(started.pid)
    assert (await started.wait()).stdout == "in"
    assert (await second.wait()).exit_code == 0
    with pytest.raises(TimeoutException):
        await box.commands.run("sleep 60", timeout=0.4)
    sleeper = await box.commands.run("sleep 60", background=True)
    assert await sleeper.kill()
    with pytest.raises(CommandExitException):
        await sleeper.wait()
    assert sleeper.pid not in [p.pid for p in await box.commands.list()]


async def test_input_can_be_streamed(box: AsyncSandbox) -> None:
    started = await box.commands.run("cat", background=True, stdin=True)
    handle = box.commands.stream_input(started.pid)
    for n in range(3):
        await handle.send(f"{n}\n")
    await handle.close()
    await box.commands.close_stdin(started.pid)
    assert (await started.wait()).stdout == "0\n1\n2\n"


async def test_a_kill_breaks_open_streams_off(box: AsyncSandbox) -> None:
    started = await box.commands.run("sleep 60", background=True)
    asyncio.get_running_loop().call_later(0.3, lambda: asyncio.ensure_future(box.kill()))
    with pytest.raises((SandboxException, TimeoutException)) as broken:
        await started.wait()
    assert not isinstance(broken.value, CommandExitException)


@pytest.mark.parametrize("how", [{}, {"use_octet_stream": True}, {"gzip": True}])
async def test_files_go_both_ways_whatever_the_encoding(box: AsyncSandbox, how: dict[str, Any]) -> None:
    data = bytes(range(256)) * 4_000
    await box.files.write("deep/er/f.bin", data, **how)
    assert bytes(await box.files.read("deep/er/f.bin", format="bytes")) == data
    assert await box.files.rename("deep/er/f.bin", "g.bin") and await box.files.exists("g.bin")
    assert [e.name for e in await box.files.list("deep", depth=3)] == ["er"]
    await box.files.remove("g.bin")
    with pytest.raises(NotFoundException):
        await box.files.read("g.bin")


async def test_a_watch_streams_what_happens(box: AsyncSandbox) -> None:
    seen: asyncio.Queue[Any] = asyncio.Queue()
    await box.files.make_dir("seen")
    watch: AsyncWatchHandle = await box.files.watch_dir("seen", on_event=seen.put_nowait, recursive=True, timeout=20)
    await box.files.write("seen/sub/f", "x")
    events = [await asyncio.wait_for(seen.get(), 5) for _ in range(2)]
    assert (events[0].name, events[0].type) == ("sub", FilesystemEventType.CREATE)
    assert events[1].name == "sub/f"
    await watch.stop()


async def test_a_terminal(box: AsyncSandbox) -> None:
    out = bytearray()
    terminal = await box.pty.create(PtySize(rows=24, cols=80), on_data=out.extend)
    await box.pty.resize(terminal.pid, PtySize(rows=40, cols=120))
    await box.pty.send_stdin(terminal.pid, b"stty size; exit\n")
    await terminal.wait()
    assert b"40 120" in out


async def test_pause_connect_list_metrics_and_kill(box: AsyncSandbox, server: Server) -> None:
    await box.run_code("kept = 5")
    assert await box.pause() and not await box.pause()
    assert (await box.get_info()).state is SandboxState.PAUSED
    query = SandboxQuery(metadata={"of": "async"}, state=[SandboxState.PAUSED])
    found = await AsyncSandbox.list(query=query, **server.options()).next_items()
    assert [s.sandbox_id for s in found] == [box.sandbox_id]
    again = await AsyncSandbox.connect(box.sandbox_id, timeout=60, **server.options())
    assert (await again.run_code("kept")).text == "5"
    assert (await again.get_metrics())[0].mem_used > 0
    await again.set_timeout(500)
    assert (await again.get_info()).end_at.timestamp() - time.time() > 400
    assert await again.kill() and not await again.kill() and not await again.is_running()


async def test_many_sandboxes_at_once_answer_each_to_their_own(server: Server) -> None:
    async def one(n: int) -> str | None:
        sandbox = await AsyncSandbox.create(template="python", **server.options())
        try:
            await sandbox.run_code(f"mine = {n}")
            return (await sandbox.run_code("mine")).text
        finally:
            await sandbox.kill()

    assert await asyncio.gather(*map(one, range(6))) == [str(n) for n in range(6)]
