"""Firecracker's HTTP API, over one connection to its Unix socket, a request at a time.

Who answers may be a monitor that its guest has taken over: each answer has a deadline and a most.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Mapping
from typing import cast

from fumehood.runtime.microvm.jailer import API, Jail
from fumehood.runtime.microvm.process import Monitor

CALL_S = 20.0
_STEP_S, _ENDING_S = 0.0005, 1.0
_ANSWER_BYTES = 1 << 16
_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Fault(Exception):
    """A request was refused, or not answered: says why."""


class Api:
    def __init__(self, monitor: Monitor, jail: Jail) -> None:
        self._monitor, self._jail = monitor, jail
        self._turn = asyncio.Lock()
        self._connection: _Connection | None = None

    async def ask(self, request: str, body: Mapping[str, object], deadline_s: float = CALL_S) -> None:
        """`request`: METHOD and path. Raises Fault."""
        async with self._turn:
            try:
                async with asyncio.timeout(deadline_s):
                    await self._exchange(request, json.dumps(body).encode())
            except TimeoutError:
                raise Fault(f"{request}: no answer within {deadline_s:g} s") from None
            except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as e:
                with contextlib.suppress(TimeoutError):  # a process that ends closes its sockets first
                    await asyncio.wait_for(self._monitor.ended(), _ENDING_S)
                raise Fault(f"{request}: {e!r}") from None

    async def _exchange(self, request: str, body: bytes) -> None:
        reader, writer = self._connection or await self._connected()
        self._connection = None  # and stays so unless an answer comes to its end
        with contextlib.ExitStack() as undo:
            undo.callback(writer.close)
            headers = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            head = f"{request} HTTP/1.1\r\n{headers}\r\n\r\n"
            writer.write(head.encode() + body)
            status, size = parse_head(await reader.readuntil(b"\r\n\r\n"))
            answer = await reader.readexactly(size)
            self._connection = reader, writer
            undo.pop_all()
        if status not in (200, 204):
            raise Fault(f"{request}: {fault_message(answer)}")

    async def _connected(self) -> _Connection:
        """The socket is there some milliseconds after the process."""
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError), self._jail.socket(API) as path:
                return await asyncio.open_unix_connection(path, limit=_ANSWER_BYTES)
            if not self._monitor.alive:
                raise ConnectionError("it ended")
            await asyncio.sleep(_STEP_S)

    async def aclose(self) -> None:
        if self._connection is not None:
            self._connection[1].close()
            with contextlib.suppress(ConnectionError):
                await self._connection[1].wait_closed()
            self._connection = None


def parse_head(head: bytes) -> tuple[int, int]:
    """Status and length of the body. Raises ValueError."""
    status = re.match(rb"HTTP/1\.[01] (\d{3})\b", head)
    length = re.search(rb"(?i)\r\ncontent-length: *(\d{1,9}) *\r\n", head)
    size = int(length[1]) if length else 0
    if status is None or size > _ANSWER_BYTES:
        raise ValueError(f"no answer of Firecracker's: {head[:80]!r}")
    return int(status[1]), size


def fault_message(answer: bytes) -> str:
    try:
        return str(cast("dict[str, object]", json.loads(answer))["fault_message"])[:2000]
    except (ValueError, KeyError, TypeError):
        return f"{answer[:200]!r}"
