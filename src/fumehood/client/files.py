"""Files of a sandbox. Every path is resolved inside it, by its agent; the host opens only what the caller names here (H12)."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fumehood.agent import wire
from fumehood.client.calls import await_engine, block_on
from fumehood.client.engine import Engine
from fumehood.client.port import Link, Stream
from fumehood.errors import InvalidInput, NotFound
from fumehood.model import GIB, MIB

if TYPE_CHECKING:
    from fumehood.client.sandbox import AsyncSandbox, Sandbox

_MAX_READ_BYTES, _MAX_DOWNLOAD_BYTES = 256 * MIB, 1 * GIB  # into memory; onto the disk
_MAX_ENTRIES = 100_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One file as the sandbox sees it. `type` is file, directory, symlink or other."""

    name: str
    type: str
    path: str
    size: int
    mode: int
    owner: str
    group: str
    modified_s: float
    target: str | None = None


def _entry(raw: dict[str, Any]) -> Entry:
    return Entry(
        str(raw.get("name")),
        str(raw.get("type")),
        str(raw.get("path")),
        int(raw.get("size") or 0),
        int(raw.get("mode") or 0),
        str(raw.get("owner")),
        str(raw.get("group")),
        float(raw.get("modified_s") or 0),
        raw.get("target"),
    )


def _check_path(path: str) -> str:
    if not path or "\0" in path:
        raise InvalidInput(f"bad path: {path[:80]!r}", remediation="a path has at least one character and no NUL byte")
    return path


async def _chunks(link: Link, path: str) -> AsyncGenerator[bytes, None]:
    stream = await link.open("files.read", path=_check_path(path))
    try:
        async for frame in stream:
            if frame.kind == wire.DATA:
                yield frame.payload[1:]
    finally:
        await stream.cancel()


def _check_size(path: str, size: int, limit_bytes: int) -> None:
    if size > limit_bytes:
        raise InvalidInput(
            f"{path} has more than {limit_bytes} bytes", remediation="read less of it, or pass a larger limit_bytes"
        )


async def _read(link: Link, path: str, limit_bytes: int) -> bytes:
    _check_size(path, await _size(link, path), limit_bytes)  # a sparse file of 1 TB is refused before a byte of it came
    data = bytearray()
    async with contextlib.aclosing(_chunks(link, path)) as chunks:
        async for chunk in chunks:
            data += chunk
            _check_size(path, len(data), limit_bytes)
    return bytes(data)


async def _size(link: Link, path: str) -> int:
    return _entry((await link.call("files.stat", path=_check_path(path)))["entry"]).size


async def _write(link: Link, path: str, data: bytes | Path) -> Entry:
    stream = await link.open("files.write", path=_check_path(path))
    try:
        if isinstance(data, Path):
            with data.open("rb") as f:
                while chunk := f.read(wire.CHUNK_BYTES):
                    await stream.send(chunk)
        else:
            await stream.send(data)
        await stream.close_input()
        return _entry((await stream.result())["entry"])
    except BaseException:  # Ctrl-C, a host file that can't be read on: half of a file must not stay, nor the stream
        await stream.cancel()
        raise


async def _list(link: Link, path: str, depth: int) -> list[Entry]:
    found: list[Entry] = []
    stream = await link.open("files.list", path=_check_path(path), depth=depth)
    async for frame in stream:
        event = link.checked_json(frame) if frame.kind == wire.EVENT else {}
        found += [_entry(e) for e in event.get("entries", ())]
        if len(found) > _MAX_ENTRIES:
            await stream.cancel()
            raise InvalidInput(f"{path} holds more than {_MAX_ENTRIES} entries", remediation="list a smaller part")
    return found


async def _exists(link: Link, path: str) -> bool:
    try:
        await link.call("files.stat", path=_check_path(path))
    except NotFound:
        return False
    return True


async def _upload(link: Link, host: Path, path: str) -> None:  # the reads here are of the caller's own disk
    """A file, or a directory with all below it. Links on the host side are not followed out of it."""
    if not host.exists():
        raise NotFound(f"no such file on the host: {host}", remediation="check the path")
    if not host.is_dir():
        await _write(link, path, host)
        return
    await link.call("files.mkdir", path=path)
    for item in sorted(host.rglob("*")):
        inside = f"{path.rstrip('/')}/{item.relative_to(host)}"
        if item.is_dir() and not item.is_symlink():
            await link.call("files.mkdir", path=inside)
        elif stat.S_ISREG(item.lstat().st_mode):
            await _write(link, inside, item)


