"""Who is let in and when: places, memory, keys, deadlines, fairness, the end of a server; what fails gives all back."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from opened import ME, OTHER, cgroups, held, opened, until

from fumehood.errors import DeadlineExceeded, Draining, FumehoodError, InvalidInput, QueueFull, RateLimited, SetupFailed
from fumehood.execution import Sinks
from fumehood.model import GIB, MIB, CodeRequest, ExecRequest
from fumehood.records import KeyLimits
from fumehood.service import CreateAsk, Service


def sleeping(seconds: float, timeout_s: float | None = None) -> ExecRequest:
    return ExecRequest(("sleep", str(seconds)), timeout_s=timeout_s)


def nothing_left(service: Service, n_warm: int = 0) -> bool:
    """But the warm ones: here, and among the host's cgroups."""
    instance = service.supervisor.runtime("native")._instance.name
    found = {Path(path).name for path in cgroups("") if Path(path).parent.name.endswith(instance)}
    sandboxes = {name for name in found if re.fullmatch(r"s[0-9a-f]{16}", name)}
    alive = len(service.supervisor._live) == n_warm and sandboxes <= set(service.supervisor._live)
    return alive and held(service) == {} and service.leases(ME) == [] and not service._coming


@pytest.mark.parametrize("asked", [{"policy": "nobody's"}, {"lease_s": -1}, {"limits": {"pids": "x"}}, {"priority": -11}])
async def test_a_wrong_ask_takes_nothing(tmp_path: Path, asked: dict[str, Any]) -> None:
    async with opened(tmp_path, "fake") as service:
        with pytest.raises(InvalidInput):
            await service.create(ME, CreateAsk(**asked))
        assert held(service) == {} and service.supervisor._live == {}


async def test_a_key_holds_no_more_sandboxes_than_it_may_even_when_it_asks_for_all_at_once(tmp_path: Path) -> None:
    caller = replace(ME, limits=KeyLimits(sandboxes=2))
    async with opened(tmp_path, "fake") as service:
        got = await asyncio.gather(*(service.create(caller, CreateAsk()) for _ in range(6)), return_exceptions=True)
        leases = [lease for lease in got if not isinstance(lease, BaseException)]
        assert len(leases) == 2 and sum(isinstance(error, RateLimited) for error in got) == 4
        assert await service.create(OTHER, CreateAsk())
        await service.kill(caller, leases[0])
        with pytest.raises(InvalidInput):
            await service.create(caller, CreateAsk(priority=-11))
        assert await service.create(caller, CreateAsk())
        with pytest.raises(RateLimited):
            await service.create(caller, CreateAsk())


async def test_without_a_place_it_is_turned_away_and_with_one_let_in(tmp_path: Path) -> None:
    async with opened(tmp_path, "fake", max_sandboxes=1, queue_limit=1) as service:
        lease = await service.create(ME, CreateAsk())
        with pytest.raises(DeadlineExceeded):
            await service.create(ME, CreateAsk(wait_s=0.1))
        waiting = asyncio.create_task(service.create(ME, CreateAsk()))
        await until(lambda: service.status()["scheduler"]["places"]["waiting"], "it does not wait")
        with pytest.raises(QueueFull):
            await service.create(ME, CreateAsk())
        await service.kill(ME, lease)
        await service.kill(ME, await waiting)
        assert held(service) == {}


async def test_the_memory_of_all_together_stays_within_the_budget_swap_included(tmp_path: Path) -> None:
    async with opened(tmp_path, "fake", memory_budget_bytes=GIB, memory_overcommit=1.0) as service:
        for wrong in ({"memory_bytes": GIB + 1}, {"memory_bytes": GIB, "swap_bytes": 1}):
            with pytest.raises(InvalidInput):
                await service.create(ME, CreateAsk(limits=wrong))
        first = await service.create(ME, CreateAsk(limits={"memory_bytes": 512 * MIB}))
        await service.create(OTHER, CreateAsk(limits={"memory_bytes": 256 * MIB, "swap_bytes": 256 * MIB}))
        with pytest.raises(DeadlineExceeded):
            await service.create(ME, CreateAsk(limits={"memory_bytes": 32 * MIB}, wait_s=0.1))
        waiting = asyncio.create_task(service.create(ME, CreateAsk(limits={"memory_bytes": 512 * MIB})))
        await until(lambda: service.status()["scheduler"]["places"]["waiting"], "it does not wait")
        await service.kill(ME, first)
        await waiting
        assert service.status()["scheduler"]["places"]["held_total"]["memory_bytes"] == GIB


