"""A tenant that floods the store with results keeps the newest of them, long before the ten minutes between two prunes."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

from opened import ME, OTHER, opened, until

from fumehood.model import MIB, CodeRequest
from fumehood.service import CreateAsk

PRINTED, RUNS = 200 * 1024, 40
A_RESULT = PRINTED + 16 * 1024  # as JSON


def bytes_kept(home: Path, tenant: str) -> int:
    with contextlib.closing(sqlite3.connect(home / "state" / "store.db")) as db:
        text = "SELECT total(length(CAST(result AS BLOB))), total(result_bytes) FROM executions WHERE tenant = ?"
        held, counted = db.execute(text, (tenant,)).fetchone()
    assert held == counted
    return int(held)


async def test_results_stay_within_the_bound_and_a_quarter_and_the_newest_are_readable(tmp_path: Path) -> None:
    async with opened(tmp_path, "fake", retention_bytes_per_tenant=MIB) as service:
        mine, theirs = await service.create(ME, CreateAsk()), await service.create(OTHER, CreateAsk())
        await service.run(OTHER, theirs, CodeRequest("print('theirs')"))
        for n in range(RUNS):
            result = await service.run(ME, mine, CodeRequest(f"print('{n:03}' + 'x' * {PRINTED})"))
            assert result.stdout.startswith(f"{n:03}")
            await until(lambda: bytes_kept(tmp_path, ME.tenant) <= 1.25 * MIB + A_RESULT, f"more is kept after run {n}")
        listed = await service.executions(ME, limit=1000)
        found = [await service.execution(ME, record.id) for record in listed]
        assert {(record.state, record.status) for record in found} == {("done", "ok")} and len(found) == RUNS
        newest = [json.loads(record.result)["stdout"][:3] for record in found if record.result]
        assert newest == [f"{n:03}" for n in reversed(range(RUNS - len(newest), RUNS))] and 4 <= len(newest) <= 6
        (other,) = await service.executions(OTHER)
        assert json.loads((await service.execution(OTHER, other.id)).result)["stdout"] == "theirs\n"