async def _download(link: Link, path: str, host: Path, limit_bytes: int) -> None:
    """Into a new plain file, never through a link: the name may be one that code in the sandbox chose, and the file a
    terabyte of holes (H12)."""
    part = host.with_name(host.name + ".part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        with os.fdopen(fd, "wb") as f:
            _check_size(path, await _size(link, path), limit_bytes)
            async with contextlib.aclosing(_chunks(link, path)) as chunks:
                async for chunk in chunks:
                    f.write(chunk)
                    _check_size(path, f.tell(), limit_bytes)
        part.replace(host)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@dataclass(frozen=True, slots=True)
class FileEvent:
    """`change` is create, write, remove, rename or chmod; `name` is relative to the watched directory."""

    change: str
    name: str


async def _watch(link: Link, path: str, recursive: bool) -> Stream:
    """A stream that sees every change from now on."""
    stream = await link.open("files.watch", path=_check_path(path), recursive=recursive)
    await _next_event(link, stream, "ready")
    return stream


async def _next_event(link: Link, stream: Stream, kind: str = "change") -> FileEvent | None:
    async for frame in stream:
        event = link.checked_json(frame) if frame.kind == wire.EVENT else {}
        if event.get("type") == kind:
            return FileEvent(str(event.get("change")), str(event.get("name")))
    return None


class AsyncWatch:
    """Iterate for FileEvents; close() when done."""

    def __init__(self, engine: Engine, link: Link, stream: Stream) -> None:
        self._engine, self._link, self._stream = engine, link, stream

    async def __aiter__(self) -> AsyncIterator[FileEvent]:
        while (event := await await_engine(self._engine, _next_event(self._link, self._stream))) is not None:
            yield event

    async def close(self) -> None:
        await await_engine(self._engine, self._stream.cancel())


class Watch:
    """AsyncWatch, blocking."""

    def __init__(self, engine: Engine, link: Link, stream: Stream) -> None:
        self._engine, self._link, self._stream = engine, link, stream

    def __iter__(self) -> Iterator[FileEvent]:
        while (event := block_on(self._engine, _next_event(self._link, self._stream))) is not None:
            yield event

    def close(self) -> None:
        block_on(self._engine, self._stream.cancel())


class AsyncFiles:
    """`~` and relative paths start at /home/user. Raises NotFound, FileFault (errno kept), InvalidInput."""

    def __init__(self, box: AsyncSandbox) -> None:
        self._engine, self._box = box.engine, box

    @property
    def _link(self) -> Link:
        return self._box.port.link  # asked for anew: a rollback of the whole sandbox gives it another

    async def read(self, path: str, *, limit_bytes: int = _MAX_READ_BYTES) -> bytes:
        return await await_engine(self._engine, _read(self._link, path, limit_bytes))

    async def read_text(self, path: str) -> str:
        return (await self.read(path)).decode()

    async def write(self, path: str, data: bytes | str | Path) -> Entry:
        data = data.encode() if isinstance(data, str) else data
        return await await_engine(self._engine, _write(self._link, path, data))

    async def list(self, path: str = "~", depth: int = 1) -> list[Entry]:
        return await await_engine(self._engine, _list(self._link, path, depth))

    async def stat(self, path: str) -> Entry:
        return _entry((await self._call("files.stat", path))["entry"])

    async def exists(self, path: str) -> bool:
        return await await_engine(self._engine, _exists(self._link, path))

    async def mkdir(self, path: str) -> Entry:
        return _entry((await self._call("files.mkdir", path))["entry"])

    async def move(self, source: str, destination: str) -> Entry:
        work = self._link.call("files.move", source=_check_path(source), destination=_check_path(destination))
        return _entry((await await_engine(self._engine, work))["entry"])

    async def remove(self, path: str) -> None:
        await self._call("files.remove", path)

    async def upload(self, host_path: str | Path, path: str) -> None:
        await await_engine(self._engine, _upload(self._link, Path(host_path), _check_path(path)))

    async def download(self, path: str, host_path: str | Path, *, limit_bytes: int = _MAX_DOWNLOAD_BYTES) -> None:
        await await_engine(self._engine, _download(self._link, path, Path(host_path), limit_bytes))

    async def watch(self, path: str = "~", *, recursive: bool = False) -> AsyncWatch:
        """When this returns, no later change is missed."""
        stream = await await_engine(self._engine, _watch(self._link, path, recursive))
        return AsyncWatch(self._engine, self._link, stream)

    async def _call(self, verb: str, path: str) -> dict[str, Any]:
        return await await_engine(self._engine, self._link.call(verb, path=_check_path(path)))


class Files:
    """AsyncFiles, blocking."""

    def __init__(self, box: Sandbox) -> None:
        self._engine, self._box = box.engine, box

    @property
    def _link(self) -> Link:
        return self._box.port.link  # asked for anew: a rollback of the whole sandbox gives it another

    def read(self, path: str, *, limit_bytes: int = _MAX_READ_BYTES) -> bytes:
        return block_on(self._engine, _read(self._link, path, limit_bytes))

    def read_text(self, path: str) -> str:
        return self.read(path).decode()

    def write(self, path: str, data: bytes | str | Path) -> Entry:
        data = data.encode() if isinstance(data, str) else data
        return block_on(self._engine, _write(self._link, path, data))

    def list(self, path: str = "~", depth: int = 1) -> list[Entry]:
        return block_on(self._engine, _list(self._link, path, depth))

    def stat(self, path: str) -> Entry:
        return _entry(self._call("files.stat", path)["entry"])

    def exists(self, path: str) -> bool:
        return block_on(self._engine, _exists(self._link, path))

    def mkdir(self, path: str) -> Entry:
        return _entry(self._call("files.mkdir", path)["entry"])

    def move(self, source: str, destination: str) -> Entry:
        work = self._link.call("files.move", source=_check_path(source), destination=_check_path(destination))
        return _entry(block_on(self._engine, work)["entry"])

    def remove(self, path: str) -> None:
        self._call("files.remove", path)

    def upload(self, host_path: str | Path, path: str) -> None:
        block_on(self._engine, _upload(self._link, Path(host_path), _check_path(path)))

    def download(self, path: str, host_path: str | Path, *, limit_bytes: int = _MAX_DOWNLOAD_BYTES) -> None:
        block_on(self._engine, _download(self._link, path, Path(host_path), limit_bytes))

    def watch(self, path: str = "~", *, recursive: bool = False) -> Watch:
        return Watch(self._engine, self._link, block_on(self._engine, _watch(self._link, path, recursive)))

    def _call(self, verb: str, path: str) -> dict[str, Any]:
        return block_on(self._engine, self._link.call(verb, path=_check_path(path)))
