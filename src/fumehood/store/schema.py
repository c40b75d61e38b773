"""The store's file: whose it is, of which generation, and how it is opened. What is not surely ours is refused.

MIGRATIONS[n] leads from generation n to n + 1, in one transaction each; what is in it never changes once it was released.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from fumehood.errors import StoreFailed

T = TypeVar("T")
APPLICATION_ID = 0x66_75_6D_65  # "fume": what other databases don't have
MIGRATIONS: list[str] = [
    """
    CREATE TABLE keys (
        id TEXT PRIMARY KEY, tenant TEXT NOT NULL, digest TEXT NOT NULL, scopes TEXT NOT NULL, name TEXT NOT NULL,
        limits TEXT NOT NULL, compat TEXT NOT NULL, created_at REAL NOT NULL, revoked_at REAL);
    CREATE TABLE sandboxes (
        seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, key_id TEXT NOT NULL, template TEXT NOT NULL,
        tier TEXT NOT NULL, policy TEXT NOT NULL, state TEXT NOT NULL, created_at REAL NOT NULL, end_at REAL NOT NULL,
        on_expiry TEXT NOT NULL, auto_resume INTEGER NOT NULL, metadata TEXT NOT NULL, ended_at REAL, cause TEXT NOT NULL);
    CREATE INDEX sandboxes_of_tenant ON sandboxes (tenant, seq);
    CREATE TABLE executions (
        seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, sandbox_id TEXT NOT NULL, tenant TEXT NOT NULL, kind TEXT NOT NULL,
        state TEXT NOT NULL, queued_at REAL NOT NULL, started_at REAL, finished_at REAL, status TEXT, cause TEXT NOT NULL,
        result TEXT NOT NULL);
    CREATE INDEX executions_of_tenant ON executions (tenant, seq);
    CREATE INDEX executions_of_sandbox ON executions (sandbox_id, seq)
    """,
    """
    CREATE TABLE replies (
        tenant TEXT NOT NULL, key TEXT NOT NULL, body_digest TEXT NOT NULL, status INTEGER NOT NULL, body TEXT NOT NULL,
        created_at REAL NOT NULL, PRIMARY KEY (tenant, key));
    CREATE TABLE events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, tenant TEXT NOT NULL, sandbox_id TEXT NOT NULL, at REAL NOT NULL,
        kind TEXT NOT NULL, data TEXT NOT NULL);
    CREATE INDEX events_of_tenant ON events (tenant, seq);
    CREATE INDEX events_by_age ON events (at);
    CREATE INDEX replies_by_age ON replies (created_at);
    CREATE INDEX executions_by_age ON executions (finished_at);
    CREATE INDEX sandboxes_by_age ON sandboxes (ended_at);
    CREATE INDEX executions_unfinished ON executions (state) WHERE state != 'done';
    CREATE INDEX sandboxes_live ON sandboxes (state) WHERE state != 'stopped'
    """,
    # Newest first, as they are summed: in the other direction each prune would sort them all.
    """
    ALTER TABLE executions ADD COLUMN result_bytes INTEGER NOT NULL DEFAULT 0;
    UPDATE executions SET result_bytes = length(CAST(result AS BLOB)) WHERE result != '';
    CREATE INDEX executions_by_bytes ON executions (tenant, seq DESC, result_bytes) WHERE result_bytes > 0
    """,
    """
    CREATE TABLE snapshots (
        seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, key_id TEXT NOT NULL, sandbox_id TEXT NOT NULL,
        tier TEXT NOT NULL, template TEXT NOT NULL, policy TEXT NOT NULL, policy_hash TEXT NOT NULL, spec TEXT NOT NULL,
        state TEXT NOT NULL, created_at REAL NOT NULL, size_bytes INTEGER NOT NULL, metadata TEXT NOT NULL);
    CREATE INDEX snapshots_of_tenant ON snapshots (tenant, seq)
    """,
]


def connect(path: Path, busy_s: float, *, flush: bool = True) -> sqlite3.Connection:
    """One connection; it waits `busy_s` for another process's transaction to end. `flush`: each commit reaches the disk;
    without it none waits for the disk, and bringing the log there is left to others.
    """
    connection = sqlite3.connect(path, timeout=busy_s, isolation_level=None, check_same_thread=False)
    connection.execute(f"PRAGMA synchronous = {'FULL' if flush else 'NORMAL'}")
    if not flush:
        connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


def prepare(path: Path, busy_s: float, *, check: bool) -> None:
    """Make the file (0600) or prove that it is a store of ours, whole (`check`) and of this generation. Raises StoreFailed."""
    _make_or_refuse(path)
    try:
        connection = connect(path, busy_s)
        try:
            _migrate(connection, path)
            if check and (found := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise StoreFailed(f"the store {path} is damaged", cause=found, remediation="restore it from a backup")
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise StoreFailed(
            f"the store {path} can't be opened", cause=str(error), remediation="see that it is a whole file"
        ) from error


def lock(path: Path) -> int:
    """Hold the side file `path`.lock until the descriptor is closed, or the process is gone (`kill -9` included).

    Raises StoreFailed, which names the pid, when another server holds it.
    """
    _own_folder(path.parent)
    side = path.with_name(path.name + ".lock")
    _judge(side)
    try:
        held = os.open(side, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreFailed(f"the lock {side} can't be made", cause=str(error), remediation="remove what is there") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        pid = os.pread(held, 32, 0).decode(errors="replace").strip()
        os.close(held)
        raise StoreFailed(
            f"the store {path} is in use by process {pid}",
            cause="two servers can't serve one store",
            remediation="stop that server, or give this one another state_dir",
            pid=pid,
        ) from error
    os.ftruncate(held, 0)
    os.pwrite(held, str(os.getpid()).encode(), 0)
    return held


def _own_folder(folder: Path) -> None:
    """Nobody else may be able to plant or swap anything in it, for what is in it is judged first and opened by SQLite later."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise StoreFailed(f"{folder} can't hold a store", cause=str(error), remediation="choose another state_dir") from error
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
        raise _unsafe(folder, "others can write in this directory", "chmod go-w it, or choose another state_dir")


