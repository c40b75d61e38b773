"""A lease ends once, whoever or whatever ends it; nothing of its sandbox is left then, and its tenant is told why (H19)."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from opened import ME, OTHER, cgroups, held, init_of, opened, traces, until

from fumehood.errors import FumehoodError, InvalidInput, InvalidTransition, NotFound, SandboxGone, StoreFailed
from fumehood.lease import Lease
from fumehood.model import CodeRequest, ExecRequest, SandboxState
from fumehood.service import CreateAsk, Service

pytestmark = pytest.mark.rootless


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with opened(tmp_path, "fake") as service:
        yield service


def counted(lease: Lease) -> list[str]:
    """One item for each time that its place was given back."""
    given: list[str] = []
    before = lease.give_back

    def give_back() -> None:
        given.append(lease.id)
        before()

    lease.give_back = give_back
    return given


async def told(service: Service, lease: Lease) -> list[str]:
    return [e.kind for e in await service.store.events(None, 0) if e.sandbox_id == lease.id and e.kind.startswith("sandbox.")]


async def die(service: Service, lease: Lease) -> None:
    signal.pidfd_send_signal(lease.live.handle._pidfd, signal.SIGKILL)


async def kill(service: Service, lease: Lease) -> None:
    await service.kill(ME, lease)


async def expire(service: Service, lease: Lease) -> None:
    await service.extend(ME, lease, 0)


async def pause(service: Service, lease: Lease) -> None:
    with suppress(SandboxGone, InvalidTransition):  # it ended first, and says so
        await service.pause(ME, lease)


async def leave(service: Service, lease: Lease) -> None:
    """Somebody who asks for its end and goes away at once."""
    task = asyncio.create_task(service.kill(ME, lease))
    await asyncio.sleep(0)
    task.cancel()


async def shut(service: Service, lease: Lease) -> None:
    await service.aclose()


Act = Callable[[Service, Lease], Coroutine[Any, Any, None]]
TOGETHER: list[tuple[Act, ...]] = [
    (kill, kill, kill),
    (kill, expire),
    (expire, die),
    (die, kill),
    (pause, kill),
    (pause, die, expire),
    (kill, pause),
    (leave,),
    (leave, expire),
    (kill, shut),
    (die, shut),
    (leave, shut),
    (die, leave, expire, pause, kill, shut),
]


@pytest.mark.parametrize("acts", TOGETHER, ids=lambda acts: "+".join(act.__name__ for act in acts))
async def test_it_ends_once_whatever_comes_together_and_nothing_of_it_is_left(tmp_path: Path, acts: tuple[Act, ...]) -> None:
    async with opened(tmp_path, "native") as service:
        lease = await service.create(ME, CreateAsk())
        await service.run(ME, lease, ExecRequest(("/bin/sh", "-c", "setsid sleep 60 & sleep 60 &")))
        given, init = counted(lease), init_of(lease)
        await asyncio.gather(*(act(service, lease) for act in acts))
        await until(lambda: lease.ending is not None, "it did not end")
        await service.kill(ME, lease)
        assert given == [lease.id] and held(service) == {}
        assert traces(lease, init) == []
        cause = lease.cause
        with pytest.raises(SandboxGone, match=cause):
            service.lease(ME, lease.id)
        if shut not in acts:
            record = await service.record(ME, lease.id)
            assert record is not None and (record.state, record.cause) == ("stopped", cause)
            kinds = await told(service, lease)
            assert kinds[0] == "sandbox.started" and kinds[-1] == "sandbox.stopped" and kinds.count("sandbox.stopped") == 1
    async with opened(tmp_path, "fake") as service:
        assert service.store.recovered.sandboxes == 0
        record = await service.record(ME, lease.id)
        assert record is not None and (record.state, record.cause) == ("stopped", cause)


async def test_who_asks_for_an_end_that_is_under_way_waits_for_it(service: Service) -> None:
    lease = await service.create(ME, CreateAsk())
    first = asyncio.create_task(service.kill(ME, lease, "first"))
    await until(lease.ended.is_set, "it did not end")
    await service.kill(ME, lease, "second")
    assert lease.live.handle.alive is False and not Path(lease.live.handle.home).exists()
    await first
    assert lease.cause == "first"


async def test_an_ended_one_is_gone_for_its_tenant_and_never_was_for_others(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fumehood.service.leases._REMEMBERED", 2)
    ended = [await service.create(ME, CreateAsk()) for _ in range(3)]
    others = await service.create(OTHER, CreateAsk())
    for lease in ended:
        await service.kill(ME, lease, f"end of {lease.id}")
    for lease in ended[1:]:
        with pytest.raises(SandboxGone, match=lease.id):
            service.lease(ME, lease.id)
    unknown = words(service, "s" + "0" * 16)
    for sandbox_id in (ended[0].id, others.id):
        assert words(service, sandbox_id).replace(sandbox_id, "s" + "0" * 16) == unknown
    await service.kill(OTHER, others)
    assert words(service, others.id).replace(others.id, "s" + "0" * 16) == unknown
    assert len(service._leases._ended) == 2


def words(service: Service, sandbox_id: str) -> str:
    with pytest.raises(NotFound) as e:
        service.lease(ME, sandbox_id)
    return f"{e.value.code} {e.value} {e.value.remediation} {e.value.details}"


async def answer(service: Service, lease: Lease) -> str | None:
    return (await service.run(ME, await service.awake(ME, lease.id), CodeRequest("6 * 7"))).text


@pytest.mark.parametrize("auto_resume", [False, True])
@pytest.mark.parametrize("on_expiry", ["kill", "pause"])
async def test_at_the_end_of_its_lease_it_ends_or_pauses_and_wakes_as_agreed(
    service: Service, on_expiry: Any, auto_resume: bool
) -> None:
    lease = await service.create(ME, CreateAsk(lease_s=0.3, on_expiry=on_expiry, auto_resume=auto_resume))
    assert time.time() < lease.end_at <= time.time() + 0.3
    assert lease.live.state is SandboxState.READY
    if on_expiry == "kill":
        await until(lambda: lease.ending and lease.ending.done(), "it did not end")
        assert lease.cause == "its lease is over" and time.time() >= lease.end_at - 0.05
        return
    await until(lambda: lease.end_at > time.time() + 60 and not lease.moving.locked(), "it did not pause")
    assert lease.is_paused
    (record,) = await service.history(ME, states=frozenset({"paused"}))
    assert record == lease.record
    if auto_resume:
        assert await answer(service, lease) == "42"
        assert time.time() < lease.end_at <= time.time() + 0.3
        await until(lambda: lease.is_paused, "the new lease has no end")
    else:
        with pytest.raises(InvalidTransition):
            await answer(service, lease)
        await service.resume(ME, lease)
        assert await answer(service, lease) == "42"


async def test_a_pause_stops_the_lease_and_a_resume_goes_on_with_what_was_left(service: Service) -> None:
    lease = await service.create(ME, CreateAsk(lease_s=0.5))
    await service.pause(ME, lease)
    left_s = lease.left_s
    await asyncio.sleep(0.6)
    assert lease.is_paused and not lease.ended.is_set() and 0 < left_s <= 0.5
    await service.resume(ME, lease)
    assert lease.end_at == pytest.approx(time.time() + left_s, abs=0.05)
    await until(lease.ended.is_set, "it did not end")
    assert await told(service, lease) >= ["sandbox.started", "sandbox.paused", "sandbox.resumed"]


async def test_a_pause_has_an_end_too(tmp_path: Path) -> None:
    async with opened(tmp_path, "fake", paused_lifetime_s=1) as service:
        lease = await service.create(ME, CreateAsk())
        await service.pause(ME, lease)
        await until(lambda: lease.ending and lease.ending.done(), "it is paused for ever")
        assert lease.cause == "its paused time is over"


async def test_a_lease_can_be_extended_shortened_and_ended_now(service: Service) -> None:
    lease = await service.create(ME, CreateAsk(lease_s=0.3))
    await service.extend(ME, lease, 60)
    assert lease.end_at == pytest.approx(time.time() + 60, abs=0.5)
    await asyncio.sleep(0.4)
    assert not lease.ended.is_set()
    for wrong in (float("nan"), float("inf"), service.config.max_lifetime_s + 1):
        with pytest.raises(InvalidInput):
            await service.extend(ME, lease, wrong)
    await service.extend(ME, lease, 0.1)
    await until(lease.ended.is_set, "it did not end")
    with pytest.raises(SandboxGone):
        await service.extend(ME, lease, 60)
    now = await service.create(ME, CreateAsk())
    await service.extend(ME, now, -1)
    assert now.ending is not None and now.ending.done()


async def test_extending_a_paused_one_is_for_when_it_goes_on(service: Service) -> None:
    lease = await service.create(ME, CreateAsk(lease_s=5))
    await service.pause(ME, lease)
    await service.extend(ME, lease, 60)
    assert lease.is_paused
    await service.resume(ME, lease)
    assert lease.end_at == pytest.approx(time.time() + 60, abs=0.5)


async def test_no_extension_passes_the_longest_life_in_which_pauses_do_not_count(tmp_path: Path) -> None:
    async with opened(tmp_path, "fake", max_lifetime_s=2, default_policy="strictless") as service:
        lease = await service.create(ME, CreateAsk(policy={"limits": {"lifetime_s": 1, "timeout_s": 1}}, lease_s=1.5))
        await service.extend(ME, lease, 2)
        assert lease.end_at <= lease.created_at + 2
        await service.pause(ME, lease)
        await asyncio.sleep(1)
        await service.resume(ME, lease)
        await service.extend(ME, lease, 1.5)
        assert lease.end_at == pytest.approx(time.time() + 1.5, abs=0.3)
        assert lease.end_at <= lease.created_at + lease.paused_s + 2 and lease.paused_s >= 1


async def test_pausing_and_resuming_at_once_leaves_the_state_and_the_processes_agreed(tmp_path: Path) -> None:
    async with opened(tmp_path, "native") as service:
        lease = await service.create(ME, CreateAsk())
        for n in range(10):
            acts = (service.pause, service.resume, service.pause)[n % 2 :]
            done = await asyncio.gather(*(act(ME, lease) for act in acts), return_exceptions=True)
            assert all(d is None or isinstance(d, InvalidTransition) for d in done)
            if not lease.is_paused:
                await service.pause(ME, lease)
            with pytest.raises(InvalidTransition):
                await service.pause(ME, lease)
            await service.resume(ME, lease)
            with pytest.raises(InvalidTransition):
                await service.resume(ME, lease)
            assert await answer(service, lease) == "42"


async def test_a_pause_at_the_moment_of_expiry_wins_or_loses_but_is_never_undone(service: Service) -> None:
    """Paused by its owner, it stays; the end of the lease that was under way has nothing to end any more."""
    for late_s in (-0.01, -0.002, 0.0, 0.002):
        lease = await service.create(ME, CreateAsk(lease_s=0.1, on_expiry="pause"))
        await asyncio.sleep(max(0.0, lease.end_at - time.time() + late_s))
        await pause(service, lease)
        await asyncio.sleep(0.05)
        assert lease.is_paused and not lease.ended.is_set()


async def test_an_extension_that_was_agreed_to_holds_however_late_it_came(service: Service) -> None:
    for on_expiry in ("kill", "pause"):
        lease = await service.create(ME, CreateAsk(lease_s=0.2, on_expiry=on_expiry))
        busy = time.monotonic() + max(0.0, lease.end_at - time.time()) + 0.01
        while time.monotonic() < busy:
            pass  # the loop finds the end of the lease and the extension in one turn
        await service.extend(ME, lease, 60)
        await asyncio.sleep(0.05)
        assert not lease.ended.is_set() and not lease.is_paused


async def test_one_that_can_not_be_recorded_leaves_no_sandbox(tmp_path: Path) -> None:
    async with opened(tmp_path, "native") as service:
        await service.store.aclose()
        with pytest.raises(StoreFailed):
            await service.create(ME, CreateAsk())
        assert held(service) == {} and service.leases(ME) == [] and service.supervisor._live == {}
        assert cgroups(service.supervisor.runtime("native")._instance.name + "/s") == []


async def test_one_whose_processes_died_says_so_and_frees_its_place(tmp_path: Path) -> None:
    async with opened(tmp_path, "native") as service:
        lease = await service.create(ME, CreateAsk())
        running = asyncio.create_task(service.run(ME, lease, ExecRequest(("sleep", "60"))))
        await until(lambda: service.status()["executions"] and lease.live.state is SandboxState.RUNNING, "it does not run")
        os.kill(init_of(lease), signal.SIGKILL)
        assert (await running).status == "killed"
        await until(lambda: lease.ending and lease.ending.done(), "nobody noticed")
        assert held(service) == {}
        with pytest.raises(FumehoodError) as e:
            await service.run(ME, lease, CodeRequest("1"))
        assert e.value.code == "sandbox_gone"
