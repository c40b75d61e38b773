"""What is written, as works for the writer. Every value is a parameter; what is formatted in are names of tables and columns.

A work that raises has written nothing before (see writer.py).
"""

from __future__ import annotations

import sqlite3
from dataclasses import fields
from typing import Any

from fumehood.errors import Conflict, InvalidTransition, NotFound
from fumehood.records import EventRecord, IdempotentReply, Recovered, SandboxRecord
from fumehood.store.rows import checked, columns, insertion, pack, unpack
from fumehood.store.writer import Work

SLICE = 1000  # rows that one transaction forgets
# Results, of up to 8 MiB, and all of it is written where SQLite overwrites what it frees (as Debian's does). Never fewer than
# are written meanwhile, or a flood outruns it.
RESULTS_SLICE = 256
REPLIES_S = 86_400.0  # a request is repeated soon or never

_REPLACED = ", ".join(f"{f.name} = excluded.{f.name}" for f in fields(SandboxRecord) if f.name not in ("id", "tenant"))

REVOKE = "UPDATE keys SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL"
PUT_SANDBOX = (
    f"{insertion('sandboxes', SandboxRecord)} ON CONFLICT (id) DO UPDATE SET {_REPLACED} "
    "WHERE tenant = excluded.tenant AND (state != 'stopped' OR excluded.state = 'stopped')"
)
END_SANDBOX = "UPDATE sandboxes SET state = 'stopped', ended_at = ?, cause = ? WHERE id = ? AND state != 'stopped'"
FINISH = (
    "UPDATE executions SET state = 'done', started_at = ?1, finished_at = ?2, status = ?3, cause = ?4, result = ?5, "
    "result_bytes = length(CAST(?5 AS BLOB)) WHERE id = ?6 AND state != 'done'"
)
CLAIM = f"{insertion('replies', IdempotentReply)} ON CONFLICT (tenant, key) DO NOTHING"
KEEP_REPLY = "UPDATE replies SET status = ?, body = ? WHERE tenant = ? AND key = ? AND status = 0"
DROP_REPLY = "DELETE FROM replies WHERE tenant = ? AND key = ? AND status = 0"
APPEND = insertion("events", EventRecord)  # without a `seq` (NULL) it is the next one

# In the order of Recovered's fields; ?1 is now, ?2 the cause.
RECOVER = (
    "UPDATE sandboxes SET state = 'stopped', ended_at = ?1, cause = ?2 WHERE state != 'stopped'",
    "UPDATE executions SET state = 'done', status = 'killed', finished_at = ?1, cause = ?2 WHERE state != 'done'",
    "DELETE FROM replies WHERE status = 0 AND ?1 > 0 AND ?2 IS NOT NULL",
)


def _forget(table: str, ended: str, at: str) -> str:
    """?1 the cutoff, ?2 how many to keep: counted by rowid, which has gaps only where rows were forgotten before."""
    aged = f"({at} < ?1 OR rowid <= (SELECT max(rowid) FROM {table}) - ?2)"
    return f"DELETE FROM {table} WHERE rowid IN (SELECT rowid FROM {table} WHERE {ended} AND {aged} LIMIT {SLICE})"


FORGET_EXECUTIONS = _forget("executions", "state = 'done'", "finished_at")
FORGET_EVENTS = _forget("events", "TRUE", "at")
FORGET_SANDBOXES = _forget(
    "sandboxes",
    "state = 'stopped' AND NOT EXISTS (SELECT 1 FROM executions AS e WHERE e.sandbox_id = sandboxes.id)",
    "ended_at",
)
FORGET_REPLIES = _forget("replies", "status != 0", "created_at")
FORGET_RESULTS = (
    "UPDATE executions SET result = '', result_bytes = 0 WHERE seq IN "
    f"(SELECT seq FROM executions WHERE tenant = ? AND seq <= ? AND result_bytes > 0 LIMIT {RESULTS_SLICE})"
)


def statement(text: str, *values: Any) -> Work:
    """Comes to the number of rows written. Raises InvalidInput, now and not in the writer, for values that can't be kept."""
    known = checked(*values)
    return lambda db: db.execute(text, known).rowcount


def put_sandbox(record: SandboxRecord) -> Work:
    values = pack(record)

    def work(db: sqlite3.Connection) -> None:
        if db.execute(PUT_SANDBOX, values).rowcount:
            return
        if db.execute("SELECT 1 FROM sandboxes WHERE id = ? AND tenant = ?", (record.id, record.tenant)).fetchone():
            raise InvalidTransition(f"sandbox {record.id} has ended", cause="its record says so for good")
        raise Conflict(f"sandbox {record.id} can't be recorded", cause="the id is taken")

    return work


def end_sandbox(sandbox_id: str, now: float, cause: str) -> Work:
    ended = statement(END_SANDBOX, now, cause, sandbox_id)

    def work(db: sqlite3.Connection) -> None:
        if not ended(db):
            _known(db, "sandboxes", sandbox_id)

    return work


def finish(execution_id: str, *outcome: Any) -> Work:
    finished = statement(FINISH, *outcome, execution_id)

    def work(db: sqlite3.Connection) -> None:
        if not finished(db):
            _known(db, "executions", execution_id)
            raise InvalidTransition(f"execution {execution_id} is done", cause="its record says how it ended for good")

    return work


class Claim:
    """A work, and the work that undoes it if it was what claimed the key."""

    def __init__(self, wanted: IdempotentReply) -> None:
        self._wanted = wanted
        self._values = pack(wanted)
        self._mine = False

    def __call__(self, db: sqlite3.Connection) -> IdempotentReply | None:
        self._mine = db.execute(CLAIM, self._values).rowcount == 1
        return None if self._mine else self._used(db)

    def undo(self, db: sqlite3.Connection) -> None:
        if self._mine:
            db.execute(DROP_REPLY, (self._wanted.tenant, self._wanted.key))

    def _used(self, db: sqlite3.Connection) -> IdempotentReply:
        text = f"SELECT {columns(IdempotentReply)} FROM replies WHERE tenant = ? AND key = ?"
        kept = unpack(IdempotentReply, db.execute(text, (self._wanted.tenant, self._wanted.key)).fetchone())
        if kept.body_digest != self._wanted.body_digest:
            raise Conflict("this idempotency key was used for another request", remediation="use a new key for each request")
        return kept


def recover(now: float, cause: str) -> Work:
    ends = [statement(text, now, cause) for text in RECOVER]
    return lambda db: Recovered(*(end(db) for end in ends))


def _known(db: sqlite3.Connection, table: str, row_id: str) -> None:
    if not db.execute(f"SELECT 1 FROM {table} WHERE id = ?", (row_id,)).fetchone():
        raise NotFound(
            f"no {row_id!a} in the history", cause="it was never written, or is forgotten", remediation="check the id"
        )
