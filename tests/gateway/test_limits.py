"""What one key, and the whole server, may have at once; what is said beyond; how the server stops."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from callers import MANY, SSE, client, ended, events, eventually, new_key, problem

from http_server import Serving, serving

SETTINGS = {"max_running": 1, "queue_limit": 2, "queue_wait_s": 10, "max_sandboxes": 3, "memory_budget_bytes": 2 << 30}
SLEEP = {"argv": ["sleep", "60"], "wait": False}


def slower(answer: httpx.Response, code: str) -> dict[str, Any]:
    """A 429 that says when to come again."""
    said = problem(answer, 429, code)
    assert said["retryable"] and 1 <= int(answer.headers["retry-after"]) <= 60
    return said


@pytest.fixture
def busy(alice: httpx.Client, box: str) -> Iterator[str]:
    """The path of a sandbox in which a program holds the only turn."""
    name = alice.post(f"{box}/exec", json=SLEEP).raise_for_status().json()["id"]
    eventually(lambda: alice.get(f"/v1/executions/{name}").json()["state"] == "running")
    yield box
    alice.delete(f"/v1/executions/{name}").raise_for_status()
    ended(alice, name)


def test_a_key_that_asks_too_fast_is_told_to_slow_down_and_served_again(server: Serving, admin: httpx.Client) -> None:
    key = new_key(admin, "alice", limits={"requests_per_s": 2, "burst": 3})["api_key"]
    with client(server, key) as http:
        statuses = [http.get("/v1/whoami").status_code for _ in range(3)]
        slower(http.get("/v1/whoami"), "rate_limited")
        assert statuses == [200] * 3
        eventually(lambda: http.get("/v1/whoami").status_code == 200, 5)


def test_the_rate_of_one_key_is_not_that_of_another(server: Serving, admin: httpx.Client, alice: httpx.Client) -> None:
    key = new_key(admin, "alice", limits={"requests_per_s": 0.02, "burst": 1})["api_key"]
    with client(server, key) as http:
        http.get("/v1/whoami").raise_for_status()
        slower(http.get("/nothing"), "rate_limited")
    alice.get("/v1/whoami").raise_for_status()


def test_a_signed_url_gets_its_key_no_more_than_the_keys_limits(server: Serving, admin: httpx.Client) -> None:
    key = new_key(admin, "alice", limits={"requests_per_s": 0.02, "burst": 3})["api_key"]
    with client(server, key) as http:
        made = f"/v1/sandboxes/{http.post('/v1/sandboxes', json={}).raise_for_status().json()['id']}"
        url = http.post(f"{made}/files/sign", json={"path": "nothing"}).raise_for_status().json()["url"]
        problem(httpx.get(server.url + url), 404, "not_found")
        slower(httpx.get(server.url + url), "rate_limited")
    with client(server, new_key(admin, "alice")["api_key"]) as http:
        http.delete(made).raise_for_status()


def test_a_key_with_too_much_under_way_is_told_so_until_it_ends(server: Serving, admin: httpx.Client, box: str) -> None:
    key = new_key(admin, "alice", limits={**MANY, "concurrent_requests": 1})["api_key"]
    with client(server, key) as http:
        with http.stream("GET", "/v1/events") as stream:
            heard = events(stream)
            assert next(heard) == ("", {})
            slower(http.get("/v1/whoami"), "rate_limited")
            heard.close()
        eventually(lambda: http.get("/v1/whoami").status_code == 200)


def test_a_key_holds_no_more_sandboxes_than_it_may(server: Serving, admin: httpx.Client) -> None:
    key = new_key(admin, "alice", limits={**MANY, "sandboxes": 1})["api_key"]
    with client(server, key) as http:
        first = http.post("/v1/sandboxes", json={}).raise_for_status().json()["id"]
        for path, body in (("/v1/sandboxes", {}), ("/v1/run", {"code": "1"})):
            slower(http.post(path, json=body), "rate_limited")
        http.delete(f"/v1/sandboxes/{first}").raise_for_status()
        second = http.post("/v1/sandboxes", json={}).raise_for_status().json()["id"]
        http.delete(f"/v1/sandboxes/{second}").raise_for_status()


def test_a_full_queue_turns_away_at_once_and_serves_who_waited(alice: httpx.Client, busy: str) -> None:
    waiting = [alice.post(f"{busy}/exec", json={"argv": ["true"], "wait": False}).json()["id"] for _ in range(2)]
    slower(alice.post(f"{busy}/exec", json={"argv": ["true"]}), "queue_full")
    running = alice.get("/v1/executions", params={"sandbox_id": busy[14:]}).json()["executions"][-1]["id"]
    alice.delete(f"/v1/executions/{running}").raise_for_status()
    assert [ended(alice, name)["status"] for name in waiting] == ["ok", "ok"]


def test_a_burst_gets_a_result_or_a_clean_429(alice: httpx.Client, box: str) -> None:
    with ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(alice.post, f"{box}/exec", json={"argv": ["sleep", "0.05"]}) for _ in range(48)]
        answers = [each.result() for each in asked]
    for answer in answers:
        if answer.status_code != 200:
            slower(answer, "queue_full")
    assert sum(answer.status_code == 200 for answer in answers) >= 3


def test_who_waits_longer_than_it_would_is_told_so(alice: httpx.Client, busy: str) -> None:
    for path, body in ((f"{busy}/exec", {"argv": ["true"]}), (f"{busy}/executions", {"code": "1"})):
        began = time.monotonic()
        assert problem(alice.post(path, json={**body, "wait_s": 0.2}), 504, "deadline_exceeded")["retryable"]
        assert 0.2 <= time.monotonic() - began < 5


def test_there_are_no_more_sandboxes_than_places_and_who_waits_gets_the_next(alice: httpx.Client, box: str) -> None:
    mine = [alice.post("/v1/sandboxes", json={}).raise_for_status().json()["id"] for _ in range(2)]
    problem(alice.post("/v1/sandboxes", json={"wait_s": 0.2}), 504, "deadline_exceeded")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(alice.post, "/v1/sandboxes", json={"wait_s": 10})
        time.sleep(0.2)  # it waits, or comes later: either is right
        alice.delete(f"/v1/sandboxes/{mine[0]}").raise_for_status()
        late = waiting.result().raise_for_status().json()["id"]
    for name in (mine[1], late):
        alice.delete(f"/v1/sandboxes/{name}").raise_for_status()


def test_memory_that_there_will_never_be_is_refused_at_once(alice: httpx.Client) -> None:
    answer = alice.post("/v1/sandboxes", json={"limits": {"memory_bytes": "64GiB"}})
    assert answer.status_code in (422, 429), answer.text
    problem(answer, answer.status_code, answer.json()["code"])


def test_a_full_server_tells_nobody_who_fills_it(alice: httpx.Client, robert: httpx.Client, busy: str) -> None:
    mine = [alice.post("/v1/sandboxes", json={}).raise_for_status().json()["id"] for _ in range(2)]
    answer = robert.post("/v1/sandboxes", json={"wait_s": 0.2})
    problem(answer, 504, "deadline_exceeded")
    assert not any(word in answer.text for word in ("alice", *mine, busy[14:]))
    for name in mine:
        alice.delete(f"/v1/sandboxes/{name}").raise_for_status()


def test_a_server_that_stops_lets_end_what_runs_and_takes_nothing_new(tmp_path: Path) -> None:
    with serving(tmp_path, grace_s=20) as server, client(server) as http, client(server) as other:
        box = f"/v1/sandboxes/{http.post('/v1/sandboxes', json={}).raise_for_status().json()['id']}"
        code = "import os, time\nopen('began', 'w')\nwhile not os.path.exists('go'): time.sleep(0.01)"
        with http.stream("POST", f"{box}/executions", json={"code": code}, headers=SSE) as stream:
            assert next(heard := events(stream))[0] == "started"
            server.process.send_signal(signal.SIGTERM)
            eventually(lambda: other.get("/readyz").status_code == 503)
            assert other.get("/readyz").json() == {"status": "draining"} and other.get("/healthz").status_code == 200
            for path, body in (("/v1/run", {"code": "1"}), ("/v1/sandboxes", {}), (f"{box}/exec", {"argv": ["true"]})):
                refused = other.post(path, json=body)
                assert problem(refused, 503, "draining")["retryable"] and int(refused.headers["retry-after"]) >= 1
            other.put(f"{box}/files", params={"path": "go"}).raise_for_status()
            assert list(heard)[-1][1]["result"]["status"] == "ok"
        assert server.process.wait(20) == 0


def test_what_outlives_the_grace_is_cancelled_and_told_so(tmp_path: Path) -> None:
    with serving(tmp_path, grace_s=0.3) as server, client(server) as http:
        body = {"code": "print('begun', flush=True); import time; time.sleep(60)"}
        with http.stream("POST", "/v1/run", json=body, headers=SSE) as stream:
            heard = events(stream)
            assert [next(heard)[0], next(heard)[0]] == ["started", "stdout"]
            server.process.send_signal(signal.SIGTERM)
            kind, data = list(heard)[-1]
        assert (kind, data.get("result", data).get("status")) == ("end", "cancelled"), data
        assert server.process.wait(20) == 0