async def test_a_make_that_fails_gives_all_back(tmp_path: Path) -> None:
    async with opened(tmp_path, "native", pool_ceiling=0) as service:
        await service.kill(ME, await service.create(ME, CreateAsk()))
        runtime = service.supervisor.runtime("native")
        for step in ("cgroups", "disk", "seccomp-floor"):
            runtime.switches = {"fail_at": step}
            for ask in (service.create(ME, CreateAsk()), service.run_once(ME, CreateAsk(), CodeRequest("1"))):
                with pytest.raises(SetupFailed):
                    await ask
            await until(lambda: nothing_left(service), f"something is left of {step}")
        runtime.switches = {}
        assert (await service.run_once(ME, CreateAsk(), CodeRequest("6 * 7"))).text == "42"


@pytest.mark.parametrize("warm", [0, 1])
async def test_a_caller_who_leaves_at_any_moment_leaves_no_sandbox_and_no_place(tmp_path: Path, warm: int) -> None:
    async with opened(tmp_path, "native", pool_policies="default", pool_floor=warm, pool_ceiling=warm) as service:
        await service.kill(ME, await service.create(ME, CreateAsk()))
        ticks, ended = 0, 0
        while ended < 3:  # until it gets there three times before its caller leaves
            await until(lambda: nothing_left(service, warm), f"something is left of {ticks} ticks")
            work = service.run_once(ME, CreateAsk(), CodeRequest("1")) if ticks % 2 else service.create(ME, CreateAsk())
            caller = asyncio.create_task(work)
            for _ in range(ticks):
                await asyncio.sleep(0)
            caller.cancel()
            await asyncio.wait({caller})
            if not caller.cancelled():
                ended += 1
                await asyncio.gather(*(service.kill(ME, lease) for lease in service.leases(ME)))
            ticks = ticks + 1 if ticks < 12 else ticks * 4 // 3
        await until(lambda: nothing_left(service, warm), "something is left")


def broken(name: str, text: str) -> None:
    raise RuntimeError("a broken listener")


async def test_a_one_shot_ends_its_sandbox_however_it_comes_out(tmp_path: Path) -> None:
    async with opened(tmp_path, "native", pool_ceiling=0) as service:
        ask = CreateAsk(on_expiry="pause", lease_s=60)
        assert (await service.run_once(ME, ask, CodeRequest("1"))).status == "ok"
        assert (await service.run_once(ME, ask, CodeRequest("1/0"))).status == "error"
        assert (await service.run_once(ME, ask, sleeping(60, 0.2))).status == "timeout"
        for timeout_s in (0, -1, float("nan"), 1e9):
            with pytest.raises(InvalidInput):
                await service.run_once(ME, ask, sleeping(60, timeout_s))
        with pytest.raises(RuntimeError):
            await service.run_once(ME, ask, CodeRequest("print(1)"), Sinks(output=broken))
        by_id = asyncio.create_task(service.run_once(ME, ask, sleeping(60), execution_id="e1234"))
        await until(lambda: service._executions.alive(None, "e1234"), "it never began")
        await service.cancel(ME, "e1234")
        assert (await by_id).status == "cancelled"
        await until(lambda: nothing_left(service), "a sandbox is left")
        records = await service.executions(ME)
        assert [r.status for r in records] == ["cancelled", "error", "timeout", "error", "ok"]
        assert all(r.state == "stopped" for r in await service.history(ME))


async def test_what_is_waited_for_is_not_had_afterwards(tmp_path: Path) -> None:
    """M11, H17: a timeout is counted from the arrival, the queue included."""
    async with opened(tmp_path, "native", max_running=1) as service:
        lease = await service.create(ME, CreateAsk())
        for late in (service.run(ME, lease, sleeping(60, 1.0)), service.run_once(ME, CreateAsk(), sleeping(60, 1.0))):
            service.submit(OTHER, await service.create(OTHER, CreateAsk()), sleeping(0.5))
            await until(lambda: service.status()["scheduler"]["turns"]["held"], "nothing runs")
            result = await late
            assert result.status == "timeout" and result.timings.queue_ms > 300
            had_s = float(re.findall(r"deadline of ([0-9.]+) s", result.cause)[0])
            assert had_s + result.timings.queue_ms / 1e3 == pytest.approx(1.0, abs=0.01)


async def test_who_waits_longer_than_its_timeout_never_runs(tmp_path: Path) -> None:
    async with opened(tmp_path, "fake", max_running=1) as service:
        lease, mine = await service.create(OTHER, CreateAsk()), await service.create(ME, CreateAsk())
        service.submit(OTHER, lease, sleeping(60))
        await until(lambda: service.status()["scheduler"]["turns"]["held"], "nothing runs")
        for work in (
            service.run(ME, mine, sleeping(0, 0.1)),
            service.run(ME, mine, sleeping(0), wait_s=0.1),
            service.run_once(ME, CreateAsk(), sleeping(0, 0.1)),
            service.run_once(ME, CreateAsk(wait_s=0.1), sleeping(0)),
        ):
            with pytest.raises(DeadlineExceeded):
                await work
        assert {(r.status, r.started_at) for r in await service.executions(ME)} == {("error", None)}
        assert [lease.id for lease in service.leases(ME)] == [mine.id]


