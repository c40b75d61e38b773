"""Bodies that are wrong (issue 3, "Bad input"): a typed problem each, never a 500. The log is read at the end (conftest.py)."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from callers import problem, socket

SETTINGS = {"max_body_bytes": 6 << 20, "max_upload_bytes": 2 << 20}
NUL, HALF = "a\0b", "\ud800"
HUGE = "9" * 5_000
UNREADABLE: dict[str, bytes] = {
    "nothing": b"",
    "half an object": b'{"code": "1"',
    "no JSON": b"code=1",
    "no UTF-8": b'{"code": "\xff"}',
    "nested deeply": b'{"code": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a number of 5000 digits": f'{{"code": "1", "timeout_s": {HUGE}}}'.encode(),
    "null": b"null",
    "a list": b"[]",
    "text": b'"code"',
    "a number": b"1",
    "NaN": b'{"code": "1", "timeout_s": NaN}',
    "infinite": b'{"code": "1", "timeout_s": Infinity}',
    "overflowing": b'{"code": "1", "timeout_s": 1e999}',
    "an int no float holds": b'{"code": "1", "timeout_s": 1' + b"0" * 400 + b"}",
}
# What is wrong for every body of an execution, and for every body of a sandbox.
RUN: dict[str, dict[str, Any]] = {
    "an unknown member": {"code": "1", "Code": "2"},
    "code as a number": {"code": 1},
    "code as null": {"code": None},
    "no code": {},
    "bool for a number": {"code": "1", "priority": True},
    "text for a number": {"code": "1", "timeout_s": "5"},
    "text for a bool": {"code": "1", "wait": "false"},
    "a negative timeout": {"code": "1", "timeout_s": -1},
    "no timeout": {"code": "1", "timeout_s": 0},
    "a timeout over the sandbox's": {"code": "1", "timeout_s": 31},
    "a priority out of range": {"code": "1", "priority": 1 << 70},
    "NUL in env": {"code": "1", "env": {"A": NUL}},
    "NUL in a name of env": {"code": "1", "env": {NUL: "1"}},
    "= in a name of env": {"code": "1", "env": {"A=B": "1"}},
    "no name of env": {"code": "1", "env": {"": "1"}},
    "a number in env": {"code": "1", "env": {"A": 1}},
    "a language that nobody has": {"code": "1", "language": "cobol"},
    "half a surrogate pair as language": {"code": "1", "language": HALF},
    "NUL as context": {"code": "1", "context": NUL},
    "NUL in code": {"code": NUL},
}
BOX: dict[str, dict[str, Any]] = {
    "an unknown member": {"polcy": "strict"},
    "a policy as a number": {"policy": 1},
    "a policy with half a pair": {"policy": HALF},
    "a policy deep down": {"policy": {"limits": {"pids": [[[1]]]}}},
    "a template that nobody has": {"template": "nothing"},
    "limits that nobody knows": {"limits": {"memry_bytes": 1}},
    "a limit of NUL": {"limits": {"memory_bytes": "\0"}},
    "a limit of less than nothing": {"limits": {"pids": -1}},
    "a limit beyond every machine": {"limits": {"memory_bytes": 1e300}},
    "half a pair as limit": {"limits": {HALF: HALF}},
    "metadata of numbers": {"metadata": {"a": 1}},
    "half a pair as metadata": {"metadata": {"a": HALF}},
    "metadata too long": {"metadata": {"a": "x" * 4_097}},
    "NUL in env": {"env": {"A": NUL}},
    "half a pair as a name of env": {"env": {HALF: "1"}},
    "no lease": {"lease_s": 0},
    "an end that nobody knows": {"on_expiry": "explode"},
    "a tier that nobody has": {"tier": HALF},
}
JSON = {"content-type": "application/json"}


def refused(answer: httpx.Response, *statuses: int) -> None:
    assert answer.status_code in statuses, answer.text[:500]
    problem(answer, answer.status_code, answer.json()["code"])


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_body_that_can_not_be_read_is_a_typed_problem(alice: httpx.Client, box: str, what: str) -> None:
    for path in (f"{box}/executions", f"{box}/exec", "/v1/run", "/v1/sandboxes"):
        refused(alice.post(path, content=UNREADABLE[what], headers=JSON), 400, 422)


def test_what_is_wrong_in_an_execution_is_named_and_nothing_runs(alice: httpx.Client, box: str) -> None:
    for body in RUN.values():
        refused(alice.post(f"{box}/executions", content=json.dumps(body), headers=JSON), 404, 422)
    mine = alice.get("/v1/executions", params={"sandbox_id": box.rpartition("/")[2]}).json()["executions"]
    assert {e["status"] for e in mine} <= {"error"}


@pytest.mark.parametrize("what", BOX)
def test_what_is_wrong_in_a_sandbox_is_a_typed_problem(alice: httpx.Client, what: str) -> None:
    refused(alice.post("/v1/sandboxes", content=json.dumps(BOX[what]), headers=JSON), 422)
    assert alice.get("/v1/sandboxes").json()["sandboxes"] == []


def test_a_refusal_shows_no_value_that_was_sent(alice: httpx.Client, box: str) -> None:
    secret = "hunter2" * 3
    for body in ({"code": "1", "env": {"TOKEN": [secret]}}, {"code": "1", secret[:3]: 1, "env": {"A": secret, "B": None}}):
        assert secret not in alice.post(f"{box}/executions", json=body).text
    assert secret not in alice.post("/v1/sandboxes", json={"env": {"A": secret + NUL}}).text


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""])
def test_a_body_of_another_type_is_a_typed_problem(alice: httpx.Client, box: str, kind: str) -> None:
    answer = alice.post(f"{box}/executions", content=b'{"code": "1"}', headers={"content-type": kind})
    refused(answer, 415, 422)
    assert "Content-Type" in answer.json()["cause"]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [(6 << 20) + 1, 40 << 20])
def test_an_oversized_body_gets_413_and_its_sender_can_read_it(alice: httpx.Client, box: str, size: int, chunked: bool) -> None:
    body = b'{"code": "' + b"#" * size + b'"}'
    pieces = (body[at : at + 65_536] for at in range(0, len(body), 65_536)) if chunked else body
    problem(alice.post(f"{box}/executions", content=pieces, headers=JSON), 413, "invalid_input")
    assert alice.get("/v1/whoami").status_code == 200


def test_an_oversized_upload_gets_413_and_leaves_nothing(alice: httpx.Client, box: str) -> None:
    large = {"params": {"path": "large"}}
    problem(alice.put(f"{box}/files", content=b"x" * ((2 << 20) + 1), **large), 413, "invalid_input")
    problem(alice.get(f"{box}/files", **large), 404, "not_found")
    alice.put(f"{box}/files", content=b"x" * (2 << 20), **large).raise_for_status()


def test_oversized_code_is_refused_by_name(alice: httpx.Client, box: str) -> None:
    problem(alice.post(f"{box}/executions", json={"code": "#" * ((4 << 20) + 1)}), 422, "invalid_input")
    assert alice.post(f"{box}/executions", json={"code": "#" * (4 << 20)}).json()["status"] == "ok"


FIRST: dict[str, str | bytes] = {
    "no JSON": "argv",
    "bytes": b"{}",
    "a list": "[]",
    "nested deeply": "[" * 100_000,
    "an unknown member": '{"argv": ["true"], "code": "1", "shell": true}',
    "nothing to run": "{}",
    "no program": '{"argv": []}',
    "NUL": '{"argv": ["a\\u0000b"]}',
    "a huge number": f'{{"argv": ["true"], "pty": {{"rows": {HUGE}, "cols": 1}}}}',
    "NaN": '{"argv": ["true"], "pty": {"rows": NaN, "cols": 1}}',
    "no such program": '{"argv": ["/no/such/program"]}',
    "no such directory": '{"argv": ["true"], "cwd": "/no/such"}',
}


@pytest.mark.parametrize("end", ["/processes", "/executions/stream"])
def test_a_wrong_first_message_is_answered_by_a_problem_and_the_end(alice: httpx.Client, box: str, end: str) -> None:
    for what, message in FIRST.items():
        with socket(alice, box + end) as talking:
            talking.send(message)
            last = [json.loads(m) for m in talking][-1]
            assert last["problem" if end == "/processes" else "event"] and talking.close_code == 1000, (what, last)
            assert last.get("code", last.get("problem", {}).get("code")) in ("invalid_input", "not_found"), (what, last)
