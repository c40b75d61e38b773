"""The second connection, in a thread of its own: it reads what is committed while the writer writes, which WAL allows."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from fumehood.errors import NotFound, StoreFailed
from fumehood.store.rows import R, checked, columns, page, typed, unpack

Conditions = Mapping[str, Any]  # "column = ?" -> its value; those whose value is None are left out


class Reader:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._thread = ThreadPoolExecutor(1, "fumehood-store-read")
        self._closed = False

    async def aclose(self) -> None:
        self._closed = True
        await asyncio.to_thread(self._thread.shutdown)
        self._connection.close()

    async def one(self, record: type[R], table: str, conditions: Conditions) -> R | None:
        found = await self.rows(record, table, conditions, "LIMIT 1")
        return found[0] if found else None

    async def rows(
        self, record: type[R], table: str, conditions: Conditions, rest: str, without: frozenset[str] = frozenset()
    ) -> list[R]:
        where, values = _where(conditions)
        found = await self._select(f"SELECT {columns(record, without)} FROM {table} {where} {rest}", values)
        return [unpack(record, row) for row in found]

    async def newest(
        self,
        record: type[R],
        table: str,
        conditions: Conditions,
        after: str | None,
        limit: int,
        without: frozenset[str] = frozenset(),
    ) -> list[R]:
        """The page below the row `after`, which must meet the conditions on the tenant too. Raises NotFound when it doesn't."""
        below = None
        if after is not None:
            where, values = _where({"id = ?": after, "tenant = ?": conditions["tenant = ?"]})
            found = await self._select(f"SELECT seq FROM {table} {where}", values)
            if not found:
                raise NotFound(f"no {after!a} to go on after", cause="it is unknown, or forgotten", remediation="start again")
            below = found[0][0]
        rest = f"ORDER BY seq DESC LIMIT {page(limit)}"
        return await self.rows(record, table, {**conditions, "seq < ?": below}, rest, without)

    async def last_seq(self) -> int:
        found = await self._select("SELECT seq FROM sqlite_sequence WHERE name = 'events'", [])
        return found[0][0] if found else 0

    async def over(self, max_bytes: int) -> list[tuple[str, int]]:
        """Each tenant whose results have more bytes together, and the `seq` up to which they must go."""
        summed = "sum(result_bytes) OVER (PARTITION BY tenant ORDER BY seq DESC ROWS UNBOUNDED PRECEDING)"
        kept = f"SELECT tenant, seq, {summed} AS bytes FROM executions WHERE result_bytes > 0"
        return await self._select(f"SELECT tenant, max(seq) FROM ({kept}) WHERE bytes > ? GROUP BY tenant", [max_bytes])

    async def snapshots_held(self, tenant: str) -> tuple[int, int]:
        """How many of the tenant, and how many bytes of all."""
        sums = "count(*) FILTER (WHERE tenant = ?), coalesce(sum(size_bytes), 0)"
        return (await self._select(f"SELECT {sums} FROM snapshots WHERE state != 'gone'", [tenant]))[0]

    async def _select(self, statement: str, values: list[Any]) -> list[Any]:
        if self._closed:
            raise StoreFailed("the store is closed", cause="its server is stopping", remediation="ask a running server")
        known = checked(*values)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._fetch, statement, known)
        except (sqlite3.Error, OverflowError) as error:
            raise typed(error) from error

    def _fetch(self, statement: str, values: tuple[Any, ...]) -> list[Any]:
        return self._connection.execute(statement, values).fetchall()


def _where(conditions: Conditions) -> tuple[str, list[Any]]:
    """A value that is a frozenset stands for any of its members."""
    texts, values = ["TRUE"], list[Any]()
    for text, value in conditions.items():
        if value is None:
            continue
        members = sorted(cast(frozenset[str], value)) if isinstance(value, frozenset) else [value]
        texts.append(text.replace("(?)", f"({', '.join('?' * len(members))})"))
        values += members
    return f"WHERE {' AND '.join(texts)}", values
