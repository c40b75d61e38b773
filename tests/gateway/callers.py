"""How the tests of the gateway call it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

from http_server import Serving

WAIT_S = 30.0
MANY = {"requests_per_s": 10_000, "burst": 10_000}
SSE = {"accept": "text/event-stream"}


def client(server: Serving, key: str | None = None) -> httpx.Client:
    headers = {"x-api-key": server.api_key if key is None else key}
    return httpx.Client(base_url=server.url, headers=headers, timeout=WAIT_S)


def new_key(admin: httpx.Client, tenant: str, **asked: Any) -> dict[str, Any]:
    """`api_key` and `id` of it, and what else is known of a key."""
    answer = admin.post("/v1/keys", json={"tenant": tenant, "limits": MANY, **asked})
    return answer.raise_for_status().json()


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The problem that `answer` must be, checked for what every problem says."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text[:500]
    said = answer.json()
    assert (answer.status_code, said["code"]) == (status, code), said
    assert said["status"] == status and said["type"] == f"urn:fumehood:error:{code}"
    assert said["title"] == said["message"] != "" and said["detail"] == said["cause"]
    assert said["request_id"] == answer.headers["x-request-id"]
    return said


def run(http: httpx.Client, box: str, code: str, **asked: Any) -> dict[str, Any]:
    return http.post(f"{box}/executions", json={"code": code, **asked}).raise_for_status().json()


def events(stream: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kind and data of each, from an answer that is still being received; ("", {}) for a sign of life."""
    kind = ""
    for line in stream.iter_lines():
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield kind, json.loads(line.removeprefix("data: "))
        elif line.startswith(":"):
            yield "", {}


def socket(http: httpx.Client, path: str, **more: Any) -> ClientConnection:
    url = str(http.base_url).replace("http://", "ws://").rstrip("/") + path
    headers = {"x-api-key": http.headers["x-api-key"]}
    return connect(url, additional_headers=headers, open_timeout=WAIT_S, max_size=None, proxy=None, **more)


def eventually(met: Callable[[], Any], wait_s: float = WAIT_S) -> Any:
    """What `met` comes to once it is true."""
    deadline = time.monotonic() + wait_s
    while not (found := met()):
        assert time.monotonic() < deadline, f"not within {wait_s:g} s"
        time.sleep(0.02)
    return found


def ended(http: httpx.Client, execution_id: str) -> dict[str, Any]:
    """The record of an execution, once it is done."""

    def done() -> dict[str, Any] | None:
        record = http.get(f"/v1/executions/{execution_id}").raise_for_status().json()
        return record if record["state"] == "done" else None

    found: dict[str, Any] = eventually(done)
    return found