async def test_a_tenant_with_much_work_does_not_keep_another_waiting(tmp_path: Path) -> None:
    async with opened(tmp_path, "fake", max_running=1) as service:
        many, few = await service.create(ME, CreateAsk()), await service.create(OTHER, CreateAsk())
        for _ in range(12):
            service.submit(ME, many, sleeping(0.02))
        await until(lambda: service.status()["scheduler"]["turns"]["held"], "nothing runs")
        for _ in range(3):
            service.submit(OTHER, few, sleeping(0.02))
        await until(lambda: not service.status()["executions"], "they do not end")
        done = [*await service.executions(ME), *await service.executions(OTHER)]
        order = [r.tenant for r in sorted(done, key=lambda r: r.started_at or 0)]
        assert len(order) == 15 and {r.status for r in done} == {"ok"}
        assert max(n for n, tenant in enumerate(order) if tenant == OTHER.tenant) <= 7


async def test_a_drain_lets_what_runs_end_and_takes_nothing_new(tmp_path: Path) -> None:
    async with opened(tmp_path, "fake", max_running=1) as service:
        lease = await service.create(ME, CreateAsk())
        runs = asyncio.create_task(service.run(ME, lease, sleeping(0.4)))
        await until(lambda: service.status()["scheduler"]["turns"]["held"], "nothing runs")
        waits = asyncio.create_task(service.run(ME, lease, sleeping(0)))
        await until(lambda: service.status()["scheduler"]["turns"]["waiting"], "nothing waits")
        await service.drain(30)
        assert (await runs).status == "ok"
        with pytest.raises(Draining):
            await waits
        for work in (
            service.create(ME, CreateAsk()),
            service.run(ME, lease, sleeping(0)),
            service.run_once(ME, CreateAsk(), sleeping(0)),
        ):
            with pytest.raises(Draining):
                await work
        assert sorted(str(r.status) for r in await service.executions(ME)) == ["error", "ok"]


async def test_what_outlives_the_grace_is_cancelled_and_says_so(tmp_path: Path) -> None:
    async with opened(tmp_path, "native") as service:
        lease = await service.create(ME, CreateAsk())
        runs = asyncio.create_task(service.run(ME, lease, sleeping(20)))
        await until(lambda: service.status()["scheduler"]["turns"]["held"], "nothing runs")
        await service.drain(0.1)
        assert (await runs).status == "cancelled"
        assert service.status()["executions"] == 0


async def test_a_server_that_closes_while_callers_come_leaves_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path, "native", pool_policies="default", pool_floor=2) as service:
        instance = service.supervisor.runtime("native")._instance.name
        await service.kill(ME, await service.create(ME, CreateAsk()))
        work = [service.run_once(ME, CreateAsk(), sleeping(9)) for _ in range(4)]
        work += [service.create(ME, CreateAsk()) for _ in range(8)]
        callers = [asyncio.create_task(w) for w in work]
        await asyncio.sleep(0.03)
        await service.aclose()
        done = await asyncio.gather(*callers, return_exceptions=True)
        assert not [d for d in done if isinstance(d, BaseException) and not isinstance(d, FumehoodError)]
        assert held(service) == {} and service.leases(ME) == [] and cgroups(instance) == []
        assert list((tmp_path / "run" / "instances").iterdir()) == []
    async with opened(tmp_path, "fake") as service:
        assert service.store.recovered.sandboxes == service.store.recovered.executions == 0


async def test_a_server_that_can_not_open_holds_nothing(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        async with opened(tmp_path, "native", pool_policies="default,nobody's"):
            pass
    async with opened(tmp_path, "native") as service:
        assert nothing_left(service)


async def test_an_execution_that_was_told_of_is_on_the_disk(tmp_path: Path) -> None:
    """Else a server that is killed a moment later would not know what it has promised."""
    async with opened(tmp_path, "fake") as service:
        lease = await service.create(ME, CreateAsk())
        file = tmp_path / "state" / "store.db"
        busy, reader = sqlite3.connect(file, isolation_level=None), sqlite3.connect(file)
        with closing(busy), closing(reader):
            busy.execute("BEGIN IMMEDIATE")
            execution_id = service.submit(ME, lease, sleeping(0))
            told = asyncio.create_task(service.execution(ME, execution_id))
            done, _ = await asyncio.wait({told}, timeout=0.2)
            assert not done
            busy.execute("ROLLBACK")
            assert (await told).id == execution_id
            assert reader.execute("SELECT count(*) FROM executions WHERE id = ?", (execution_id,)).fetchone() == (1,)
