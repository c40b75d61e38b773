"""A TCP server that says exactly what a test wants: broken, hostile or early answers that a real one never gives."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SANDBOX = {
    "id": "s0123456789abcdef",
    "tenant": "t",
    "key_id": "k",
    "template": "python",
    "tier": "native",
    "policy": "default",
    "state": "ready",
    "created_at": 1.0,
    "end_at": 2.0,
    "protections": [],
}


@dataclass
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Answer = bytes | None  # None = the connection is reset


def answer(value: Any, status: int = 200, *headers: str) -> bytes:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return head(status, f"content-length: {len(body)}", *headers) + body


def head(status: int, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} X", *headers, "", ""]).encode()


@dataclass
class Scripted:
    """`on_request` answers everything but the creation and the end of a sandbox."""

    on_request: Callable[[Asked], Answer] = lambda asked: answer({})
    asked: list[Asked] = field(default_factory=list[Asked])

    def __enter__(self) -> Scripted:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:  # what the client keeps open
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)

    @property
    def later(self) -> list[Asked]:
        """Without the creation."""
        return [a for a in self.asked if (a.method, a.path) != ("POST", "/v1/sandboxes") and a.method != "DELETE"]

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            self._threads.append(threading.Thread(target=self._talk, args=(connection,)))
            self._threads[-1].start()

    def _talk(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as reader:
            try:
                while asked := _read(reader):
                    self.asked.append(asked)
                    said = self._answered(asked)
                    if said is None:
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        return
                    connection.sendall(said)
                    if b"content-length" not in said.partition(b"\r\n\r\n")[0]:
                        return
            except ConnectionError:
                return

    def _answered(self, asked: Asked) -> Answer:
        if asked.method == "DELETE":
            return head(204, "content-length: 0")
        if (asked.method, asked.path) == ("POST", "/v1/sandboxes"):
            return answer(SANDBOX, 201)
        return self.on_request(asked)


def _read(reader: Any) -> Asked | None:
    first = reader.readline().decode()
    if not first:
        return None
    headers: dict[str, str] = {}
    while line := reader.readline().decode().strip():
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    method, path, _ = first.split()
    return Asked(method, path, headers, reader.read(int(headers.get("content-length", 0))))
