"""What a review broke: counters of the whole host, the supervisor's loop and its memory. H12, H15, H16."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attack import words

from fumehood import AsyncSandbox, Sandbox
from fumehood.cli import files
from fumehood.errors import SandboxGone
from fumehood.model import MIB
from fumehood.runtime.link import Link
from fumehood.runtime.native import peek

pytestmark = pytest.mark.rootless
FLOOD = ("cat", "/dev/zero")


def stands_still(link: Link) -> bool:
    """Whether unread frames have stopped the reading of the channel."""
    return not link._space.is_set()  # pyright: ignore[reportPrivateUsage]


def unread(link: Link) -> list[int]:
    """Bytes that each open stream holds."""
    return [stream.buffered_bytes for stream in link._streams.values()]  # pyright: ignore[reportPrivateUsage]


def until(holds: Callable[[], bool]) -> None:
    while not holds():
        time.sleep(0.01)


def test_no_sandbox_takes_the_contexts_of_asynchronous_io_that_the_whole_host_shares(box: Sandbox) -> None:
    before = Path("/proc/sys/fs/aio-nr").read_text()
    attack = "attempt(syscall, 206, 1024, ctypes.byref(ctypes.c_ulong()))"
    assert words(box, attack) == ["EPERM"]
    assert Path("/proc/sys/fs/aio-nr").read_text() == before


def test_no_sandbox_takes_the_terminals_that_the_whole_host_shares(box: Sandbox) -> None:
    attack = """
held = []
try:
    while True:
        held.append(os.open('/dev/ptmx', os.O_RDWR))
except OSError as e:
    print(len(held), errno.errorcode[e.errno])
"""
    assert words(box, attack) == ["64", "ENOSPC"]


def test_a_devices_times_are_the_hosts_and_it_is_written_to_all_the_same(box: Sandbox) -> None:
    before = os.stat("/dev/null").st_mtime_ns
    attack = "attempt(os.utime, '/dev/null'); attempt(write, '/dev/null'); attempt(read, '/dev/urandom')"
    assert words(box, attack) == ["EROFS", "through", "through"]
    assert os.stat("/dev/null").st_mtime_ns == before


@pytest.fixture
def slow_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """(looked, released): a guest's memory map whose lock is held from the look until the release."""
    looked, released = threading.Event(), threading.Event()
    destinations = peek.destinations

    def slow(name: str, pid: int, args: tuple[int, ...]) -> Iterator[peek.Destination]:
        looked.set()
        assert released.wait(30)
        yield from destinations(name, pid, args)

    monkeypatch.setattr(peek, "destinations", slow)
    yield looked, released
    released.set()


def test_who_holds_the_lock_of_its_memory_map_while_it_connects_makes_nobody_else_wait(
    box: Sandbox, slow_memory: tuple[threading.Event, threading.Event]
) -> None:
    looked, released = slow_memory
    results: list[Any] = []
    connect = "attempt(socket.socket(type=socket.SOCK_DGRAM).connect, ('192.0.2.1', 53))"
    attacker = threading.Thread(target=lambda: results.append((words(box, connect), box.run("0"))))
    with Sandbox(tier="native") as neighbour:
        attacker.start()
        assert looked.wait(10)
        assert neighbour.run("6 * 7").text == "42"
        assert not released.is_set()
    released.set()
    attacker.join()
    assert results[0][0] == ["ENETUNREACH"]


def test_a_sandbox_whose_connect_is_being_looked_at_ends_as_any_other(
    box: Sandbox, slow_memory: tuple[threading.Event, threading.Event]
) -> None:
    looked, _ = slow_memory
    process = box.start(["python3", "-c", "import socket; socket.socket(type=socket.SOCK_DGRAM).connect(('192.0.2.1', 53))"])
    assert looked.wait(10)
    box.close()
    assert process.pid > 0


def test_page_tables_count_as_memory() -> None:
    """24 GiB of the one zero page are no memory of anybody's, and 48 MiB of page tables."""
    attack = """
libc = ctypes.CDLL(None)
libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
size = 24 << 30
area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
area.madvise(22)  # MADV_POPULATE_READ
time.sleep(5)
"""
    with Sandbox(tier="native", limits={"memory_bytes": 32 * MIB, "cpus": 2}) as box:
        assert box.run("import ctypes, mmap, time\n" + attack).status == "oom"


def test_what_a_sandbox_makes_the_host_hold_is_bounded_for_all_its_unread_streams_together(box: Sandbox) -> None:
    link = box.live.link
    floods = [box.start(["sh", "-c", "read go; cat /dev/zero"]) for _ in range(4)]
    for flood in floods:
        flood.write(b"go\n")
    until(lambda: stands_still(link))
    assert sum(unread(link)) < 9 * MIB


def test_who_waits_beside_an_unread_flood_is_told_of_the_end(box: Sandbox) -> None:
    told: list[BaseException] = []

    def wait() -> None:
        try:
            box.files.stat("/tmp")
        except BaseException as e:
            told.append(e)

    flood = box.start(FLOOD)
    until(lambda: stands_still(box.live.link))
    waiting = threading.Thread(target=wait)
    waiting.start()
    until(lambda: len(unread(box.live.link)) == 2)
    box.kill()
    waiting.join(10)
    assert [type(e) for e in told] == [SandboxGone]
    assert flood.pid > 0


def test_results_of_many_small_values_are_kept_by_what_they_take_not_by_their_text(box: Sandbox) -> None:
    result = box.run("for _ in range(40): display({'application/json': [{}] * 150_000}, raw=True)")
    assert result.status == "ok"
    assert 1 <= len(result.results) <= 4


async def test_a_file_that_grew_since_it_was_measured_costs_only_itself(tmp_path: Path) -> None:
    async with AsyncSandbox(tier="native") as box:
        await box.exec("echo 1 > a; echo 2 > b")
        stat = box.files.stat

        class Files:
            async def stat(self, path: str) -> Any:
                entry = await stat(path)
                if path.endswith("/a"):
                    await box.exec(["truncate", "-s", "1T", path])
                return entry

            def __getattr__(self, name: str) -> Any:
                return getattr(box.files, name)

        class Grows:
            files = Files()

        async with asyncio.timeout(20):
            refused = await files.copy_out(Grows(), ["/home/user/a", "/home/user/b"], tmp_path)  # type: ignore[arg-type]
    assert len(refused) == 1 and os.listdir(tmp_path) == ["b"]