def _make_or_refuse(path: Path) -> None:
    """An existing file is judged by lstat, never opened: closing a second descriptor would drop SQLite's own locks on it."""
    _own_folder(path.parent)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        pass  # judged below, like its side files
    except OSError as error:
        raise StoreFailed(f"the store {path} can't be made", cause=str(error), remediation="choose another path") from error
    for suffix in ("", "-wal", "-shm", "-journal"):
        _judge(path.with_name(path.name + suffix))


def _judge(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        raise _unsafe(path, "it is a link or no regular file", "remove it")
    if found.st_uid != os.geteuid():
        raise _unsafe(path, f"it belongs to uid {found.st_uid}", "run as that user, or choose another state_dir")
    if found.st_mode & 0o077:
        raise _unsafe(path, "others may read or write it", "chmod 600 it")


def _unsafe(path: Path, cause: str, remediation: str) -> StoreFailed:
    return StoreFailed(f"{path} is not safely one's own", cause=cause, remediation=remediation)


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    # In this order: another process may be making the file, and what it makes comes with the id in one commit.
    is_made = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if is_made and connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise _unsafe(path, "it is a database of another program", "choose another path")
    generation = _generation(connection)
    if generation > len(MIGRATIONS):
        raise StoreFailed(
            f"the store {path} is of generation {generation}, this program knows {len(MIGRATIONS)}",
            cause="a newer version of the program wrote it",
            remediation="run that version, or choose another state_dir",
        )
    connection.execute("PRAGMA journal_mode = WAL")
    for step in range(generation, len(MIGRATIONS)):
        atomically(connection, partial(_step, connection, step))


def _step(connection: sqlite3.Connection, step: int) -> None:
    if _generation(connection) != step:  # asked again under the lock: another process may have been first
        return
    for statement in MIGRATIONS[step].split(";"):
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {step + 1}")


def _generation(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA user_version").fetchone()[0]


def atomically(connection: sqlite3.Connection, work: Callable[[], T]) -> T:
    """All of `work` or nothing. SQLite itself ends the transaction on some failures (disk full), hence the question."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        came_to = work()
        connection.execute("COMMIT")
        return came_to
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
