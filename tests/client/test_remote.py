"""The SDK against a real server: keys, threads, loops, forks, callbacks, interrupts, a Unix socket, and a server that dies."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fumehood import AsyncSandbox, Sandbox
from fumehood.errors import InvalidTransition, NotFound, ServerUnreachable, Unauthenticated, Unsupported
from http_server import Serving, serving

pytestmark = pytest.mark.rootless
WAIT_S = 30.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("served")) as serving_:
        yield serving_


@pytest.fixture
def box(server: Serving) -> Iterator[Sandbox]:
    with Sandbox(**server.where) as sandbox:
        yield sandbox


def script(server: Serving, code: str, *arguments: str) -> subprocess.Popen[str]:
    """A program of a user of ours, told by its environment alone where the server is."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=server.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("key", ["", "fh_" + "0" * 64, "nonsense"])
def test_a_wrong_key_is_a_typed_error_everywhere(server: Serving, box: Sandbox, key: str) -> None:
    with pytest.raises(Unauthenticated):
        Sandbox(url=server.url, api_key=key).open()
    with pytest.raises(Unauthenticated):
        Sandbox.connect(box.id, url=server.url, api_key=key)
    with pytest.raises(Unauthenticated):
        Sandbox.list(url=server.url, api_key=key)


def test_one_that_was_joined_shares_the_state_and_outlives_the_joining(server: Serving, box: Sandbox) -> None:
    box.run("x = 41")
    other = Sandbox.connect(box.id, **server.where)
    assert (other.id, other.run("x + 1").text) == (box.id, "42")
    other.close()
    assert box.run("x").text == "41"
    with pytest.raises(NotFound):
        Sandbox.connect("s0000000000000000", **server.where)


async def test_the_async_face_joins_and_lists_too(server: Serving, box: Sandbox) -> None:
    async with await AsyncSandbox.connect(box.id, **server.where) as other:
        assert (await other.run("1 + 1")).text == "2"
    assert box.id in [record.id for record in await AsyncSandbox.list(**server.where)]


def test_the_list_shows_what_lives_and_what_ended(server: Serving) -> None:
    with Sandbox(**server.where, metadata={"job": "7"}) as box:
        assert box.metadata == {"job": "7"}
        shown = next(r for r in Sandbox.list(**server.where) if r.id == box.id)
        assert (shown.metadata, shown.policy) == ({"job": "7"}, "default")
    assert shown.id not in [r.id for r in Sandbox.list(**server.where)]
    assert shown.id in [r.id for r in Sandbox.list(**server.where, state="stopped")]


def test_what_lies_below_is_not_pretended(box: Sandbox) -> None:
    for name in ("live", "spec"):
        with pytest.raises(Unsupported):
            getattr(box, name)


def test_callbacks_come_in_order_and_before_the_end(box: Sandbox) -> None:
    seen: list[str] = []
    code = "import sys, time\nfor n in range(50): print(n, flush=True)\ndisplay('shown')\nprint('last')"
    result = box.run(code, on_stdout=seen.append, on_result=lambda r: seen.append(f"<{r.text}>"))
    assert "".join(s for s in seen if not s.startswith("<")) == result.stdout
    assert "<'shown'>" in seen and threading.current_thread() is threading.main_thread()


def test_a_callback_that_raises_ends_the_run(box: Sandbox) -> None:
    def refuse(text: str) -> None:
        raise RuntimeError(text)

    with pytest.raises(RuntimeError, match="first"):
        box.run("import time; print('first', flush=True); time.sleep(25)", on_stdout=refuse)
    assert box.run("'free'", timeout_s=10).text == "'free'"


