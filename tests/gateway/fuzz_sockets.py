"""Mutated requests over raw sockets to any HTTP server: it may refuse them, but must answer in HTTP and stay well.

    fuzz("http://127.0.0.1:8470", 500, seed=1, headers=[("Authorization", "Bearer fh_..")], paths=["/v1/sandboxes"], pid=4711)

Every round has a generator of its own, so a failure names what repeats it: seed and round.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

AT_ONCE = 16
PATIENCE_S = 0.25  # for the answer to a request that may be incomplete
CALM_S = 15.0  # until connections of ours must be forgotten
_MAY_FAIL = (501, 503, 505)
_STATUS = re.compile(rb"HTTP/1\.1 ([1-5]\d\d) [\x20-\x7e]*\r\n")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?([\x20-\x7e\x80-\xff\t]*)\r\n")
_CHUNK = re.compile(rb"([0-9a-fA-F]+)\r\n")
_LINES = (
    b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked", b"Expect: 100-continue", b"Connection: close", b"Connection: Upgrade", b"Host: twice",
    b"Upgrade: websocket", b"Upgrade: h2c", b"ffffffff", b"B: " + b"b" * 40_000, b"C: d\r\n" * 120, b" folded", b"no colon",
)  # fmt: skip
_SCRAPS = (
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\0", b"\xff\xfe", b" ", b"\t", b":", b"0\r\n\r\n", b"%00", b"%", b"/../",
    b"\x16\x03\x01", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"CONNECT", b"PUT", 
    b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", b"A" * 9_000,
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[bytes, bytes]
    body: bytes


def answers(data: bytes, *, to_head: bool = False) -> list[Answer]:
    """Every response in `data`, read strictly; what comes after a 101 is not HTTP. AssertionError for anything malformed."""
    found: list[Answer] = []
    while data:
        status, headers, data = _head(data)
        body, data = _body(status, headers, data, to_head)
        found.append(Answer(status, headers, body))
        if status == 101:
            break
    return found


def _head(data: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    line = _STATUS.match(data)
    assert line, data[:200]
    headers, at = dict[bytes, bytes](), line.end()
    while not data.startswith(b"\r\n", at):
        header = _HEADER.match(data, at)
        assert header, data[at : at + 200]
        headers[header[1].lower()], at = header[2], header.end()
    return int(line[1]), headers, data[at + 2 :]


def _body(status: int, headers: dict[bytes, bytes], data: bytes, to_head: bool) -> tuple[bytes, bytes]:
    if to_head or status < 200 or status in (204, 304):
        return b"", data
    if headers.get(b"transfer-encoding") == b"chunked":
        assert b"content-length" not in headers, headers
        return _chunks(data)
    if (length := headers.get(b"content-length")) is None:
        assert headers.get(b"connection") == b"close", headers
        return data, b""
    assert len(data) >= int(length), (status, headers, data[:200])
    return data[: int(length)], data[int(length) :]


def _chunks(data: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        size = _CHUNK.match(data)
        assert size, data[:200]
        end = size.end() + int(size[1], 16)
        assert data[end : end + 2] == b"\r\n", data[:200]
        body, last, data = body + data[size.end() : end], end == size.end(), data[end + 2 :]
        if last:
            return body, data


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """To `http://HOST:PORT` or `unix:/path`."""
    if address.startswith("unix:"):
        return await asyncio.open_unix_connection(address.removeprefix("unix:"))
    host, _, port = address.removeprefix("http://").rpartition(":")
    return await asyncio.open_connection(host.strip("[]"), int(port))


def fuzz(
    address: str,
    rounds: int,
    seed: int,
    headers: Sequence[tuple[str, str]] = (),
    *,
    paths: Sequence[str] = ("/healthz",),
    pid: int | None = None,
) -> dict[int, int]:
    """How often each status was answered. `headers` go with every request, such as a key.

    No connection may be left at the server's end and, if its `pid` is given, no other file (a pool that fills would count).
    """
    return asyncio.run(_fuzz(address, rounds, seed, headers, paths, pid))


async def _fuzz(
    address: str, rounds: int, seed: int, headers: Sequence[tuple[str, str]], paths: Sequence[str], pid: int | None
) -> dict[int, int]:
    await _is_well(address)
    before, seen, gate = _open_files(pid), dict[int, int](), asyncio.Semaphore(AT_ONCE)

    async def one(name: str) -> None:
        async with gate:
            for status in await _round(address, random.Random(name), name, headers, paths):
                seen[status] = seen.get(status, 0) + 1

    async with asyncio.TaskGroup() as group:
        for number in range(rounds):
            group.create_task(one(f"{seed}/{number}"))
    await _is_well(address)
    await _calm(lambda: _connections(address) == 0, "connections were left")
    await _calm(lambda: _open_files(pid) <= before, "files were left open")
    return dict(sorted(seen.items()))


async def _calm(is_calm: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + CALM_S
    while not is_calm():
        assert time.monotonic() < deadline, otherwise
        await asyncio.sleep(0.1)


def _open_files(pid: int | None) -> int:
    return len(os.listdir(f"/proc/{pid}/fd")) if pid else 0


def _connections(address: str) -> int:
    """That the server's process still holds, by the kernel's tables."""
    if address.startswith("unix:"):
        rows = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
        return sum(row[7:] == [address.removeprefix("unix:")] and row[5] == "03" for row in rows)
    port = f":{int(address.rpartition(':')[2]):04X}"
    rows = (line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:])
    return sum(row[1].endswith(port) and row[3] != "0A" and row[9] != "0" for row in rows)  # 0A listens, inode 0 is no file


async def _is_well(address: str) -> None:
    async with asyncio.timeout(10):
        reader, writer = await connect(address)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        (answer,) = answers(await reader.read())
        await _close(writer)
    assert answer.status == 200, answer


async def _round(
    address: str, rng: random.Random, name: str, headers: Sequence[tuple[str, str]], paths: Sequence[str]
) -> list[int]:
    request = _mutated(rng, _request(rng, headers, paths))
    data, is_whole = await _exchange(address, rng, request)
    try:
        is_readable = is_whole and b"HEAD" not in request  # whose answers have a length and no body
        statuses = [a.status for a in answers(data)] if is_readable else _first_status(data)
        assert all(status < 500 or status in _MAY_FAIL for status in statuses), statuses
    except AssertionError as e:
        raise AssertionError(f"round {name}: {request[:2_000]!r} was answered by {data[:2_000]!r}") from e
    return statuses


def _first_status(data: bytes) -> list[int]:
    """Of what can't be read to its end: it must begin as an answer."""
    return [_head(data)[0]] if b"\r\n\r\n" in data else []


