"""Any sequence of operations, in one tick or in several, leaves held what a model that counts grants says is held."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from moment import PRIORITY, UNTIMED
from waiters import ticks

from fumehood.errors import DeadlineExceeded, Draining, QueueFull
from fumehood.scheduler import PRIORITIES, RESERVE_AFTER_S, Capacity, Grant, Scheduler

CAPACITY = Capacity(places=3, memory_bytes=10, tenant_places=2)
QUEUE_LIMIT = 4
WHICH = st.integers(0, 9)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), st.sampled_from("abc"), st.integers(0, 10), PRIORITY, st.sampled_from([None, 0, 1, 4])),
        st.tuples(st.just("release"), WHICH),
        st.tuples(st.just("cancel"), WHICH),
        st.tuples(st.just("later"), st.sampled_from([0.5, 2, 6])),
        st.tuples(st.just("tick")),
        st.tuples(st.just("settle")),
    ),
    max_size=50,
)


class Traffic:
    """The scheduler under test on a clock of its own, those who wait for it, and the grants they were given."""

    def __init__(self) -> None:
        self.now = 0.0
        self.said: list[dict[str, Any]] = []
        self.scheduler = Scheduler(CAPACITY, QUEUE_LIMIT, clock=lambda: self.now)
        self.asked: dict[asyncio.Task[Grant], tuple[str, int, float]] = {}
        self.grants: list[Grant] = []

    async def admit(self, tenant: str, memory_bytes: int, priority: int, wait_s: float | None) -> None:
        admission = self.scheduler.admit(tenant, memory_bytes=memory_bytes, priority=priority, wait_s=wait_s)
        self.asked[asyncio.create_task(admission)] = tenant, memory_bytes, self.now

    async def release(self, which: int) -> None:
        if self.grants:
            self.grants.pop(which % len(self.grants)).release()

    async def cancel(self, which: int) -> None:
        if self.asked:
            list(self.asked)[which % len(self.asked)].cancel()

    async def later(self, seconds: float) -> None:
        self.now += seconds

    async def tick(self) -> None:
        await asyncio.sleep(0)
        for task in [task for task in self.asked if task.done()]:
            del self.asked[task]
            if task.cancelled():
                continue
            if error := task.exception():
                assert isinstance(error, QueueFull | DeadlineExceeded | Draining)
            else:
                self.grants.append(task.result())

    async def settle(self) -> None:
        await ticks(6)
        await self.tick()
        self.check()

    def check(self) -> None:
        view, places = self.scheduler.snapshot(), Counter(grant.tenant for grant in self.grants)
        memory = sum(grant.memory_bytes for grant in self.grants)
        assert view["held_total"] == {"places": len(self.grants), "memory_bytes": memory}
        assert {tenant: held["places"] for tenant, held in view["held"].items()} == places
        assert len(self.grants) <= CAPACITY.places and memory <= CAPACITY.memory_bytes
        assert max(places.values(), default=0) <= CAPACITY.tenant_places
        assert view["waiting"] == Counter(tenant for tenant, _, _ in self.asked.values())
        assert len(self.asked) <= QUEUE_LIMIT
        if all(self.now - at < RESERVE_AFTER_S for _, _, at in self.asked.values()):
            assert not any(self.fits(*ask) for ask in self.asked.values())

    def fits(self, tenant: str, memory_bytes: int, _: float) -> bool:
        free_bytes = CAPACITY.memory_bytes - sum(grant.memory_bytes for grant in self.grants)
        mine = sum(grant.tenant == tenant for grant in self.grants)
        return len(self.grants) < CAPACITY.places and memory_bytes <= free_bytes and mine < CAPACITY.tenant_places


async def played(steps: list[tuple[Any, ...]]) -> Traffic:
    traffic = Traffic()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: traffic.said.append(context))
    for what, *args in steps:
        await getattr(traffic, what)(*args)
    await traffic.settle()
    return traffic


async def all_is_given_back(steps: list[tuple[Any, ...]]) -> None:
    traffic = await played(steps)
    for task in traffic.asked:
        task.cancel()
    for grant in traffic.grants:
        grant.release()
    traffic.grants.clear()
    await traffic.settle()
    await asyncio.wait_for(traffic.scheduler.idle(), 5)
    whole = await traffic.scheduler.admit("d", memory_bytes=CAPACITY.memory_bytes, priority=PRIORITIES[0], wait_s=0)
    whole.release()
    assert not traffic.said


async def drained(steps: list[tuple[Any, ...]]) -> None:
    traffic = await played(steps)
    waited, held = list(traffic.asked), len(traffic.grants)
    traffic.scheduler.drain()
    await traffic.settle()
    assert all(isinstance(task.exception(), Draining) for task in waited) and len(traffic.grants) == held
    for grant in traffic.grants:
        grant.release()
    await asyncio.wait_for(traffic.scheduler.idle(), 5)
    assert not traffic.said


@UNTIMED
@given(STEPS)
def test_whatever_happens_the_grants_add_up_and_all_is_given_back(steps: list[tuple[Any, ...]]):
    asyncio.run(all_is_given_back(steps))


@UNTIMED
@given(STEPS)
def test_whatever_happened_before_draining_ends_with_nothing_waiting_or_held(steps: list[tuple[Any, ...]]):
    asyncio.run(drained(steps))
