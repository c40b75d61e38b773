"""What top shows: the figures of a server's sandboxes, queue and pool, read again and again."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fumehood.cli import exits, pool, show, terminal
from fumehood.errors import Forbidden, NotFound, SandboxGone

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fumehood.client.admin import Admin

COLUMNS = ("id", "state", "cpu %", "memory", "of", "pids", "policy", "age", "lease left")
_AT_ONCE = 16  # requests for figures: top is a guest of the server that it watches
_FIRST_S = 0.5


@dataclass
class Row:
    record: dict[str, Any]
    stats: dict[str, Any] | None  # None: it ended meanwhile
    cpu: float | None = None  # of one processor


@dataclass
class View:
    rows: list[Row] = field(default_factory=list[Row])
    status: dict[str, Any] | None = None  # None: not an admin's key


class Watch:
    """Remembers the last reading of each sandbox, since a share of CPU is a difference."""

    def __init__(self, admin: Admin, limit: int) -> None:
        self._admin, self._limit, self._places = admin, limit, asyncio.Semaphore(_AT_ONCE)
        self._before: dict[str, tuple[float, float]] = {}  # id -> (when, CPU seconds)

    async def look(self) -> View:
        records = await self._admin.pages("/v1/sandboxes", "sandboxes", self._limit)
        rows = await asyncio.gather(*(self._row(record) for record in records))
        self._before = {k: v for k, v in self._before.items() if k in {r["id"] for r in records}}
        return View(rows, await self._status())

    async def _row(self, record: dict[str, Any]) -> Row:
        async with self._places:
            try:
                stats = await self._admin.get(f"/v1/sandboxes/{record['id']}/stats")
            except (NotFound, SandboxGone):
                return Row(record, None)
        now, used_s = time.monotonic(), float(stats["usage"]["cpu_s"])
        then, used_then_s = self._before.get(record["id"], (now, used_s))
        self._before[record["id"]] = now, used_s
        return Row(record, stats, max(0.0, (used_s - used_then_s) / (now - then)) if now > then else None)

    async def _status(self) -> dict[str, Any] | None:
        try:
            return await self._admin.get("/v1/status")
        except Forbidden:
            return None


def _cells(row: Row, now: float) -> list[object]:
    record, stats = row.record, row.stats or {}
    memory = show.size(stats["memory_bytes"]) if stats else ""
    bound = record.get("limits", {}).get("memory_bytes") or stats.get("memory_limit_bytes")
    cpu = "" if row.cpu is None else f"{row.cpu * 100:.0f}"
    times = show.ago(record["created_at"], now), show.span(max(0.0, record["end_at"] - now))
    limit = show.size(bound) if bound else ""
    return [record["id"], record["state"], cpu, memory, limit, stats.get("pids", ""), record["policy"], *times]


async def once(watch: Watch, as_json: bool) -> None:
    """Two looks, since the first can't know a share of CPU."""
    await watch.look()
    await asyncio.sleep(_FIRST_S)
    view = await watch.look()
    if as_json:
        boxes = [
            {**r.record, "stats": r.stats, "cpu_percent": None if r.cpu is None else round(r.cpu * 100, 1)} for r in view.rows
        ]
        exits.print_json({"sandboxes": boxes, "status": view.status})
    else:
        show.table(COLUMNS, [_cells(row, time.time()) for row in view.rows])


async def live(watch: Watch, every_s: float) -> None:
    from rich.live import Live

    with _quitting() as left, Live(_picture(await watch.look()), screen=True, auto_refresh=False) as screen:
        while not left.is_set():
            try:
                await asyncio.wait_for(left.wait(), every_s)
            except TimeoutError:
                screen.update(_picture(await watch.look()), refresh=True)


@contextmanager
def _quitting() -> Generator[asyncio.Event]:
    left, loop = asyncio.Event(), asyncio.get_running_loop()
    if not sys.stdin.isatty():
        yield left
        return
    stdin = sys.stdin.fileno()

    def key() -> None:
        if os.read(stdin, 64).lower() in (b"q", b""):
            left.set()

    with terminal.keys_at_once(stdin):
        loop.add_reader(stdin, key)
        try:
            yield left
        finally:
            loop.remove_reader(stdin)


def _queue(name: str, facts: dict[str, Any]) -> str:
    """`turns 3/16, waiting 2`: held of those there are, and asked for by all tenants together."""
    return f"{name} {facts['held_total']['places']}/{facts['capacity']['places']}, waiting {sum(facts['waiting'].values())}"


def _picture(view: View) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    now = time.time()
    boxes = show.grid(COLUMNS, [_cells(row, now) for row in view.rows])
    head = Text(f"{len(view.rows)} sandboxes   {time.strftime('%H:%M:%S')}   q leaves", "bold")
    if view.status is None:
        return Group(head, boxes)
    queues = Text("   ".join(_queue(name, facts) for name, facts in view.status["scheduler"].items()))
    return Group(head, queues, show.grid(pool.COLUMNS, pool.rows(view.status["pools"])), Text(), boxes)
