"""Makes and closes for a pool under test, and knows of each thing where it is: nothing may be lost or given twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fumehood.pool import Pool, PoolSettings

STEPS = 3
MAKE_S = 0.3
SETTINGS = PoolSettings(floor=2, ceiling=8, headroom=1.2, idle_s=30.0, make_timeout_s=5.0)


class Broken(Exception):
    pass


@dataclass(eq=False)
class Thing:
    number: int
    key: str
    dead: bool = False


@dataclass
class Workshop:
    """`fault` is what happens in step `fault_step` of a make, of the classes in `faulty` or of all: None goes well."""

    clock: Callable[[], float]
    fault: str | None = None
    fault_step: int = 0
    faulty: frozenset[str] | None = None
    close_fails: bool = False
    tools: int = 0  # held by makes: each step takes one and gives it back when the make ends badly
    attempts: list[float] = field(default_factory=list)
    keys: Counter[str] = field(default_factory=Counter)
    now_making: Counter[str] = field(default_factory=Counter)
    things: list[Thing] = field(default_factory=list)
    closed: list[Thing] = field(default_factory=list)
    claimed: list[Thing] = field(default_factory=list)

    def pool(self, settings: PoolSettings = SETTINGS) -> Pool[str, Thing]:
        return Pool(self.make, self.close, settings, clock=self.clock)

    async def make(self, key: str) -> Thing:
        self.attempts.append(self.clock())
        self.keys[key] += 1
        self.now_making[key] += 1
        held = 0
        fault = self.fault if self.faulty is None or key in self.faulty else None
        fault_step = self.fault_step  # one fault for each make, also when the next is to have another
        try:
            for step in range(STEPS):
                self.tools += 1
                held += 1
                await self._step(step, fault if step == fault_step else None)
            thing = Thing(len(self.things), key)
            self.things.append(thing)
            return thing
        finally:
            self.tools -= held
            self.now_making[key] -= 1

    async def _step(self, step: int, fault: str | None) -> None:
        if fault == "raises at once":
            raise Broken(f"step {step}")
        if fault == "stubborn":  # answers a cancellation with a result
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                return
        await asyncio.sleep(1000 if fault == "hangs" else MAKE_S / STEPS)
        if fault == "raises":
            raise Broken(f"step {step}")
        if fault == "cancelled inside":
            raise asyncio.CancelledError

    async def close(self, thing: Thing) -> None:
        await asyncio.sleep(0.1)
        self.closed.append(thing)
        if self.close_fails:
            raise Broken("close")

    def claim(self, pool: Pool[str, Thing], key: str) -> Thing | None:
        thing = pool.claim(key)
        if thing is not None:
            assert thing.key == key, "of another class"
            assert not thing.dead, "known dead"
            assert thing not in self.claimed and thing not in self.closed, "given twice"
            self.claimed.append(thing)
        return thing

    def nothing_left(self) -> None:
        """Each thing was either claimed or closed, once; no make goes on or holds anything."""
        assert Counter(t.number for t in [*self.claimed, *self.closed]) == Counter(t.number for t in self.things)
        assert self.tools == 0
        assert not +self.now_making


def row(pool: Pool[str, Any], key: str) -> dict[str, Any]:
    return next(row for row in pool.snapshot() if row["class"] == key)