@pytest.mark.parametrize("callback", ["None", "print"])
def test_ctrl_c_ends_the_program_on_the_server(server: Serving, box: Sandbox, callback: str) -> None:
    code = f"""
import sys, fumehood
box = fumehood.Sandbox.connect(sys.argv[1])
box.run("open('begun', 'w').close(); import time; time.sleep(25)", on_stdout={callback})
"""
    caller = script(server, code, box.id)
    deadline = time.monotonic() + WAIT_S
    while not box.files.exists("begun"):
        assert time.monotonic() < deadline and caller.poll() is None, caller.communicate()
        time.sleep(0.05)
    caller.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in caller.communicate(timeout=WAIT_S)[1]
    assert box.run("'free'", timeout_s=10).text == "'free'"


def test_many_threads_share_connections_and_nothing_else(server: Serving) -> None:
    found: dict[int, str | None] = {}

    def work(number: int) -> None:
        with Sandbox(**server.where) as box:
            box.files.write("n", str(number))
            found[number] = box.run("open('n').read()").text

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert found == {n: f"'{n}'" for n in range(8)}


def test_one_sandbox_serves_several_event_loops(server: Serving) -> None:
    box = asyncio.run(AsyncSandbox(**server.where).open())
    assert asyncio.run(box.run("x = 1")).ok and asyncio.run(box.run("x")).text == "1"

    async def both() -> list[Any]:
        return [r.text for r in await asyncio.gather(box.run("x + 1"), box.exec("true"))]

    assert asyncio.run(both()) == ["2", None]
    asyncio.run(box.close())


def test_a_forked_child_makes_its_own_and_leaves_its_parents_alone(server: Serving) -> None:
    code = """
import os, fumehood
box = fumehood.Sandbox().open()
box.run("x = 1")
if (child := os.fork()) == 0:
    try:
        box.run("x")
    except fumehood.FumehoodError as e:
        print(e.code, flush=True)
    with fumehood.Sandbox() as own:
        print(own.run("'x' in globals()").text, flush=True)
    os._exit(0)
print(os.waitpid(child, 0)[1], box.run("x").text)
box.close()
"""
    said, errors = script(server, code).communicate(timeout=WAIT_S)
    assert said.split() == [InvalidTransition.code, "False", "0", "1"], errors


def test_an_upload_that_fails_here_leaves_no_half_there(box: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        box.files.upload(tmp_path / "none", "x")
    with pytest.raises(IsADirectoryError):
        box.files.write("half", tmp_path)
    assert not box.files.exists("half") and box.run("1").text == "1"


def test_names_and_bytes_survive_the_way(box: Sandbox) -> None:
    for name in ("a b+c%20&d=e#f", "ünï", "q?", "nl\n", "caf\udce9"):
        box.files.write(name, name.encode("utf-8", "surrogateescape"))
        assert box.files.read(name) == name.encode("utf-8", "surrogateescape")
        assert name in [e.name for e in box.files.list()]
    assert box.exec(["cat"], stdin=bytes(range(256))).ok
    assert {c.path.rsplit("/", 1)[1] for c in box.run("open(b'n\\xff', 'w').write('1')").changes} == {"n\udcff"}


def test_importing_the_sdk_loads_no_http(server: Serving) -> None:
    code = "import sys, fumehood; fumehood.Sandbox(url=''); print([m for m in ('httpcore', 'websockets') if m in sys.modules])"
    assert script(server, code).communicate(timeout=WAIT_S)[0] == "[]\n"


def test_a_unix_socket_does_all_and_a_server_that_dies_ends_each_call(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving(tmp_path, f"unix:{path}") as server:
        box = Sandbox(**server.where).open()
        assert box.run("print('out'); 1", on_stdout=print).text == "1"
        cat = box.start(["cat"])
        cat.write(b"ping\n")
        assert next(iter(cat)) == ("stdout", b"ping\n")
        threading.Timer(0.5, server.process.kill).start()
        with pytest.raises(ServerUnreachable):
            box.run("import time; time.sleep(25)")
        for work in (lambda: box.run("1", on_stdout=print), cat.wait, box.stats, box.close):
            with pytest.raises(ServerUnreachable):
                work()
