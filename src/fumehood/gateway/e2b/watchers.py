"""Watching a directory: WatchDir streams, and the polled watchers of the synchronous SDK."""

from __future__ import annotations

import asyncio
import collections
import posixpath
import secrets
from collections.abc import AsyncGenerator
from typing import Any

from fumehood.errors import FumehoodError
from fumehood.gateway.call import leave
from fumehood.runtime.link import Stream

from .call import Call
from .connect import Fault, flag, text
from .filesystem import entry_or_none, stat_path

Message = dict[str, Any]
MAX_WATCHERS = 16  # for each sandbox
MAX_EVENTS = 1_000  # kept for a client that does not come to fetch them; then the oldest go
_NAME_CHARS = 4_096  # no path is longer (PATH_MAX), but what a hostile agent says would be kept
_PING_S = 30.0
_TYPES = {c: f"EVENT_TYPE_{c.upper()}" for c in ("create", "write", "remove", "rename", "chmod")}


async def watch_dir(call: Call, message: Message) -> AsyncGenerator[Message, None]:
    root, entries, stream = await _open(call, message)
    try:
        yield {"start": {}}
        while True:
            try:
                async with asyncio.timeout(_PING_S):
                    frame = await anext(stream)
            except TimeoutError:
                yield {"keepalive": {}}
                continue
            except StopAsyncIteration:
                return
            if change := _change(call.link.checked_json(frame)):
                yield {"filesystem": await _event(call, root, change, entries)}
    finally:
        await leave(stream)


async def _open(call: Call, message: Message) -> tuple[str, bool, Stream]:
    """(the directory's path, whether events carry entries, the stream after its `ready`). Raises what the agent answers."""
    path = text(message, "path")
    root = str((await stat_path(call, path)).get("path"))
    stream = await call.link.open("files.watch", path=path, recursive=flag(message, "recursive"))
    async for frame in stream:
        if call.link.checked_json(frame).get("type") == "ready":
            break
    return root, flag(message, "includeEntry"), stream


def _change(event: Message) -> tuple[str, str] | None:
    kind = _TYPES.get(str(event.get("change")))
    return (kind, str(event.get("name"))[:_NAME_CHARS]) if event.get("type") == "change" and kind else None


async def _event(call: Call, root: str, change: tuple[str, str], entries: bool) -> Message:
    kind, name = change
    event: Message = {"name": name, "type": kind}
    described = entries and kind in ("EVENT_TYPE_CREATE", "EVENT_TYPE_WRITE", "EVENT_TYPE_CHMOD")
    if described and (entry := await entry_or_none(call, posixpath.join(root, name))):
        event["entry"] = entry
    return event


class _Watcher:
    def __init__(self, call: Call, root: str, entries: bool, stream: Stream) -> None:
        self.lease, self.root, self.entries = call.lease, root, entries
        self.changes: collections.deque[tuple[str, str]] = collections.deque(maxlen=MAX_EVENTS)
        self._link, self._stream = call.link, stream
        self.failure: FumehoodError | None = None
        self.task = asyncio.create_task(self._fill())

    async def _fill(self) -> None:
        """Read as it comes, so that an idle client never stops the sandbox's channel."""
        try:
            async for frame in self._stream:
                if change := _change(self._link.checked_json(frame)):
                    self.changes.append(change)
        except FumehoodError as e:
            self.failure = e  # told at the next GetWatcherEvents, after what had been seen before

    async def close(self) -> None:
        if not self.task.done():
            await self._stream.cancel()
        self.task.cancel()
        self._stream.abandon()


class Watchers:
    """Of all sandboxes: a watcher is found under its own sandbox only."""

    def __init__(self) -> None:
        self._all: dict[tuple[str, str], _Watcher] = {}

    async def create(self, call: Call, message: Message) -> Message:
        self._forget_the_dead()
        if sum(sandbox == call.lease.id for sandbox, _ in self._all) >= MAX_WATCHERS:
            raise Fault("resource_exhausted", f"a sandbox may have {MAX_WATCHERS} watchers; remove one")
        root, entries, stream = await _open(call, message)
        name = "w" + secrets.token_hex(8)
        self._all[call.lease.id, name] = _Watcher(call, root, entries, stream)
        return {"watcherId": name}

    async def events(self, call: Call, message: Message) -> Message:
        """All that happened before the request: the second ping is answered after inotify had its turn, and by then
        its frames are here."""
        watcher = self._find(call, message)
        for _ in range(2):
            await call.link.call("ping")
        await asyncio.sleep(0)
        changes = list(watcher.changes)
        watcher.changes.clear()
        if not changes and watcher.failure:
            raise watcher.failure
        return {"events": [await _event(call, watcher.root, change, watcher.entries) for change in changes]}

    async def remove(self, call: Call, message: Message) -> Message:
        watcher = self._find(call, message)
        del self._all[call.lease.id, text(message, "watcherId")]
        await watcher.close()
        return {}

    def _find(self, call: Call, message: Message) -> _Watcher:
        name = text(message, "watcherId")
        if (watcher := self._all.get((call.lease.id, name))) is None:
            raise Fault("not_found", f"no watcher {name[:32]!r}")
        return watcher

    def _forget_the_dead(self) -> None:
        for key in [key for key, watcher in self._all.items() if watcher.lease.ended.is_set()]:
            self._all.pop(key).task.cancel()
