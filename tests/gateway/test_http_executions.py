"""Executions: waited for, in the background, streamed; polled, cancelled, timed from their arrival (H17)."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from callers import SSE, ended, events, eventually, problem, run, socket

SETTINGS = {"max_running": 2, "queue_wait_s": 20}
SLEEP = "import time; time.sleep(60)"
BEGUN = "print('begun', flush=True); import time; time.sleep(60)"


def submit(http: httpx.Client, box: str, **body: Any) -> str:
    end = "executions" if "code" in body else "exec"
    answer = http.post(f"{box}/{end}", json={**body, "wait": False})
    assert answer.status_code == 202, answer.text
    found: str = answer.json()["id"]
    return found


def running(http: httpx.Client, execution_id: str) -> None:
    eventually(lambda: http.get(f"/v1/executions/{execution_id}").json()["state"] == "running")


def processes(http: httpx.Client, box: str) -> int:
    found: int = http.get(f"{box}/stats").json()["pids"]
    return found


def test_what_is_not_waited_for_is_polled_to_its_end(alice: httpx.Client, box: str) -> None:
    name = submit(alice, box, code="x = 20; print('said'); x + 1")
    record = ended(alice, name)
    assert (record["id"], record["status"], record["kind"]) == (name, "ok", "code")
    assert record["result"]["stdout"] == "said\n" and record["result"]["results"][0]["data"]["text/plain"] == "21"
    assert record["queued_at"] <= record["started_at"] <= record["finished_at"]
    assert run(alice, box, "x")["results"][0]["data"]["text/plain"] == "20"
    listed = alice.get("/v1/executions", params={"sandbox_id": box[14:]}).json()["executions"]
    assert {e["id"] for e in listed} >= {name} and all("result" not in e for e in listed)


def test_pages_of_executions_hold_each_once(alice: httpx.Client, box: str) -> None:
    names = [submit(alice, box, argv=["true"]) for _ in range(7)]
    for name in names:
        ended(alice, name)
    seen: list[str] = []
    after: str | None = None
    while True:
        asked = {"sandbox_id": box[14:], "limit": "3", **({"after": after} if after else {})}
        page = alice.get("/v1/executions", params=asked).json()
        seen += [e["id"] for e in page["executions"]]
        if (after := page["next"]) is None:
            break
    assert seen == names[::-1]


@pytest.mark.parametrize("body", [{"code": SLEEP}, {"argv": ["sleep", "60"]}, {"command": "sleep 60 & sleep 60; wait"}])
def test_cancelling_reaches_the_program_and_the_record_says_so(alice: httpx.Client, box: str, body: dict[str, Any]) -> None:
    run(alice, box, "1")
    before = processes(alice, box)
    name = submit(alice, box, **body)
    running(alice, name)
    assert alice.delete(f"/v1/executions/{name}").status_code == 202
    record = ended(alice, name)
    assert (record["status"], record["cause"]) == ("cancelled", "cancelled by its id")
    eventually(lambda: processes(alice, box) <= before)
    assert alice.delete(f"/v1/executions/{name}").json()["status"] == "cancelled"
    assert run(alice, box, "6 * 7")["results"][0]["data"]["text/plain"] == "42"


def test_who_waits_for_a_cancelled_execution_gets_a_result_that_says_so(alice: httpx.Client, box: str) -> None:
    with alice.stream("POST", f"{box}/executions", json={"code": BEGUN}, headers=SSE) as stream:
        heard = events(stream)
        name = next(heard)[1]["execution_id"]
        assert next(heard)[0] == "stdout"
        alice.delete(f"/v1/executions/{name}").raise_for_status()
        kind, data = list(heard)[-1]
    assert (kind, data["result"]["status"]) == ("end", "cancelled")


def test_one_that_waits_for_its_turn_is_cancelled_before_it_begins(alice: httpx.Client, box: str) -> None:
    busy = [submit(alice, box, argv=["sleep", "60"]) for _ in range(2)]
    for name in busy:
        running(alice, name)
    waiting = submit(alice, box, command="touch began")
    assert alice.get(f"/v1/executions/{waiting}").json()["state"] == "queued"
    alice.delete(f"/v1/executions/{waiting}").raise_for_status()
    record = ended(alice, waiting)
    assert (record["status"], record["started_at"]) == ("cancelled", None)
    for name in busy:
        alice.delete(f"/v1/executions/{name}").raise_for_status()
        ended(alice, name)
    problem(alice.get(f"{box}/files", params={"path": "began"}), 404, "not_found")


def test_the_end_of_a_sandbox_ends_what_runs_in_it(alice: httpx.Client, box: str) -> None:
    name = submit(alice, box, code=SLEEP)
    running(alice, name)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(alice.post, f"{box}/exec", json={"argv": ["sleep", "60"]})
        eventually(lambda: len(alice.get("/v1/executions", params={"sandbox_id": box[14:]}).json()["executions"]) == 2)
        alice.delete(box).raise_for_status()
        answer = waiting.result()
    assert answer.json().get("status") in ("killed", 410)
    record = ended(alice, name)
    assert record["status"] == "killed" and "owner" in record["cause"]


def test_a_timeout_counts_from_the_arrival_and_so_the_queue_is_in_it(alice: httpx.Client, box: str) -> None:
    """H17: by the server's clock, on time."""
    busy = [submit(alice, box, argv=["sleep", "60"]) for _ in range(2)]
    for name in busy:
        running(alice, name)
    began = time.monotonic()
    problem(alice.post(f"{box}/exec", json={"argv": ["true"], "timeout_s": 0.5}), 504, "deadline_exceeded")
    assert 0.5 <= time.monotonic() - began < 5
    for name in busy:
        alice.delete(f"/v1/executions/{name}").raise_for_status()


