"""The store and other processes: one that is killed while it writes, one that serves the same file, one that adds a key."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fumehood.errors import StoreFailed
from fumehood.records import ApiKey, ExecutionRecord, Recovered, SandboxRecord
from fumehood.store import LEFT_BEHIND, Store

pytestmark = pytest.mark.rootless
ROUNDS = 12

# Prints an id only after finish_execution returned; the pipe keeps what was printed when the writer is killed.
LOAD = """
import asyncio, os, sys
from pathlib import Path
from fumehood.records import ExecutionRecord, SandboxRecord
from fumehood.store import Store

async def caller(store, name):
    n = 0
    while True:
        box, run = f"sb-{name}-{n}", f"ex-{name}-{n}"
        await store.put_sandbox(SandboxRecord(box, "t", "k", "python", "native", "default", "running", 1.0, 9.0))
        store.begin_execution(ExecutionRecord(run, box, "t", "code", "running", 1.0))
        await store.claim_reply("t", run, "d")
        await asyncio.sleep(0.001)  # it runs: some do when the writer is killed
        await store.finish_execution(run, started_at=1.0, finished_at=2.0, status="ok", cause="", result="r" * (n % 50) * 100)
        os.write(1, f"{run}\\n".encode())
        if n % 2:
            await store.end_sandbox(box, "done")
        n += 1

async def main():
    store = await Store.open(Path(sys.argv[1]))
    os.write(1, b"open\\n")
    await asyncio.gather(*(caller(store, f"{sys.argv[2]}-{k}") for k in range(32)))

asyncio.run(main())
"""
HOLD = """
import asyncio, sys
from pathlib import Path
from fumehood.store import Store

async def main():
    store = await Store.open(Path(sys.argv[1]))
    print("open", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await store.aclose()

asyncio.run(main())
"""
ADD_KEYS = """
import asyncio, sys
from pathlib import Path
from fumehood.records import ApiKey
from fumehood.store import Store

async def main():
    store = await Store.open(Path(sys.argv[1]), exclusive=False)
    for n in range(30):
        await store.add_key(ApiKey(f"k{n}", "t", "d", frozenset()))
    await store.aclose()

asyncio.run(main())
"""


@contextlib.contextmanager
def running(script: str, *args: object) -> Iterator[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-c", script, *map(str, args)]
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"open\n"
        yield child
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def killed_under_load(path: Path, round_: int, after_s: float) -> list[str]:
    with running(LOAD, path, round_) as child:
        time.sleep(after_s)
        child.kill()
        return child.stdout.read().decode().split()


async def test_a_killed_writer_loses_and_doubles_no_execution_h19(tmp_path):
    path, acknowledged, chance = tmp_path / "store.db", list[str](), random.Random(19)
    left = Recovered()
    for round_ in range(ROUNDS):
        # to_thread: the child's pipe is drained at the end only, so the time is short enough for it not to fill up
        acknowledged += await asyncio.to_thread(killed_under_load, path, round_, chance.uniform(0.005, 0.15))
        with contextlib.closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        store = await Store.open(path)
        left = Recovered(*(getattr(left, f) + getattr(store.recovered, f) for f in ("sandboxes", "executions", "replies")))
        assert await store.sandboxes(None, states=frozenset({"running"})) == []
        assert (await store.recover("again")) == Recovered()
        await store.aclose()
    with contextlib.closing(sqlite3.connect(path)) as db:
        ended = dict(db.execute("SELECT id, count(*) FROM executions WHERE status = 'ok' GROUP BY id").fetchall())
        killed = db.execute("SELECT state, cause, result FROM executions WHERE status = 'killed'").fetchall()
        states = db.execute("SELECT DISTINCT state FROM executions").fetchall()
    assert len(acknowledged) > 32 * ROUNDS and len(set(acknowledged)) == len(acknowledged)
    assert {run: ended.get(run) for run in acknowledged} == dict.fromkeys(acknowledged, 1)
    assert states == [("done",)] and set(killed) == {("done", LEFT_BEHIND, "")} and len(killed) == left.executions
    assert left.sandboxes and left.replies


async def test_a_second_server_on_one_store_is_refused_by_the_pid_of_the_first(tmp_path):
    path = tmp_path / "store.db"
    with running(HOLD, path) as first:
        with pytest.raises(StoreFailed, match=f"in use by process {first.pid}") as refused:
            await Store.open(path)
        assert refused.value.details == {"pid": str(first.pid)}
        first.kill()
        first.wait()
        await (await Store.open(path)).aclose()  # a killed server leaves nothing to remove
    store = await Store.open(path)
    with pytest.raises(StoreFailed, match="in use"):
        await Store.open(path)
    await store.aclose()


async def test_a_server_that_failed_to_open_lets_go_of_the_lock(tmp_path):
    path = tmp_path / "store.db"
    path.write_bytes(b"not a database" * 99)
    path.chmod(0o600)
    for _ in range(2):
        with pytest.raises(StoreFailed, match="can't be opened"):
            await Store.open(path)
    path.unlink()
    await (await Store.open(path)).aclose()


async def test_keys_are_added_beside_a_running_server_which_sees_them_and_keeps_its_live_rows(tmp_path):
    path = tmp_path / "store.db"
    server = await Store.open(path)
    await server.put_sandbox(SandboxRecord("sb", "t", "k", "python", "native", "default", "ready", 1.0, 2.0))
    other = await asyncio.create_subprocess_exec(sys.executable, "-c", ADD_KEYS, str(path))
    ended = asyncio.ensure_future(other.wait())
    written = 0
    while not ended.done():
        server.begin_execution(ExecutionRecord(f"ex{written}", "sb", "t", "code", "running", 1.0))
        written += 1
        await asyncio.sleep(0.002)
    assert other.returncode == 0 and server.lost == 0
    assert len(await server.keys("t")) == 30 and await server.key("k29") == ApiKey("k29", "t", "d", frozenset())
    assert (await server.sandbox("t", "sb")).state == "ready"
    assert len(await server.executions("t", limit=1000)) == min(written, 1000)
    await server.aclose()


async def test_two_processes_that_make_the_file_at_once_both_find_it_whole(tmp_path):
    stores = await asyncio.gather(*(Store.open(tmp_path / "store.db", exclusive=False) for _ in range(6)))
    for n, store in enumerate(stores):
        await store.add_key(ApiKey(f"k{n}", "t", "d", frozenset(), created_at=n))
    assert [k.id for k in await stores[0].keys()] == [f"k{n}" for n in range(6)]
    for store in stores:
        await store.aclose()
