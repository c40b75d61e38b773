"""Each execution has one record, whatever becomes of it: its work, its caller, the store, the server (H19)."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from opened import until

from fumehood.errors import CapacityExceeded, InvalidInput, SandboxGone, StoreFailed
from fumehood.model import MIB, CodeError, FileChange, Result, RichResult
from fumehood.records import ExecutionRecord
from fumehood.scheduler import Capacity, Grant, Scheduler
from fumehood.service.executions import MAX_KEPT_BYTES, Executions, Running, to_json
from fumehood.store import Store

OK = Result("ok", stdout="done")
BUSY_S = 0.3


class Office:
    """Executions over a real store and a queue with one place."""

    def __init__(self, path: Path, store: Store) -> None:
        self.path, self.store = path, store
        self.queue, self.told = Scheduler(Capacity(1), 100), list[ExecutionRecord]()
        self.executions = Executions(store, self.told.append)
        self.works, self.gate = asyncio.Event(), asyncio.Event()

    async def _turn(self) -> Grant:
        return await self.queue.admit("one")

    async def at_the_gate(self) -> Result:
        self.works.set()
        await self.gate.wait()
        return OK

    def begin(self, work: Callable[[], Awaitable[Result]] | None = None) -> Running:
        return self.executions.begin("one", "s1", "code", self._turn, work or self.at_the_gate)

    @contextmanager
    def store_locked(self) -> Iterator[None]:
        """By another process, as it seems: every write fails after BUSY_S."""
        other = sqlite3.connect(self.path, isolation_level=None)
        try:
            other.execute("BEGIN IMMEDIATE")
            yield
        finally:
            other.close()

    async def records(self) -> list[ExecutionRecord]:
        return await self.store.executions(None)

    async def the_record(self, status: str) -> ExecutionRecord:
        """The only one; it is done, it was told of once, and nothing of it is left here."""
        (listed,) = await self.records()
        record = await self.store.execution(None, listed.id)
        assert record is not None and replace(record, result="") == listed
        assert (record.state, record.status) == ("done", status)
        assert [told.status for told in self.told] == [status]
        assert len(self.executions) == 0 and "one" not in self.queue.snapshot()["held"]
        return record


@pytest.fixture
async def office(tmp_path: Path) -> AsyncIterator[Office]:
    path = tmp_path / "store.db"
    store = await Store.open(path, busy_s=BUSY_S)
    yield Office(path, store)
    await store.aclose()


async def good() -> Result:
    return OK


async def test_what_ends_well_is_recorded_before_its_caller_has_the_result(office: Office) -> None:
    result = await office.executions.result(office.begin(good))
    assert result.stdout == "done"
    record = await office.the_record("ok")
    assert json.loads(record.result)["stdout"] == "done"
    assert record.started_at is not None and record.finished_at is not None
    assert record.queued_at <= record.started_at <= record.finished_at


@pytest.mark.parametrize(
    ("error", "status"),
    [(InvalidInput("no"), "error"), (SandboxGone("gone"), "killed"), (RuntimeError("a bug"), "error"), (OSError(5), "error")],
    ids=["invalid", "gone", "bug", "os"],
)
async def test_what_the_work_raises_is_recorded_and_raised(office: Office, error: Exception, status: str) -> None:
    async def work() -> Result:
        raise error

    with pytest.raises(type(error)):
        await office.executions.result(office.begin(work))
    record = await office.the_record(status)
    assert str(error) in record.cause


@pytest.mark.parametrize("error", [InvalidInput("no"), RuntimeError("a bug")], ids=["invalid", "bug"])
async def test_a_failure_that_nobody_awaits_is_logged_only_when_it_is_a_bug(
    office: Office, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> Result:
        raise error

    running = office.begin(work)
    assert running.task is not None
    await asyncio.wait({running.task})
    del running
    await office.the_record("error")
    assert [r.levelno for r in caplog.records] == ([logging.ERROR] if isinstance(error, RuntimeError) else [])


async def stand(office: Office, moment: str) -> Running:
    """An execution at that moment of its life."""
    if moment == "queued":
        place = await office.queue.admit("two")
        asyncio.get_running_loop().call_later(0.1, place.release)
    running = office.begin()
    if moment == "queued":
        await until(lambda: office.queue.snapshot()["waiting"], "it never queued")
    elif moment != "before its first step":
        await office.works.wait()
    if moment == "being written":
        office.gate.set()
        await until(lambda: running.is_over, "it never ended")
    return running


MOMENTS = ("before its first step", "queued", "running", "being written")


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("moment", MOMENTS)
async def test_cancelled_by_its_id_at_any_moment_it_has_one_record_and_its_caller_the_result(
    office: Office, moment: str, times: int
) -> None:
    with office.store_locked() if moment == "being written" else nullcontext():
        running = await stand(office, moment)
        assert office.executions.cancel("one", running.record.id) is (moment != "being written")
        for _ in range(times - 1):
            await asyncio.sleep(0)
            office.executions.cancel("one", running.record.id)
    result = await office.executions.result(running)
    status = "ok" if moment == "being written" else "cancelled"
    assert result.status == status
    await office.the_record(status)


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_caller_who_leaves_at_any_moment_stops_the_work_and_leaves_one_record(
    office: Office, moment: str, times: int
) -> None:
    stood = asyncio.Event()

    async def come() -> Result:
        running = await stand(office, moment)
        stood.set()
        return await office.executions.result(running)

    with office.store_locked() if moment == "being written" else nullcontext():
        caller = asyncio.create_task(come())
        await (asyncio.sleep(0) if moment == "before its first step" else stood.wait())
        for _ in range(times):
            caller.cancel()
            await asyncio.sleep(0)
        if moment != "being written" or times > 1:
            await asyncio.wait({caller})
    with pytest.raises(asyncio.CancelledError):
        await caller
    await until(lambda: not len(office.executions), "it never ended")
    await office.the_record("ok" if moment == "being written" else "cancelled")


async def test_a_caller_who_left_hears_of_nothing_that_goes_wrong_afterwards(office: Office) -> None:
    async def work() -> Result:
        try:
            return await office.at_the_gate()
        except asyncio.CancelledError:
            raise RuntimeError("a bug") from None

    caller = asyncio.create_task(office.executions.result(office.begin(work)))
    await office.works.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await office.the_record("error")


async def test_only_its_own_tenant_reaches_an_execution(office: Office) -> None:
    running = await stand(office, "running")
    assert not office.executions.cancel("two", running.record.id)
    assert office.executions.alive("two", running.record.id) is None
    assert not office.executions.cancel("one", "e0")
    office.gate.set()
    await office.executions.result(running)
    await office.the_record("ok")


async def test_when_all_are_stopped_every_record_says_so_and_every_caller_has_a_result(office: Office) -> None:
    place = await office.queue.admit("two")
    begun = [office.begin() for _ in range(4)]
    callers = [asyncio.create_task(office.executions.result(running)) for running in begun[:2]]
    await until(lambda: len(office.queue.snapshot()["waiting"]), "they never queued")
    place.release()
    await office.works.wait()
    begun.append(office.begin())
    await office.executions.stop_all()
    assert len(office.executions) == 0
    assert [r.status for r in await office.records()] == ["cancelled"] * 5
    assert [(await caller).status for caller in callers] == ["cancelled"] * 2
    await office.executions.stop_all()


async def test_a_store_that_does_not_keep_up_refuses_and_nothing_is_begun(office: Office) -> None:
    with office.store_locked():
        with pytest.raises(CapacityExceeded):
            for _ in range(10_000):
                office.store.append_event("one", "s1", "noise", {})
        with pytest.raises(CapacityExceeded):
            office.begin()
    assert len(office.executions) == 0 and office.queue.snapshot()["held"] == {} and office.told == []


async def test_one_whose_beginning_could_not_be_written_is_written_at_its_end(office: Office) -> None:
    with office.store_locked():
        running = await stand(office, "running")
        await until(lambda: office.store.lost, "the store never failed")
    office.gate.set()
    assert (await office.executions.result(running)).status == "ok"
    assert (await office.the_record("ok")).result


async def test_one_whose_end_could_not_be_written_is_no_success_and_is_found_killed_at_the_next_start(
    office: Office, tmp_path: Path
) -> None:
    running = await stand(office, "running")
    await office.store.executions(None)
    with office.store_locked():
        office.gate.set()
        with pytest.raises(StoreFailed):
            await office.executions.result(running)
    assert len(office.executions) == 0 and office.queue.snapshot()["held"] == {}
    await office.store.aclose()
    office.store = await Store.open(tmp_path / "store.db")
    try:
        (record,) = await office.records()
        assert (record.id, record.state, record.status) == (running.record.id, "done", "killed")
    finally:
        await office.store.aclose()


HUGE = {
    "results": Result("ok", "why", 0, results=tuple(RichResult({"text/plain": "x" * MIB}) for _ in range(12))),
    "control characters": Result("ok", "why", 0, stdout="\0" * 9 * MIB, stderr="\0" * 9 * MIB),
    "not Unicode": Result("ok", "why", 0, stdout="\udc80" * 2 * MIB, stderr="😀" * 2 * MIB),
    "traceback": Result("ok", "why", 0, error=CodeError("E" * 256, "😀" * 65_536, "\udc80" * 2 * MIB)),
    "names": Result("ok", "why", 0, changes=tuple(FileChange("\udc80" * 4_096, "created") for _ in range(1_000))),
    "context": Result("ok", "why", 0, context="\0" * 3 * MIB),
}


@pytest.mark.parametrize("what", HUGE)
async def test_a_huge_result_is_cut_in_the_history_and_nowhere_else(office: Office, what: str) -> None:
    async def work() -> Result:
        return HUGE[what]

    result = await office.executions.result(office.begin(work))
    assert (result.results, result.stdout, result.error, result.changes) == (
        HUGE[what].results,
        HUGE[what].stdout,
        HUGE[what].error,
        HUGE[what].changes,
    )
    kept = (await office.the_record("ok")).result
    assert len(kept.encode()) <= MAX_KEPT_BYTES
    said = json.loads(kept)
    assert (said["status"], said["cause"], said["exit_code"], said["stdout_truncated"]) == ("ok", "why", 0, True)
    assert said["stdout"] == HUGE[what].stdout[-len(said["stdout"]) :] if said["stdout"] else True


def nested(depth: int, leaf: str) -> RichResult:
    return RichResult({"application/json": json.loads("[" * depth + json.dumps(leaf) + "]" * depth)})


@pytest.mark.parametrize(
    "result",
    [
        Result("ok", stdout="a\udc80b"),
        Result("error", cause="\udc80", error=CodeError("\ud800", "", "")),
        Result("ok", results=(RichResult({"\ud800": float("nan"), "b": [float("inf")]}),)),
        Result("ok", results=(nested(300, ""),)),
        Result("ok", results=(nested(300, "\udc80"),)),
        Result("ok", changes=(FileChange("/home/user/\udcff", "created"),)),
    ],
    ids=["output", "cause", "no numbers", "deep", "deep and no Unicode", "a file's name"],
)
async def test_whatever_a_guest_makes_of_its_result_is_kept_as_json(office: Office, result: Result) -> None:
    async def work() -> Result:
        return result

    assert await office.executions.result(office.begin(work)) == result
    record = await office.the_record(result.status)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(record.result, parse_constant=refuse) == json.loads(to_json(result), parse_constant=refuse)
    if not result.results:
        assert json.loads(record.result)["stdout"] == result.stdout


async def test_the_queue_is_in_the_timings(office: Office) -> None:
    place = await office.queue.admit("two")
    running = office.executions.begin("one", "s1", "exec", office._turn, good, waited_ms=1_000)
    asyncio.get_running_loop().call_later(0.1, place.release)
    result = await office.executions.result(running)
    assert result.timings.queue_ms >= 1_090
    assert (await office.the_record("ok")).kind == "exec"
