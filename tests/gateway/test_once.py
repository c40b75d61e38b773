"""Idempotency keys: a request that is repeated is done once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from callers import SSE, client, ended, events, eventually, new_key, problem, run

from http_server import Serving

COUNT = "open('times', 'a').write('x')"
HOLD = "import os, time\nopen('began', 'w')\nwhile not os.path.exists('go'): time.sleep(0.01)"


def key(name: str) -> dict[str, str]:
    return {"idempotency-key": name}


def times(http: httpx.Client, box: str) -> int:
    answer = http.get(f"{box}/files", params={"path": "times"})
    return len(answer.text) if answer.status_code == 200 else 0


def routes(box: str) -> dict[str, tuple[str, dict[str, Any]]]:
    return {
        "code": (f"{box}/executions", {"code": COUNT}),
        "a program": (f"{box}/exec", {"command": "echo -n x >> times"}),
        "in the background": (f"{box}/executions", {"code": COUNT, "wait": False}),
    }


@pytest.mark.parametrize("what", ["code", "a program", "in the background"])
def test_the_same_request_is_done_once_and_answered_twice(alice: httpx.Client, box: str, what: str) -> None:
    path, body = routes(box)[what]
    first = alice.post(path, json=body, headers=key(what.replace(" ", "-")))
    second = alice.post(path, json=body, headers=key(what.replace(" ", "-")))
    assert (second.status_code, second.json()) == (first.status_code, first.json())
    assert "idempotent-replayed" not in first.headers and second.headers["idempotent-replayed"] == "true"
    eventually(lambda: times(alice, box) == 1)
    assert len(alice.get("/v1/executions", params={"sandbox_id": box[14:]}).json()["executions"]) == 1


def test_sandboxes_and_runs_of_their_own_are_made_once_too(alice: httpx.Client) -> None:
    made = [alice.post("/v1/sandboxes", json={}, headers=key("box")).raise_for_status() for _ in range(2)]
    assert made[0].json() == made[1].json() and len(alice.get("/v1/sandboxes").json()["sandboxes"]) == 1
    alice.delete(f"/v1/sandboxes/{made[0].json()['id']}").raise_for_status()
    ran = [alice.post("/v1/run", json={"code": "print(1)"}, headers=key("run")).raise_for_status() for _ in range(2)]
    assert ran[0].json() == ran[1].json() and ran[1].headers["idempotent-replayed"] == "true"


def test_another_request_under_the_same_key_is_a_conflict(alice: httpx.Client, box: str) -> None:
    run_path, exec_path = f"{box}/executions", f"{box}/exec"
    alice.post(run_path, json={"code": COUNT}, headers=key("other")).raise_for_status()
    for path, body in ((run_path, {"code": "2"}), (run_path, {"code": COUNT, "timeout_s": 5}), (exec_path, {"argv": ["true"]})):
        said = problem(alice.post(path, json=body, headers=key("other")), 409, "conflict")
        assert not said["retryable"]
    assert times(alice, box) == 1


def test_a_repetition_while_the_first_still_runs_may_be_retried(alice: httpx.Client, box: str) -> None:
    asked = {"json": {"code": HOLD}, "headers": key("slow")}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(alice.post, f"{box}/executions", **asked)
        eventually(lambda: alice.get(f"{box}/files", params={"path": "began"}).status_code == 200)
        assert problem(alice.post(f"{box}/executions", **asked), 409, "conflict")["retryable"]
        alice.put(f"{box}/files", params={"path": "go"}).raise_for_status()
        done = first.result().raise_for_status()
    again = alice.post(f"{box}/executions", **asked).raise_for_status()
    assert again.json() == done.json() and again.headers["idempotent-replayed"] == "true"


def test_of_many_at_once_under_one_key_one_is_done(alice: httpx.Client, box: str) -> None:
    gate = threading.Barrier(8)

    def ask(_: int) -> int:
        gate.wait()
        return alice.post(f"{box}/executions", json={"code": COUNT}, headers=key("race")).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(ask, range(8)))
    assert set(statuses) <= {200, 409} and 200 in statuses and times(alice, box) == 1


def test_a_stream_is_done_once_and_its_repetition_gets_the_end(alice: httpx.Client, box: str) -> None:
    asked = {"json": {"code": f"print('said'); {COUNT}"}, "headers": {**SSE, **key("stream")}}
    heard: list[list[tuple[str, dict[str, Any]]]] = []
    for _ in range(2):
        with alice.stream("POST", f"{box}/executions", **asked) as stream:
            heard.append(list(events(stream)))
    assert heard[0][0][0] == "started" and heard[0][-1][1]["result"]["stdout"] == "said\n"
    assert heard[1] == heard[0][-1:] and times(alice, box) == 1
    asked["headers"] = key("stream")
    assert alice.post(f"{box}/executions", **asked).json() == heard[0][-1][1]["result"]


def test_what_was_refused_may_be_asked_again(alice: httpx.Client, box: str) -> None:
    for _ in range(2):
        asked = {"json": {"code": "1", "timeout_s": 999}, "headers": key("bad")}
        problem(alice.post(f"{box}/executions", **asked), 422, "invalid_input")
    assert alice.post(f"{box}/executions", json={"code": "1"}, headers=key("bad")).json()["status"] == "ok"


def test_a_repetition_after_its_caller_went_away_runs_anew(alice: httpx.Client, box: str) -> None:
    asked = {"json": {"code": HOLD}, "headers": {**SSE, **key("gone")}}
    with alice.stream("POST", f"{box}/executions", **asked) as stream:
        name = next(events(stream))[1]["execution_id"]
    assert ended(alice, name)["status"] == "cancelled"
    alice.put(f"{box}/files", params={"path": "go"}).raise_for_status()
    again = eventually(lambda: (a := alice.post(f"{box}/executions", **{**asked, "headers": key("gone")})).is_success and a)
    assert again.json()["status"] == "ok" and "idempotent-replayed" not in again.headers


def test_keys_of_two_api_keys_never_meet(server: Serving, admin: httpx.Client, alice: httpx.Client, box: str) -> None:
    with client(server, new_key(admin, "alice")["api_key"]) as sister:
        for http in (alice, sister):
            answer = http.post(f"{box}/executions", json={"code": COUNT}, headers=key("shared")).raise_for_status()
            assert "idempotent-replayed" not in answer.headers
    assert times(alice, box) == 2


@pytest.mark.parametrize("bad", ["", "a b", "x" * 256, "é"])
def test_a_key_that_is_none_is_refused_and_nothing_runs(alice: httpx.Client, box: str, bad: str) -> None:
    headers = {"idempotency-key": bad.encode()}
    problem(alice.post(f"{box}/executions", json={"code": COUNT}, headers=headers), 422, "invalid_input")
    assert times(alice, box) == 0


def test_an_answer_too_large_to_keep_is_not_done_twice(alice: httpx.Client, box: str) -> None:
    asked = {"json": {"code": f"{COUNT}\nprint('x' * 1_040_000, end='')\nimport sys; sys.stderr.write('y' * 200_000)"}}
    assert alice.post(f"{box}/executions", **asked, headers=key("big")).json()["status"] == "ok"
    answer = alice.post(f"{box}/executions", **asked, headers=key("big"))
    said = answer.json()
    assert (answer.status_code, said["code"], said["retryable"]) == (409, "conflict", False)
    assert times(alice, box) == 1 and run(alice, box, "1")["status"] == "ok"
