"""A server that is killed under load, at any moment: what it acknowledged is on record, and nothing that ran lives on (H19)."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from asyncio.subprocess import DEVNULL, Process
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from opened import cgroups, until

from fumehood.records import ExecutionRecord
from fumehood.store import LEFT_BEHIND, Store
from http_server import COMMAND, START_S, clean_env

pytestmark = pytest.mark.rootless
CALLERS, ROUNDS = 16, 5
REFUSED = (410, 429, 504)  # a program that a timeout does not stop takes its sandbox along


@dataclass
class Said:
    """What callers were told before the connection broke."""

    results: dict[str, str] = field(default_factory=dict)  # token -> status
    background: set[str] = field(default_factory=set)
    sandboxes: set[str] = field(default_factory=set)


@dataclass
class Server:
    home: Path
    process: Process
    client: httpx.AsyncClient

    @property
    def instances(self) -> list[str]:
        """The names that its cgroups and directories carry."""
        return [path.name for path in (self.home / "run" / "instances").iterdir()]

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()


@asynccontextmanager
async def serving(home: Path) -> AsyncIterator[Server]:
    chosen = {"state_dir": home / "state", "run_dir": home / "run", "pool_floor": 2, "grace_s": 1, "max_running": 64}
    env = {**clean_env(), **{f"FUMEHOOD_{name.upper()}": str(value) for name, value in chosen.items()}}
    with (home / "log").open("ab") as log:
        argv = [*COMMAND, "--listen", "127.0.0.1:0"]
        process = await asyncio.create_subprocess_exec(*argv, env=env, stdin=DEVNULL, stdout=log, stderr=log)
    try:
        found = await announced(home, process)
        headers = {"authorization": f"Bearer {found['api_key']}"}
        async with httpx.AsyncClient(base_url=found["url"], headers=headers, timeout=30, limits=httpx.Limits()) as client:
            yield Server(home, process, client)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def announced(home: Path, process: Process) -> dict[str, Any]:
    """By this very process: a killed one leaves its own word behind."""
    deadline = time.monotonic() + START_S
    while True:
        with suppress(FileNotFoundError, ValueError):
            found = json.loads((home / "state" / "server.json").read_text())
            if found["pid"] == process.pid:
                return found
        assert process.returncode is None and time.monotonic() < deadline, (home / "log").read_text()
        await asyncio.sleep(0.02)


class Crowd:
    """Callers who note what they were told."""

    def __init__(self, client: httpx.AsyncClient, said: Said) -> None:
        self._client, self._said, self._n = client, said, 0

    async def call(self, number: int) -> None:
        with suppress(httpx.TransportError):  # the server is gone
            while True:
                await (self._one_shot() if number % 2 else self._session())

    def _body(self) -> tuple[str, dict[str, Any]]:
        self._n += 1
        token = f"{id(self)}-{self._n}"
        end = random.choice(("", "; 1/0", "; import time; time.sleep(9)"))
        return token, {"code": f"print({token!r}){end}", **({"timeout_s": 0.4} if "sleep" in end else {})}

    async def _ask(self, path: str, body: dict[str, Any]) -> Any:
        response = await self._client.post(path, json=body)
        assert response.status_code in (200, 201, 202, *REFUSED), response.text
        return response.json() if response.status_code not in REFUSED else None

    async def _one_shot(self) -> None:
        token, body = self._body()
        self._note(token, await self._ask("/v1/run", body))

    def _note(self, token: str, result: dict[str, Any] | None) -> None:
        if result and (printed := result["stdout"].strip()):
            assert token.startswith(printed), "another's"
            if printed == token:  # a timeout may have come in between
                self._said.results[token] = result["status"]

    async def _session(self) -> None:
        if (made := await self._ask("/v1/sandboxes", {})) is None:
            return
        box = made["id"]
        self._said.sandboxes.add(box)
        for _ in range(random.randrange(4)):
            token, body = self._body()
            self._note(token, await self._ask(f"/v1/sandboxes/{box}/executions", body))
        long = {"argv": ["sh", "-c", "setsid sleep 60 & sleep 60"], "wait": False, "timeout_s": 2}
        if begun := await self._ask(f"/v1/sandboxes/{box}/exec", long):
            self._said.background.add(begun["id"])
        if random.random() < 0.5:
            await self._client.delete(f"/v1/sandboxes/{box}")


def below(pid: int) -> Iterator[int]:
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split()):
                yield child
                yield from below(child)


def started_at(pid: int) -> str:
    """With the pid, the one name of a process; "" when there is none or it is dead."""
    with suppress(FileNotFoundError, ProcessLookupError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[19] if fields[0] != "Z" else ""
    return ""


async def records(home: Path) -> list[ExecutionRecord]:
    store = await Store.open(home / "state" / "store.db", exclusive=False)
    try:
        found = page = await store.executions(None, limit=1000)
        while page:
            page = await store.executions(None, after=page[-1].id, limit=1000)
            found = found + page
        assert {r.state for r in await store.sandboxes(None, limit=1000)} == {"stopped"}
        whole = [await store.execution(None, record.id) for record in found]
        return [record for record in whole if record is not None]
    finally:
        await store.aclose()


def check(found: list[ExecutionRecord], said: Said) -> None:
    assert {r.state for r in found} == {"done"}
    by_id = Counter(r.id for r in found)
    assert said.background <= by_id.keys() and max(by_id.values()) == 1
    kept = Counter[tuple[str, str]]()
    for record in (r for r in found if r.result):
        result = json.loads(record.result)
        assert result["status"] == record.status
        if result["stdout"]:
            kept[result["stdout"].strip(), str(record.status)] += 1
    lost = {t: s for t, s in said.results.items() if kept[t, s] != 1}
    assert not lost, f"of {len(said.results)} acknowledged: {lost}"
    assert all(r.status == "killed" and r.cause == LEFT_BEHIND for r in found if not r.result)


async def test_what_a_killed_server_acknowledged_is_on_record_and_nothing_of_it_lives_on(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    said, instances, processes = Said(), set[str](), dict[int, str]()
    for _ in range(ROUNDS):
        async with serving(tmp_path) as server:
            if instances:
                gone_with_the_last(instances, processes)
                check(await records(tmp_path), said)
            crowd = Crowd(server.client, said)
            callers = [asyncio.create_task(crowd.call(n)) for n in range(CALLERS)]
            before, killed_at = len(said.results), time.monotonic() + random.uniform(0.3, 1.5)
            await until(lambda before=before: len(said.results) >= before + CALLERS, "nothing is answered")
            await asyncio.sleep(max(0.0, killed_at - time.monotonic()))
            instances, processes = set(server.instances), {pid: started_at(pid) for pid in below(server.process.pid)}
            assert instances and len(processes) > 3
            await server.kill()
            await asyncio.gather(*callers)
    async with serving(tmp_path):
        gone_with_the_last(instances, processes)
        found = await records(tmp_path)
        check(found, said)
    assert len(said.background) > ROUNDS and any(r.cause == LEFT_BEHIND for r in found)


def gone_with_the_last(instances: set[str], processes: dict[int, str]) -> None:
    assert not [pid for pid, start in processes.items() if start and started_at(pid) == start]
    assert not [path for name in instances for path in cgroups(name)]
