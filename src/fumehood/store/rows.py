"""Records to rows and back: a column for each field, in the field's order; what SQLite has no type for is JSON text."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, TypeVar, cast

from fumehood.errors import Conflict, FumehoodError, InvalidInput, StoreFailed
from fumehood.records import ApiKey, EventRecord, ExecutionRecord, IdempotentReply, KeyLimits, SandboxRecord, SnapshotRecord

Record = ApiKey | SandboxRecord | ExecutionRecord | EventRecord | IdempotentReply | SnapshotRecord
R = TypeVar("R", ApiKey, SandboxRecord, ExecutionRecord, EventRecord, IdempotentReply, SnapshotRecord)
MAX_PAGE = 1000


def _limits(text: str) -> KeyLimits:
    return KeyLimits(**json.loads(text))


def _names(text: str) -> frozenset[str]:
    return frozenset(json.loads(text))


_DECODE: Mapping[str, Callable[[Any], Any]] = {
    "scopes": _names,
    "compat": _names,
    "limits": _limits,
    "metadata": json.loads,
    "data": json.loads,
    "auto_resume": bool,
}


def columns(record: type[Record], without: frozenset[str] = frozenset()) -> str:
    """`without`: texts that are not read; "" stands for them."""
    return ", ".join(f"'' AS {f.name}" if f.name in without else f.name for f in fields(record))


def insertion(table: str, record: type[Record]) -> str:
    return f"INSERT INTO {table} ({columns(record)}) VALUES ({', '.join('?' * len(fields(record)))})"


def pack(record: Record) -> tuple[Any, ...]:
    """Raises InvalidInput for what could not come back the same."""
    return checked(*(_encode(getattr(record, f.name)) for f in fields(record)))


def unpack(record: type[R], row: Sequence[Any]) -> R:
    """Raises StoreFailed for a row that nobody of us wrote."""
    try:
        values = {f.name: _DECODE.get(f.name, _same)(value) for f, value in zip(fields(record), row, strict=True)}
        return record(**values)
    except (ValueError, TypeError) as error:
        raise StoreFailed(f"a row of {record.__name__} is damaged", cause=str(error), remediation="restore a backup") from error


def checked(*values: Any) -> tuple[Any, ...]:
    """The values, once each is known to be one that SQLite keeps as it is. NUL is; half a surrogate pair and NaN are not."""
    for value in values:
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise InvalidInput("a text is not Unicode", cause=str(error), remediation="encode it as UTF-8") from error
        elif isinstance(value, float) and not math.isfinite(value):
            raise InvalidInput(f"{value} is not a number of seconds", remediation="give a finite one")
    return values


def page(limit: int) -> int:
    """SQLite takes a negative limit for none at all."""
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidInput(f"limit = {limit}", cause=f"it must be from 1 to {MAX_PAGE}", remediation="ask for several pages")
    return limit


def to_json(value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidInput("this can't be kept as JSON", cause=str(error), remediation="pass JSON values only") from error


def typed(error: Exception) -> Exception:
    """What a caller can act on, for what SQLite said. A bug of ours stays what it is."""
    if isinstance(error, FumehoodError):
        return error
    if isinstance(error, sqlite3.IntegrityError) and str(error).startswith("UNIQUE"):
        return Conflict("there is one with this id already", cause=str(error), remediation="choose another id")
    if isinstance(error, sqlite3.IntegrityError | sqlite3.DataError | sqlite3.ProgrammingError | sqlite3.InterfaceError):
        return InvalidInput("this can't be kept", cause=str(error), remediation="pass values of the record's types")
    if isinstance(error, OverflowError):
        return InvalidInput("a number is too big to be kept", cause=str(error), remediation="stay below 2^63")
    if isinstance(error, sqlite3.Error):
        name = getattr(error, "sqlite_errorname", "")
        return StoreFailed("the store can't do that now", cause=f"{error} ({name})", remediation="see to the disk it is on")
    return error


def _same(value: Any) -> Any:
    return value


def _encode(value: Any) -> Any:
    if isinstance(value, KeyLimits):
        return to_json(asdict(value))
    if isinstance(value, frozenset):
        return to_json(sorted(cast(frozenset[str], value)))
    return to_json(dict(cast(Mapping[str, Any], value))) if isinstance(value, Mapping) else value