async def _exchange(address: str, rng: random.Random, request: bytes) -> tuple[bytes, bool]:
    """What came back, and whether the server ended it."""
    reader, writer = await connect(address)
    data, is_whole = b"", False
    try:
        for piece in _pieces(rng, request):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if is_half_closed := rng.random() < 0.1:
            writer.write_eof()
        async with asyncio.timeout(PATIENCE_S):
            while piece := await reader.read(1 << 16):
                data += piece
            is_whole = not is_half_closed  # to the server we have left
    except OSError:
        pass  # out of patience, or reset, which may cut an answer: its beginning must still be one
    finally:
        await _close(writer)
    return data, is_whole


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    await asyncio.gather(writer.wait_closed(), return_exceptions=True)  # a reset is no news here


def _request(rng: random.Random, headers: Sequence[tuple[str, str]], paths: Sequence[str]) -> bytes:
    method, path = rng.choice((b"GET", b"POST", b"PUT", b"PATCH", b"DELETE", b"HEAD", b"OPTIONS")), rng.choice(paths).encode()
    close = b"Connection: close\r\n" if rng.random() < 0.7 else b""
    common = b"Host: localhost\r\n" + close + b"".join(f"{n}: {v}\r\n".encode() for n, v in headers)
    body = rng.choice((b'{"code": "1"}', b"{}", b"", b"x" * 2_000, rng.randbytes(200)))
    kind = rng.randrange(6)
    if kind == 0:
        return b"GET %b HTTP/1.0\r\n%b\r\n" % (path, common)
    if kind == 1:
        chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
        return b"%b %b HTTP/1.1\r\n%bTransfer-Encoding: chunked\r\n\r\n%b" % (method, path, common, chunks)
    if kind == 2:
        upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
        return b"GET %b HTTP/1.1\r\n%b%bAAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n" % (path, common.replace(close, b""), upgrade)
    one = b"%b %b HTTP/1.1\r\n%bContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
    return (one % (method, path, common, len(body), body)) * (3 if kind == 3 else 1)


def _mutated(rng: random.Random, request: bytes) -> bytes:
    data = bytearray(request)
    for _ in range(rng.choice((0, 1, 1, 2, 4, 8))):
        at, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
        end = min(end, at + 64)
        match rng.randrange(5):
            case 0:
                data[at:end] = rng.randbytes(end - at)
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = data[at:end] * rng.randrange(1, 4)
            case 3:
                data[at:at] = rng.choice(_SCRAPS)
            case _:  # where a header may stand
                line = data.find(b"\r\n", at) + 2
                data[line:line] = rng.choice(_LINES) + b"\r\n"
    return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data)


def _pieces(rng: random.Random, request: bytes) -> list[bytes]:
    cuts = sorted(rng.randrange(len(request) + 1) for _ in range(rng.choice((0, 0, 1, 5))))
    return [request[a:b] for a, b in zip([0, *cuts], [*cuts, len(request)], strict=True) if b > a]
