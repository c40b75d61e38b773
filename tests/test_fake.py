"""The fake tier keeps the runtime's contract with the real agent, says that it isolates nothing, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from fumehood.config import Config
from fumehood.errors import FumehoodError, InvalidTransition, ProtectionUnavailable
from fumehood.model import Enforcement, SandboxSpec
from fumehood.policy.resolve import resolve
from fumehood.runtime import tree
from fumehood.runtime.fake import FakeHandle, FakeRuntime
from fumehood.runtime.host import cgroup_layout
from fumehood.runtime.link import Link
from fumehood.runtime.native import protections

pytestmark = pytest.mark.rootless
WAIT_S = 20.0
LINKS: list[Link] = []  # of the running test, for its end


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[FakeRuntime]:
    runtime = FakeRuntime(Config(state_dir=tmp_path, run_dir=tmp_path))
    yield runtime
    await asyncio.wait_for(runtime.aclose(), WAIT_S)
    while LINKS:
        await LINKS.pop().aclose()


async def start(runtime: FakeRuntime, name: str = "abcd") -> tuple[FakeHandle, Link]:
    handle = await runtime.start(SandboxSpec(), name, lambda event: None)
    link = Link(*await handle.connect())
    LINKS.append(link)
    await link.start(WAIT_S)
    return handle, link


async def run(link: Link, code: str) -> dict[str, object]:
    return await asyncio.wait_for(link.call("context.run", language="python", code=code, env={}), WAIT_S)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - /proc tells nobody when it changes
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    return (process := tree.read(pid)) is not None and process.state != "Z"


async def test_the_real_agent_runs_code_and_keeps_files_in_a_home_of_its_own(runtime):
    handle, link = await start(runtime)
    assert (await run(link, "open('made.txt', 'w').write('x' * 7)"))["outcome"] == "ok"
    assert (Path(handle.home) / "made.txt").read_text() == "x" * 7
    assert (await link.call("files.stat", path="made.txt"))["entry"]["size"] == 7


async def test_it_says_that_nothing_is_enforced_by_the_same_names_as_the_native_tier_h13(runtime):
    stated = runtime.capabilities().protections
    assert {p.state for p in stated} == {Enforcement.OFF}
    assert {p.name for p in stated} == {p.name for p in protections.probe(cgroup_layout.probe(), rootless=True)}
    assert FakeHandle.protections == stated


async def test_a_policy_that_requires_a_protection_is_refused_before_anything_starts_h13(runtime, tmp_path):
    def children() -> set[int]:  # and not what other tests' servers have below them, which comes and goes
        return {process.pid for process in tree.below(os.getpid()) if process.parent == os.getpid()}

    before = children()
    with pytest.raises(ProtectionUnavailable, match="seccomp"):
        await runtime.start(resolve("strict"), "abcd", lambda event: None)
    assert children() == before and not list(tmp_path.iterdir())


async def test_two_sandboxes_have_homes_and_agents_of_their_own(runtime):
    (one, link1), (two, link2) = await start(runtime, "aaaa"), await start(runtime, "bbbb")
    await run(link1, "open('canary', 'w').close(); x = 1")
    assert one.home != two.home and not (Path(two.home) / "canary").exists()
    assert (await run(link2, "x"))["outcome"] == "error"
    await one.aclose()
    assert (await run(link2, "1"))["outcome"] == "ok"


async def test_connect_works_once(runtime):
    handle, _ = await start(runtime)
    with pytest.raises(InvalidTransition):
        await handle.connect()


async def test_pause_stops_every_process_and_resume_lets_all_go_on(runtime):
    handle, link = await start(runtime)
    stream = await link.open("exec.start", argv=["sh", "-c", "sleep 60 & sleep 60"], env={})
    await until(lambda: sum(p.state == "S" for p in tree.below(handle._keeper.pid)) >= 4)
    await handle.pause()
    assert len(tree.below(handle._keeper.pid)) >= 4
    await until(lambda: {p.state for p in tree.below(handle._keeper.pid)} == {"T"})  # on a busy machine a signal takes its time
    await handle.pause()
    await handle.resume()
    await until(lambda: "T" not in [p.state for p in tree.below(handle._keeper.pid)])
    assert await asyncio.wait_for(link.call("ping"), WAIT_S) == {}
    await stream.cancel()


async def test_stats_count_processes_memory_and_cpu(runtime):
    handle, link = await start(runtime)
    idle = handle.stats()
    assert idle.pids >= 1 and idle.memory_bytes > 1 << 20
    await run(link, "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass")
    await run(link, "import subprocess; many = [subprocess.Popen(['sleep', '1000']) for _ in range(5)]")
    busy = handle.stats()
    assert busy.usage.cpu_s >= idle.usage.cpu_s + 0.25 and busy.pids >= idle.pids + 5
    assert busy.usage.peak_pids == busy.pids
    await handle.kill()
    assert handle.stats().pids == 0 and handle.stats().usage.cpu_s >= busy.usage.cpu_s


DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open('pid', 'w').write(str(os.getpid()))
        time.sleep(1000)
    os._exit(0)
os.wait()
while not os.path.exists('pid') or not open('pid').read(): time.sleep(0.01)
"""


async def daemon(runtime: FakeRuntime) -> tuple[FakeHandle, Link, int]:
    handle, link = await start(runtime)
    assert (await run(link, DAEMON))["outcome"] == "ok"
    pid = int((Path(handle.home) / "pid").read_text())
    assert alive(pid)
    return handle, link, pid


async def test_kill_ends_a_daemon_that_left_its_session_and_removes_the_home_h15(runtime):
    handle, _, pid = await daemon(runtime)
    await asyncio.wait_for(handle.kill(), WAIT_S)
    assert not alive(pid) and not Path(handle.home).exists()
    await handle.kill()
    await handle.aclose()


async def test_kill_ends_a_paused_sandbox(runtime):
    handle, _, pid = await daemon(runtime)
    await handle.pause()
    await asyncio.wait_for(handle.kill(), WAIT_S)
    assert not alive(pid)


async def test_a_killed_agent_takes_its_daemons_with_it_and_wait_dead_returns(runtime):
    handle, link, pid = await daemon(runtime)
    agent = next(p for p in tree.below(handle._keeper.pid) if p.parent == handle._keeper.pid)
    os.kill(agent.pid, signal.SIGKILL)
    await asyncio.wait_for(handle.wait_dead(), WAIT_S)
    assert not alive(pid) and not Path(handle.home).exists()
    with pytest.raises(FumehoodError):
        await link.call("ping")


HOST = """
import asyncio, sys
from pathlib import Path
from fumehood.config import Config
from fumehood.model import SandboxSpec
from fumehood.runtime.fake import FakeRuntime
async def main():
    handle = await FakeRuntime(Config(Path(sys.argv[1]), Path(sys.argv[1]))).start(SandboxSpec(), "abcd", print)
    reader, _ = await handle.connect()
    await reader.readexactly(7)  # the agent's HELLO has begun
    print(handle._keeper.pid, flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""


async def test_nothing_is_left_when_the_host_process_is_killed_h19(tmp_path):
    host = await asyncio.create_subprocess_exec(sys.executable, "-c", HOST, str(tmp_path), stdout=subprocess.PIPE)
    assert host.stdout is not None
    keeper = int(await host.stdout.readline())
    members = [keeper, *(p.pid for p in tree.below(keeper))]
    assert len(members) >= 2 and list(tmp_path.iterdir())
    host.kill()
    await host.communicate()
    await until(lambda: not any(map(alive, members)))
    assert not list(tmp_path.iterdir())
