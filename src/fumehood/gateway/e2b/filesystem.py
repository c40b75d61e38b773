"""filesystem.Filesystem: listing, making, moving and removing, by the agent inside the sandbox (H12)."""

from __future__ import annotations

import contextlib
import posixpath
import stat
from datetime import UTC, datetime
from typing import Any

from fumehood.agent import wire
from fumehood.errors import FileFault, FumehoodError, NotFound
from fumehood.gateway.listing import listed

from .call import Call
from .connect import Fault, number, text

Message = dict[str, Any]
_TYPES = {"file": "FILE_TYPE_FILE", "directory": "FILE_TYPE_DIRECTORY", "symlink": "FILE_TYPE_SYMLINK"}
_LETTERS = {"directory": "d", "symlink": "L"}
_MAX_DEPTH = 1_000
MAX_LISTED = 20_000  # an answer is built as a whole, and each entry takes a KiB meanwhile


def entry_info(entry: dict[str, Any]) -> Message:
    """E2B's EntryInfo from an Entry of docs/wire.md."""
    kind, mode = str(entry.get("type")), _natural(entry.get("mode")) & 0o7777
    info: Message = {
        "name": entry.get("name"),
        "type": _TYPES.get(kind, "FILE_TYPE_UNSPECIFIED"),
        "path": entry.get("path"),
        "size": str(_natural(entry.get("size"))),  # 64 bits travel as text in proto3's JSON
        "mode": mode,
        "permissions": _LETTERS.get(kind, "-") + stat.filemode(mode)[1:],
        "owner": entry.get("owner"),
        "group": entry.get("group"),
        "modifiedTime": _time(entry.get("modified_s")),
    }
    if kind == "symlink":
        where = posixpath.dirname(str(entry.get("path")))
        info |= {"isSymlink": True, "symlinkTarget": posixpath.normpath(posixpath.join(where, str(entry.get("target"))))}
    return info


def _natural(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def _time(seconds: object) -> str:
    """RFC 3339. A time that no calendar has (the guest may set any) is shown as the epoch."""
    try:
        at = datetime.fromtimestamp(float(seconds), UTC)  # pyright: ignore[reportArgumentType]
    except (ValueError, OverflowError, OSError, TypeError):
        at = datetime.fromtimestamp(0, UTC)
    return at.strftime("%Y-%m-%dT%H:%M:%S.%fZ").rjust(27, "0")


async def stat_path(call: Call, path: str) -> dict[str, Any]:
    """The Entry of `path`. Raises NotFound."""
    return await _entry(call, "files.stat", path=path)


async def _entry(call: Call, verb: str, **arguments: str) -> dict[str, Any]:
    return wire.table((await call.link.call(verb, **arguments)).get("entry"))


async def stat_entry(call: Call, message: Message) -> Message:
    return {"entry": entry_info(await stat_path(call, text(message, "path")))}


async def list_dir(call: Call, message: Message) -> Message:
    depth = min(number(message, "depth") or 1, _MAX_DEPTH)
    entries, truncated = await listed(call.link, text(message, "path", ""), depth, MAX_LISTED)
    if truncated:
        raise Fault("resource_exhausted", f"over {MAX_LISTED} entries: list a directory below, or less deep")
    return {"entries": [entry_info(entry) for entry in entries]}


async def make_dir(call: Call, message: Message) -> Message:
    path = text(message, "path")
    try:
        return {"entry": entry_info(await _entry(call, "files.mkdir", path=path))}
    except FileFault as e:
        if e.details.get("errno") not in ("EEXIST", "ENOTDIR"):
            raise
        if e.details["errno"] == "EEXIST" and (await stat_path(call, path)).get("type") == "directory":
            raise Fault("already_exists", f"directory already exists: {path}") from None
        raise Fault("invalid_argument", f"there is a file at {path}") from None


async def move(call: Call, message: Message) -> Message:
    ends = {"source": text(message, "source"), "destination": text(message, "destination")}
    return {"entry": entry_info(await _entry(call, "files.move", **ends))}


async def remove(call: Call, message: Message) -> Message:
    with contextlib.suppress(NotFound):  # as rm -f
        await call.link.call("files.remove", path=text(message, "path"))
    return {}


async def entry_or_none(call: Call, path: str) -> Message | None:
    """For an event's entry: what changed may be gone again."""
    try:
        return entry_info(await stat_path(call, path))
    except FumehoodError as e:
        if e.code in ("not_found", "file_error"):
            return None
        raise
