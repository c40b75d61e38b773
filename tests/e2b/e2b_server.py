"""The server that these tests drive: its address, and real keys of it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

UPLOAD_BYTES, HEADER_TIMEOUT_S = 10 << 20, 2.0
KEYS: Mapping[str, dict[str, Any]] = {
    "alpha": {"tenant": "alpha"},
    "beta": {"tenant": "beta"},
    "knowing": {"tenant": "alpha", "compat": ["ignore-egress"]},
}


class Server:
    def __init__(self, url: str, admin_key: str, pid: int, home: Path) -> None:
        self.url, self.admin_key, self.pid, self.home = url, admin_key, pid, home
        self._admin = {"Authorization": f"Bearer {admin_key}"}
        self.keys = {name: self.new_key(**wanted) for name, wanted in KEYS.items()}

    def new_key(self, **wanted: Any) -> str:
        """With the prefix that E2B's SDK wants; it is the same key as with ours."""
        answer = httpx.post(self.url + "/v1/keys", json=wanted, headers=self._admin).raise_for_status()
        return "e2b_" + answer.json()["api_key"].removeprefix("fh_")

    def options(self, key: str = "alpha", **more: Any) -> dict[str, Any]:
        return {"api_key": self.keys.get(key, key), "api_url": self.url, "sandbox_url": self.url, "retries": 0, **more}

    def headers(self, key: str = "alpha") -> dict[str, str]:
        return {"X-API-Key": self.keys.get(key, key)}

    def figure(self, name: str) -> float:
        """One of /metrics; 0 for what did not happen yet."""
        text = httpx.get(self.url + "/metrics", headers=self._admin).raise_for_status().text
        return next((float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + " ")), 0.0)

    def connect(self) -> socket.socket:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return socket.create_connection((host, int(port)), 20)

    def raw(self, start: str, **headers: str) -> bytes:
        """The whole answer to a request without a body, as it came, but for its time."""
        shown = {"host": "127.0.0.1", "x-request-id": "same", "connection": "close", "content-length": "0", **headers}
        head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in shown.items())
        with self.connect() as connection:
            connection.sendall(f"{start} HTTP/1.1\r\n{head}\r\n".encode())
            answer = connection.makefile("rb").read()
        return b"\r\n".join(line for line in answer.split(b"\r\n") if not line.lower().startswith(b"date:"))


def eventually(holds: Callable[[], Any], seconds: float = 20) -> Any:
    until = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.02)
    return value
