"""Callers who go away, or who stop reading: the program ends, or waits; the server keeps no more than it may (H15)."""

from __future__ import annotations

import json
import socket as sockets
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from callers import SSE, ended, events, eventually, run, socket

from http_server import Serving

SETTINGS = {"pool_floor": 2}
MIB = 1 << 20
BEGUN = "print('begun', flush=True); import time; time.sleep(60)"
FLOOD = "for _ in range(50): print('x' * (1 << 20))"
SILENCE_S = 15.0  # after which a stream shows that it lives


def resident_bytes(server: Serving) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) << 10


def plain(
    server: Serving, http: httpx.Client, path: str, body: dict[str, Any], accept: str = "*/*", *, held: bool = False
) -> sockets.socket:
    """A request on a connection of its own, sent whole; nothing is read of the answer. `held`: it leaves with the end of the
    connection, in one segment, so that the server never sees the one without the other (tcp(7), TCP_CORK)."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = sockets.socket()
    connection.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 64 << 10)
    connection.connect((host, int(port)))
    connection.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_CORK, held)
    text = json.dumps(body)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {http.headers['x-api-key']}\r\naccept: {accept}\r\n"
    connection.sendall(f"{head}content-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode())
    return connection


def newest(http: httpx.Client, box: str) -> dict[str, Any] | None:
    found = http.get("/v1/executions", params={"sandbox_id": box[14:], "limit": 1}).raise_for_status().json()["executions"]
    return found[0] if found and found[0]["state"] == "running" else None


def gone(http: httpx.Client, box: str, name: str) -> None:
    record = ended(http, name)
    assert (record["status"], record["cause"]) == ("cancelled", "its caller went away")
    assert run(http, box, "1")["status"] == "ok"


@pytest.mark.parametrize("end", ["executions", "exec"])
def test_a_caller_who_leaves_a_plain_request_stops_the_program(
    server: Serving, alice: httpx.Client, box: str, end: str
) -> None:
    body = {"code": BEGUN} if end == "executions" else {"argv": ["sleep", "60"]}
    with plain(server, alice, f"{box}/{end}", body):
        name = eventually(lambda: newest(alice, box))["id"]
    gone(alice, box, name)


def test_a_caller_who_leaves_a_stream_stops_the_program(alice: httpx.Client, box: str) -> None:
    with alice.stream("POST", f"{box}/executions", json={"code": BEGUN}, headers=SSE) as stream:
        heard = events(stream)
        name = next(heard)[1]["execution_id"]
        assert next(heard)[0] == "stdout"
    gone(alice, box, name)


def test_a_caller_who_leaves_a_socket_stops_the_program(alice: httpx.Client, box: str) -> None:
    with socket(alice, f"{box}/executions/stream") as talking:
        talking.send(json.dumps({"code": BEGUN}))
        name = json.loads(talking.recv())["execution_id"]
        assert json.loads(talking.recv())["event"] == "stdout"
    gone(alice, box, name)


def test_a_caller_who_vanishes_without_a_word_stops_the_program(server: Serving, alice: httpx.Client, box: str) -> None:
    connection = plain(server, alice, f"{box}/executions", {"code": BEGUN}, "text/event-stream")
    name = eventually(lambda: newest(alice, box))["id"]
    connection.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()  # a reset, not an end
    gone(alice, box, name)


def test_a_caller_who_leaves_before_its_sandbox_is_made_leaves_none_behind(server: Serving, alice: httpx.Client) -> None:
    for _ in range(4):
        plain(server, alice, "/v1/sandboxes", {}, held=True).close()
    plain(server, alice, "/v1/run", {"code": BEGUN}, held=True).close()
    time.sleep(0.2)  # for those that the server had already begun with
    eventually(lambda: alice.get("/v1/sandboxes").json()["sandboxes"] == [])


def test_a_silent_program_s_stream_shows_that_it_lives(alice: httpx.Client, box: str) -> None:
    slow = {"code": f"import time; time.sleep({SILENCE_S + 2})"}
    with alice.stream("POST", f"{box}/executions", json=slow, headers=SSE) as stream:
        heard = list(events(stream))
    assert [kind for kind, _ in heard] == ["started", "", "end"] and heard[-1][1]["result"]["status"] == "ok"


def test_a_program_waits_for_who_does_not_read_and_the_server_stays_small(
    server: Serving, alice: httpx.Client, box: str
) -> None:
    """50 MiB for a client that reads nothing, then all of it; meanwhile others are served."""
    before = resident_bytes(server)
    with plain(server, alice, f"{box}/executions", {"code": FLOOD}, "text/event-stream") as connection:
        name = eventually(lambda: newest(alice, box))["id"]
        largest, until = before, time.monotonic() + 3
        while time.monotonic() < until:
            largest = max(largest, resident_bytes(server))
            assert alice.get("/v1/whoami").status_code == 200
            time.sleep(0.05)
        assert alice.get(f"/v1/executions/{name}").json()["state"] == "running"
        assert largest - before < 24 * MIB
        received = 0
        connection.settimeout(30)
        while received < 50 * MIB:
            received += len(connection.recv(MIB))
        assert ended(alice, name)["status"] == "ok"


def test_a_socket_that_is_not_read_holds_its_program_up_too(server: Serving, alice: httpx.Client, box: str) -> None:
    before = resident_bytes(server)
    with socket(alice, f"{box}/executions/stream", max_queue=1) as talking:
        talking.send(json.dumps({"code": FLOOD}))
        name = json.loads(talking.recv())["execution_id"]
        time.sleep(2)
        assert alice.get(f"/v1/executions/{name}").json()["state"] == "running"
        assert resident_bytes(server) - before < 24 * MIB
        heard = [json.loads(message) for message in talking]
    assert sum(len(m["text"]) for m in heard if m["event"] == "stdout") >= 50 * MIB
    assert heard[-1]["result"]["status"] == "ok"


def test_input_that_nobody_takes_any_more_is_no_failure(alice: httpx.Client) -> None:
    """It may still be on its way when its sandbox ends. The log is read at the end (conftest.py)."""
    for _ in range(4):
        box = f"/v1/sandboxes/{alice.post('/v1/sandboxes', json={}).raise_for_status().json()['id']}"
        asked = {"argv": ["sleep", "60"], "stdin": "x" * (7 * MIB), "wait": False}
        name = alice.post(f"{box}/exec", json=asked).raise_for_status().json()["id"]
        eventually(lambda name=name: alice.get(f"/v1/executions/{name}").json()["state"] == "running")
        alice.delete(box).raise_for_status()
        assert ended(alice, name)["status"] == "killed"


def test_many_who_leave_at_once_leave_nothing_running(
    server: Serving, alice: httpx.Client, box: str, admin: httpx.Client
) -> None:
    def visit(_: int) -> None:
        with plain(server, alice, f"{box}/exec", {"argv": ["sleep", "60"]}):
            time.sleep(0.1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(visit, range(24)))
    eventually(lambda: admin.get("/v1/status").json()["executions"] == 0)
    turns = eventually(lambda: (s := admin.get("/v1/status").json()["scheduler"]["turns"])["held_total"]["places"] == 0 and s)
    assert sum(turns["waiting"].values()) == 0
