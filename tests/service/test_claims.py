"""A warm sandbox is its claimer's alone: alive, under the claimer's limits and env, with nothing of others (H18, H24)."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from opened import ADMIN, ME, OTHER, held, init_of, opened, traces, until

from fumehood.errors import NotFound
from fumehood.execution import Sinks
from fumehood.lease import Lease
from fumehood.live import Live
from fumehood.model import MIB, CodeRequest, ExecRequest, SandboxState
from fumehood.service import CreateAsk, Service

pytestmark = pytest.mark.rootless
N_WARM = 2


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    settings = {"pool_policies": "default", "pool_floor": N_WARM, "pool_ceiling": N_WARM}
    async with opened(tmp_path, "native", agent_timeout_s=2, **settings) as service:
        await full(service)
        yield service


def row(service: Service) -> dict[str, int]:
    (found,) = service.status()["pools"]
    return found


async def full(service: Service) -> None:
    await until(lambda: row(service)["warm"] == N_WARM, "it does not get warm")


def warm(service: Service) -> list[Live]:
    leased = {lease.id for lease in service.everyone()}
    return [live for live in service.supervisor._live.values() if live.id not in leased]


async def says(service: Service, lease: Lease, code: str) -> str:
    result = await service.run(ME, lease, CodeRequest(code))
    assert result.ok, result
    return result.stdout


ALL_IT_SEES = """
import os, pathlib, socket
print(sorted(os.listdir("/tmp") + os.listdir("/home/user") + os.listdir("/dev/shm")))
print([p for p in os.listdir("/proc") if p.isdigit() and int(p) != os.getpid()] and "others" )
print("canary" in str(dict(os.environ)), "canary" in globals())
print(pathlib.Path("/proc/net/unix").read_text().count("canary") if os.path.exists("/proc/net/unix") else 0)
"""
LEAVE_ALL = """
import os, pathlib, socket
canary = 1
for place in ("/tmp/canary", "/home/user/canary", "/dev/shm/canary"): pathlib.Path(place).write_text("canary")
os.environ["canary"] = "canary"
kept = socket.socket(socket.AF_UNIX); kept.bind("\\0canary")
"""


async def test_nothing_of_an_earlier_tenant_is_in_a_later_ones_sandbox(service: Service) -> None:
    untouched = await says(service, await service.create(ME, CreateAsk()), ALL_IT_SEES)
    seen: set[str] = set()
    for _ in range(4):
        await full(service)
        theirs = await service.create(OTHER, CreateAsk(env={"canary": "canary"}))
        await service.run(OTHER, theirs, CodeRequest(LEAVE_ALL))
        await service.run(OTHER, theirs, ExecRequest(("/bin/sh", "-c", "setsid sleep 60 &")))
        await service.kill(OTHER, theirs)
        mine = await service.create(ME, CreateAsk())
        assert await says(service, mine, ALL_IT_SEES) == untouched
        assert not seen & {mine.id, theirs.id} and mine.id != theirs.id
        seen |= {mine.id, theirs.id}
    assert row(service)["hits"] >= 5


HISTORY = "print(_i, _ii, _iii, In, Out, get_ipython().history_manager.db_input_cache)"


async def test_a_warm_one_shows_nothing_of_the_cell_that_warmed_it(service: Service) -> None:
    ready = {live.id for live in warm(service)}
    claimed, cold = await service.create(ME, CreateAsk()), await service.create(ME, CreateAsk(policy="permissive"))
    assert claimed.id in ready and cold.id not in ready
    assert await says(service, claimed, HISTORY) == await says(service, cold, HISTORY)


async def test_a_claimers_limits_and_env_are_in_force_in_a_warm_one(service: Service) -> None:
    ready = {live.id for live in warm(service)}
    limits = {"memory_bytes": 64 * MIB, "cpus": 0.5}
    lease = await service.create(ME, CreateAsk(limits=limits, env={"MINE": "1"}))
    assert lease.id in ready
    assert lease.live.spec.limits.memory_bytes == 64 * MIB and lease.live.spec.env == {"MINE": "1"}
    assert await says(service, lease, "import os; print(os.environ['MINE'])") == "1\n"
    assert (await service.run(ME, lease, ExecRequest(("/bin/sh", "-c", "echo $MINE")))).stdout == "1\n"
    result = await service.run(ME, lease, ExecRequest(("python3", "-c", "len(bytearray(200 << 20)); print('too much')")))
    assert (result.status, result.stdout) == ("oom", "")
    roomy = await service.create(ME, CreateAsk())
    assert roomy.id in ready
    assert (
        await says(service, roomy, "import os; print('MINE' in os.environ, len(bytearray(200 << 20)) >> 20)") == "False 200\n"
    )


async def test_a_warm_one_that_died_is_not_handed_out_and_is_replaced(service: Service) -> None:
    for wait in (True, False):
        await full(service)
        dead = {live.id for live in warm(service)}
        for live in warm(service):
            signal.pidfd_send_signal(live.handle._pidfd, signal.SIGKILL)
        if wait:
            await until(lambda dead=dead: not dead & {live.id for live in warm(service)}, "nobody noticed")
        lease = await service.create(ME, CreateAsk())
        assert lease.id not in dead and await says(service, lease, "print(6 * 7)") == "42\n"
        await until(lambda dead=dead: not dead & service.supervisor._live.keys(), "the dead are kept")
        await service.kill(ME, lease)
    assert held(service) == {}


async def test_a_warm_one_that_does_not_answer_is_not_waited_for_longer_than_for_a_new_one(service: Service) -> None:
    hung = {live.id: live for live in warm(service)}
    for live in hung.values():
        await live.handle.pause()
    async with asyncio.timeout(10):
        lease = await service.create(ME, CreateAsk())
    assert lease.id not in hung and await says(service, lease, "print(6 * 7)") == "42\n"
    assert len(hung.keys() & service.supervisor._live.keys()) == N_WARM - 1


async def test_another_policy_gets_no_warm_one_of_this(service: Service) -> None:
    ready = {live.id for live in warm(service)}
    for ask in (CreateAsk(policy={"files": {"hidden": ["/usr/share"]}}), CreateAsk(limits={"disk_bytes": 64 * MIB})):
        assert (await service.create(ME, ask)).id not in ready
    assert (await service.create(ADMIN, CreateAsk())).id in ready


async def test_an_end_waits_for_no_listener_that_has_stopped_reading(service: Service) -> None:
    lease, never = await service.create(ME, CreateAsk()), asyncio.Event()
    init = init_of(lease)

    async def room() -> None:
        await never.wait()

    chatty = CodeRequest("while True: print('x' * 1000)")
    running = asyncio.create_task(service.run(ME, lease, chatty, Sinks(room=room)))
    await until(lambda: lease.live.state is SandboxState.RUNNING, "it does not run")
    await asyncio.sleep(0.2)
    async with asyncio.timeout(5):
        await service.kill(ME, lease)
    assert traces(lease, init) == [] and "places" not in held(service)
    never.set()
    result = await running
    assert result.status == "killed" and result.cause == "killed by its owner" and result.usage.peak_memory_bytes > 0


async def test_a_tenant_finds_nothing_of_another(service: Service) -> None:
    lease = await service.create(ME, CreateAsk())
    execution_id = service.submit(ME, lease, ExecRequest(("sleep", "60")))
    for look in (
        lambda caller: service.execution(caller, execution_id),
        lambda caller: service.cancel(caller, execution_id),
        lambda caller: service.awake(caller, lease.id),
    ):
        with pytest.raises(NotFound):
            await look(OTHER)
    assert await service.executions(OTHER) == await service.history(OTHER) == service.leases(OTHER) == []
    assert await service.record(OTHER, lease.id) is None
    (running,) = await service.executions(ME)
    assert running.id == execution_id and running.state in ("queued", "running")
    await service.cancel(ME, execution_id)
    await until(lambda: not service.status()["executions"], "it goes on")
    assert (await service.execution(ME, execution_id)).status == "cancelled"