def test_a_program_is_ended_at_its_timeout(alice: httpx.Client, box: str) -> None:
    result = run(alice, box, SLEEP, timeout_s=0.5)
    assert result["status"] == "timeout" and 0.5 <= result["usage"]["wall_s"] < 3


def test_events_come_in_order_while_it_happens(alice: httpx.Client, box: str) -> None:
    code = "import sys\nfor n in range(3):\n print(n, flush=True); input_ = open(f'/tmp/{n}', 'w')\nsys.stderr.write('e')\n7"
    with alice.stream("POST", f"{box}/executions", json={"code": code}, headers=SSE) as stream:
        assert stream.headers["content-type"] == "text/event-stream" and stream.headers["cache-control"] == "no-store"
        heard = list(events(stream))
    kinds = [kind for kind, _ in heard]
    assert kinds[0] == "started" and kinds[-1] == "end" and set(kinds[1:-1]) == {"stdout", "stderr", "result"}
    assert "".join(data["text"] for kind, data in heard if kind == "stdout") == "0\n1\n2\n"
    assert next(data for kind, data in heard if kind == "result")["data"]["text/plain"] == "7"
    result = heard[-1][1]["result"]
    assert (result["status"], result["stderr"]) == ("ok", "e")
    assert ended(alice, heard[0][1]["execution_id"])["result"] == result


def test_what_goes_wrong_after_the_first_byte_is_the_last_event(alice: httpx.Client, box: str) -> None:
    with alice.stream("POST", f"{box}/exec", json={"argv": ["/no/such"]}, headers=SSE) as stream:
        heard = list(events(stream))
    assert [kind for kind, _ in heard] == ["started", "problem"]
    assert (heard[1][1]["code"], heard[1][1]["request_id"]) == ("not_found", stream.headers["x-request-id"])


def test_a_socket_says_the_same_as_a_stream_and_takes_a_cancel(alice: httpx.Client, box: str) -> None:
    with socket(alice, f"{box}/executions/stream") as talking:
        talking.send(json.dumps({"code": "print('a'); 1"}))
        heard = [json.loads(message) for message in talking]
    assert heard[0]["event"] == "started" and heard[-1]["event"] == "end" and heard[-1]["result"]["stdout"] == "a\n"
    with socket(alice, f"{box}/executions/stream") as talking:
        talking.send(json.dumps({"command": "echo begun; sleep 60"}))
        while json.loads(talking.recv())["event"] != "stdout":
            pass
        talking.send(json.dumps({"cancel": True}))
        assert [json.loads(message) for message in talking][-1]["result"]["status"] == "cancelled"
    assert talking.close_code == 1000


@pytest.mark.parametrize("given", [{"stdin": "höh\0"}, {"stdin_base64": "aMO2aAA="}])
def test_a_program_gets_its_input_and_its_end(alice: httpx.Client, box: str, given: dict[str, str]) -> None:
    result = alice.post(f"{box}/exec", json={"argv": ["cat"], **given}).raise_for_status().json()
    assert (result["status"], result["stdout"]) == ("ok", "höh\0")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"argv": ["a"], "command": "a"},
        {"argv": ["a"], "stdin": "", "stdin_base64": ""},
        {"argv": ["a"], "stdin_base64": "*"},
    ],
)
def test_a_program_is_asked_for_in_one_way(alice: httpx.Client, box: str, body: dict[str, Any]) -> None:
    problem(alice.post(f"{box}/exec", json=body), 422, "invalid_input")
